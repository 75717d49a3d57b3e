"""What must be conserved at every iteration, summed anew from the requests' own states: compiled, for millions of them.

It says the same as ``check`` of ``tests/engine/test_engine_properties.py`` does (which is slower and also looks into
heaps and lanes), and beside it what serving engines do: blocks taken chunk by chunk, and those of requests that are not
known to have finished. A *ledger* follows each prompt from one iteration to the next, so that tokens prefilled and
recomputed are counted a second time.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from l3env.choices import Status
from l3env.engine.kernels.prefix import cached_blocks
from l3env.engine.kernels.run import Stop, Until, run
from l3env.engine.state import NOWHERE
from l3env.jit import helper, kernel

LEDGER_DTYPE = np.dtype(
    [("seq", np.int64), ("prefilled", np.int64), ("prefilling", np.int64), ("emitted", np.int64)], align=True
)
SUMS_DTYPE = np.dtype(
    [
        ("prefill_tokens", np.int64),
        ("recomputed_tokens", np.int64),
        ("clock_s", np.float64),
        ("iterations", np.int64),
        ("preemptions", np.int64),
        ("unseen", np.int64),  # iterations with blocks of requests that are not known to have finished
        ("shared", np.int64),  # iterations with a segment of which two hold a reference
    ],
    align=True,
)


class Broken(IntEnum):
    """What is not conserved."""

    NOTHING = 0
    REQUESTS = 1
    ARRIVED = 2
    ADMITTED = 3
    PREEMPTIONS = 4
    OUTPUT_TOKENS = 5
    MORE_THAN_ASKED = 6
    KV_TOKENS = 7
    PREFILL_LEFT = 8
    PREFILLED = 9
    RECOMPUTED = 10
    BLOCKS = 11
    LEAVING = 12
    CAPACITY = 13
    REFERENCES = 14
    PROMISED = 15
    CLOCK = 16
    TIMES = 17
    LANES = 18


@helper
def emitted_by(s, e, r):
    """Tokens that a request has emitted: by what is written down, and by the clock since it joined."""
    q = s.req[e, r]
    if q["status"] != Status.DECODE:
        return np.int64(q["emitted_tokens"])
    draft = np.int64(q["draft_class"]) if s.group.shape[2] > 1 else np.int64(0)
    return q["emitted_tokens"] + s.group[e, q["sub"], draft]["clock"] - q["joined_clock"]


@helper
def check_requests(s, e):
    """Every request is in one place, and has emitted no more than it was to."""
    env = s.env[e]
    waiting, running, finished, rejected, future, preempted, emitted = 0, 0, 0, 0, 0, 0, 0
    for r in range(env["requests_count"]):
        q = s.req[e, r]
        status, tokens = q["status"], emitted_by(s, e, r)
        waiting += status == Status.WAITING
        finished += status == Status.FINISHED
        rejected += status == Status.REJECTED
        future += status == Status.FUTURE
        running += status == Status.PREFILL or status == Status.DECODE or status == Status.PAUSED
        preempted += q["preemptions_count"]
        emitted += tokens
        if tokens > s.truth[e, r] or (tokens == s.truth[e, r]) != (status == Status.FINISHED):
            return Broken.MORE_THAN_ASKED
        if np.isnan(q["first_token_s"]) != (tokens == 0) or np.isnan(q["finish_s"]) == (status == Status.FINISHED):
            return Broken.TIMES
        if tokens > 0 and not (q["arrival_s"] <= q["first_token_s"] <= env["clock_s"]):
            return Broken.TIMES
        if status == Status.FINISHED and not (q["first_token_s"] <= q["finish_s"] <= env["clock_s"]):
            return Broken.TIMES
    there = waiting == env["waiting_count"] and running == env["running_count"] and finished == env["finished_count"]
    if not there or rejected != env["rejected_count"]:
        return Broken.REQUESTS
    arrived = waiting + running + finished + rejected
    if arrived != env["arrived_count"] or arrived + future != env["requests_count"]:
        return Broken.ARRIVED
    if env["admitted_count"] != preempted + running + finished:
        return Broken.ADMITTED
    # who schedules ahead may preempt one that has finished: that is counted, and nothing else happens to it
    if env["preemptions_count"] < preempted or (not env["ahead"] and env["preemptions_count"] != preempted):
        return Broken.PREEMPTIONS
    return Broken.NOTHING if emitted == env["output_tokens"] else Broken.OUTPUT_TOKENS


@helper
def count_prefills(s, e, ledger, sums, exact):
    """Prompt tokens since the last iteration, request by request, beside the engine's sums."""
    env, left = s.env[e], 0
    for r in range(env["requests_count"]):
        q, was = s.req[e, r], ledger[r]
        emitted = emitted_by(s, e, r)
        held = q["status"] == Status.DECODE or q["status"] == Status.PAUSED or q["status"] == Status.FINISHED
        same = was["prefilling"] and was["seq"] == q["admitted_seq"]
        before, chunk = was["prefilled"] if same else np.int64(0), np.int64(0)
        if q["status"] == Status.PREFILL:
            chunk = q["prefilled_tokens"] - before
            left += q["target_tokens"] - q["prefilled_tokens"]
            if q["target_tokens"] != q["prompt_tokens"] + q["emitted_tokens"]:
                return Broken.KV_TOKENS
        elif held and (same or was["seq"] != q["admitted_seq"]):
            chunk = q["target_tokens"] - before
        if chunk < 0:
            return Broken.PREFILLED
        sums[0]["prefill_tokens"] += chunk
        sums[0]["recomputed_tokens"] += chunk if was["emitted"] > 0 else 0
        was["seq"], was["prefilling"] = q["admitted_seq"], q["status"] == Status.PREFILL
        was["prefilled"], was["emitted"] = q["prefilled_tokens"], emitted
    if left != env["prefill_left_tokens"]:
        return Broken.PREFILL_LEFT
    if exact and sums[0]["prefill_tokens"] != env["prefill_tokens"]:
        return Broken.PREFILLED
    if sums[0]["prefill_tokens"] < env["prefill_tokens"]:
        return Broken.PREFILLED  # with a prefix cache, what was found is in the ledger too
    if exact and sums[0]["recomputed_tokens"] != env["recomputed_tokens"]:
        return Broken.RECOMPUTED
    return Broken.NOTHING


@helper
def kv_of(s, e, r):
    """KV tokens whose blocks a running request holds."""
    q = s.req[e, r]
    if q["status"] == Status.PREFILL:
        return np.int64(q["held_tokens"])
    return q["prompt_tokens"] + emitted_by(s, e, r) - 1


@helper
def own_blocks(prefix, e, r, tokens, block):
    """Blocks that only this request holds."""
    if len(prefix) == 0:
        return (tokens + block - 1) // block
    row = prefix.req[e, r]
    blocks = row["ids_blocks"] + (tokens - row["ids_tokens"] + block - 1) // block
    for i in range(row["held_count"]):
        blocks -= prefix.segment[e, prefix.ids[e, row["ids_first"] + i]]["blocks"]
    return blocks


@helper
def count_references(prefix, e, r, pool, refs):
    """Counts the references that a request holds on slots of its pool; False where one is missing."""
    if len(prefix) == 0:
        return True
    row, pools = prefix.req[e, r], prefix.pool.shape[1]
    for i in range(row["held_count"]):
        copy = prefix.segment[e, prefix.ids[e, row["ids_first"] + i]]["first_copy"]
        while copy != NOWHERE and copy % pools != pool:
            copy = prefix.slot[e, copy % pools, copy // pools]["next_copy"]
        if copy == NOWHERE:
            return False
        refs[pool, copy // pools] += 1
    return True


@helper
def check_references(prefix, e, refs, used, sums):
    """References are those of who runs; shared blocks count once; idle ones are as many as are called cached."""
    if len(prefix) == 0:
        return True
    slots, segments, shared = prefix.slot[e], prefix.segment[e], False
    for pool in range(prefix.pool.shape[1]):
        free = prefix.pool[e, pool]["free_slot"]
        while free != NOWHERE:
            if refs[pool, free] != 0:
                return False
            refs[pool, free] = -1
            free = slots[pool, free]["next_copy"]
        cached = 0
        for place in range(prefix.env[e]["slots_count"]):
            count = refs[pool, place]
            if count == -1:
                continue
            if count != slots[pool, place]["refs"]:
                return False
            shared |= count > 1
            blocks = segments[slots[pool, place]["segment"]]["blocks"]
            used[pool] += blocks if count > 0 else 0
            cached += blocks if count == 0 else 0
        if cached != prefix.pool[e, pool]["cached"]:
            return False
    sums[0]["shared"] += shared
    return True


@helper
def check_memory(t, s, e, used, refs, sums):
    """Blocks of every pool: held by who runs, shared once, and of those not known to have finished."""
    env, table = s.env[e], s.env[e]["table_idx"]
    coef = t.coef[table]
    pools, block = coef["pools_count"], coef["block_tokens"]
    used[:], refs[:] = 0, 0
    promised, pending, decoding, prefilling = 0, 0.0, 0, 0
    for i in range(env["running_count"]):
        r = s.lists[e, i]["running"]
        q = s.req[e, r]
        pool = t.lane_pool[table, q["lane"]]
        used[pool] += own_blocks(s.prefix, e, r, kv_of(s, e, r), block)
        promised += q["promised_blocks"]
        if q["status"] == Status.PREFILL:
            prefilling += 1
            pending += q["target_tokens"]
        elif q["status"] == Status.PAUSED:
            pending += kv_of(s, e, r)
        else:
            decoding += kv_of(s, e, r)
        if not count_references(s.prefix, e, r, pool, refs):
            return Broken.REFERENCES
    if prefilling != env["prefill_count"]:
        return Broken.REQUESTS
    if not check_references(s.prefix, e, refs, used, sums):
        return Broken.REFERENCES
    sums[0]["unseen"] += env["leaving_count"] > 0
    for i in range(env["leaving_count"]):
        q = s.req[e, s.lists[e, i]["leaving"]]
        used[t.lane_pool[table, q["lane"]]] += q["held_tokens"]
        if q["status"] != Status.FINISHED:
            return Broken.LEAVING
    for pool in range(pools):
        row = s.pool[e, pool]
        cached = cached_blocks(s.prefix, e, pool)
        promised -= row["promised"]
        if row["used"] != used[pool]:
            return Broken.BLOCKS
        if row["used"] + cached > t.pool_blocks[table, pool] or row["peak"] > t.pool_blocks[table, pool]:
            return Broken.CAPACITY
        if row["used"] > row["peak"] or row["used"] < row["leaving"]:
            return Broken.CAPACITY
        own = coef["decompressed_pool"]
        if (
            0 < pool < own
            and row["used"] + s.pool[e, own]["used"] * coef["decompressed_share"] > 1e-6 + (t.pool_blocks[table, pool])
        ):
            return Broken.CAPACITY
    for sub in range(s.lane.shape[1]):
        for lane in range(coef["lanes_count"]):
            pending -= s.lane[e, sub, lane]["pending"]
            decoding -= s.lane[e, sub, lane]["kv"]
    if pending != 0 or decoding != 0:
        return Broken.LANES
    return Broken.NOTHING if promised == 0 else Broken.PROMISED


@kernel
def check(t, s, e, ledger, sums, used, refs, exact):
    """What is not conserved in an environment; ``Broken.NOTHING`` where all is. ``exact``: no prefix is found."""
    env = s.env[e]
    if env["clock_s"] < sums[0]["clock_s"]:
        return np.int64(Broken.CLOCK)
    sums[0]["clock_s"] = env["clock_s"]
    broken = np.int64(check_requests(s, e))
    if broken == Broken.NOTHING:
        broken = np.int64(count_prefills(s, e, ledger, sums, exact))
    if broken == Broken.NOTHING:
        broken = np.int64(check_memory(t, s, e, used, refs, sums))
    return broken


@kernel
def drive(t, s, k, e, settings, picks, limits, ledger, sums, used, refs, exact):
    """An iteration for each pick, under that row of ``settings``; all is checked after each. Ends at the first fault,
    and where nothing is left to do."""
    for pick in picks:
        k[e] = settings[pick]
        before, preempted = s.env[e]["iterations_count"], s.env[e]["preemptions_count"]
        run(t, s, k, e, e + 1, np.int64(Until.ITERATIONS), limits)
        sums[0]["iterations"] += s.env[e]["iterations_count"] - before
        sums[0]["preemptions"] += s.env[e]["preemptions_count"] - preempted
        broken = check(t, s, e, ledger, sums, used, refs, exact)
        if broken != Broken.NOTHING or s.env[e]["stop"] != Stop.RUNNING:
            return broken
    return np.int64(Broken.NOTHING)
