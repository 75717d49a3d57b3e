"""What follows an iteration: tokens are emitted, requests finish, gaps between tokens are counted."""

from __future__ import annotations

import numpy as np

from l3env.choices import SloForm, Status
from l3env.engine.kernels.drafts import classes_count, second_tokens_count, step_clocks
from l3env.engine.kernels.memory import decoding_count, finish, join_decode, leave_prefill, let_go, pool_of
from l3env.engine.kernels.patience import leave, leaves_s
from l3env.engine.kernels.prefix import publish
from l3env.engine.kernels.slo import note_first_token, note_prefill_token, note_step_deadlines, note_step_gaps
from l3env.engine.state import FINISH_HEAP, GAP_LOW_S, GAP_RATIO, SUB_BATCHES
from l3env.jit import helper, inner

LOG_GAP_RATIO = np.log(GAP_RATIO)


@inner
def step_all(t, s, e, decode, prefill):
    """Decodes and prefills take their step, and who has emitted its last token leaves."""
    if s.env[e]["ahead"]:
        let_go(s, e)
    if decode:
        step_decodes(s, e, t.coef[s.env[e]["table_idx"]]["lanes_count"])
    if prefill:
        step_prefills(t, s, e)
    for draft in range(classes_count(s.lane_class)):
        for sub in range(SUB_BATCHES):
            heap, now = FINISH_HEAP + sub + SUB_BATCHES * draft, s.group[e, sub, draft]["clock"]
            while s.heap_len[e, heap] > 0 and s.heap[e, heap, s.heap[e, heap, 0]["item"]]["key"] <= now:
                finish(t, s, e, np.int64(s.heap[e, heap, 0]["item"]))


@inner
def step_decodes(s, e, lanes):
    """All decoding requests emit their tokens: clocks, lane loads, gaps between tokens."""
    env = s.env[e]
    now_s = env["clock_s"]
    if env["slo_form"] == SloForm.P99_GAP:
        note_step_gaps(s, e, now_s)
    if s.gap_hist.shape[1] > 1:
        record_gaps(s, e, now_s)
    else:
        for i in range(env["joining_count"]):
            s.req[e, s.lists[e, i]["joining"]]["joining"] = 0
    env["joining_count"] = 0
    for sub in range(SUB_BATCHES):
        step_clocks(s.lane_class, s, e, sub, lanes)
        s.sub[e, sub]["last_step_s"] = now_s
    if env["slo_form"] == SloForm.TOKEN_DEADLINES:
        note_step_deadlines(s, e, now_s)


@helper
def record_gaps(s, e, now_s):
    """Adds this decode step's gaps: one and the same for all who took the last step, their own for those who joined.

    A second token of the step has none before it.
    """
    env, req = s.env[e], s.req
    common_0, common_1 = decoding_count(s, e, 0), decoding_count(s, e, 1)
    for i in range(env["joining_count"]):
        r = s.lists[e, i]["joining"]
        req[e, r]["joining"] = 0
        if req[e, r]["status"] == Status.DECODE:
            add_gap(s, e, now_s - req[e, r]["last_token_s"], 1)
            if req[e, r]["sub"] == 0:
                common_0 -= 1
            else:
                common_1 -= 1
    add_gap(s, e, now_s - s.sub[e, 0]["last_step_s"], common_0)
    add_gap(s, e, now_s - s.sub[e, 1]["last_step_s"], common_1)
    add_gap(s, e, 0.0, second_tokens_count(s.lane_class, s, e))


@inner
def add_gap(s, e, gap_s, count):
    if count > 0:
        place = np.int64(np.log(max(gap_s, GAP_LOW_S) / GAP_LOW_S) / LOG_GAP_RATIO)
        s.gap_hist[e, min(place, s.gap_hist.shape[1] - 1)] += count


@helper
def step_prefills(t, s, e):
    """Planned chunks are done; requests whose prefill ends emit a token and decode from the next iteration on."""
    env, req = s.env[e], s.req
    now_s = env["clock_s"]
    i = 0
    while i < env["prefill_count"]:
        r = np.int64(s.lists[e, i]["prefill"])
        chunk = req[e, r]["chunk_tokens"]
        req[e, r]["chunk_tokens"] = 0
        req[e, r]["prefilled_tokens"] += chunk
        env["prefill_left_tokens"] -= chunk
        if req[e, r]["emitted_tokens"] > 0:
            env["recomputed_tokens"] += chunk
        if chunk > 0:
            publish(s.prefix, s.pool, e, r, pool_of(t, s, e, r), req[e, r]["prefilled_tokens"])
        if env["patience_s"] > 0.0 and np.isnan(req[e, r]["first_token_s"]) and now_s > leaves_s(s, e, r):
            leave(t, s, e, r)
            continue
        if chunk == 0 or req[e, r]["prefilled_tokens"] < req[e, r]["target_tokens"]:
            i += 1
            continue
        leave_prefill(s, e, r)
        s.lane[e, req[e, r]["sub"], req[e, r]["lane"]]["pending"] -= req[e, r]["target_tokens"]
        if env["slo_form"] != SloForm.MEAN_TBT:
            note_prefill_token(s, e, r, now_s)
        if np.isnan(req[e, r]["first_token_s"]):
            note_first_token(s, e, r, now_s)
        elif s.gap_hist.shape[1] > 1:
            add_gap(s, e, now_s - req[e, r]["last_token_s"], 1)
        req[e, r]["last_token_s"] = now_s
        req[e, r]["emitted_tokens"] += 1
        env["output_tokens"] += 1
        req[e, r]["kv_tokens"] = req[e, r]["target_tokens"]
        join_decode(t, s, e, r, np.int64(req[e, r]["sub"]))
