"""Runs one planned iteration: prices it, moves the clocks, emits tokens, finishes requests."""

from __future__ import annotations

import numpy as np

from l3env.choices import SloForm, Status, SubBatching
from l3env.engine.kernels.drafts import classes_count, drafting_now, second_tokens_count, step_clocks
from l3env.engine.kernels.forms import pim_blocks_used, spread_load, stored_lanes, stored_tokens
from l3env.engine.kernels.memory import finish, join_decode, leave_prefill, pool_of
from l3env.engine.kernels.prefix import moving_tokens, publish
from l3env.engine.kernels.price import (
    back_batch_s,
    causal_pairs,
    gpu_batch_s,
    hbm_attention_s,
    lane_attention_s,
    one_batch_s,
    pim_side_s,
    prefill_launch_s,
    prefill_work_s,
)
from l3env.engine.kernels.schedule import decoding_count, moved_requests
from l3env.engine.kernels.slo import note_prefill_token, note_step_deadlines, note_step_gaps
from l3env.engine.state import FINISH_HEAP, GAP_LOW_S, GAP_RATIO, SUB_BATCHES
from l3env.jit import helper, inner

LOG_GAP_RATIO = np.log(GAP_RATIO)


@helper
def execute(t, s, e, decode, mode):
    """One iteration of the plan that stands in the requests.

    With two sub-batches T = max(T_GPU_0, T_PIM_0) + max(T_GPU_1, T_PIM_1), where the GPU's phase i holds prefill
    attention of sub-batch i and the FC batch of its chunks with the decodes of the other (arXiv 2504.17584, section 6).
    With one batch T = max(prefill and HBM attention, PIM side) + FC. ``mode`` is a SubBatching.
    """
    env, req = s.env[e], s.req
    table = env["table_idx"]
    coef = t.coef[table]

    # prefill of each sub-batch
    attention_0, attention_1 = 0.0, 0.0  # t_p, launches apart
    chunks_0, chunks_1, histories_0, histories_1 = 0, 0, 0, 0
    tokens_0, tokens_1 = 0, 0
    pushed_0, pushed_1 = 0.0, 0.0  # tokens whose KV goes to the PIM side, or comes from it, in tokens as stored
    ends_0, ends_1 = 0, 0
    energy_j = 0.0
    for i in range(env["prefill_count"]):
        r = s.lists[e, i]["prefill"]
        chunk = np.int64(req[e, r]["chunk_tokens"])
        if chunk == 0:
            continue
        history = np.int64(req[e, r]["prefilled_tokens"])
        chunk_s = prefill_work_s(t, table, chunk, history)
        joined = 1 if history > 0 else 0
        ends = 1 if history + chunk == req[e, r]["target_tokens"] else 0
        pushed = stored_tokens(t.forms, coef, req[e, r]["lane"], chunk) if req[e, r]["lane"] > 0 else 0.0
        pushed += moving_tokens(s.prefix, e, r)
        if req[e, r]["sub"] == 0:
            attention_0, chunks_0, histories_0 = attention_0 + chunk_s, chunks_0 + 1, histories_0 + joined
            tokens_0, pushed_0, ends_0 = tokens_0 + chunk, pushed_0 + pushed, ends_0 + ends
        else:
            attention_1, chunks_1, histories_1 = attention_1 + chunk_s, chunks_1 + 1, histories_1 + joined
            tokens_1, pushed_1, ends_1 = tokens_1 + chunk, pushed_1 + pushed, ends_1 + ends
        energy_j += coef["prefill_pair_j"] * causal_pairs(chunk, history)
        energy_j += coef["prefill_kv_j"] * float(history + chunk)

    # decode of each sub-batch, the new tokens' KV included
    decodes_0, decodes_1 = 0, 0
    hbm_n_0, hbm_n_1, hbm_kv_0, hbm_kv_1 = 0.0, 0.0, 0.0, 0.0
    slowest_0_s, slowest_1_s, slowest_both_s, pim_kv = 0.0, 0.0, 0.0, 0.0
    spread_0_s, spread_1_s, spread_kv, moved_0, moved_1 = 0.0, 0.0, 0.0, 0.0, 0.0
    lanes, drafting = stored_lanes(t.forms, coef), drafting_now(s.lane_class, env)
    queries = 1 + drafting
    if decode:
        decodes_0, decodes_1 = decoding_count(s, e, 0), decoding_count(s, e, 1)
        hbm_n_0, hbm_n_1 = s.lane[e, 0, 0]["count"], s.lane[e, 1, 0]["count"]
        hbm_kv_0 = s.lane[e, 0, 0]["kv"] + queries * hbm_n_0
        hbm_kv_1 = s.lane[e, 1, 0]["kv"] + queries * hbm_n_1
        moved_0, moved_1 = moved_requests(t, s, e, 0), moved_requests(t, s, e, 1)
        for lane in range(1, lanes):
            n_0, n_1 = s.lane[e, 0, lane]["count"], s.lane[e, 1, lane]["count"]
            kv_0 = s.lane[e, 0, lane]["kv"] + queries * n_0
            kv_1 = s.lane[e, 1, lane]["kv"] + queries * n_1
            lane_0_s = lane_attention_s(t, table, kv_0, n_0, queries)
            lane_1_s = lane_attention_s(t, table, kv_1, n_1, queries)
            slowest_0_s, slowest_1_s = max(slowest_0_s, lane_0_s), max(slowest_1_s, lane_1_s)
            slowest_both_s = max(slowest_both_s, lane_0_s + lane_1_s)
            pim_kv += kv_0 + kv_1
        spread_kv_0, spread_0_s = spread_load(t.forms, t, table, s.lane[e, 0], queries)
        spread_kv_1, spread_1_s = spread_load(t.forms, t, table, s.lane[e, 1], queries)
        spread_kv = spread_kv_0 + spread_kv_1
    pim_n = decodes_0 + decodes_1 - hbm_n_0 - hbm_n_1
    rows_0, rows_1 = queries * decodes_0, queries * decodes_1
    guessed_0, guessed_1 = drafting * decodes_0, drafting * decodes_1

    # price
    gpu_0_s, gpu_1_s, pim_0_s, pim_1_s, move_0_s, move_1_s = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    prefill_0_s, prefill_1_s, hbm_0_s, hbm_1_s = 0.0, 0.0, 0.0, 0.0
    read_0_s, read_1_s, slowest_s, duration_s = 0.0, 0.0, 0.0, np.inf
    interleaved, batches = 0, 0
    if mode != SubBatching.OFF:
        prefill_0_s = attention_0 + prefill_launch_s(t, table, chunks_0, histories_0)
        prefill_1_s = attention_1 + prefill_launch_s(t, table, chunks_1, histories_1)
        hbm_0_s = hbm_attention_s(t, table, hbm_kv_0, hbm_n_0, queries)
        hbm_1_s = hbm_attention_s(t, table, hbm_kv_1, hbm_n_1, queries)
        gpu_0_s = prefill_0_s + hbm_0_s + back_batch_s(t, table, tokens_0 + rows_1, ends_0 + rows_1, guessed_1)
        gpu_0_s = gpu_batch_s(t, table, gpu_0_s, tokens_0 + rows_1)
        gpu_1_s = prefill_1_s + hbm_1_s + back_batch_s(t, table, tokens_1 + rows_0, ends_1 + rows_0, guessed_0)
        gpu_1_s = gpu_batch_s(t, table, gpu_1_s, tokens_1 + rows_0)
        pim_0_s, read_0_s, move_0_s = pim_side_s(t, table, slowest_0_s + spread_0_s, moved_0, pushed_1)
        pim_1_s, read_1_s, move_1_s = pim_side_s(t, table, slowest_1_s + spread_1_s, moved_1, pushed_0)
        slowest_s = slowest_0_s + slowest_1_s
        duration_s = max(gpu_0_s, pim_0_s) + max(gpu_1_s, pim_1_s)
        batches = (1 if tokens_0 + decodes_1 > 0 else 0) + (1 if tokens_1 + decodes_0 > 0 else 0)
        interleaved = 1
    if mode != SubBatching.ON:
        prefill_s = attention_0 + attention_1
        prefill_s += prefill_launch_s(t, table, chunks_0 + chunks_1, histories_0 + histories_1)
        hbm_s = hbm_attention_s(t, table, hbm_kv_0 + hbm_kv_1, hbm_n_0 + hbm_n_1, queries)
        batch = tokens_0 + tokens_1 + rows_0 + rows_1
        rows = ends_0 + ends_1 + rows_0 + rows_1
        pushed = pushed_0 + pushed_1
        one_s, one_gpu_s, one_pim_s, one_read_s, one_move_s = one_batch_s(
            t,
            table,
            prefill_s + hbm_s,
            slowest_both_s + spread_0_s + spread_1_s,
            moved_0 + moved_1,
            pushed,
            batch,
            rows,
            guessed_0 + guessed_1,
        )
        if one_s < duration_s:
            duration_s, gpu_0_s, pim_0_s, read_0_s, move_0_s = one_s, one_gpu_s, one_pim_s, one_read_s, one_move_s
            gpu_1_s, pim_1_s, read_1_s, move_1_s = 0.0, 0.0, 0.0, 0.0
            prefill_0_s, prefill_1_s, hbm_0_s, hbm_1_s = prefill_s, 0.0, hbm_s, 0.0
            interleaved = 0
            slowest_s = slowest_both_s
            batches = 1 if batch > 0 else 0

    # account
    tokens, decodes = tokens_0 + tokens_1, decodes_0 + decodes_1
    energy_j += coef["fc_batch_j"] * batches + coef["fc_token_j"] * (tokens + rows_0 + rows_1)
    energy_j += coef["hbm_token_j"] * (hbm_kv_0 + hbm_kv_1) + coef["pim_token_j"] * pim_kv
    energy_j += coef["spread_token_j"] * spread_kv + coef["transfer_request_j"] * (moved_0 + moved_1)
    energy_j += coef["transfer_token_j"] * (pushed_0 + pushed_1)
    env["clock_s"] += duration_s
    env["iterations_count"] += 1
    env["busy_s"] += duration_s
    env["gpu_busy_s"] += gpu_0_s + gpu_1_s
    env["pim_busy_s"] += pim_0_s + pim_1_s
    env["transfer_s"] += move_0_s + move_1_s
    env["transfer_exposed_s"] += pim_0_s + pim_1_s - (read_0_s + read_1_s)
    env["energy_j"] += energy_j
    env["queue_s"] += duration_s * env["waiting_count"]
    env["present_s"] += duration_s * (env["waiting_count"] + env["running_count"])
    env["prefill_tokens"] += tokens
    env["decode_tokens"] += decodes
    if lanes > 1:
        env["imbalance_s"] += slowest_s - lane_attention_s(t, table, pim_kv, pim_n, queries) / (lanes - 1)
    env["last_iteration_s"] = duration_s
    env["last_gpu_0_s"], env["last_gpu_1_s"] = gpu_0_s, gpu_1_s
    env["last_attention_0_s"], env["last_attention_1_s"] = prefill_0_s + hbm_0_s, prefill_1_s + hbm_1_s
    env["last_prefill_0_s"], env["last_prefill_1_s"] = prefill_0_s, prefill_1_s
    env["last_pim_0_s"], env["last_pim_1_s"] = pim_0_s, pim_1_s
    env["last_read_0_s"], env["last_read_1_s"] = read_0_s, read_1_s
    env["last_interleaved"] = interleaved
    env["last_transfer_0_s"], env["last_transfer_1_s"] = move_0_s, move_1_s
    env["last_prefill_tokens"], env["last_decode_tokens"] = tokens, decodes

    if decode:
        step_decodes(s, e, coef["lanes_count"])
    if tokens > 0:
        step_prefills(t, s, e)
    for draft in range(classes_count(s.lane_class)):
        for sub in range(SUB_BATCHES):
            heap, now = FINISH_HEAP + sub + SUB_BATCHES * draft, s.group[e, sub, draft]["clock"]
            while s.heap_len[e, heap] > 0 and s.heap[e, heap, s.heap[e, heap, 0]["item"]]["key"] <= now:
                finish(t, s, e, np.int64(s.heap[e, heap, 0]["item"]))
    if s.log.shape[1] > 1:
        write_log(t, s, e, duration_s, gpu_0_s + gpu_1_s, pim_0_s + pim_1_s, decodes, tokens)


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
        if chunk == 0 or req[e, r]["prefilled_tokens"] < req[e, r]["target_tokens"]:
            i += 1
            continue
        leave_prefill(s, e, r)
        s.lane[e, req[e, r]["sub"], req[e, r]["lane"]]["pending"] -= req[e, r]["target_tokens"]
        if env["slo_form"] != SloForm.MEAN_TBT:
            note_prefill_token(s, e, r, now_s)
        if np.isnan(req[e, r]["first_token_s"]):
            req[e, r]["first_token_s"] = now_s
        elif s.gap_hist.shape[1] > 1:
            add_gap(s, e, now_s - req[e, r]["last_token_s"], 1)
        req[e, r]["last_token_s"] = now_s
        req[e, r]["emitted_tokens"] += 1
        env["output_tokens"] += 1
        req[e, r]["kv_tokens"] = req[e, r]["target_tokens"]
        join_decode(t, s, e, r, np.int64(req[e, r]["sub"]))


@helper
def write_log(t, s, e, duration_s, gpu_s, pim_s, decodes, tokens):
    """Adds an iteration to the time line; when the rows are full, neighbours are merged and the stride doubles."""
    env, log = s.env[e], s.log
    rows = log.shape[1]
    if env["log_count"] == 0:
        env["log_stride"] = 1
    stride = env["log_stride"]
    row = (env["iterations_count"] - 1) // stride
    if row == rows:
        for i in range(rows // 2):
            first, second = 2 * i, 2 * i + 1
            merge_rows(log, e, i, first, second)
        for i in range(rows // 2, rows):
            clear_row(log, e, i)
        env["log_stride"] = 2 * stride
        row = (env["iterations_count"] - 1) // (2 * stride)
    log[e, row]["end_s"] = env["clock_s"]
    log[e, row]["duration_s"] += duration_s
    log[e, row]["iterations_count"] += 1
    log[e, row]["gpu_busy_s"] += gpu_s
    log[e, row]["pim_busy_s"] += pim_s
    log[e, row]["decode_tokens"] += decodes
    log[e, row]["prefill_tokens"] += tokens
    log[e, row]["waiting_count"] = env["waiting_count"]
    log[e, row]["running_count"] = env["running_count"]
    log[e, row]["hbm_blocks"] = s.pool[e, 0]["used"]
    log[e, row]["pim_blocks"] = pim_blocks_used(t.forms, t.coef[env["table_idx"]], s.pool[e])
    env["log_count"] = row + 1


@helper
def merge_rows(log, e, into, first, second):
    """Sums of two rows, levels of the later one."""
    duration_s = log[e, first]["duration_s"] + log[e, second]["duration_s"]
    iterations = log[e, first]["iterations_count"] + log[e, second]["iterations_count"]
    gpu_s = log[e, first]["gpu_busy_s"] + log[e, second]["gpu_busy_s"]
    pim_s = log[e, first]["pim_busy_s"] + log[e, second]["pim_busy_s"]
    decodes = log[e, first]["decode_tokens"] + log[e, second]["decode_tokens"]
    tokens = log[e, first]["prefill_tokens"] + log[e, second]["prefill_tokens"]
    log[e, into] = log[e, second]
    log[e, into]["duration_s"] = duration_s
    log[e, into]["iterations_count"] = iterations
    log[e, into]["gpu_busy_s"] = gpu_s
    log[e, into]["pim_busy_s"] = pim_s
    log[e, into]["decode_tokens"] = decodes
    log[e, into]["prefill_tokens"] = tokens


@helper
def clear_row(log, e, row):
    """Zero sums; levels are overwritten."""
    log[e, row]["duration_s"] = 0.0
    log[e, row]["iterations_count"] = 0
    log[e, row]["gpu_busy_s"] = 0.0
    log[e, row]["pim_busy_s"] = 0.0
    log[e, row]["decode_tokens"] = 0
    log[e, row]["prefill_tokens"] = 0
