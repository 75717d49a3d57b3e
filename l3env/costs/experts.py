"""Layers with experts: which are hit, how long the slowest rank computes, what tokens cost on the way (DeepSeekMoE).

Every replica has the same batch, so a group of ``ranks`` GPUs routes ``ranks / tp`` batches at once. Experts are hit
independently and equally often; what is unequal is in one factor, the imbalance between ranks, which
``experiments/deepseek/router.py`` simulates.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from l3env.costs.gpu import (
    Array,
    all_reduce_s,
    attention_shapes,
    dense_layer_s,
    elementwise_layer_s,
    ffn_shapes,
    head_s,
    linears_s,
    matmul_compute_s,
    memory_s,
    overlap_s,
    speedup,
)
from l3env.specs import ExpertParallelSpec, GpuSpec, LinkSpec, ModelSpec, MoeSpec, SystemSpec
from l3env.units import FP8_BYTES, FP16_BYTES

FP8_SCALE_BYTES = 4 / 128  # per element: a 32-bit scale for 128 of them (arXiv 2412.19437, section 3.3.2)


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
    total = np.zeros_like(tokens)
    for k, n in ffn_shapes(model, ffn_size):
        compute = matmul_compute_s(gpu, rows, k, n * hit) / speedup(model, gpu)
        moved = hit * k * n * model.bytes_per_parameter + pairs * (k + n) * FP16_BYTES
        total = total + gpu.linear_launch_s + overlap_s(gpu, compute, memory_s(gpu, moved))
    return np.where(tokens > 0, total, 0.0)


def moe_layer_s(
    model: ModelSpec, gpu: GpuSpec, link: LinkSpec, experts: ExpertParallelSpec | None, tp: int, tokens: ArrayLike
) -> Array:
    """Computing of one layer with experts outside attention; the all-to-all apart. 0 for 0 tokens.

    With expert parallelism the ``tp`` GPUs of a replica split its tokens between them outside attention (sequence
    parallel: arXiv 2412.19437, section 3.4) and join them in one all-reduce a layer.
    """
    assert model.moe is not None
    moe, count = model.moe, np.asarray(tokens, dtype=float)
    own = count if experts is None else count / tp
    shared_size = moe.shared_count * moe.expert_ffn_size / (tp if experts is None else 1)
    shapes = [(float(model.hidden_size), float(moe.experts_count))]
    if shared_size > 0 and not (experts and experts.shared_is_routed):
        shapes += ffn_shapes(model, shared_size)
    inner_size = (moe.chosen_count + moe.shared_count) * moe.expert_ffn_size / tp
    layer = linears_s(model, gpu, count, attention_shapes(model, tp)) + linears_s(model, gpu, own, shapes)
    layer = layer + elementwise_layer_s(model, gpu, tp, count, inner_size) + routed_s(model, gpu, experts, tp, count)
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
    token_bytes = model.hidden_size * (FP8_BYTES + FP8_SCALE_BYTES + FP16_BYTES)
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
