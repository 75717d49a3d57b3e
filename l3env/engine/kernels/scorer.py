"""A scheduler made of scores: before each iteration every request that can still meet its SLO gets a value, and the
iteration a length.

What it knows is what the View shows. The weights (``WEIGHTS``) are shared by all requests, so that the order in which
they are looked at does not matter; an optimizer finds them (``l3env.experiments.learning.evolve``). Without weights
(``State.scorer`` is ``()``) kernels are compiled without any of this.

* *Candidates* wait or prefill, and their deadline can be met. A deadline is that of the first token; of a request
  preempted later, that of its next token at the mean TBT of its SLO. Their score, from 0 to 1, decides who is admitted
  and whose prompt is processed next.
* *Lost* ones (their deadline cannot be met, or needs more than the machine gives) have the score 0. They get what is
  left, and only while the machine has room for them.
* The iteration is as long as the decoding requests that may still meet their SLO can bear, and no longer than the
  candidates' deadlines allow. From that follow the prompt tokens; where all are ahead of their SLO by enough, decoding
  waits.
* KV lies in HBM as long as there is room.
"""

from __future__ import annotations

import numpy as np

from l3env.choices import HBM_FIRST, Order, Status, SubBatching, Victim
from l3env.engine.kernels.heap import push, remove
from l3env.engine.kernels.iteration import gather_decodes, queries_now
from l3env.engine.kernels.memory import emitted_now, preempt
from l3env.engine.kernels.queue import build_order, waiting_key
from l3env.engine.state import NOWHERE, SLACK_HEAP, Score
from l3env.jit import helper, inner
from l3env.machine.iteration import Batch, Work, no_decode, no_prefill, price, with_chunk

LONGEST_TOKENS = 16384  # prompt tokens an iteration, at most
ABOVE_LOST = 1e-12  # a score
FAR = 64.0  # a stretch or a lead beyond it counts as this


@inner
def around_zero(value):
    """(-inf, inf) -> (-1, 1)."""
    return value / (abs(value) + 1.0)


@inner
def lead_s(s, e, r):
    """How far a request that has emitted is ahead of the mean TBT of its SLO."""
    req = s.req[e, r]
    return req["first_token_s"] + emitted_now(s, e, r) * req["tbt_slo_s"] - s.env[e]["clock_s"]


@inner
def work_s(s, e, r):
    """Time of what is left of its prompt, alone on the machine."""
    req = s.req[e, r]
    left = req["target_tokens"] - req["prefilled_tokens"]
    return req["ttft_alone_s"] * left / max(req["prompt_tokens"], 1)


@inner
def time_left_s(s, e, r):
    """Until a candidate's deadline."""
    req = s.req[e, r]
    if np.isnan(req["first_token_s"]):
        return req["arrival_s"] + req["ttft_slo_s"] - s.env[e]["clock_s"]
    if req["first_token_s"] > req["arrival_s"] + req["ttft_slo_s"]:
        return -np.inf
    return lead_s(s, e, r) + req["tbt_slo_s"]


@inner
def score_of(w, s, e, r, pressure, free_tokens, left_s):
    """From 0 to 1; 0 for one that is lost: too late, or in need of more than the machine gives.

    The stretch is how many times longer than alone the rest of its prompt may take.
    """
    if left_s <= 0:
        return 0.0
    req = s.req[e, r]
    alone_s = work_s(s, e, r)
    stretch = min(left_s / alone_s, FAR)
    log_work, log_stretch = np.log(alone_s / s.env[e]["tbt_slo_s"]), np.log(stretch)
    if log_stretch < w[Score.LOST] + w[Score.LOST_PRESSURE] * pressure + w[Score.LOST_WORK] * log_work:
        return 0.0
    target = float(req["target_tokens"])
    total = (w[Score.WORK] + w[Score.WORK_PRESSURE] * pressure) * log_work
    total += (w[Score.STRETCH] + w[Score.STRETCH_PRESSURE] * pressure) * log_stretch
    total += w[Score.URGENCY] / stretch
    if req["status"] == Status.PREFILL:
        total += w[Score.BEGUN] + w[Score.PROGRESS] * req["prefilled_tokens"] / target
    else:
        total += w[Score.KV] * target / (target + free_tokens)
    if req["emitted_tokens"] > 0:
        total += w[Score.RESUMED]
    if req["predicted_tokens"] > 0:
        left = max(req["predicted_tokens"] - req["emitted_tokens"], 1)
        total += w[Score.PREDICTED] * np.log(left / 256.0)
    return max(0.5 + 0.5 * around_zero(total), ABOVE_LOST)


@helper
def free_tokens_of(t, s, e):
    """(KV tokens that still fit, their share of all)."""
    table = s.env[e]["table_idx"]
    free, total = 0, 0
    for pool in range(t.coef[table]["pools_count"]):
        total += t.pool_blocks[table, pool]
        free += t.pool_blocks[table, pool] - s.pool[e, pool]["used"]
    return float(free * t.coef[table]["block_tokens"]), free / total


@helper
def score_decoding(w, s, e):
    """Scores for when memory runs over. Returns what the decoding ones that may still meet their SLO can bear:
    (how many, the longest iteration (s), the smallest lead in tokens), and a lost one, or -1."""
    hopeful, longest_s, least, lost = 0, np.inf, FAR, NOWHERE
    for i in range(s.env[e]["running_count"]):
        r = np.int64(s.lists[e, i]["running"])
        req = s.req[e, r]
        if req["status"] != Status.DECODE:
            continue
        slo_s = req["tbt_slo_s"]
        lead = min(lead_s(s, e, r) / slo_s, FAR)
        if req["first_token_s"] > req["arrival_s"] + req["ttft_slo_s"] or lead < -np.exp(w[Score.GIVEN_UP]):
            req["score"] = 0.0
            lost = r
            continue
        hopeful += 1
        longest_s = min(longest_s, slo_s * (1.0 + w[Score.LEAD] * lead if lead > 0 else 1.0 + lead))
        least = min(least, lead)
        req["score"] = 0.5 + 0.5 * around_zero(w[Score.KEEP_LEAD] * around_zero(lead / 16.0) + w[Score.KEEP])
    return hopeful, longest_s, least, lost


@helper
def pressure_of(s, e):
    """log(1 + work of all candidates over the nominal TTFT SLO)."""
    total_s = 0.0
    for i in range(s.heap_len[e, SLACK_HEAP]):
        total_s += work_s(s, e, np.int64(s.heap[e, SLACK_HEAP, i]["item"]))
    for i in range(s.env[e]["prefill_count"]):
        total_s += work_s(s, e, np.int64(s.lists[e, i]["prefill"]))
    return np.log(1.0 + total_s / s.env[e]["ttft_slo_s"])


@helper
def rescore(s, e, r, score):
    """Gives a waiting request its score, and its place in the queue."""
    if s.req[e, r]["score"] == score:
        return
    s.req[e, r]["score"] = score
    remove(s.heap[e, Order.BY_SCORE], s.heap_len[e], Order.BY_SCORE, r)
    push(s.heap[e, Order.BY_SCORE], s.heap_len[e], Order.BY_SCORE, r, waiting_key(s.req, e, r, Order.BY_SCORE))


@helper
def score_candidates(w, s, e, pressure, free_tokens):
    """Returns (candidates, time until the first of their deadlines (s), tokens prefilled of the best one)."""
    count, first_s, best, history = 0, np.inf, -1.0, 0
    waiting = s.heap_len[e, SLACK_HEAP]
    for i in range(waiting + s.env[e]["prefill_count"]):
        if i < waiting:
            r = np.int64(s.heap[e, SLACK_HEAP, i]["item"])
        else:
            r = np.int64(s.lists[e, i - waiting]["prefill"])
        left_s = time_left_s(s, e, r)
        score = score_of(w, s, e, r, pressure, free_tokens, left_s)
        if score > 0.0:
            count += 1
            first_s = min(first_s, left_s)
            if score > best:
                best, history = score, np.int64(s.req[e, r]["prefilled_tokens"])
        if i < waiting:
            rescore(s, e, r, score)
        else:
            s.req[e, r]["score"] = score
    return count, first_s, history


@inner
def prompt_batch(t, table, steps, queries, tokens, history):
    """A decode step with one prompt's chunk: half of it in each sub-batch, or all of it in one batch."""
    has_pim = t.coef[table]["has_pim"]
    half_pushed, pushed = (float(tokens // 2), float(tokens)) if has_pim else (0.0, 0.0)
    half = with_chunk(t, table, no_prefill(), tokens // 2, history, 0, half_pushed)
    whole = with_chunk(t, table, no_prefill(), tokens, history, 1, pushed)
    return Batch((Work(half, steps[0]), Work(half, steps[1])), Work(whole, steps[2]), queries)


@helper
def tokens_within(t, s, k, e, goal_s, history, decode):
    """The most tokens of one prompt with which an iteration, beside the decoding ones or without them, takes no longer
    than ``goal_s``; by bisection."""
    table, queries = s.env[e]["table_idx"], queries_now(s, e)
    steps = gather_decodes(t, s, e) if decode else (no_decode(), no_decode(), no_decode())
    mode = k[e]["sub_batching"] if t.coef[table]["has_pim"] and decode else np.int64(SubBatching.OFF)
    low, high = 0, LONGEST_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        if price(t, table, prompt_batch(t, table, steps, queries, middle, history), mode).duration_s <= goal_s:
            low = middle
        else:
            high = middle - 1
    return low


@helper
def keep_free(w, s, k, e):
    """How much memory new requests must leave free."""
    length = np.log(max(s.env[e]["output_mean_tokens"], 1.0) / 256.0)
    k[e]["headroom_frac"] = min(np.exp(w[Score.HEADROOM] + w[Score.HEADROOM_LONG] * length), 0.5)


@helper
def decide(w, t, s, k, e):
    """Scores, and the knobs that follow from them."""
    env = s.env[e]
    if not env["heaps_built"] >> Order.BY_SCORE & 1:
        build_order(s, e, Order.BY_SCORE)
    hopeful, longest_s, least, lost = score_decoding(w, s, e)
    pressure = pressure_of(s, e)
    free_tokens, free_frac = free_tokens_of(t, s, e)
    candidates, first_s, history = score_candidates(w, s, e, pressure, free_tokens)

    keep_free(w, s, k, e)
    k[e]["hbm_share_frac"] = HBM_FIRST
    if lost != NOWHERE and candidates > 0 and free_frac < np.exp(w[Score.EVICT]):
        preempt(t, s, e, lost)
    k[e]["order"], k[e]["victim"] = Order.BY_SCORE, Victim.LOWEST_SCORE
    k[e]["prefill_in_order"], k[e]["budget_counts_decodes"], k[e]["prefill_first"] = 1, 0, 0
    room = w[Score.ROOM] + w[Score.ROOM_LEAD] * around_zero(least / 16.0) + w[Score.ROOM_FREE] * free_frac
    w[Score.FLOOR] = 0.0 if candidates == 0 and (hopeful == 0 or room > 0) else ABOVE_LOST
    if candidates == 0 and env["waiting_count"] + env["prefill_count"] == 0:
        return
    stall = w[Score.STALL] + w[Score.STALL_PRESSURE] * pressure
    decode = not (candidates > 0 and hopeful > 0 and least > np.exp(stall))
    if not decode:
        k[e]["prefill_first"] = 1
        longest_s *= np.exp(w[Score.STALL_LENGTH])
    goal_s = np.exp(w[Score.LENGTH] + w[Score.LENGTH_PRESSURE] * pressure) * longest_s
    goal_s = min(goal_s, np.exp(w[Score.CAP] + w[Score.CAP_PRESSURE] * pressure) * env["tbt_slo_s"])
    if candidates > 0:
        goal_s = min(goal_s, np.exp(w[Score.DUE]) * max(first_s, 0.0))
    tokens = tokens_within(t, s, k, e, goal_s, history, decode)
    k[e]["prefill_budget_tokens"] = max(tokens, np.int64(np.exp(w[Score.LEAST_CHUNK])), 1)


@inner
def set_scores_and_length(scorer, t, s, k, e):
    """Before an iteration is planned; nothing where there is no scorer."""
    if len(scorer) == 0:
        return
    if scorer[e, Score.ON] != 0:
        decide(scorer[e], t, s, k, e)
