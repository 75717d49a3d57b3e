"""Decodes knobs into the plan of one iteration: who is admitted where, how many prompt tokens each prefill gets.

The result is always legal. It is left in the requests themselves (status, lane, sub, chunk_tokens).
"""

from __future__ import annotations

import numpy as np

from l3env.choices import Budget, Order, PimForm, Status
from l3env.engine.kernels.drafts import drafting_now, set_drafting
from l3env.engine.kernels.forms import pim_lanes, room, spread_load, stored_lanes, stored_requests
from l3env.engine.kernels.memory import admit, lane_load, make_room_to_grow, move
from l3env.engine.kernels.prefix import ask_pools, blocks_of, offered_blocks, offered_tokens
from l3env.engine.kernels.price import (
    back_batch_s,
    gpu_batch_s,
    hbm_attention_s,
    lane_attention_s,
    pim_side_s,
    prefill_launch_s,
    prefill_work_s,
)
from l3env.engine.kernels.queue import least_score, next_waiting, waiting_key
from l3env.engine.state import NOWHERE
from l3env.jit import helper, inner

LARGE_TOKENS = 1 << 40
ALIGN_MIN_CHUNK_TOKENS = 128  # a sub-batch's prefill always gets this much, so that a GPU-bound system still prefills


@inner
def decoding_count(s, e, sub):
    return s.sub[e, sub]["decoding"]


@inner
def slowest_lane_s(t, s, e, sub):
    """The slowest PIM lane's attention in this sub-batch's next decode step, the new tokens included."""
    table = s.env[e]["table_idx"]
    queries = 1 + drafting_now(s.lane_class, s.env[e])
    slowest_s = 0.0
    for lane in range(1, stored_lanes(t.forms, t.coef[table])):
        count = s.lane[e, sub, lane]["count"]
        kv = s.lane[e, sub, lane]["kv"] + queries * count
        slowest_s = max(slowest_s, lane_attention_s(t, table, kv, count, queries))
    return slowest_s + spread_load(t.forms, t, table, s.lane[e, sub], queries)[1]


@inner
def moved_requests(t, s, e, sub):
    """Decoding requests on the PIM side in transfers of one query: two queries move twice as much, and requests with
    decompressed KV in proportion."""
    count = float(decoding_count(s, e, sub)) - s.lane[e, sub, 0]["count"]
    moved = stored_requests(t.forms, t.coef[s.env[e]["table_idx"]], s.lane[e, sub], count)
    return moved * (1 + drafting_now(s.lane_class, s.env[e]))


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
    for pool in range(1, t.coef[s.env[e]["table_idx"]]["pools_count"]):
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
        decompressed = could_ever_fit(t, s, e, r, t.coef[table]["spread_pool"])
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
    hbm_fits = has_room(t, s, k, e, r, 0)
    if not t.coef[table]["has_pim"]:
        return 0 if hbm_fits else NOWHERE
    share = k[e]["hbm_share_frac"]
    if share <= 0.0:
        lane = find_pim_lane(t, s, k, e, r, sub)
        return 0 if lane == NOWHERE and hbm_fits and only_hbm_holds(t, s, e, r) else lane
    total = 0
    for pool in range(t.coef[table]["pools_count"]):
        total += s.pool[e, pool]["used"]
    if hbm_fits and s.pool[e, 0]["used"] <= share * total:
        return 0
    lane = NOWHERE
    if share != 1.0 or not could_ever_fit(t, s, e, r, 0):
        lane = find_pim_lane(t, s, k, e, r, sub)
    if lane == NOWHERE and hbm_fits:
        return 0
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
    most = k[e]["admit_max_count"]
    return max(most, 1) if s.env[e]["running_count"] == 0 else most


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


@helper
def plan_by_budget(t, s, k, e):
    """Prefill tokens in order of admission up to the budget; returns the tokens planned."""
    env, req = s.env[e], s.req
    left = k[e]["prefill_budget_tokens"]
    if left < 0:
        left = LARGE_TOKENS
    if k[e]["budget_counts_decodes"]:
        left = max(left - decoding_count(s, e, 0) - decoding_count(s, e, 1), 0)
    planned = 0
    for i in range(env["prefill_count"]):
        r = s.lists[e, i]["prefill"]
        chunk = min(np.int64(req[e, r]["target_tokens"] - req[e, r]["prefilled_tokens"]), left)
        req[e, r]["chunk_tokens"] = chunk
        planned += chunk
        left -= chunk
    admitted, most = 0, most_admissions(s, k, e)
    while left > 0 and admitted < most:
        r = admit_next(t, s, k, e, lighter_sub(s, e))
        if r == NOWHERE:
            break
        chunk = min(np.int64(req[e, r]["target_tokens"] - req[e, r]["prefilled_tokens"]), left)
        req[e, r]["chunk_tokens"] = chunk
        planned += chunk
        left -= chunk
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


@inner
def plan_chunk(s, e, r, planned, left):
    """As much of a prompt as is left to plan; returns the tokens (planned, left) then."""
    chunk = min(np.int64(s.req[e, r]["target_tokens"] - s.req[e, r]["prefilled_tokens"]), left)
    s.req[e, r]["chunk_tokens"] = chunk
    return planned + chunk, left - chunk


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
            planned, left = plan_chunk(s, e, w, planned, left)
            continue
        if r == NOWHERE or (is_held(s, k, e, r) and planned + decoding > 0):
            break
        planned, left = plan_chunk(s, e, r, planned, left)
        r = next_prefill(s, e, listed, order)
    return planned


@helper
def gpu_side_s(t, s, e, sub, prefill_s, prefill_tokens):
    """T_GPU of a phase with the given prefill: attention of ``sub``, FC with the other sub-batch's decodes."""
    table = s.env[e]["table_idx"]
    drafting = drafting_now(s.lane_class, s.env[e])
    queries = 1 + drafting
    others = decoding_count(s, e, 1 - sub)
    rows = queries * others
    hbm_n = s.lane[e, sub, 0]["count"]
    back_s = back_batch_s(t, table, prefill_tokens + rows, rows, drafting * others)
    hbm_s = hbm_attention_s(t, table, s.lane[e, sub, 0]["kv"] + queries * hbm_n, hbm_n, queries)
    return gpu_batch_s(t, table, prefill_s + back_s + hbm_s, prefill_tokens + rows)


@helper
def aligned_chunk(t, s, e, sub, goal_s, prefill_s, tokens, history, most):
    """Largest chunk (up to ``most``) with T_GPU <= goal, given the sub-batch's other prefill and the launches
    (``prefill_s``); by bisection."""
    table = s.env[e]["table_idx"]
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        attention_s = prefill_s + prefill_work_s(t, table, middle, history)
        if gpu_side_s(t, s, e, sub, attention_s, tokens + middle) <= goal_s:
            low = middle
        else:
            high = middle - 1
    return low


@helper
def plan_aligned(t, s, k, e, only_when_full):
    """L3's adaptive chunk partitioning (arXiv 2504.17584, section 6): hide prefill behind the PIM side.

    Each sub-batch takes whole prefills, at least one, while T_GPU < T_PIM; then its last one is chunked so that T_GPU
    comes as close as possible to T_PIM: always, or only once the next request does not fit in memory. While nothing
    decodes there is nothing to align with, and prompts stay whole.
    """
    env, req = s.env[e], s.req
    table = env["table_idx"]
    planned, admitted, most = 0, 0, most_admissions(s, k, e)
    full = False
    decoding = decoding_count(s, e, 0) + decoding_count(s, e, 1) > 0
    pushed_before = 0.0
    for sub in range(2):
        decodes = moved_requests(t, s, e, sub)
        goal_s = pim_side_s(t, table, slowest_lane_s(t, s, e, sub), decodes, pushed_before)[0]
        tokens, attention_s = 0, 0.0
        chunks, histories, launch_s = 0, 0, 0.0
        last, last_attention_s = NOWHERE, 0.0
        listed = env["prefill_count"]
        place = 0
        while True:
            if last != NOWHERE and gpu_side_s(t, s, e, sub, attention_s + launch_s, tokens) >= goal_s:
                break
            r = NOWHERE
            while place < listed and r == NOWHERE:
                if req[e, s.lists[e, place]["prefill"]]["sub"] == sub:
                    r = s.lists[e, place]["prefill"]
                place += 1
            if r == NOWHERE:
                if admitted >= most:
                    break
                r = admit_next(t, s, k, e, sub)
                if r == NOWHERE:
                    full = full or env["waiting_count"] > 0
                    break
                admitted += 1
            history = np.int64(req[e, r]["prefilled_tokens"])
            chunk = np.int64(req[e, r]["target_tokens"]) - history
            req[e, r]["chunk_tokens"] = chunk
            last, last_attention_s = r, prefill_work_s(t, table, chunk, history)
            tokens += chunk
            attention_s += last_attention_s
            chunks, histories = chunks + 1, histories + (1 if history > 0 else 0)
            launch_s = prefill_launch_s(t, table, chunks, histories)
        while place < listed:  # prefills begun earlier that find no time now
            if req[e, s.lists[e, place]["prefill"]]["sub"] == sub:
                req[e, s.lists[e, place]["prefill"]]["chunk_tokens"] = 0
            place += 1
        if last != NOWHERE and decoding and (full or not only_when_full):
            whole = np.int64(req[e, last]["chunk_tokens"])
            rest_s, rest = attention_s - last_attention_s, tokens - whole
            history = np.int64(req[e, last]["prefilled_tokens"])
            chunk = aligned_chunk(t, s, e, sub, goal_s, rest_s + launch_s, rest, history, whole)
            if rest == 0:
                chunk = max(chunk, min(whole, ALIGN_MIN_CHUNK_TOKENS))
            req[e, last]["chunk_tokens"] = chunk
            tokens = rest + chunk
        pushed_before = float(tokens)
        planned += tokens
    return planned


@inner
def can_admit(t, s, k, e):
    """Is there a waiting request that has room? The common case, memory full, is answered without a call."""
    if s.env[e]["waiting_count"] == 0 or most_admissions(s, k, e) <= 0:
        return False
    r = next_waiting(s, e, k[e]["order"])
    return r != NOWHERE and find_lane(t, s, k, e, r, lighter_sub(s, e)) != NOWHERE


@helper
def plan_prefill(t, s, k, e, interleaved):
    """Admissions and prompt tokens, as the budget says; returns the tokens planned."""
    budget = k[e]["prefill_budget_tokens"]
    if interleaved and budget <= Budget.ALIGN:
        return plan_aligned(t, s, k, e, budget == Budget.ALIGN_WHEN_FULL)
    if k[e]["prefill_in_order"]:
        return plan_in_order(t, s, k, e)
    return plan_by_budget(t, s, k, e)


@helper
def schedule(t, s, k, e):
    """Knobs -> plan. Returns (decode?, prefill tokens planned)."""
    env = s.env[e]
    interleaved = k[e]["sub_batching"] and t.coef[env["table_idx"]]["has_pim"]
    prefill_first = k[e]["prefill_first"]
    set_drafting(s.lane_class, t, env, k[e]["multi_token"])
    if not prefill_first:
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
    if interleaved and decode:
        balance_subs(t, s, e)
    return decode, planned
