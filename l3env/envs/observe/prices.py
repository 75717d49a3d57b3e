"""What the next decode step takes by the tables, in both ways of running it."""

from __future__ import annotations

import numpy as np

from l3env.engine.kernels.drafts import drafting_now
from l3env.engine.kernels.forms import spread_load, stored_lanes
from l3env.engine.kernels.price import (
    draft_batch_s,
    fc_batch_s,
    gpu_batch_s,
    hbm_attention_s,
    head_batch_s,
    lane_attention_s,
    pim_side_s,
)
from l3env.engine.kernels.schedule import decoding_count, moved_requests
from l3env.envs.observe.feature import Feature, squash
from l3env.jit import helper, inner

MORE_TOKENS, MANY_MORE_TOKENS = 512, 2048  # of prompts, beside the decode step


class Prices(Feature):
    """The next decode step by the tables, over the mean TBT SLO of the decoding requests, scale 1."""

    next_gpu_0 = "T_GPU of phase 0 (systems without PIM: of the batch)"
    next_gpu_1 = "T_GPU of phase 1"
    next_pim_0 = "T_PIM of phase 0"
    next_pim_1 = "T_PIM of phase 1"
    next_one_batch = "as one batch"
    next_interleaved = "as two sub-batches"
    one_batch_share = "one batch over the sum of both"
    next_with_512 = f"as one batch with the FC work of {MORE_TOKENS:,} prompt tokens more"
    next_with_2048 = f"with that of {MANY_MORE_TOKENS:,} more"
    last_iteration = "the last iteration"


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
def write_prices(t, s, e, mark, row):
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
    row[Prices.next_gpu_0] = squash(gpu_0_s, slo_s)
    row[Prices.next_gpu_1] = squash(gpu_1_s, slo_s)
    row[Prices.next_pim_0] = squash(pim_0_s, slo_s)
    row[Prices.next_pim_1] = squash(pim_1_s, slo_s)
    row[Prices.next_one_batch] = squash(one_s, slo_s)
    row[Prices.next_interleaved] = squash(two_s, slo_s)
    row[Prices.one_batch_share] = squash(one_s, two_s) if two_s > 0 else 0.5
    head_s = head_batch_s(t, table, rows_0 + rows_1)
    row[Prices.next_with_512] = squash(front_s + fc_batch_s(t, table, rows_0 + rows_1 + MORE_TOKENS) + head_s, slo_s)
    row[Prices.next_with_2048] = squash(
        front_s + fc_batch_s(t, table, rows_0 + rows_1 + MANY_MORE_TOKENS) + head_s, slo_s
    )
    row[Prices.last_iteration] = squash(s.env[e]["last_iteration_s"], slo_s)
