"""What the next decode step takes by the tables, in both ways of running it."""

from __future__ import annotations

import numpy as np

from l3env.choices import SubBatching
from l3env.engine.kernels.iteration import gather_decodes, queries_now
from l3env.envs.observe.feature import Feature, squash
from l3env.jit import helper, inner
from l3env.machine.iteration import Prefill, batch_of, no_prefill, price
from l3env.machine.price import fc_batch_s, head_batch_s

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


@helper
def fc_head_s(t, table, tokens, rows):
    """FC and head of a batch."""
    return fc_batch_s(t, table, np.int64(tokens)) + head_batch_s(t, table, np.int64(rows))


@inner
def with_prompts_s(t, table, steps, queries, tokens):
    """A decode step as one batch with the FC work of so many prompt tokens more."""
    batch = batch_of(Prefill(0, tokens, 0, 0.0, 0.0, 0.0), no_prefill(), steps, queries)
    return price(t, table, batch, SubBatching.OFF).duration_s


@helper
def write_prices(t, s, e, mark, row):
    table, slo_s = s.env[e]["table_idx"], mark["tbt_slo_s"]
    steps, queries = gather_decodes(t, s, e), queries_now(s, e)
    batch = batch_of(no_prefill(), no_prefill(), steps, queries)
    one = price(t, table, batch, SubBatching.OFF)
    two = price(t, table, batch, SubBatching.ON) if t.coef[table]["has_pim"] else one
    first, second = two.phases
    row[Prices.next_gpu_0] = squash(first.gpu_s, slo_s)
    row[Prices.next_gpu_1] = squash(second.gpu_s, slo_s)
    row[Prices.next_pim_0] = squash(first.pim_s, slo_s)
    row[Prices.next_pim_1] = squash(second.pim_s, slo_s)
    row[Prices.next_one_batch] = squash(one.duration_s, slo_s)
    row[Prices.next_interleaved] = squash(two.duration_s, slo_s)
    row[Prices.one_batch_share] = squash(one.duration_s, two.duration_s) if two.duration_s > 0 else 0.5
    row[Prices.next_with_512] = squash(with_prompts_s(t, table, steps, queries, MORE_TOKENS), slo_s)
    row[Prices.next_with_2048] = squash(with_prompts_s(t, table, steps, queries, MANY_MORE_TOKENS), slo_s)
    row[Prices.last_iteration] = squash(s.env[e]["last_iteration_s"], slo_s)
