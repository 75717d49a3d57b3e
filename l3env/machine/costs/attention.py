"""Attention on the GPU: the coefficients of what ``price`` puts together per chunk, per batch and per token.

Prefill goes in tiles of queries over the multiprocessors, each against all keys before it (FlashAttention-2, arXiv
2307.08691; with all query heads of a KV head in a tile where ``prefill_packs_heads``, as FlashAttention-3 does with
short chunks). Decode reads KV, split along its length between multiprocessors (FlashDecoding), or with one of them a
head where the kernel does not split. With a spec's neutral defaults both are the plain roofline.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from l3env.machine.costs.gpu import (
    Array,
    attention_elementwise_bytes,
    attention_shapes,
    latent_extra_s,
    linear_s,
    linears_s,
    streaming_s,
)
from l3env.machine.specs import AttentionForm, GpuSpec, ModelSpec
from l3env.units import FP8_BYTES, FP16_BYTES

HEAD_SIZE = 128  # parameters are those of heads of this size
LARGEST_HEAD_SIZE = 256  # launches do not grow beyond


class Tiles(NamedTuple):
    """Prefill's tiles of queries, all layers; as in ``COEF_DTYPE``."""

    tile_s: float  # a started one on all multiprocessors
    tile_tokens: float  # new tokens of one
    history_tokens: float  # fewer new tokens cost as much on a history
    tail_s: float  # the longest on one multiprocessor,
    tail_token_s: float  # per key


def pair_s(
    model: ModelSpec, gpu: GpuSpec, tp: int, utilisation_frac: float = 0.0, form: AttentionForm | None = None
) -> float:
    """Compute time per (query, key) pair of attention, all layers: 2 FLOP a multiply-accumulate of the form.

    ``utilisation_frac`` is the share of the peak that is reached, by default that of linear operations.
    """
    flop = 2 * (form or model.naive_form).macs_per_pair / tp
    return model.layers_count * flop / (gpu.fp16_flop_per_s * (utilisation_frac or gpu.compute_utilisation_frac))


def prefill_pair_s(model: ModelSpec, gpu: GpuSpec, tp: int) -> float:
    """Compute time per pair of prefill attention, on plain keys and values; c new tokens on a history of f have
    c f + c (c + 1) / 2 pairs. The exponential of a pair costs as much as some more head size, whatever the head's.
    Layer after layer of it, under a lasting load, holds the clock down as large products do."""
    wider = gpu.prefill_latent_utilisation_frac if model.mla is not None else 0.0
    if narrow(model) and gpu.fp8_kv_prefill_utilisation_frac > 0:
        wider = gpu.fp8_kv_prefill_utilisation_frac
    plain = pair_s(model, gpu, tp, wider or gpu.prefill_utilisation_frac)
    form = model.naive_form
    softmax = 1 + 2 * gpu.prefill_softmax_size / (form.key_size + form.value_size)
    return plain * (softmax / (1 + gpu.prefill_softmax_size / HEAD_SIZE)) * (1 + gpu.prefill_slowdown_frac)


def narrow(model: ModelSpec) -> bool:
    """Is KV of 8 bit?"""
    return model.bytes_per_kv_element <= FP8_BYTES


def prefill_tiles(model: ModelSpec, gpu: GpuSpec, tp: int) -> Tiles:
    """Tiles of ``prefill_tile_rows`` queries, those of all heads of a KV head together where they are packed."""
    form = model.naive_form
    packed = form.queries_per_kv_head if gpu.prefill_packs_heads else 1
    tile_tokens = max(gpu.prefill_tile_rows / packed, 1.0)
    if gpu.sm_count == 0:
        return Tiles(0.0, tile_tokens, tile_tokens, 0.0, 0.0)
    heads = max(form.heads_count / tp, 1)
    once_s = model.layers_count * (gpu.prefill_tile_s + (gpu.fp8_kv_prefill_tile_s if narrow(model) else 0.0))
    tail_s = gpu.prefill_tail_frac * once_s
    tail_token_s = gpu.prefill_tail_frac * prefill_pair_s(model, gpu, tp) * gpu.prefill_tile_rows * gpu.sm_count / heads
    fill_tokens = gpu.sm_count * gpu.prefill_tile_rows / heads
    history_tokens = tile_tokens if gpu.prefill_splits_keys else max(fill_tokens, tile_tokens)
    return Tiles(once_s * heads / packed / gpu.sm_count, tile_tokens, history_tokens, tail_s, tail_token_s)


def new_token_s(model: ModelSpec, gpu: GpuSpec, tp: int) -> float:
    """Moving a new token's keys, values, queries and outputs beside computing, all layers.

    Not for latent attention, whose copies are in ``latent_head_s``."""
    if model.mla is not None:
        return 0.0
    form = model.naive_form
    kv = form.stored_elements * max(1 / tp, 1 / form.kv_heads_count) * model.bytes_per_kv_element
    queries = (form.query_elements + form.output_elements) / tp * FP16_BYTES
    moved = gpu.prefill_kv_moves * kv + gpu.prefill_query_moves * queries
    return model.layers_count * moved / gpu.hbm_bytes_per_s


def launch_s(model: ModelSpec, gpu: GpuSpec, form: AttentionForm, each_s: float) -> float:
    """Launches of all layers: larger heads take longer to begin and end."""
    larger = min(form.key_size, LARGEST_HEAD_SIZE) / HEAD_SIZE - 1
    more_s = gpu.fp8_kv_launch_s if narrow(model) else 0.0
    return model.layers_count * (each_s * (1 + gpu.attention_head_launch_frac * larger) + more_s)


def kv_read_s(model: ModelSpec, gpu: GpuSpec, tp: int, utilisation_frac: float = 0.0) -> float:
    """Time to read one token's stored KV of all layers from HBM, KV heads divided over ``tp`` GPUs."""
    shard = model.kv_bytes_per_token * max(1 / tp, 1 / model.stored_form.kv_heads_count)
    return shard / (gpu.hbm_bytes_per_s * (utilisation_frac or gpu.memory_utilisation_frac))


def history_token_s(model: ModelSpec, gpu: GpuSpec, tp: int) -> float:
    """Time per token of a chunk's history, all layers: with latent attention its keys and values are projected from the
    latent again, since prefill computes on plain ones. A large product; its launch is left out."""
    if model.mla is None:
        return 0.0
    many = np.array([16_384.0])
    size = model.heads_count / tp * (model.mla.nope_size + model.mla.value_size)
    each_s = (linear_s(model, gpu, many, model.mla.kv_rank, size) - gpu.linear_launch_s) / many
    return float(model.layers_count * each_s[0])


def query_move_s(model: ModelSpec, gpu: GpuSpec, tp: int, form: AttentionForm | None = None) -> float:
    """Time to read Q and write the attention output of one query token in HBM, all layers."""
    each = form or model.naive_form
    moved = model.layers_count * (each.query_elements + each.output_elements) / tp * FP16_BYTES
    return moved / (gpu.hbm_bytes_per_s * gpu.memory_utilisation_frac)


def decode_token_s(model: ModelSpec, gpu: GpuSpec, tp: int, query_tokens: int = 1) -> float:
    """Decode attention in HBM per KV token: the larger of reading it and computing with it, for so many query tokens
    of the request at once."""
    compute = pair_s(model, gpu, tp, gpu.decode_compute_utilisation_frac, model.stored_form)
    share = (gpu.fp8_kv_decode_utilisation_frac if narrow(model) else 0.0) or gpu.decode_utilisation_frac
    share = (gpu.latent_decode_utilisation_frac if model.mla is not None else 0.0) or share
    return max(kv_read_s(model, gpu, tp, share), query_tokens * compute)


def decode_tiles(model: ModelSpec, gpu: GpuSpec, tp: int) -> tuple[float, float]:
    """(time of a request's tiles on all multiprocessors, requests that these take at once), a tile a KV head.

    A larger head's tile takes longer by the square root: it begins and ends as often, but has more to load.
    """
    if gpu.sm_count == 0:
        return 0.0, 0.0
    form = model.stored_form
    heads = max(form.kv_heads_count / tp, 1)
    tile_s = gpu.decode_tile_s * (form.key_size / HEAD_SIZE) ** 0.5
    return model.layers_count * tile_s * heads / gpu.sm_count, gpu.sm_count / heads


def decode_head_token_s(model: ModelSpec, gpu: GpuSpec) -> float:
    """Per KV token of the mean request, where one multiprocessor reads a head's KV: kernels of FlashAttention-2 split
    only heads that share KV."""
    form = model.stored_form
    if gpu.decode_head_bytes_per_s == 0 or form.queries_per_kv_head > 1:
        return 0.0
    return model.layers_count * form.stored_size * model.bytes_per_kv_element / gpu.decode_head_bytes_per_s


def regroup_s(model: ModelSpec, gpu: GpuSpec, tp: int) -> float:
    """Copying the outputs of several requests whose query heads share several KV heads, all layers."""
    form = model.stored_form
    several = form.queries_per_kv_head > 1 and form.kv_heads_count / tp > 1
    return model.layers_count * gpu.decode_regroup_s if several else 0.0


def latent_block_s(model: ModelSpec, gpu: GpuSpec, tp: int, tokens: Array) -> Array:
    """A latent attention block around the attention itself, one layer: projections and small kernels."""
    rotated = attention_elementwise_bytes(model, gpu, tp) - 4 * model.hidden_size * FP16_BYTES
    moved = streaming_s(gpu, tokens * rotated)
    return linears_s(model, gpu, tokens, attention_shapes(model, tp)) + moved + latent_extra_s(model, gpu, tp, tokens)
