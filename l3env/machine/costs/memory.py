"""What weights and activations take, and what is left for KV."""

from __future__ import annotations

from l3env.errors import SpecError
from l3env.machine.specs import ModelSpec, SystemSpec
from l3env.units import FP16_BYTES, GB


def weight_bytes(model: ModelSpec) -> float:
    """All weights of the model, once."""
    return model.parameters_count * model.bytes_per_parameter


def replica_weight_bytes(system: SystemSpec, model: ModelSpec, tp: int) -> float:
    """Weights that the ``tp`` GPUs of one replica hold.

    All of the model; with expert parallelism each GPU holds its slots of routed experts, and the replica the rest.
    """
    if model.moe is None or system.experts is None:
        return weight_bytes(model)
    slots = tp * system.experts.slots_count / system.experts.ranks_count
    shared = 0 if system.experts.shared_is_routed else model.moe.shared_count
    dense = (model.layers_count - model.moe_layers_count) * model.layer_parameters_count
    routers = model.moe_layers_count * model.moe_layer_parameters_count(shared)
    routed = model.moe_layers_count * slots * model.expert_parameters_count
    return (dense + routers + routed + model.embedding_parameters_count) * model.bytes_per_parameter


def kv_copies_count(model: ModelSpec, tp: int) -> float:
    """How often a token's KV lies in HBM: KV heads fewer than ``tp`` are replicated."""
    return max(tp / model.stored_form.kv_heads_count, 1.0)


def activation_bytes(model: ModelSpec, tp: int, tokens: int) -> float:
    """Peak activations on one GPU for a batch of ``tokens``: residual and normed input, plus the widest intermediate.

    The widest is the larger of QKV and the FFN's inner activations (gate and up where gated), divided over ``tp``; of
    experts, what a token's chosen ones take.
    """
    naive = model.naive_form
    qkv = (naive.query_elements + naive.stored_elements) / tp
    inner = (2 if model.gated_ffn else 1) * model.ffn_size / tp
    if model.moe is not None:
        chosen = model.moe.chosen_count + model.moe.shared_count
        inner = max(inner, chosen * (model.hidden_size + 2 * model.moe.expert_ffn_size) / tp)
    return tokens * (2 * model.hidden_size + max(qkv, inner)) * FP16_BYTES


def _given_bytes(system: SystemSpec, model: ModelSpec, tp: int) -> float:
    """What a GPU gives to weights, activations, KV: all but the runtime's share, or what the serving engine takes."""
    memory = system.serving.memory
    if memory is None:
        return system.gpu.hbm_bytes - system.gpu.reserved_bytes
    logits = memory.logit_bytes * system.serving.max_num_seqs * model.vocab_size / tp
    return memory.utilisation_frac * memory.usable_frac * system.gpu.hbm_bytes - memory.runtime_bytes - logits


def free_hbm_bytes(system: SystemSpec, model: ModelSpec, tp: int) -> float:
    """HBM of one replica's ``tp`` GPUs that weights, activations and the runtime leave.

    Raises:
        SpecError: the model does not fit.
    """
    tokens = system.serving.max_num_batched_tokens or system.max_batched_tokens
    per_gpu = _given_bytes(system, model, tp) - activation_bytes(model, tp, tokens)
    left = tp * per_gpu - replica_weight_bytes(system, model, tp)
    if left < 0:
        raise SpecError(
            f"{model.name} does not fit on {tp} x {system.gpu.name}: weights and activations need "
            f"{(tp * system.gpu.hbm_bytes - left) / GB:.0f} GB of {tp * system.gpu.hbm_bytes / GB:.0f} GB; "
            "raise the tensor-parallel degree"
        )
    return left
