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

import numpy as np
from numpy.typing import ArrayLike, NDArray

from l3env.machine.specs import AttentionForm, GpuSpec, LinkSpec, ModelSpec
from l3env.units import FP8_BYTES, FP16_BYTES

Array = NDArray[np.float64]
FP8_SCALE_BYTES = 4 / 128  # per element: a 32-bit scale for 128 of them (arXiv 2412.19437, section 3.3.2)


TILES = ((64, 64), (64, 128), (64, 256), (128, 64), (128, 128), (128, 256), (256, 64), (256, 128))
"""Output tiles (tokens x outputs) that libraries choose from for 16-bit matrix products (CUTLASS's common shapes)."""


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


def matmul_compute_s(gpu: GpuSpec, tokens: Array, k: float, n: float | Array) -> Array:
    """Compute time of a (tokens, k) x (k, n) product in 16 bit: the best tile's waves over the multiprocessors.

    A partly filled last wave is waited for in part (split-K and stream-K schedules fill some of it); small tiles reuse
    their operands less. Without ``sm_count`` the plain FLOP over FLOP/s. Never falls with ``tokens``.
    """
    if gpu.sm_count == 0:
        return compute_s(gpu, 2 * tokens * k * n)
    best = np.full_like(tokens, np.inf)
    for rows, columns in TILES:
        waves = np.ceil(tokens / rows) * np.ceil(n / columns) / gpu.sm_count
        waited = (1 - gpu.tile_wave_frac) * np.maximum(waves, 1) + gpu.tile_wave_frac * np.ceil(waves)
        loading = 1 + gpu.tile_ramp_frac * 64 * (1 / rows + 1 / columns)
        wave_s = compute_s(gpu, 2 * rows * columns * k * gpu.sm_count) * loading
        best = np.minimum(best, waited * wave_s)
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


def linear_flop_and_bytes(model: ModelSpec, tokens: Array, k: float, n: float) -> tuple[Array, Array]:
    """FLOP and bytes of an (tokens, k) x (k, n) product: weights once, inputs and outputs in 16 bit."""
    flop = 2 * tokens * k * n
    moved = k * n * model.bytes_per_parameter + tokens * (k + n) * FP16_BYTES
    return flop, moved


def linear_s(model: ModelSpec, gpu: GpuSpec, tokens: Array, k: float, n: float) -> Array:
    """One linear operation of one GPU."""
    compute = matmul_compute_s(gpu, tokens, k, n)
    return product_s(model, gpu, compute, k * n * model.bytes_per_parameter, tokens * k, tokens * n)


def product_s(
    model: ModelSpec, gpu: GpuSpec, compute_16_s: Array, weight_bytes: float | Array, inputs: Array, outputs: Array
) -> Array:
    """A matrix product of one GPU, launched: computing (``compute_16_s`` as in 16 bit) beside reading its operands.

    Outputs are written beside them too, but for FP8 products with a scale for 128 elements, where a tile's sums are
    scaled and stored after its last step: a tile is as long as both (``fp8_output_bytes_per_s``, fitted to DeepGEMM's
    table by ``experiments/gpu/deep_gemm.py``).
    """
    faster = speedup(model, gpu)
    if faster > 1 and gpu.fp8_output_bytes_per_s > 0:
        read_s = memory_s(gpu, weight_bytes + inputs * (FP8_BYTES + FP8_SCALE_BYTES))
        written_s = outputs * FP16_BYTES / gpu.fp8_output_bytes_per_s
        return gpu.linear_launch_s + overlap_s(gpu, compute_16_s / faster, read_s) + written_s
    moved_s = memory_s(gpu, weight_bytes + (inputs + outputs) * FP16_BYTES)
    return gpu.linear_launch_s + overlap_s(gpu, compute_16_s / faster, moved_s)


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
    own (arXiv 2412.19437, section 3.5.2); 0 for 16-bit products."""
    return FP16_BYTES + FP8_BYTES + FP8_SCALE_BYTES if speedup(model, gpu) > 1 else 0.0


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


def dense_layer_s(model: ModelSpec, gpu: GpuSpec, link: LinkSpec, tp: int, tokens: ArrayLike) -> Array:
    """Work of one layer outside attention for a batch of ``tokens``, all-reduces included; 0 for 0 tokens.

    Two all-reduces a layer (after the output projection and after the FFN) of tokens x hidden elements.
    """
    count = np.asarray(tokens, dtype=float)
    layer = linear_layer_s(model, gpu, tp, count) + elementwise_layer_s(model, gpu, tp, count)
    layer = layer + 2 * all_reduce_s(link, tp, count * model.hidden_size * FP16_BYTES)
    return np.where(count > 0, layer, 0.0)


def fc_s(model: ModelSpec, gpu: GpuSpec, link: LinkSpec, tp: int, tokens: ArrayLike) -> Array:
    """Work of all layers of a dense model outside attention (``costs/experts.py`` has the one for all models)."""
    return model.layers_count * dense_layer_s(model, gpu, link, tp, tokens)


def head_s(model: ModelSpec, gpu: GpuSpec, tp: int, rows: ArrayLike) -> Array:
    """Language-model head for ``rows`` tokens that need logits; 0 for none."""
    count = np.asarray(rows, dtype=float)
    return np.where(count > 0, linear_s(model, gpu, count, model.hidden_size, model.vocab_size / tp), 0.0)


def all_reduce_s(link: LinkSpec, tp: int, message_bytes: ArrayLike) -> Array:
    """Ring all-reduce: 2 (tp - 1) / tp of the message over each link, plus one latency (Patarasuk & Yuan, 2009)."""
    message = np.asarray(message_bytes, dtype=float)
    if tp == 1:
        return np.zeros_like(message)
    wire = 2 * (tp - 1) / tp * message / (link.bytes_per_s * link.utilisation_frac)
    return link.latency_s + wire


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
    c f + c (c + 1) / 2 pairs."""
    wider = gpu.prefill_latent_utilisation_frac if model.mla is not None else 0.0
    return pair_s(model, gpu, tp, wider or gpu.prefill_utilisation_frac)


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
    return max(kv_read_s(model, gpu, tp, gpu.decode_utilisation_frac), query_tokens * compute)


def decode_waves_per_request(model: ModelSpec, gpu: GpuSpec, tp: int) -> float:
    """Share of the multiprocessors that one request's KV heads occupy, one block a head; 0 without waves."""
    return max(model.stored_form.kv_heads_count / tp, 1) / gpu.sm_count if gpu.sm_count else 0.0
