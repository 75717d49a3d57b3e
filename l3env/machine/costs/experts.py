"""Layers with experts: which are hit, how long the slowest rank computes, what tokens cost on the way (DeepSeekMoE).

Every replica has the same batch, so a group of ``ranks`` GPUs routes ``ranks / tp`` batches at once. Experts are hit
independently and equally often; what is unequal is in one factor, the imbalance between ranks, which
``experiments/reproduce/deepseek_router.py`` simulates.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from l3env.machine.costs.gpu import (
    FP8_SCALE_BYTES,
    Array,
    all_reduce_s,
    attention_elementwise_bytes,
    attention_shapes,
    dense_layer_s,
    elementwise_s,
    ffn_elementwise_bytes,
    ffn_shapes,
    head_s,
    latent_extra_s,
    linears_s,
    matmul_compute_s,
    product_s,
    speedup,
    streaming_s,
)
from l3env.machine.specs import ExpertParallelSpec, GpuSpec, LinkSpec, ModelSpec, MoeSpec, SystemSpec
from l3env.units import FP8_BYTES, FP16_BYTES

DISPATCHED_BYTES = FP8_BYTES + FP8_SCALE_BYTES  # per element; combined in 16 bit (arXiv 2412.19437, section 3.4)
DISPATCH_FRAC = DISPATCHED_BYTES / (DISPATCHED_BYTES + FP16_BYTES)  # of an all-to-all's time


def hit_count(slots: float, chosen: float, all_slots: float, tokens: ArrayLike) -> Array:
    """Expected slots, of ``slots``, that get at least one of ``tokens`` tokens, each choosing ``chosen`` of all."""
    count = np.asarray(tokens, dtype=float)
    return slots * -np.expm1(count * np.log1p(-chosen / all_slots))


def routed_experts(moe: MoeSpec, experts: ExpertParallelSpec | None) -> tuple[int, int]:
    """(chosen per token, slots) of what is routed: the shared expert among them where it has slots of its own."""
    if experts is None:
        return moe.chosen_count, moe.experts_count
    return moe.chosen_count + (moe.shared_count if experts.shared_is_routed else 0), experts.slots_count


def routed_s(model: ModelSpec, gpu: GpuSpec, experts: ExpertParallelSpec | None, tp: int, tokens: Array) -> Array:
    """The routed experts of one layer on the slowest GPU, as grouped matrix products: up, down; 0 for 0 tokens.

    Without expert parallelism each of the ``tp`` GPUs holds its share of every expert.
    """
    assert model.moe is not None
    chosen, slots = routed_experts(model.moe, experts)
    if experts is None:
        mine, ffn_size, group_tokens, pairs = float(slots), model.moe.expert_ffn_size / tp, tokens, chosen * tokens
    else:
        mine, ffn_size = slots / experts.ranks_count, float(model.moe.expert_ffn_size)
        group_tokens = tokens * experts.ranks_count / tp
        pairs = chosen * tokens / tp * (1 + experts.imbalance_frac)
    hit = hit_count(mine, chosen, slots, group_tokens)
    rows = np.divide(pairs, hit, out=np.zeros_like(pairs), where=hit > 0)
    return np.where(tokens > 0, grouped_s(model, gpu, hit, rows, pairs, ffn_size, chosen * group_tokens), 0.0)


def expert_gpu(model: ModelSpec, gpu: GpuSpec) -> GpuSpec:
    """The GPU as kernels for experts reach it, in the model's precision."""
    if speedup(model, gpu) > 1:
        return replace(
            gpu,
            fp8_utilisation_frac=gpu.fp8_expert_utilisation_frac or gpu.fp8_utilisation_frac,
            memory_utilisation_frac=gpu.fp8_expert_memory_utilisation_frac or gpu.memory_utilisation_frac,
            expert_launch_s=gpu.fp8_expert_launch_s,
            expert_row_moves=gpu.fp8_expert_row_moves,
            expert_token_moves=gpu.fp8_expert_token_moves,
        )
    return replace(
        gpu,
        compute_utilisation_frac=gpu.expert_utilisation_frac or gpu.compute_utilisation_frac,
        memory_utilisation_frac=gpu.expert_memory_utilisation_frac or gpu.memory_utilisation_frac,
    )


def grouped_s(
    model: ModelSpec, gpu: GpuSpec, hit: Array, rows: Array, pairs: Array, ffn_size: float, group_pairs: Array
) -> Array:
    """Grouped products of ``hit`` experts: up, down.

    Args:
        rows: tokens of an expert that is hit, on average.
        pairs: tokens of all of them.
        ffn_size: inner size of an expert on this GPU.
        group_pairs: tokens of all ranks' experts, which kernels that do not sort them out first go through.
    """
    kernels = expert_gpu(model, gpu)
    moved_bytes = kernels.expert_token_moves * group_pairs * model.hidden_size * FP16_BYTES
    total = kernels.expert_launch_s + moved_bytes / gpu.hbm_bytes_per_s
    for k, n in ffn_shapes(model, ffn_size):
        compute = matmul_compute_s(model, kernels, rows, k, n * hit, grouped=True)
        weight_bytes = hit * k * n * model.bytes_per_parameter
        total = total + product_s(model, kernels, compute, weight_bytes, pairs * k, pairs * n)
        total = total + kernels.expert_row_moves * pairs * (k + n) * FP16_BYTES / gpu.hbm_bytes_per_s
    return total


def expert_products_s(
    model: ModelSpec, gpu: GpuSpec, experts: ExpertParallelSpec | None, tp: int, tokens: Array
) -> Array:
    """Router, shared and routed experts of one layer on the slowest GPU.

    With expert parallelism the ``tp`` GPUs of a replica split its tokens between them outside attention (sequence
    parallel: arXiv 2412.19437, section 3.4).
    """
    assert model.moe is not None
    moe, own = model.moe, tokens if experts is None else tokens / tp
    shared_size = moe.shared_count * moe.expert_ffn_size / (tp if experts is None else 1)
    shapes = [(float(model.hidden_size), float(moe.experts_count))]
    if shared_size > 0 and not (experts and experts.shared_is_routed):
        shapes += ffn_shapes(model, shared_size)
    return linears_s(model, gpu, own, shapes) + routed_s(model, gpu, experts, tp, tokens)


def expert_elementwise_bytes(model: ModelSpec, gpu: GpuSpec, experts: ExpertParallelSpec | None, tp: int) -> float:
    """Bytes per token of the small operations around a layer's experts on one GPU.

    Those of an FFN; the sum of the shared expert's output and the routed ones'; and where tokens come once per GPU (not
    through low-latency kernels, which deliver them by expert and sum them on the way back), every row copied to its
    expert's rows and the results summed: read and written once each.
    """
    assert model.moe is not None
    moe = model.moe
    moved = ffn_elementwise_bytes(model, gpu, (moe.chosen_count + moe.shared_count) * moe.expert_ffn_size / tp)
    moved += 3 * model.hidden_size * FP16_BYTES if moe.shared_count else 0.0
    if experts is None or experts.by_node:
        rows = moe.chosen_count / (1 if experts is None else tp)
        row_bytes = FP8_BYTES + FP8_SCALE_BYTES if speedup(model, gpu) > 1 else FP16_BYTES
        moved += 2 * rows * model.hidden_size * (row_bytes + FP16_BYTES)
    return moved


def moe_layer_s(
    model: ModelSpec, gpu: GpuSpec, link: LinkSpec, experts: ExpertParallelSpec | None, tp: int, tokens: ArrayLike
) -> Array:
    """Computing of one layer with experts outside attention; the all-to-all apart. 0 for 0 tokens.

    With expert parallelism one all-reduce a layer joins the tokens that the GPUs of a replica split.
    """
    count = np.asarray(tokens, dtype=float)
    layer = linears_s(model, gpu, count, attention_shapes(model, tp)) + expert_products_s(
        model, gpu, experts, tp, count
    )
    token_bytes = attention_elementwise_bytes(model, gpu, tp) + expert_elementwise_bytes(model, gpu, experts, tp)
    layer = layer + elementwise_s(gpu, count, token_bytes) + latent_extra_s(model, gpu, tp, count)
    reduces = 2 if experts is None else 1
    layer = layer + reduces * all_reduce_s(link, tp, count * model.hidden_size * FP16_BYTES)
    return np.where(count > 0, layer, 0.0)


def token_copies(moe: MoeSpec, experts: ExpertParallelSpec, host_gpus_count: int) -> tuple[float, float]:
    """(over the network, over the GPU link) copies of a token that leave its GPU for its experts' GPUs, on average.

    Straight: one per expert, to the hosts they lie on. By node: one per distinct other host (no more than the routing
    allows), each then sent on to the experts' GPUs over the link.
    """
    chosen, _ = routed_experts(moe, experts)
    nodes = max(experts.ranks_count / host_gpus_count, 1.0)
    if not experts.by_node:
        return chosen * (1 - 1 / nodes), chosen * (1 / nodes) * (1 - 1 / host_gpus_count)
    distinct = min(nodes * (1 - (1 - 1 / nodes) ** chosen), float(experts.most_nodes_count))
    return distinct * (1 - 1 / nodes), chosen * (1 - 1 / host_gpus_count)


def all_to_all_s(system: SystemSpec, model: ModelSpec, tp: int, tokens: ArrayLike) -> Array:
    """Dispatch (FP8 with scales) and combine (16 bit) of one layer: the slower of network and GPU link; 0 without.

    The fullest rank receives (1 + imbalance) times the mean, and sends as much back.
    """
    count = np.asarray(tokens, dtype=float)
    experts = system.experts
    if model.moe is None or experts is None:
        return np.zeros_like(count)
    token_bytes = model.hidden_size * (DISPATCHED_BYTES + FP16_BYTES)
    network, local = token_copies(model.moe, experts, system.host_gpus_count)
    sent = count / tp * (1 + experts.imbalance_frac) * token_bytes
    rates = [each.bytes_per_s * each.utilisation_frac for each in (experts.network, system.gpu_link)]
    wire_s = np.maximum(sent * network / rates[0], sent * local / rates[1])
    return np.where(count > 0, wire_s + 2 * experts.network.latency_s, 0.0)


def fc_and_all_to_all_s(system: SystemSpec, model: ModelSpec, tp: int, tokens: ArrayLike) -> tuple[Array, Array]:
    """(work, all-to-all) of all layers outside attention for a batch; 0 for 0 tokens.

    The all-to-all is part of the work unless two micro-batches hide it behind each other's computing (arXiv 2412.19437,
    section 3.4): then each half of the batch reads the weights once more, and an iteration takes the longer of work and
    all-to-all.
    """
    count = np.asarray(tokens, dtype=float)
    parts = system.experts.micro_batches_count if model.moe is not None and system.experts is not None else 1
    dense = model.layers_count - model.moe_layers_count
    work = dense * dense_layer_s(model, system.gpu, system.gpu_link, tp, count / parts)
    if model.moe is None:
        return work, np.zeros_like(work)
    work = work + model.moe_layers_count * moe_layer_s(
        model, system.gpu, system.gpu_link, system.experts, tp, count / parts
    )
    sending = model.moe_layers_count * all_to_all_s(system, model, tp, count / parts)
    if parts == 1:
        return work + sending, np.zeros_like(work)
    return parts * work, parts * sending


def phase_s(system: SystemSpec, model: ModelSpec, tp: int, tokens: ArrayLike) -> Array:
    """The experts' part of the work of ``fc_and_all_to_all_s`` where two micro-batches take turns at attention and
    experts (``beside_s``); 0 elsewhere."""
    count = np.asarray(tokens, dtype=float)
    experts = system.experts
    if model.moe is None or experts is None or not experts.overlap_by_phase:
        return np.zeros_like(count)
    half = count / experts.micro_batches_count
    layer = expert_products_s(model, system.gpu, experts, tp, half)
    layer = layer + streaming_s(system.gpu, half * expert_elementwise_bytes(model, system.gpu, experts, tp))
    return np.where(count > 0, experts.micro_batches_count * model.moe_layers_count * layer, 0.0)


def beside_s(work_s: float, experts_s: float, comm_s: float, dispatch_frac: float, comm_sm_frac: float) -> float:
    """GPU time of a batch in two micro-batches that hide each other's all-to-all, all layers.

    While the all-to-all runs it takes a share of the multiprocessors, so work beside it takes that share of its time
    longer. Finely interleaved (``dispatch_frac`` 0; decode in five stages) the longer of both counts. Taking turns, one
    dispatches beside the other's attention, computes its experts beside the other's dispatch, combines beside the
    other's experts, and attends again beside the other's combine: the longer counts in each of these four phases
    (DeepSeek's open-infra overview of day 6, prefill).

    Args:
        work_s: attention and all else; ``experts_s`` of it are the experts' phases.
    """
    if dispatch_frac == 0:
        return max(work_s + comm_sm_frac * comm_s, comm_s)
    total_s = 0.0
    for part_s in (experts_s, work_s - experts_s):
        for sent_s in (dispatch_frac * comm_s, (1 - dispatch_frac) * comm_s):
            total_s += max(part_s + comm_sm_frac * sent_s, sent_s) / 2
    return total_s


def draft_s(system: SystemSpec, model: ModelSpec, tp: int, tokens: ArrayLike) -> Array:
    """Guessing one more token for each of ``tokens`` requests, outside attention.

    The module of arXiv 2412.19437, section 2.2: a projection of the hidden state and the embedding side by side, one
    layer like the last ones, the head.
    """
    count = np.asarray(tokens, dtype=float)
    if model.draft_modules_count == 0:
        return np.zeros_like(count)
    total = linears_s(model, system.gpu, count, [(2 * model.hidden_size, model.hidden_size / tp)])
    if model.moe is None:
        total = total + dense_layer_s(model, system.gpu, system.gpu_link, tp, count)
    else:
        total = total + moe_layer_s(model, system.gpu, system.gpu_link, system.experts, tp, count)
        total = total + all_to_all_s(system, model, tp, count)
    return np.where(count > 0, total + head_s(model, system.gpu, tp, count), 0.0)
