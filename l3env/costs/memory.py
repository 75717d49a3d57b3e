"""What weights and activations take, and what is left for KV."""

from __future__ import annotations

from l3env.errors import SpecError
from l3env.specs import ModelSpec, SystemSpec
from l3env.units import FP16_BYTES, GB


def weight_bytes(model: ModelSpec) -> float:
    """All weights of one replica."""
    return model.parameters_count * model.bytes_per_parameter


def activation_bytes(model: ModelSpec, tp: int, tokens: int) -> float:
    """Peak activations on one GPU for a batch of ``tokens``: residual and normed input, plus the widest intermediate.

    The widest is the larger of QKV and the FFN's inner activations (gate and up where gated), divided over ``tp``.
    """
    qkv = (model.heads_count + 2 * model.kv_heads_count) * model.head_size / tp
    inner = (2 if model.gated_ffn else 1) * model.ffn_size / tp
    return tokens * (2 * model.hidden_size + max(qkv, inner)) * FP16_BYTES


def free_hbm_bytes(system: SystemSpec, model: ModelSpec, tp: int) -> float:
    """HBM of one replica's ``tp`` GPUs that weights, activations and the runtime leave.

    Raises:
        SpecError: the model does not fit.
    """
    per_gpu = system.gpu.hbm_bytes - system.gpu.reserved_bytes
    left = tp * (per_gpu - activation_bytes(model, tp, system.max_batched_tokens)) - weight_bytes(model)
    if left < 0:
        raise SpecError(
            f"{model.name} does not fit on {tp} x {system.gpu.name}: weights and activations need "
            f"{(tp * system.gpu.hbm_bytes - left) / GB:.0f} GB of {tp * system.gpu.hbm_bytes / GB:.0f} GB; "
            "raise the tensor-parallel degree"
        )
    return left
