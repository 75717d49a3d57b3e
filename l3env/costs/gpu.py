"""GPU operation times: a roofline per operation with constant utilisation factors.

Every function is pure and takes arrays of token counts. ``tp`` is the tensor-parallel degree: weights and heads are
divided by it. Utilisation (0.80 compute, 0.85 memory) and the two-sided roofline are AttAcc's (ASPLOS 2024, simulator
defaults). Valid for large operations; launch overhead and wave quantisation are not modelled here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from l3env.specs import GpuSpec, LinkSpec, ModelSpec
from l3env.units import FP16_BYTES

Array = NDArray[np.float64]


def roofline_s(gpu: GpuSpec, flop: ArrayLike, moved_bytes: ArrayLike) -> Array:
    """Time of one operation: the larger of its compute and its memory time (Williams et al., CACM 2009)."""
    compute = np.asarray(flop, dtype=float) / (gpu.fp16_flop_per_s * gpu.compute_utilisation_frac)
    memory = np.asarray(moved_bytes, dtype=float) / (gpu.hbm_bytes_per_s * gpu.memory_utilisation_frac)
    return np.maximum(compute, memory)


def linear_shapes(model: ModelSpec, tp: int) -> list[tuple[float, float]]:
    """(input, output) sizes of the layer's linear operations on one GPU: QKV, output projection, FFN up, FFN down.

    KV heads fewer than ``tp`` are replicated, as in Megatron-style tensor parallelism.
    """
    q_size = model.heads_count * model.head_size / tp
    kv_size = 2 * max(model.kv_heads_count / tp, 1) * model.head_size
    up_size = (2 if model.gated_ffn else 1) * model.ffn_size / tp
    return [
        (model.hidden_size, q_size + kv_size),
        (q_size, model.hidden_size),
        (model.hidden_size, up_size),
        (model.ffn_size / tp, model.hidden_size),
    ]


def linear_flop_and_bytes(model: ModelSpec, tokens: Array, k: float, n: float) -> tuple[Array, Array]:
    """FLOP and bytes of an (tokens, k) x (k, n) product: weights once, inputs and outputs in 16 bit."""
    flop = 2 * tokens * k * n
    moved = k * n * model.bytes_per_parameter + tokens * (k + n) * FP16_BYTES
    return flop, moved


def fc_s(model: ModelSpec, gpu: GpuSpec, link: LinkSpec, tp: int, tokens: ArrayLike) -> Array:
    """Fully connected work of all layers for a batch of ``tokens``, all-reduces included; 0 for 0 tokens.

    Two all-reduces a layer (after the output projection and after the FFN) of tokens x hidden elements.
    """
    count = np.asarray(tokens, dtype=float)
    layer = np.zeros_like(count)
    for k, n in linear_shapes(model, tp):
        layer = layer + roofline_s(gpu, *linear_flop_and_bytes(model, count, k, n))
    layer = layer + 2 * all_reduce_s(link, tp, count * model.hidden_size * FP16_BYTES)
    return np.where(count > 0, model.layers_count * layer, 0.0)


def head_s(model: ModelSpec, gpu: GpuSpec, tp: int, rows: ArrayLike) -> Array:
    """Language-model head for ``rows`` tokens that need logits; 0 for none."""
    count = np.asarray(rows, dtype=float)
    time = roofline_s(gpu, *linear_flop_and_bytes(model, count, model.hidden_size, model.vocab_size / tp))
    return np.where(count > 0, time, 0.0)


def all_reduce_s(link: LinkSpec, tp: int, message_bytes: ArrayLike) -> Array:
    """Ring all-reduce: 2 (tp - 1) / tp of the message over each link, plus one latency (Patarasuk & Yuan, 2009)."""
    message = np.asarray(message_bytes, dtype=float)
    if tp == 1:
        return np.zeros_like(message)
    wire = 2 * (tp - 1) / tp * message / (link.bytes_per_s * link.utilisation_frac)
    return link.latency_s + wire


def prefill_pair_s(model: ModelSpec, gpu: GpuSpec, tp: int) -> float:
    """Compute time per (query, key) pair of prefill attention, all layers: 4 FLOP x heads x head size.

    A chunk of c tokens on a history of f has c f + c (c + 1) / 2 causal pairs.
    """
    flop = 4 * model.heads_count * model.head_size / tp
    return model.layers_count * flop / (gpu.fp16_flop_per_s * gpu.compute_utilisation_frac)


def kv_read_s(model: ModelSpec, gpu: GpuSpec, tp: int) -> float:
    """Time to read one token's K and V of all layers from HBM, heads divided over ``tp`` GPUs."""
    shard = model.kv_bytes_per_token * max(1 / tp, 1 / model.kv_heads_count)
    return shard / (gpu.hbm_bytes_per_s * gpu.memory_utilisation_frac)


def query_move_s(model: ModelSpec, gpu: GpuSpec, tp: int) -> float:
    """Time to read Q and write the attention output of one query token in HBM, all layers."""
    moved = 2 * model.layers_count * model.heads_count * model.head_size / tp * FP16_BYTES
    return moved / (gpu.hbm_bytes_per_s * gpu.memory_utilisation_frac)


def decode_token_s(model: ModelSpec, gpu: GpuSpec, tp: int) -> float:
    """Decode attention in HBM per KV token: the larger of reading it and computing with it (one pair)."""
    return max(kv_read_s(model, gpu, tp), prefill_pair_s(model, gpu, tp))
