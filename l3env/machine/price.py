"""What the parts of an iteration cost, from the tables; ``iteration`` puts them together."""

from __future__ import annotations

import numpy as np

from l3env.jit import helper, inner, rare
from l3env.machine.arrays import COMM, DENSE_TOKENS, DRAFT, EXPERTS, FC, HEAD, STRIDE_TOKENS, TABLE_TOKENS


@inner
def lookup_s(row, slope_s, tokens):
    """Tabulated time for a token count: exact up to DENSE_TOKENS, then interpolated, then the last slope."""
    if tokens <= DENSE_TOKENS:
        return row[tokens]
    if tokens >= TABLE_TOKENS:
        return row[row.shape[0] - 1] + (tokens - TABLE_TOKENS) * slope_s
    steps = (tokens - DENSE_TOKENS) // STRIDE_TOKENS
    rest = (tokens - DENSE_TOKENS) - steps * STRIDE_TOKENS
    low = row[DENSE_TOKENS + steps]
    return low + (row[DENSE_TOKENS + steps + 1] - low) * (rest / STRIDE_TOKENS)


@inner
def causal_pairs(chunk, history):
    """(query, key) pairs of a prefill chunk on a history: c f + c (c + 1) / 2."""
    return chunk * float(history) + chunk * (chunk + 1.0) / 2


@inner
def gpu_busy_j(coef, work_j, busy_s):
    """Energy of GPUs above their idle power: their work's, and what they draw for being busy, within the power limit.

    Constant power while it runs, energy per FLOP and per byte: Choi et al., "A Roofline Model of Energy" (IPDPS 2013),
    section II; the bound on power: Choi et al., "Algorithmic Time, Energy, and Power on Candidate HPC Compute Building
    Blocks" (IPDPS 2014). Where no such power was measured, the work's alone.
    """
    if coef["gpu_most_w"] == 0.0:
        return work_j
    return min(work_j + coef["gpu_busy_w"] * busy_s, coef["gpu_most_w"] * busy_s)


@helper
def norm_s(a_s, b_s, exponent):
    """The p-norm of two times."""
    large_s, small_s = max(a_s, b_s), min(a_s, b_s)
    if small_s <= 0.0:
        return large_s
    return large_s * (1.0 + (small_s / large_s) ** exponent) ** (1.0 / exponent)


@inner
def beside_s(a_s, b_s, exponent):
    """Two times that overlap: the larger, or a p-norm that rounds the corner off (``costs.gpu.overlap_s``)."""
    return max(a_s, b_s) if exponent == 0.0 else norm_s(a_s, b_s, exponent)


@inner
def prefill_work_s(t, table, chunk, history):
    """Attention of one prefilling request's chunk on all multiprocessors: the larger of computing and reading.

    A started tile of queries costs as much as a full one; keys and values of a latent's history are projected first.
    """
    coef = t.coef[table]
    if chunk <= 0:
        return max(0.0, coef["prefill_kv_s"] * float(history + chunk))
    pairs = max(float(chunk), coef["prefill_history_tokens"]) * float(history)
    pairs += max(float(chunk), coef["prefill_tile_tokens"]) * ((chunk + 1.0) / 2)
    compute_s = coef["prefill_pair_s"] * pairs + coef["prefill_new_s"] * chunk
    if coef["prefill_tile_s"] > 0.0:
        compute_s += coef["prefill_tile_s"] * np.ceil(chunk / coef["prefill_tile_tokens"])
    memory_s = coef["prefill_kv_s"] * float(history + chunk) + coef["prefill_query_s"] * chunk
    return max(compute_s, memory_s) + coef["prefill_history_token_s"] * float(history)


@inner
def prefill_tail_s(t, table, chunk):
    """The last tile of a chunk, which attends to all of it on one multiprocessor."""
    return t.coef[table]["prefill_tail_s"] + t.coef[table]["prefill_tail_token_s"] * chunk if chunk > 0 else 0.0


@inner
def prefill_batch_s(t, table, work_s, longest_s, chunks_count):
    """Prefill attention of a batch: one kernel takes all chunks (variable lengths), beside the longest of them."""
    launch_s = t.coef[table]["prefill_fixed_s"] if chunks_count > 0 else 0.0
    return launch_s + beside_s(work_s, longest_s, t.coef[table]["prefill_exponent"])


@inner
def prefill_attention_s(t, table, chunk, history):
    """t_p of one request alone."""
    return prefill_batch_s(t, table, prefill_work_s(t, table, chunk, history), prefill_tail_s(t, table, chunk), 1)


@inner
def fc_batch_s(t, table, tokens):
    """t_batch: the fully connected layers for a batch of tokens."""
    return lookup_s(t.rows_s[table, FC], t.coef[table]["fc_slope_s"], tokens)


@inner
def head_batch_s(t, table, rows):
    """Language-model head for the tokens that are emitted."""
    return lookup_s(t.rows_s[table, HEAD], t.coef[table]["head_slope_s"], rows)


@rare
def rare_lookup_s(row, slope_s, tokens):
    """``lookup_s`` where most models do not come."""
    return lookup_s(row, slope_s, tokens)


@rare
def sent_beside_s(t, table, work_s, tokens):
    """``costs.experts.beside_s`` of a batch's all-to-all."""
    coef = t.coef[table]
    comm_s = lookup_s(t.rows_s[table, COMM], coef["comm_slope_s"], tokens)
    share = coef["comm_sm_frac"]
    if coef["dispatch_frac"] == 0:
        return max(work_s + share * comm_s, comm_s)
    experts_s = lookup_s(t.rows_s[table, EXPERTS], coef["experts_slope_s"], tokens)
    other_s, dispatch_s = work_s - experts_s, coef["dispatch_frac"] * comm_s
    combine_s = comm_s - dispatch_s
    total_s = max(experts_s + share * dispatch_s, dispatch_s) + max(experts_s + share * combine_s, combine_s)
    total_s += max(other_s + share * dispatch_s, dispatch_s) + max(other_s + share * combine_s, combine_s)
    return total_s / 2


@inner
def gpu_batch_s(t, table, work_s, tokens):
    """GPU time of a batch: its work, beside the all-to-all where computing hides one."""
    if t.coef[table]["sends"] == 0:
        return work_s
    return sent_beside_s(t, table, work_s, np.int64(tokens))


@inner
def host_step_s(t, table, requests, tokens):
    """What the serving engine's host needs to prepare and launch a step; ideal engines: 0."""
    coef = t.coef[table]
    launches_s = coef["step_host_eager_s"] if tokens > coef["captured_tokens"] else 0.0
    return coef["step_host_s"] + coef["step_host_request_s"] * requests + launches_s


@inner
def draft_batch_s(t, table, requests):
    """Guessing a token for so many requests."""
    if requests == 0:
        return 0.0
    return rare_lookup_s(t.rows_s[table, DRAFT], t.coef[table]["draft_slope_s"], np.int64(requests))


@helper
def beside_tiles_s(t, table, read_s, kv_tokens, requests):
    """Reading KV beside the tiles' own time, with launches that depend on the mean request."""
    coef = t.coef[table]
    mean_tokens = kv_tokens / requests
    tiles_s = coef["hbm_tile_s"] * max(requests - coef["hbm_wave_requests"], 0.0)
    tiles_s += coef["hbm_mean_token_s"] * mean_tokens
    more_s = coef["hbm_split_s"] * min(max(mean_tokens / 384.0 - 1.0 / 3.0, 0.0), 1.0)
    if requests > 1:
        more_s += coef["hbm_regroup_s"]
    return beside_s(read_s, tiles_s, coef["hbm_exponent"]) + more_s


@inner
def hbm_attention_s(t, table, kv_tokens, requests, queries=1):
    """Decode attention of HBM residents, on the GPU, with one or two query tokens a request.

    Reading overlaps with the tiles' own time: one for each request and KV head, past the first on each multiprocessor;
    before, the kernel splits requests so that all of them work (FlashDecoding), or a head's KV is read by one.
    """
    coef = t.coef[table]
    read_s = (coef["hbm_token_s"] if queries == 1 else coef["hbm_verify_s"]) * kv_tokens
    read_s += coef["hbm_request_s"] * requests * queries
    if requests <= 0:
        return read_s
    if coef["hbm_tile_s"] > 0.0:
        read_s = beside_tiles_s(t, table, read_s, kv_tokens, float(requests))
    return read_s + coef["hbm_fixed_s"]


@inner
def lane_attention_s(t, table, kv_tokens, requests, queries=1):
    """Decode attention of one PIM lane; the slowest lane of a sub-batch decides."""
    token_s = t.coef[table]["pim_token_s"] if queries == 1 else t.coef[table]["pim_verify_s"]
    return token_s * kv_tokens + t.coef[table]["pim_request_s"] * requests * queries


@inner
def decompressed_attention_s(t, table, kv_tokens, queries):
    """Decode attention on decompressed KV, spread over all PIM lanes: every one is busy for it."""
    return (
        t.coef[table]["decompressed_token_s"] if queries == 1 else t.coef[table]["decompressed_verify_s"]
    ) * kv_tokens


@inner
def pim_side_s(t, table, slowest_s, requests, kv_pushed):
    """T_PIM = t_d + t_comm: the slowest lane's decode attention (``slowest_s``) and the transfers.

    Transfers: Q, K, V and outputs of ``requests`` decoding ones, KV of ``kv_pushed`` prefilled tokens. A rank is
    blocked for the exposed share of them; the buses are busy for all of it (arXiv 2504.17584, sections 4 and 6).

    Returns (T_PIM, t_d, t_comm).
    """
    coef = t.coef[table]
    attention_s = slowest_s
    if requests > 0:
        attention_s += coef["pim_batch_s"]
    moving_s = coef["transfer_request_s"] * requests + coef["transfer_token_s"] * kv_pushed
    side_s = max(attention_s + coef["transfer_exposed_frac"] * moving_s, moving_s)
    if requests > 0:
        side_s += coef["transfer_latency_s"]
    return side_s, attention_s, moving_s
