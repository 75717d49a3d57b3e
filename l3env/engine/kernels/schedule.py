"""Decodes knobs into the plan of one iteration: who is admitted where, how many prompt tokens each prefill gets.

The result is always legal. It is left in the requests themselves (status, lane, sub, chunk_tokens).
"""

from __future__ import annotations

import numpy as np

from l3env.choices import Budget, Order, PimForm, Status
from l3env.engine.kernels.drafts import set_drafting
from l3env.engine.kernels.iteration import gather_decodes, queries_now
from l3env.engine.kernels.memory import (
    admit,
    decoding_count,
    lane_load,
    make_room_to_grow,
    move,
    preempt_from,
    take_chunk,
    take_chunks,
    take_growth,
)
from l3env.engine.kernels.prefix import ask_pools, blocks_of, offered_blocks, offered_tokens
from l3env.engine.kernels.queue import least_score, next_waiting, waiting_key
from l3env.engine.state import NOWHERE, SUB_BATCHES
from l3env.jit import helper, inner
from l3env.machine.arrays import FIRST_PIM, HBM
from l3env.machine.forms import pim_lanes, room
from l3env.machine.iteration import Work, no_prefill, phase, with_chunk
from l3env.machine.price import pim_side_s

LARGE_TOKENS = 1 << 40
ALIGN_MIN_CHUNK_TOKENS = 128  # a sub-batch's prefill always gets this much, so that a GPU-bound system still prefills


@inner
def has_room(t, s, k, e, r, pool):
    """May a waiting request start in a pool, given the headroom and the promises the knobs ask to keep?"""
    table = s.env[e]["table_idx"]
    block = t.coef[table]["block_tokens"]
    target = np.int64(s.req[e, r]["target_tokens"])
    capacity = room(t.forms, t.coef[table], t.pool_blocks[table], s.pool[e], pool)
    used = s.pool[e, pool]["used"]
    need = blocks_of(s.prefix, e, r, target, block) - offered_blocks(s.prefix, e, pool)
    if used == 0:  # an empty pool takes any request that fits; one that outgrows it is preempted and goes elsewhere
        return need <= capacity
    if used + need > capacity - np.int64(np.ceil(k[e]["headroom_frac"] * capacity)):
        return False
    if k[e]["reserve_predicted"]:
        left = max(s.req[e, r]["predicted_tokens"] - s.req[e, r]["emitted_tokens"], 1)
        return s.pool[e, pool]["promised"] + blocks_of(s.prefix, e, r, target + left - 1, block) <= capacity
    return True


@inner
def could_ever_fit(t, s, e, r, pool):
    """Would the KV to build now fit in the pool if it were empty?"""
    table = s.env[e]["table_idx"]
    target, block = np.int64(s.req[e, r]["target_tokens"]), t.coef[table]["block_tokens"]
    return blocks_of(s.prefix, e, r, target, block) <= t.pool_blocks[table, pool]


@inner
def only_hbm_holds(t, s, e, r):
    """Is the KV to build now too large for every PIM pool?"""
    for pool in range(FIRST_PIM, t.coef[s.env[e]["table_idx"]]["pools_count"]):
        if could_ever_fit(t, s, e, r, pool):
            return False
    return True


@inner
def find_pim_lane(t, s, k, e, r, sub):
    """The least loaded PIM lane whose pool has room, or -1; cached tokens of its prompt count for their pool.

    Where KV is to lie decompressed there is one lane; what is too long for it lies as stored.
    """
    table = s.env[e]["table_idx"]
    decompressed = k[e]["pim_form"] == PimForm.DECOMPRESSED
    if decompressed:
        decompressed = could_ever_fit(t, s, e, r, t.coef[table]["decompressed_pool"])
    first, end = pim_lanes(t.forms, t.coef[table], decompressed)
    best, least = NOWHERE, np.inf
    for lane in range(first, end):
        pool = t.lane_pool[table, lane]
        load = lane_load(s, e, sub, lane, k[e]["sub_batching"] != 0) - offered_tokens(s.prefix, e, pool)
        if load < least:
            if has_room(t, s, k, e, r, pool):
                best, least = lane, load
    return best


@helper
def find_lane(t, s, k, e, r, sub):
    """Where a waiting request would live now, or -1: PIM where there is one, HBM up to its share of the KV.

    With a share of 1 PIM takes only what could never fit in HBM; with ``HBM_FIRST``, whatever finds no room there.
    """
    table = s.env[e]["table_idx"]
    ask_pools(s.prefix, e, r)
    hbm_fits = has_room(t, s, k, e, r, HBM)
    if not t.coef[table]["has_pim"]:
        return HBM if hbm_fits else NOWHERE
    share = k[e]["hbm_share_frac"]
    if share <= 0.0:
        lane = find_pim_lane(t, s, k, e, r, sub)
        return HBM if lane == NOWHERE and hbm_fits and only_hbm_holds(t, s, e, r) else lane
    total = 0
    for pool in range(t.coef[table]["pools_count"]):
        total += s.pool[e, pool]["used"]
    if hbm_fits and s.pool[e, HBM]["used"] <= share * total:
        return HBM
    lane = NOWHERE
    if share != 1.0 or not could_ever_fit(t, s, e, r, HBM):
        lane = find_pim_lane(t, s, k, e, r, sub)
    if lane == NOWHERE and hbm_fits:
        return HBM
    return lane


@inner
def lighter_sub(s, e):
    return 1 if s.sub[e, 1]["members"] < s.sub[e, 0]["members"] else 0


@inner
def admit_next(t, s, k, e, sub):
    """Admits the next waiting request if it has room; returns it, or -1."""
    r = next_waiting(s, e, k[e]["order"])
    if r == NOWHERE:
        return NOWHERE
    lane = find_lane(t, s, k, e, r, sub)
    if lane == NOWHERE:
        return NOWHERE
    admit(t, s, e, r, lane, sub)
    return r


@inner
def most_admissions(s, k, e):
    """New requests allowed in this iteration; a machine with nothing running always starts one."""
    env = s.env[e]
    if env["running_count"] == 0:
        return min(max(k[e]["admit_max_count"], 1), max(k[e]["running_max_count"] - env["leaving_count"], 1))
    if env["waits_after_preemption"] and env["preemptions_count"] != env["preempted_before_count"]:
        return 0
    return min(k[e]["admit_max_count"], k[e]["running_max_count"] - env["running_count"] - env["leaving_count"])


@helper
def balance_subs(t, s, e):
    """After departures one sub-batch may be larger: moves its most recent decoding member, one an iteration."""
    first, second = decoding_count(s, e, 0), decoding_count(s, e, 1)
    if abs(first - second) < 2:
        return
    heavy = 0 if first > second else 1
    for i in range(s.env[e]["running_count"] - 1, -1, -1):
        r = np.int64(s.lists[e, i]["running"])
        if s.req[e, r]["status"] == Status.DECODE and s.req[e, r]["sub"] == heavy:
            move(t, s, e, r, 1 - heavy)
            return


@inner
def plan_chunk(s, k, e, r, planned, left):
    """As much of a prompt as is left to plan, and may be at once; returns the tokens (planned, left) then."""
    chunk = min(np.int64(s.req[e, r]["target_tokens"] - s.req[e, r]["prefilled_tokens"]), left)
    if s.env[e]["running_count"] + s.env[e]["waiting_count"] + s.env[e]["leaving_count"] > 1:
        chunk = min(chunk, k[e]["chunk_max_tokens"])
    s.req[e, r]["chunk_tokens"] = chunk
    return planned + chunk, left - chunk


@helper
def plan_begun(s, k, e):
    """Prefill tokens of prompts under way, in order of admission up to the budget; returns (planned, left)."""
    left = k[e]["prefill_budget_tokens"]
    if left < 0:
        left = LARGE_TOKENS
    if k[e]["budget_counts_decodes"]:
        left = max(left - decoding_count(s, e, 0) - decoding_count(s, e, 1), 0)
    planned = 0
    for i in range(s.env[e]["prefill_count"]):
        planned, left = plan_chunk(s, k, e, s.lists[e, i]["prefill"], planned, left)
    return planned, left


@helper
def grow_by_chunk(t, s, k, e):
    """Blocks for a decode step and for the chunks of prompts under way, both at once: who came last gives way."""
    plan_begun(s, k, e)
    for pool in range(t.coef[s.env[e]["table_idx"]]["pools_count"]):
        while not take_growth(t, s, e, pool):
            preempt_from(t, s, e, pool, k[e]["victim"])
            plan_begun(s, k, e)


@helper
def plan_by_budget(t, s, k, e):
    """Prefill tokens in order of admission up to the budget; returns the tokens planned."""
    env = s.env[e]
    planned, left = plan_begun(s, k, e)
    admitted, most = 0, most_admissions(s, k, e)
    while left > 0 and admitted < most:
        r = admit_next(t, s, k, e, lighter_sub(s, e))
        if r == NOWHERE:
            break
        planned, left = plan_chunk(s, k, e, r, planned, left)
        if env["by_chunk"]:
            take_chunk(t, s, e, r, k[e]["victim"], False)
        admitted += 1
    return planned


@helper
def next_prefill(s, e, listed, order):
    """Of the first ``listed`` prompts under way, without a chunk yet, the first in the queue's order, or -1.

    Of equal ones the earlier admitted; whether one is hopeless is as it was when it was admitted.
    """
    best, least = NOWHERE, np.inf
    for i in range(listed):
        r = np.int64(s.lists[e, i]["prefill"])
        if s.req[e, r]["chunk_tokens"] == 0:
            key = waiting_key(s.req, e, r, order)
            if best == NOWHERE or key < least:
                best, least = r, key
    return best


@inner
def is_held(s, k, e, r):
    """Is a prompt under way held back by its score?"""
    return k[e]["order"] == Order.BY_SCORE and s.req[e, r]["score"] < least_score(s.scorer, e)


@helper
def plan_in_order(t, s, k, e):
    """Prefill tokens up to the budget for prompts under way and for waiting requests, in the queue's order; returns the
    tokens planned. Under scores, those held back get nothing while anything else is planned or decodes."""
    env, req = s.env[e], s.req
    order = k[e]["order"]
    decoding = decoding_count(s, e, 0) + decoding_count(s, e, 1)
    left = k[e]["prefill_budget_tokens"]
    if left < 0:
        left = LARGE_TOKENS
    if k[e]["budget_counts_decodes"]:
        left = max(left - decoding, 0)
    listed = env["prefill_count"]
    for i in range(listed):
        req[e, s.lists[e, i]["prefill"]]["chunk_tokens"] = 0
    planned, admissions = 0, most_admissions(s, k, e)
    r = next_prefill(s, e, listed, order)
    while left > 0:
        w = np.int64(next_waiting(s, e, order)) if admissions > 0 else NOWHERE
        if w != NOWHERE and (r == NOWHERE or waiting_key(req, e, w, order) < waiting_key(req, e, r, order)):
            if admit_next(t, s, k, e, lighter_sub(s, e)) == NOWHERE:
                admissions = 0
                continue
            admissions -= 1
            planned, left = plan_chunk(s, k, e, w, planned, left)
            continue
        if r == NOWHERE or (is_held(s, k, e, r) and planned + decoding > 0):
            break
        planned, left = plan_chunk(s, k, e, r, planned, left)
        r = next_prefill(s, e, listed, order)
    return planned


@inner
def hidden_gpu_s(t, table, prefill, mine, other, queries):
    """T_GPU of a phase with the given prefill: attention of its sub-batch, FC with the other one's decodes."""
    return phase(t, table, Work(prefill, mine), Work(no_prefill(), other), queries).gpu_s


@inner
def next_of_sub(s, e, sub, place, listed):
    """The place of a sub-batch's next prompt under way, from a place on; ``listed`` where there is none."""
    while place < listed and s.req[e, s.lists[e, place]["prefill"]]["sub"] != sub:
        place += 1
    return place


@inner
def take_whole(t, s, k, e, sub, mine, other, queries, goal_s, most):
    """Gives a sub-batch whole prompts, at least one, while T_GPU < goal; at most so many of them new ones.

    Returns (their prefill, that of all but the last, the last or -1, new ones, whether one found no room). Which
    prompts end is settled later: their tokens' head is left out.
    """
    table, req = s.env[e]["table_idx"], s.req
    prefill, rest, last, admitted, full = no_prefill(), no_prefill(), NOWHERE, 0, False
    place, listed = 0, s.env[e]["prefill_count"]
    while last == NOWHERE or hidden_gpu_s(t, table, prefill, mine, other, queries) < goal_s:
        place = next_of_sub(s, e, sub, place, listed)
        if place < listed:
            r = np.int64(s.lists[e, place]["prefill"])
            place += 1
        else:
            if admitted >= most:
                break
            r = np.int64(admit_next(t, s, k, e, sub))
            if r == NOWHERE:
                full = s.env[e]["waiting_count"] > 0
                break
            admitted += 1
        history = np.int64(req[e, r]["prefilled_tokens"])
        chunk = np.int64(req[e, r]["target_tokens"]) - history
        req[e, r]["chunk_tokens"] = chunk
        last, rest, prefill = r, prefill, with_chunk(t, table, prefill, chunk, history, 0, 0.0)
    place = next_of_sub(s, e, sub, place, listed)
    while place < listed:  # begun earlier, finds no time now
        req[e, s.lists[e, place]["prefill"]]["chunk_tokens"] = 0
        place = next_of_sub(s, e, sub, place + 1, listed)
    return prefill, rest, last, admitted, full


@inner
def cut_to_fit(t, s, e, r, rest, mine, other, queries, goal_s):
    """Cuts a chunk to the largest with T_GPU <= goal beside the rest of the prefill, by bisection; returns it."""
    table, history = s.env[e]["table_idx"], np.int64(s.req[e, r]["prefilled_tokens"])
    whole = np.int64(s.req[e, r]["chunk_tokens"])
    low, high = 0, whole
    while low < high:
        middle = (low + high + 1) // 2
        prefill = with_chunk(t, table, rest, middle, history, 0, 0.0)
        if hidden_gpu_s(t, table, prefill, mine, other, queries) <= goal_s:
            low = middle
        else:
            high = middle - 1
    if rest.tokens == 0:
        low = max(low, min(whole, ALIGN_MIN_CHUNK_TOKENS))
    s.req[e, r]["chunk_tokens"] = low
    return low


@helper
def plan_aligned(t, s, k, e, only_when_full):
    """L3's adaptive chunk partitioning (arXiv 2504.17584, section 6): hide prefill behind the PIM side.

    Each sub-batch takes whole prefills, at least one, while T_GPU < T_PIM; then its last one is chunked so that T_GPU
    comes as close as possible to T_PIM: always, or only once the next request does not fit in memory. While nothing
    decodes there is nothing to align with, and prompts stay whole. New KV is taken to go to the PIM side.
    """
    steps, queries = gather_decodes(t, s, e), queries_now(s, e)
    planned, most, full, pushed = 0, most_admissions(s, k, e), False, 0.0
    for sub in range(SUB_BATCHES):
        mine, other = steps[sub], steps[1 - sub]
        goal_s = pim_side_s(t, s.env[e]["table_idx"], mine.read_s, mine.moved_requests, pushed)[0]
        prefill, rest, last, admitted, ran_over = take_whole(t, s, k, e, sub, mine, other, queries, goal_s, most)
        most, full = most - admitted, full or ran_over
        tokens = prefill.tokens
        if last != NOWHERE and steps[2].requests > 0 and (full or not only_when_full):
            tokens = rest.tokens + cut_to_fit(t, s, e, last, rest, mine, other, queries, goal_s)
        pushed = float(tokens)
        planned += tokens
    return planned


@inner
def can_admit(t, s, k, e):
    """Is there a waiting request that has room? The common case, memory full, is answered without a call."""
    if s.env[e]["waiting_count"] == 0 or most_admissions(s, k, e) <= 0:
        return False
    r = next_waiting(s, e, k[e]["order"])
    return r != NOWHERE and find_lane(t, s, k, e, r, lighter_sub(s, e)) != NOWHERE


@inner
def goes_by_budget(k, e, interleaved):
    """Do prompts under way come first, in order of admission, up to a budget in tokens?"""
    aligned = interleaved and k[e]["prefill_budget_tokens"] <= Budget.ALIGN
    return not aligned and not k[e]["prefill_in_order"]


@helper
def plan_prefill(t, s, k, e, interleaved):
    """Admissions and prompt tokens, as the budget says; returns the tokens planned."""
    if goes_by_budget(k, e, interleaved):
        return plan_by_budget(t, s, k, e)
    budget = k[e]["prefill_budget_tokens"]
    if interleaved and budget <= Budget.ALIGN:
        return plan_aligned(t, s, k, e, budget == Budget.ALIGN_WHEN_FULL)
    return plan_in_order(t, s, k, e)


@helper
def schedule(t, s, k, e):
    """Knobs -> plan. Returns (decode?, prefill tokens planned)."""
    env = s.env[e]
    env["preempted_before_count"] = env["preemptions_count"]
    interleaved = k[e]["sub_batching"] and t.coef[env["table_idx"]]["has_pim"]
    prefill_first = k[e]["prefill_first"]
    set_drafting(s.lane_class, t, env, k[e]["multi_token"])
    if not prefill_first:
        if env["by_chunk"] and goes_by_budget(k, e, interleaved):
            grow_by_chunk(t, s, k, e)
        else:
            make_room_to_grow(t, s, e, k[e]["victim"])
    planned = 0
    if env["prefill_count"] > 0 or can_admit(t, s, k, e):
        planned = plan_prefill(t, s, k, e, interleaved)
    decode = decoding_count(s, e, 0) + decoding_count(s, e, 1) > 0
    if prefill_first:
        if planned > 0:
            decode = False
        else:
            make_room_to_grow(t, s, e, k[e]["victim"])
            decode = decoding_count(s, e, 0) + decoding_count(s, e, 1) > 0
            if not decode:  # all decoding ones were preempted: there may be room for what waits
                planned = plan_prefill(t, s, k, e, interleaved)
    if env["by_chunk"] and planned > 0:
        planned = take_chunks(t, s, e, k[e]["victim"], decode)
    if interleaved and decode:
        balance_subs(t, s, e)
    return decode, planned
