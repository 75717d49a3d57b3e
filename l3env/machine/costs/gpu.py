"""GPU operation times: one roofline per operation, rounded off as far as the GPU's spec says.

Every function is pure and takes arrays of token counts. ``tp`` is the tensor-parallel degree: weights and heads are
divided by it.

With a spec's neutral defaults an operation takes the larger of its compute and its memory time at constant shares of
the data sheet's peaks (AttAcc, ASPLOS 2024: 0.80 and 0.85). A measured spec adds launches, a smooth corner instead of
the sharp one, waves of tiles over multiprocessors, and attention kernels with rates of their own; the parameters are
fitted to measurements, see ``experiments/gpu/fit.py`` and ``docs/gpu-validation.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from l3env.machine.specs import GpuSpec, LinkSpec, ModelSpec
from l3env.units import FP8_BYTES, FP16_BYTES

Array = NDArray[np.float64]
PARTIAL_BYTES = 4  # partial sums are 32-bit
FP8_SCALE_BYTES = 4 / 128  # per element: a 32-bit scale for 128 of them (arXiv 2412.19437, section 3.3.2)


TILES = ((64, 32), (64, 64), (64, 128), (64, 256), (128, 32), (128, 64), (128, 128), (128, 256), (256, 64), (256, 128))
"""Output tiles (tokens x outputs) that libraries choose from for matrix products (CUTLASS's common shapes)."""
TILE_STEP = 64  # all of them have multiples of this many tokens
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # parts of the inner size,
SPLIT_SIZE = 256  # none of them smaller than this
LASTING_TOKENS = 256  # up to here products wait for weights often enough to stay below the power limit


def memory_s(gpu: GpuSpec, moved_bytes: ArrayLike) -> Array:
    """Streaming at the share of the bandwidth that large operations reach."""
    return np.asarray(moved_bytes, dtype=float) / (gpu.hbm_bytes_per_s * gpu.memory_utilisation_frac)


def compute_s(gpu: GpuSpec, flop: ArrayLike) -> Array:
    """Computing at the share of the FLOP/s that large operations reach."""
    return np.asarray(flop, dtype=float) / (gpu.fp16_flop_per_s * gpu.compute_utilisation_frac)


def speedup(model: ModelSpec, gpu: GpuSpec) -> float:
    """How much faster than in 16 bit the model's matrix products compute: 8-bit weights use the FP8 units."""
    return max(gpu.fp8_flop_per_s / gpu.fp16_flop_per_s, 1.0) if model.bytes_per_parameter <= 1 else 1.0


def overlap_s(gpu: GpuSpec, a_s: Array, b_s: Array) -> Array:
    """Two times that overlap: the larger (Williams et al., CACM 2009), or a p-norm that rounds the corner off.

    Near the corner neither resource is busy all the time: the pipeline fills and drains.
    """
    if gpu.roofline_exponent == 0:
        return np.maximum(a_s, b_s)
    large, small = np.maximum(a_s, b_s), np.minimum(a_s, b_s)
    ratio = np.divide(small, large, out=np.zeros_like(large), where=large > 0)
    return large * (1 + ratio**gpu.roofline_exponent) ** (1 / gpu.roofline_exponent)


def matmul_compute_s(
    model: ModelSpec, gpu: GpuSpec, tokens: Array, k: float | Array, n: float | Array, *, grouped: bool = False
) -> Array:
    """Compute time of a (tokens, k) x (k, n) product: the best tile's waves over the multiprocessors.

    A tile's step along the inner size takes the longer of multiplying and taking in its operands. A partly filled last
    wave is waited for in part. Products with few tiles are split along the inner size and joined (split-K), but not
    ``grouped`` ones nor those with scales for blocks. Large products one after the other hold the GPU at its power
    limit and its clock below that of a single one. Without ``sm_count`` the plain FLOP over FLOP/s. Never falls with
    ``tokens``.
    """
    if gpu.sm_count == 0:
        return compute_s(gpu, 2 * tokens * k * n) / speedup(model, gpu)
    tiles, grouped = _step(model, gpu), grouped or model.block_scales
    lasting = 1 + gpu.sustained_slowdown_frac * np.maximum(1 - LASTING_TOKENS / np.maximum(tokens, 1), 0)
    if np.ndim(k) == 0 and np.ndim(n) == 0 and tokens.size > TILE_STEP:
        places = np.ceil(tokens / TILE_STEP).astype(np.int64)
        if places.max() < places.size:
            steps = np.arange(places.max() + 1.0)
            return _tiled_s(gpu, tiles, steps * TILE_STEP, k, n, grouped)[places] * lasting
    return _tiled_s(gpu, tiles, np.ceil(tokens / TILE_STEP) * TILE_STEP, k, n, grouped) * lasting


class _Step(NamedTuple):
    """What a step along the inner size costs a multiprocessor."""

    flop_s: float
    operand_s: float


def _step(model: ModelSpec, gpu: GpuSpec) -> _Step:
    flop_per_s, bytes_per_s = gpu.fp16_flop_per_s * gpu.compute_utilisation_frac, gpu.sm_bytes_per_s
    if speedup(model, gpu) > 1:
        flop_per_s = gpu.fp8_flop_per_s * (gpu.fp8_utilisation_frac or gpu.compute_utilisation_frac)
        bytes_per_s = gpu.fp8_sm_bytes_per_s or bytes_per_s
    operand_bytes = FP8_BYTES if speedup(model, gpu) > 1 else FP16_BYTES
    return _Step(gpu.sm_count / flop_per_s, operand_bytes / bytes_per_s if bytes_per_s else 0.0)


def _tiled_s(gpu: GpuSpec, step: _Step, tokens: Array, k: float | Array, n: float | Array, grouped: bool) -> Array:
    best = np.full(np.broadcast_shapes(tokens.shape, np.shape(k), np.shape(n)), np.inf)
    count = len(SPLITS) if gpu.split_bytes_per_s > 0 and not grouped else 1
    parts = np.array(SPLITS[:count], dtype=float).reshape(-1, *(1,) * best.ndim)
    extra = np.where((k >= SPLIT_SIZE * parts) | (parts == 1), 0.0, np.inf)
    if count > 1:
        extra = extra + (parts > 1) * (gpu.split_s + tokens * n * parts * (PARTIAL_BYTES / gpu.split_bytes_per_s))
    for rows, columns in TILES:
        waves = np.ceil(tokens / rows) * np.ceil(n / columns) * parts / gpu.sm_count
        waited = (1 - gpu.tile_wave_frac) * np.maximum(waves, 1) + gpu.tile_wave_frac * np.ceil(waves)
        step_s = max(2 * rows * columns * step.flop_s, (rows + columns) * step.operand_s)
        best = np.minimum(best, (waited * (gpu.tile_start_s + k * step_s / parts) + extra).min(axis=0))
    return np.where(tokens > 0, best, 0.0)


def attention_shapes(model: ModelSpec, tp: int) -> list[tuple[float, float]]:
    """(input, output) sizes of the linear operations of a layer's attention on one GPU: QKV, output projection.

    KV heads fewer than ``tp`` are replicated, as in Megatron-style tensor parallelism. With latent attention: queries
    down and up, KV down (replicated), KV up, output. Absorbed decode applies the two halves of "KV up" to queries and
    outputs instead: the same weights and FLOP per token.
    """
    if model.mla is None:
        q_size = model.heads_count * model.head_size / tp
        kv_size = 2 * max(model.kv_heads_count / tp, 1) * model.head_size
        return [(model.hidden_size, q_size + kv_size), (q_size, model.hidden_size)]
    mla, heads = model.mla, model.heads_count / tp
    return [
        (model.hidden_size, mla.query_rank + mla.stored_size),
        (mla.query_rank, heads * (mla.nope_size + mla.rope_size)),
        (mla.kv_rank, heads * (mla.nope_size + mla.value_size)),
        (heads * mla.value_size, model.hidden_size),
    ]


def ffn_shapes(model: ModelSpec, ffn_size: float) -> list[tuple[float, float]]:
    """(input, output) sizes of an FFN or expert: up (with the gate beside it), down."""
    return [(model.hidden_size, (2 if model.gated_ffn else 1) * ffn_size), (ffn_size, model.hidden_size)]


def linear_shapes(model: ModelSpec, tp: int) -> list[tuple[float, float]]:
    """(input, output) sizes of a dense layer's linear operations on one GPU: those of attention, FFN up, FFN down."""
    return attention_shapes(model, tp) + ffn_shapes(model, model.ffn_size / tp)


def linear_flop_and_bytes(model: ModelSpec, tokens: Array, k: float | Array, n: float | Array) -> tuple[Array, Array]:
    """FLOP and bytes of an (tokens, k) x (k, n) product: weights once, inputs and outputs in 16 bit."""
    flop = 2 * tokens * k * n
    moved = k * n * model.bytes_per_parameter + tokens * (k + n) * FP16_BYTES
    return flop, moved


def linear_s(model: ModelSpec, gpu: GpuSpec, tokens: Array, k: float | Array, n: float | Array) -> Array:
    """One linear operation of one GPU."""
    compute = matmul_compute_s(model, gpu, tokens, k, n)
    product = product_s(model, gpu, compute, k * n * model.bytes_per_parameter, tokens * k, tokens * n)
    return product + quantise_s(model, gpu, tokens, k)


def product_s(
    model: ModelSpec, gpu: GpuSpec, compute: Array, weight_bytes: float | Array, inputs: Array, outputs: Array
) -> Array:
    """A matrix product of one GPU, launched: computing beside moving its operands and outputs.

    Of FP8 products with scales for blocks a tile's sums are scaled and stored after its last step: it is as long as
    both (``fp8_output_bytes_per_s``, fitted to DeepGEMM's table by ``experiments/gpu/deep_gemm.py``).
    """
    if speedup(model, gpu) == 1:
        moved_s = memory_s(gpu, weight_bytes + (inputs + outputs) * FP16_BYTES)
        return gpu.linear_launch_s + overlap_s(gpu, compute, moved_s)
    if model.block_scales and gpu.fp8_output_bytes_per_s > 0:
        read_s = memory_s(gpu, weight_bytes + inputs * (FP8_BYTES + FP8_SCALE_BYTES))
        written_s = outputs * FP16_BYTES / gpu.fp8_output_bytes_per_s
        return gpu.linear_launch_s + gpu.block_launch_s + overlap_s(gpu, compute, read_s) + written_s
    input_bytes = FP8_BYTES if quantises(model, gpu) else FP16_BYTES
    moved_s = memory_s(gpu, weight_bytes + inputs * input_bytes + outputs * FP16_BYTES)
    return gpu.linear_launch_s + overlap_s(gpu, compute, moved_s)


def quantises(model: ModelSpec, gpu: GpuSpec) -> bool:
    """Is an FP8 product's input given one scale by kernels of their own, as measured?"""
    return speedup(model, gpu) > 1 and not model.block_scales and gpu.quantise_bytes_per_s > 0


def quantise_s(model: ModelSpec, gpu: GpuSpec, tokens: Array, k: float | Array) -> Array:
    """The input of an FP8 product: its largest value found, then all scaled by it (dynamic per-tensor scales).

    A row is gone through by one block, several rows side by side get in each other's way until the rows, or the bytes
    read twice and written once, decide.
    """
    if not quantises(model, gpu):
        return np.zeros_like(tokens)
    crowd = np.clip(2 ** np.ceil(np.log2(np.maximum(tokens, 1))), 64, 256) / 64 - 1
    alone_s = gpu.quantise_element_s * k * (1 + gpu.quantise_crowd_frac * crowd)
    moved_s = tokens * k * (2 * FP16_BYTES + FP8_BYTES) / gpu.quantise_bytes_per_s
    total = gpu.quantise_launch_s + alone_s + np.maximum(tokens * gpu.quantise_row_s, moved_s)
    return np.where(tokens > 0, total, 0.0)


def linears_s(model: ModelSpec, gpu: GpuSpec, tokens: ArrayLike, shapes: Sequence[tuple[float, float]]) -> Array:
    """Several linear operations of one GPU, one after the other."""
    count = np.asarray(tokens, dtype=float)
    total = np.zeros_like(count)
    for k, n in shapes:
        total = total + linear_s(model, gpu, count, k, n)
    return total


def linear_layer_s(model: ModelSpec, gpu: GpuSpec, tp: int, tokens: ArrayLike) -> Array:
    """The linear operations of one dense layer on one GPU."""
    return linears_s(model, gpu, tokens, linear_shapes(model, tp))


def attention_elementwise_bytes(model: ModelSpec, gpu: GpuSpec, tp: int) -> float:
    """Bytes per token of the small operations around a layer's attention on one GPU, each a kernel that streams.

    A residual addition with norm (two inputs, two outputs of the hidden size), RoPE with the KV write (Q, K, V in and
    out), and with FP8 products the quantisation of their inputs.
    """
    stored = model.stored_form
    rotated = model.naive_form.query_elements / tp + max(stored.kv_heads_count / tp, 1) * stored.stored_size
    inputs = sum(k for k, _ in attention_shapes(model, tp))
    return (4 * model.hidden_size + 2 * rotated) * FP16_BYTES + inputs * quantised_bytes(model, gpu)


def ffn_elementwise_bytes(model: ModelSpec, gpu: GpuSpec, inner_size: float) -> float:
    """The same of its FFN: residual and norm, the activation (the up projection in, the down projection's input out),
    quantisation. ``inner_size`` is the sum of the inner sizes that a token passes on this GPU."""
    activation = (3 if model.gated_ffn else 2) * inner_size
    inputs = model.hidden_size + inner_size
    return (4 * model.hidden_size + activation) * FP16_BYTES + inputs * quantised_bytes(model, gpu)


def quantised_bytes(model: ModelSpec, gpu: GpuSpec) -> float:
    """Bytes moved per element of an FP8 product's input: read in 16 bit, written in FP8 with its scale, a kernel of its
    own (arXiv 2412.19437, section 3.5.2); 0 for 16-bit products and where ``quantise_s`` counts it."""
    if speedup(model, gpu) == 1 or quantises(model, gpu):
        return 0.0
    return FP16_BYTES + FP8_BYTES + FP8_SCALE_BYTES


def streaming_s(gpu: GpuSpec, moved_bytes: ArrayLike) -> Array:
    """Small operations that move so many bytes, launches apart; free in a plain roofline."""
    moved = np.asarray(moved_bytes, dtype=float)
    if gpu.elementwise_utilisation_frac == 0:
        return np.zeros_like(moved)
    return moved / (gpu.hbm_bytes_per_s * gpu.elementwise_utilisation_frac)


def elementwise_layer_s(model: ModelSpec, gpu: GpuSpec, tp: int, tokens: ArrayLike) -> Array:
    """The small operations of one dense layer on one GPU."""
    token_bytes = attention_elementwise_bytes(model, gpu, tp) + ffn_elementwise_bytes(model, gpu, model.ffn_size / tp)
    return elementwise_s(gpu, tokens, token_bytes)


def elementwise_s(gpu: GpuSpec, tokens: ArrayLike, token_bytes: float) -> Array:
    """A layer's small operations on one GPU that move so many bytes a token, launched."""
    count = np.asarray(tokens, dtype=float)
    launch = np.full_like(count, gpu.elementwise_launch_s)
    if gpu.elementwise_utilisation_frac == 0:
        return launch
    return overlap_s(gpu, launch, streaming_s(gpu, count * token_bytes))


def latent_extra_s(model: ModelSpec, gpu: GpuSpec, tp: int, tokens: Array) -> Array:
    """Small kernels of a latent attention block that other blocks do not have, one layer; 0 for others."""
    if model.mla is None:
        return np.zeros_like(tokens)
    return gpu.latent_launch_s + (gpu.latent_token_s + gpu.latent_head_s * model.heads_count / tp) * tokens


def dense_layer_s(model: ModelSpec, gpu: GpuSpec, link: LinkSpec, tp: int, tokens: ArrayLike) -> Array:
    """Work of one layer outside attention for a batch of ``tokens``, all-reduces included; 0 for 0 tokens.

    Two all-reduces a layer (after the output projection and after the FFN) of tokens x hidden elements.
    """
    count = np.asarray(tokens, dtype=float)
    layer = linear_layer_s(model, gpu, tp, count) + elementwise_layer_s(model, gpu, tp, count)
    layer = layer + latent_extra_s(model, gpu, tp, count)
    layer = layer + 2 * all_reduce_s(link, tp, count * model.hidden_size * FP16_BYTES)
    return np.where(count > 0, layer, 0.0)


def fc_s(model: ModelSpec, gpu: GpuSpec, link: LinkSpec, tp: int, tokens: ArrayLike) -> Array:
    """Work of all layers of a dense model outside attention (``costs/experts.py`` has the one for all models)."""
    return model.layers_count * dense_layer_s(model, gpu, link, tp, tokens)


def head_s(model: ModelSpec, gpu: GpuSpec, tp: int, rows: ArrayLike) -> Array:
    """Language-model head for ``rows`` tokens that need logits; 0 for none."""
    count = np.asarray(rows, dtype=float)
    return np.where(count > 0, linear_s(model, gpu, count, model.hidden_size, model.vocab_size / tp), 0.0)


SWITCH_RANKS = 8  # NCCL takes the switches' sums where all GPUs of a node take part


def all_reduce_s(link: LinkSpec, tp: int, message_bytes: ArrayLike) -> Array:
    """Ring all-reduce: 2 (tp - 1) / tp of the message over each link, plus one latency (Patarasuk & Yuan, 2009).

    Where measured, the faster of that, in two shots with a wait between them, and of one, in which each rank reads the
    whole message of all others (the custom all-reduces of serving engines).
    """
    message = np.asarray(message_bytes, dtype=float)
    if tp == 1:
        return np.zeros_like(message)
    share = (link.switch_utilisation_frac if tp >= SWITCH_RANKS else 0.0) or link.utilisation_frac
    wire = 2 * (tp - 1) / tp * message / (link.bytes_per_s * share)
    if link.one_shot_utilisation_frac == 0:
        return link.latency_s + wire
    one = (tp - 1) * message / (link.bytes_per_s * link.one_shot_utilisation_frac)
    return link.latency_s + link.hop_s * (tp - 2) + np.minimum(one, link.two_shot_s + wire)
