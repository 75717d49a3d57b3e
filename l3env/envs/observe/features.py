"""Computes the observation of an agent; names and ranges are in ``observe.FEATURES``, in the order of this file.

Work per environment does not grow with the requests present: what concerns many of them comes from sums, running means
and the histogram that the state keeps. Each function fills a group from place ``i`` on.
"""

from __future__ import annotations

import numpy as np

from l3env.engine.kernels.drafts import classes_count, drafting_now
from l3env.engine.kernels.forms import pim_blocks_used, spread_load, spread_scale, stored_lanes, stored_pools
from l3env.engine.kernels.memory import growth_blocks
from l3env.engine.kernels.price import (
    draft_batch_s,
    fc_batch_s,
    gpu_batch_s,
    hbm_attention_s,
    head_batch_s,
    lane_attention_s,
    pim_side_s,
    ttft_alone_s,
)
from l3env.engine.kernels.schedule import decoding_count, moved_requests
from l3env.engine.state import FINISH_HEAP, NOMINAL_PROMPT_TOKENS, PROMPT_BINS, SLACK_HEAP, SUB_BATCHES
from l3env.jit import helper, inner, kernel

QUEUE, RUNNING, MEMORY, PRICES, INTERVAL, ARRIVALS, MACHINE = 0, 11, 23, 31, 41, 51, 61  # where each group starts
FEATURES_END = 76

PACE_TOKENS = 2048  # prompt tokens an iteration at which the pace of prefill is taken
NOMINAL_REQUEST_TOKENS = NOMINAL_PROMPT_TOKENS + 256
NOMINAL_BATCH = 64


@inner
def squash(value, scale):
    """[0, inf) -> [0, 1): the value over itself plus the scale."""
    return value / (value + scale)


@inner
def share(part, whole):
    """A part of a whole, 0 where there is none."""
    return min(max(part / whole, 0.0), 1.0) if whole > 0 else 0.0


@inner
def spread(mean, mean_of_squares):
    """Standard deviation over itself plus the mean."""
    deviation = np.sqrt(max(mean_of_squares - mean * mean, 0.0))
    return share(deviation, deviation + mean)


@helper
def prompt_octaves(s, e, quantile):
    """log2 of a quantile of the prompts in the queue, even within an octave."""
    goal = quantile * s.env[e]["waiting_count"]
    below = 0.0
    for octave in range(PROMPT_BINS):
        here = float(s.prompts[e, octave])
        if here > 0 and below + here >= goal:
            return octave + (goal - below) / here
        below += here
    return 0.0


@helper
def write_queue(t, s, e, mark, row, i):
    env = s.env[e]
    waiting = env["waiting_count"]
    for k in range(11):
        row[i + k] = 0.0
    row[i + 8], row[i + 9] = 1.0, 1.0
    if waiting == 0:
        return
    feasible = s.heap_len[e, SLACK_HEAP]
    row[i] = squash(float(waiting), 16.0)
    row[i + 1] = squash(float(waiting), 256.0)
    row[i + 2] = squash(env["waiting_tokens"] * mark["prefill_token_s"], 4 * env["ttft_slo_s"])
    row[i + 3] = squash(float(env["waiting_tokens"]), mark["free_tokens"])
    row[i + 4] = squash(max(env["clock_s"] - env["waiting_arrival_s"] / waiting, 0.0), env["ttft_slo_s"])
    row[i + 5] = prompt_octaves(s, e, 0.1) / PROMPT_BINS
    row[i + 6] = prompt_octaves(s, e, 0.5) / PROMPT_BINS
    row[i + 7] = prompt_octaves(s, e, 0.9) / PROMPT_BINS
    row[i + 8] = feasible / waiting
    if feasible > 0:
        slack_s = s.heap[e, SLACK_HEAP, s.heap[e, SLACK_HEAP, 0]["item"]]["key"] - env["clock_s"]
        row[i + 9] = squash(max(slack_s, 0.0), env["ttft_slo_s"]) if slack_s < np.inf else 1.0
    row[i + 10] = squash(env["waiting_predicted_tokens"] / waiting, 256.0)


@helper
def write_running(s, e, mark, row, i):
    env = s.env[e]
    count_0, count_1 = decoding_count(s, e, 0), decoding_count(s, e, 1)
    count = count_0 + count_1
    row[i] = squash(float(env["prefill_count"]), 8.0)
    row[i + 1] = squash(env["prefill_left_tokens"] * mark["prefill_token_s"], env["ttft_slo_s"])
    row[i + 2] = squash(float(count_0), 64.0)
    row[i + 3] = squash(float(count_1), 64.0)
    row[i + 4] = squash(float(env["running_count"] - env["prefill_count"] - count), 16.0)
    for k in range(5, 12):
        row[i + k] = 0.0
    row[i + 10] = 0.5
    mark["tbt_slo_s"] = env["tbt_slo_s"]
    if count == 0:
        return
    age, age2, kv, kv2, predicted, late, slo_s, due_s = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for sub in range(SUB_BATCHES):
        for draft in range(classes_count(s.lane_class)):
            group = s.group[e, sub, draft]
            members = float(s.heap_len[e, FINISH_HEAP + sub + SUB_BATCHES * draft])
            clock = float(group["clock"])
            age += group["age_sum"] + clock * members
            age2 += group["age_sum2"] + 2 * clock * group["age_sum"] + clock * clock * members
            kv += group["kv_sum"] + clock * members
            kv2 += group["kv_sum2"] + 2 * clock * group["kv_sum"] + clock * clock * members
            predicted += group["predicted_sum"]
            late += group["late_count"]
            slo_s += group["tbt_slo_s"]
            due_s += group["due_s"] + clock * group["tbt_slo_s"]
    mark["tbt_slo_s"] = slo_s / count
    row[i + 5] = squash(age / count, 256.0)
    row[i + 6] = spread(age / count, age2 / count)
    row[i + 7] = squash(kv / count, 2048.0)
    row[i + 8] = spread(kv / count, kv2 / count)
    row[i + 9] = share(late, float(count))
    ahead_tokens = (due_s - count * env["clock_s"]) / slo_s
    row[i + 10] = 0.5 + 0.5 * ahead_tokens / (abs(ahead_tokens) + 16.0)
    row[i + 11] = squash(max(predicted - age, 0.0) / count, 256.0)


@helper
def write_memory(t, s, e, mark, row, i):
    table = s.env[e]["table_idx"]
    block = t.coef[table]["block_tokens"]
    used, blocks, promised, growth, fullest = 0, 0, 0, 0, 0.0
    for pool in range(1, stored_pools(t.forms, t.coef[table])):
        used += s.pool[e, pool]["used"]
        blocks += t.pool_blocks[table, pool]
        promised += s.pool[e, pool]["promised"]
        growth += growth_blocks(t, s, e, pool)
        fullest = max(fullest, share(float(s.pool[e, pool]["used"]), float(t.pool_blocks[table, pool])))
    used, more_promised, more_growth = with_spread(t.forms, t, s, e, used)
    promised, growth = promised + more_promised, growth + more_growth
    fullest = max(fullest, share(float(used), float(blocks)))
    hbm_used, hbm_blocks = s.pool[e, 0]["used"], t.pool_blocks[table, 0]
    free = blocks + hbm_blocks - used - hbm_used
    mark["free_tokens"] = float(free * block) + 1.0
    hbm_count = s.lane[e, 0, 0]["count"] + s.lane[e, 1, 0]["count"]
    pim_count = decoding_count(s, e, 0) + decoding_count(s, e, 1) - hbm_count
    row[i] = share(float(hbm_used), float(hbm_blocks))
    row[i + 1] = share(float(used), float(blocks))
    row[i + 2] = fullest
    hbm_free, pim_free = float((hbm_blocks - hbm_used) * block), float((blocks - used) * block)
    row[i + 3] = squash(hbm_free, 256.0 * hbm_count) if hbm_count > 0 else 1.0
    row[i + 4] = squash(pim_free, 256.0 * pim_count) if pim_count > 0 else 1.0
    row[i + 5] = squash(float(growth + growth_blocks(t, s, e, 0)), float(free) + 1.0)
    row[i + 6] = squash(float(promised + s.pool[e, 0]["promised"]), float(blocks + hbm_blocks))
    slowest, total, lanes = 0.0, 0.0, stored_lanes(t.forms, t.coef[table])
    for lane in range(1, lanes):
        load = s.lane[e, 0, lane]["kv"] + s.lane[e, 1, lane]["kv"]
        slowest = max(slowest, load)
        total += load
    row[i + 7] = squash(slowest * (lanes - 1) / total - 1.0, 1.0) if total > 0 else 0.0


@inner
def with_spread(forms, t, s, e, used):
    """Blocks used, promised and to grow of decompressed KV, which takes blocks of all PIM pools; the first added to
    ``used``."""
    if len(forms) == 1:
        return used, 0, 0
    coef = t.coef[s.env[e]["table_idx"]]
    pool, scale = coef["spread_pool"], spread_scale(forms, coef)
    promised, growth = scale * s.pool[e, pool]["promised"], scale * growth_blocks(t, s, e, pool)
    return pim_blocks_used(forms, coef, s.pool[e]), np.int64(promised), np.int64(growth)


@inner
def fc_head_s(t, table, tokens, rows):
    return _fc_head_s(t, table, np.int64(tokens), np.int64(rows))


@helper
def _fc_head_s(t, table, tokens, rows):
    return fc_batch_s(t, table, tokens) + head_batch_s(t, table, rows)


@helper
def guess_s(t, table, requests):
    return draft_batch_s(t, table, requests) if t.coef[table]["drafts_count"] > 0 else 0.0


@helper
def write_prices(t, s, e, mark, row, i):
    """The next decode step as the tables price it, in both ways of running it, over the TBT SLO."""
    table = s.env[e]["table_idx"]
    lanes, queries = stored_lanes(t.forms, t.coef[table]), 1 + drafting_now(s.lane_class, s.env[e])
    n_0, n_1 = decoding_count(s, e, 0), decoding_count(s, e, 1)
    hbm_n_0, hbm_n_1 = s.lane[e, 0, 0]["count"], s.lane[e, 1, 0]["count"]
    hbm_kv_0, hbm_kv_1 = s.lane[e, 0, 0]["kv"] + queries * hbm_n_0, s.lane[e, 1, 0]["kv"] + queries * hbm_n_1
    slowest_0_s, slowest_1_s, slowest_both_s = 0.0, 0.0, 0.0
    for lane in range(1, lanes):
        c_0, c_1 = s.lane[e, 0, lane]["count"], s.lane[e, 1, lane]["count"]
        lane_0_s = lane_attention_s(t, table, s.lane[e, 0, lane]["kv"] + queries * c_0, c_0, queries)
        lane_1_s = lane_attention_s(t, table, s.lane[e, 1, lane]["kv"] + queries * c_1, c_1, queries)
        slowest_0_s, slowest_1_s = max(slowest_0_s, lane_0_s), max(slowest_1_s, lane_1_s)
        slowest_both_s = max(slowest_both_s, lane_0_s + lane_1_s)
    spread_0_s = spread_load(t.forms, t, table, s.lane[e, 0], queries)[1]
    spread_1_s = spread_load(t.forms, t, table, s.lane[e, 1], queries)[1]
    slowest_0_s, slowest_1_s = slowest_0_s + spread_0_s, slowest_1_s + spread_1_s
    slowest_both_s += spread_0_s + spread_1_s
    slo_s = mark["tbt_slo_s"]
    hbm_s = hbm_attention_s(t, table, hbm_kv_0 + hbm_kv_1, hbm_n_0 + hbm_n_1, queries)
    moved_0, moved_1 = moved_requests(t, s, e, 0), moved_requests(t, s, e, 1)
    rows_0, rows_1 = queries * n_0, queries * n_1
    fc_s = fc_head_s(t, table, rows_0 + rows_1, rows_0 + rows_1) + (queries - 1) * guess_s(t, table, n_0 + n_1)
    pim_s = pim_side_s(t, table, slowest_both_s, moved_0 + moved_1, 0)[0]
    front_s = max(hbm_s, pim_s)
    one_s = gpu_batch_s(t, table, front_s + fc_s, rows_0 + rows_1)
    gpu_0_s, gpu_1_s, pim_0_s, pim_1_s, two_s = hbm_s + fc_s, 0.0, pim_s, 0.0, one_s
    if lanes > 1:
        gpu_0_s = hbm_attention_s(t, table, hbm_kv_0, hbm_n_0, queries) + fc_head_s(t, table, rows_1, rows_1)
        gpu_1_s = hbm_attention_s(t, table, hbm_kv_1, hbm_n_1, queries) + fc_head_s(t, table, rows_0, rows_0)
        gpu_0_s = gpu_batch_s(t, table, gpu_0_s + (queries - 1) * guess_s(t, table, n_1), rows_1)
        gpu_1_s = gpu_batch_s(t, table, gpu_1_s + (queries - 1) * guess_s(t, table, n_0), rows_0)
        pim_0_s = pim_side_s(t, table, slowest_0_s, moved_0, 0)[0]
        pim_1_s = pim_side_s(t, table, slowest_1_s, moved_1, 0)[0]
        two_s = max(gpu_0_s, pim_0_s) + max(gpu_1_s, pim_1_s)
    row[i] = squash(gpu_0_s, slo_s)
    row[i + 1] = squash(gpu_1_s, slo_s)
    row[i + 2] = squash(pim_0_s, slo_s)
    row[i + 3] = squash(pim_1_s, slo_s)
    row[i + 4] = squash(one_s, slo_s)
    row[i + 5] = squash(two_s, slo_s)
    row[i + 6] = squash(one_s, two_s) if two_s > 0 else 0.5
    head_s = head_batch_s(t, table, rows_0 + rows_1)
    row[i + 7] = squash(front_s + fc_batch_s(t, table, rows_0 + rows_1 + 512) + head_s, slo_s)
    row[i + 8] = squash(front_s + fc_batch_s(t, table, rows_0 + rows_1 + 2048) + head_s, slo_s)
    row[i + 9] = squash(s.env[e]["last_iteration_s"], slo_s)


@helper
def write_interval(s, e, mark, row, i):
    """What happened since the last observation; the mark moves."""
    env = s.env[e]
    last_s = env["last_iteration_s"]
    row[i] = share(env["last_gpu_0_s"], last_s)
    row[i + 1] = share(env["last_gpu_1_s"], last_s)
    row[i + 2] = share(env["last_pim_0_s"], last_s)
    row[i + 3] = share(env["last_pim_1_s"], last_s)
    busy_s = env["busy_s"] - mark["busy_s"]
    row[i + 4] = share(busy_s - (env["gpu_busy_s"] - mark["gpu_busy_s"]), busy_s)
    row[i + 5] = share(busy_s - (env["pim_busy_s"] - mark["pim_busy_s"]), busy_s)
    prompts = float(env["prefill_tokens"] - mark["prefill_tokens"])
    row[i + 6] = share(prompts, prompts + env["output_tokens"] - mark["output_tokens"])
    row[i + 7] = squash(float(env["preemptions_count"] - mark["preemptions_count"]), 4.0)
    row[i + 8] = env["slo_met_mean"] if env["finished_count"] + env["rejected_count"] > 0 else 1.0
    row[i + 9] = squash(env["clock_s"] - mark["clock_s"], 16.0 * mark["tbt_slo_s"])
    mark["clock_s"] = env["clock_s"]
    mark["busy_s"], mark["gpu_busy_s"], mark["pim_busy_s"] = env["busy_s"], env["gpu_busy_s"], env["pim_busy_s"]
    mark["preemptions_count"] = env["preemptions_count"]
    mark["output_tokens"], mark["prefill_tokens"] = env["output_tokens"], env["prefill_tokens"]


@helper
def write_arrivals(s, e, mark, row, i):
    """Estimated load: with x = work over gap, x / (x + 1) is written as work / (work + gap)."""
    env = s.env[e]
    for k in range(10):
        row[i + k] = 0.0
    prompt, output = env["prompt_mean_tokens"], env["output_mean_tokens"]
    row[i + 3] = 0.5
    if env["arrived_count"] > 1:
        short_s, long_s = env["gap_short_s"], env["gap_long_s"]
        work_s = prompt * mark["prefill_token_s"]
        row[i] = squash(work_s, short_s)
        row[i + 1] = squash(work_s, long_s)
        held = output * mark["tbt_slo_s"] * (prompt + output / 2)
        row[i + 2] = share(held, held + long_s * mark["capacity_tokens"])
        row[i + 3] = squash(long_s, short_s) if short_s + long_s > 0 else 0.5
        row[i + 4] = share(env["gap_short_s2"] - short_s * short_s, env["gap_short_s2"])
        row[i + 5] = share(env["gap_long_s2"] - long_s * long_s, env["gap_long_s2"])
        since_s = max(env["clock_s"] - env["last_arrival_s"], 0.0)
        row[i + 6] = share(since_s, since_s + long_s)
    row[i + 7] = squash(prompt, 2048.0)
    row[i + 8] = squash(output, 256.0)
    row[i + 9] = squash(mark["capacity_tokens"], 64.0 * (prompt + output)) if prompt > 0 else 1.0


@helper
def write_machine(t, s, e, mark, row, i):
    """The system and model as they are known before any request; also what the other groups measure by."""
    env = s.env[e]
    table = env["table_idx"]
    coef = t.coef[table]
    block, lanes = coef["block_tokens"], stored_lanes(t.forms, t.coef[table])
    hbm_tokens, pim_tokens = float(t.pool_blocks[table, 0] * block), 0.0
    for pool in range(1, stored_pools(t.forms, t.coef[table])):
        pim_tokens += float(t.pool_blocks[table, pool] * block)
    mark["capacity_tokens"] = hbm_tokens + pim_tokens
    mark["prefill_token_s"] = ttft_alone_s(t, table, PACE_TOKENS) / PACE_TOKENS
    slo_s = env["tbt_slo_s"]
    batch_kv = float(NOMINAL_BATCH * NOMINAL_PROMPT_TOKENS)
    fc_s = fc_head_s(t, table, NOMINAL_BATCH, NOMINAL_BATCH)
    row[i] = float(coef["has_pim"])
    row[i + 1] = 1.0 if hbm_tokens > 0 else 0.0
    row[i + 2] = squash(fc_head_s(t, table, 1, 1), slo_s)
    row[i + 3] = squash(fc_head_s(t, table, 256, 256), slo_s)
    row[i + 4] = squash(fc_head_s(t, table, PACE_TOKENS, 1), slo_s)
    row[i + 5] = share(ttft_alone_s(t, table, NOMINAL_PROMPT_TOKENS), env["ttft_slo_s"])
    row[i + 6] = squash(NOMINAL_PROMPT_TOKENS * mark["prefill_token_s"], env["ttft_slo_s"])
    row[i + 7] = squash(env["ttft_slo_s"], 16.0 * slo_s)
    row[i + 8] = squash(hbm_attention_s(t, table, batch_kv, float(NOMINAL_BATCH)), fc_s)
    row[i + 9], row[i + 12] = 0.0, 0.0
    if lanes > 1:
        lane_s = lane_attention_s(t, table, batch_kv / (lanes - 1), NOMINAL_BATCH / (lanes - 1))
        row[i + 9] = squash(pim_side_s(t, table, lane_s, float(NOMINAL_BATCH), 0)[0], fc_s)
        row[i + 12] = squash(coef["pim_token_s"] * pim_tokens / (lanes - 1), slo_s)
    row[i + 10] = squash(hbm_tokens, 64.0 * NOMINAL_REQUEST_TOKENS)
    row[i + 11] = squash(pim_tokens, 64.0 * NOMINAL_REQUEST_TOKENS)
    row[i + 13] = squash(float(lanes - 1), 8.0)
    row[i + 14] = squash(coef["transfer_token_s"] * PACE_TOKENS, fc_head_s(t, table, PACE_TOKENS, 1))


@inner
def write_row(t, s, mark, machine, e, row):
    """All features of environment ``e`` into ``row``; moves its mark.

    ``machine`` keeps the last group between calls; it is filled where the mark is new.
    """
    if mark["is_old"] == 0:
        write_machine(t, s, e, mark, machine, 0)
        mark["is_old"] = 1
    write_memory(t, s, e, mark, row, MEMORY)
    write_queue(t, s, e, mark, row, QUEUE)
    write_running(s, e, mark, row, RUNNING)
    write_prices(t, s, e, mark, row, PRICES)
    write_interval(s, e, mark, row, INTERVAL)
    write_arrivals(s, e, mark, row, ARRIVALS)
    for i in range(FEATURES_END - MACHINE):
        row[MACHINE + i] = machine[i]


@kernel
def write_features(t, s, marks, machine, first, last, out):
    """Features of environments first..last - 1 into ``out`` (E, F), ordered as observe.FEATURES; moves the marks."""
    for e in range(first, last):
        write_row(t, s, marks[e], machine[e], e, out[e])
