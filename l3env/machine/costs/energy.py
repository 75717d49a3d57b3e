"""Energy per operation, as coefficients (joules per token, pair or byte). Sources of the values: the presets.

Dynamic energy only; static power is charged by time. Compute is counted per multiply-accumulate, memory per byte
moved through HBM and caches (AttAcc's accounting; its I/O slip of bits for bytes is not copied). A GPU whose watts were
measured also draws power for being busy and keeps to its power limit (``machine.price.gpu_busy_j``).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from l3env.machine.costs.gpu import attention_shapes, ffn_shapes, linear_flop_and_bytes, linear_shapes, speedup
from l3env.machine.costs.link import decode_request_bytes
from l3env.machine.costs.pim import fetched_bytes
from l3env.machine.specs import AttentionForm, ExpertParallelSpec, GpuSpec, ModelSpec, SystemSpec
from l3env.units import FP16_BYTES

Array = NDArray[np.float64]


def gpu_byte_j(gpu: GpuSpec) -> float:
    """A byte from HBM through the caches to the registers."""
    return gpu.hbm_j_per_byte + gpu.cache_j_per_byte


def product_mac_j(model: ModelSpec, gpu: GpuSpec) -> float:
    """A multiply-accumulate of the model's matrix products."""
    return gpu.fp8_mac_j or gpu.mac_j if speedup(model, gpu) > 1 else gpu.mac_j


def linear_j(model: ModelSpec, gpu: GpuSpec, tokens: Array, k: float | Array, n: float | Array) -> Array:
    """Energy of (tokens, k) x (k, n) products."""
    flop, moved = linear_flop_and_bytes(model, tokens, k, n)
    return flop / 2 * product_mac_j(model, gpu) + moved * gpu_byte_j(gpu)


def fc_j(model: ModelSpec, gpu: GpuSpec, tp: int, experts: ExpertParallelSpec | None = None) -> tuple[float, float]:
    """(per batch, per token) energy of the linear layers of all GPUs of a replica: weights once, the rest by token."""
    dense = shapes_j(model, gpu, linear_shapes(model, tp)) * tp * (model.layers_count - model.moe_layers_count)
    if model.moe is not None:
        dense += moe_layer_j(model, gpu, experts, tp) * model.moe_layers_count
    return float(dense[0]), float(dense[1])


def shapes_j(model: ModelSpec, gpu: GpuSpec, shapes: list[tuple[float, float]]) -> Array:
    """(per batch, per token) energy of linear operations on one GPU."""
    energy = np.zeros(2)
    for k, n in shapes:
        energy += linear_j(model, gpu, np.array([0.0, 1.0]), k, n)
    return np.array([energy[0], energy[1] - energy[0]])


def moe_layer_j(model: ModelSpec, gpu: GpuSpec, experts: ExpertParallelSpec | None, tp: int) -> Array:
    """(per batch, per token) energy of a layer with experts over all GPUs of a replica.

    All experts there are read once a batch: right where a batch hits most of them, too much for a few tokens.
    """
    assert model.moe is not None
    rest = shapes_j(model, gpu, [*attention_shapes(model, tp), (model.hidden_size, model.moe.experts_count / tp)]) * tp
    each = shapes_j(model, gpu, ffn_shapes(model, model.moe.expert_ffn_size))
    held = model.moe.experts_count if experts is None else tp * experts.slots_count / experts.ranks_count
    active = model.moe.chosen_count + model.moe.shared_count
    return rest + np.array([(held + model.moe.shared_count) * each[0], active * each[1]])


def all_reduce_token_j(system: SystemSpec, model: ModelSpec, tp: int) -> float:
    """Interconnect energy per token: two ring all-reduces a layer, 2 (tp - 1) messages over a link each."""
    message = model.hidden_size * FP16_BYTES
    return 2 * model.layers_count * 2 * (tp - 1) * message * system.gpu_link.j_per_byte


def attention_pair_j(model: ModelSpec, mac_j: float, form: AttentionForm | None = None) -> float:
    """Multiply-accumulates of one (query, key) pair over all heads and layers: score and context."""
    return model.layers_count * (form or model.naive_form).macs_per_pair * mac_j


def hbm_token_j(model: ModelSpec, gpu: GpuSpec) -> float:
    """Decode attention on the GPU per KV token."""
    pair_j = attention_pair_j(model, gpu.mac_j, model.stored_form)
    return model.kv_bytes_per_token * gpu_byte_j(gpu) + pair_j


def pim_token_j(system: SystemSpec, model: ModelSpec, form: AttentionForm | None = None) -> float:
    """Decode attention beside memory per KV token: cell reads, as often as fetched, plus multiply-accumulates.

    Fetches beyond the first of a row come from its open row buffer: charged as the cell's, an upper bound.
    """
    assert system.pim is not None
    each = form or model.stored_form
    read = fetched_bytes(system.pim, model, each)
    return read * system.pim.cell_j_per_byte + attention_pair_j(model, system.pim.mac_j, each)


def transfer_byte_j(system: SystemSpec) -> float:
    """A byte from HBM over the link and through the memory's pins; 0 where the PIM memory is the GPU's own."""
    if system.pim is None or system.pim_link is None:
        return 0.0
    return system.gpu.hbm_j_per_byte + system.pim_link.j_per_byte + system.pim.io_j_per_byte


def decode_transfer_j(system: SystemSpec, model: ModelSpec) -> float:
    """Transfers of one decoding request in one step."""
    return decode_request_bytes(model) * transfer_byte_j(system)


def static_power_w(system: SystemSpec, tp: int) -> float:
    """Idle power of one replica's GPUs and of its share of the PIM memory."""
    pim = system.pim.static_power_w / (system.host_gpus_count / tp) if system.pim is not None else 0.0
    return tp * system.gpu.idle_power_w + pim


def gpu_busy_w(gpu: GpuSpec, tp: int) -> tuple[float, float]:
    """(drawn for being busy, the most with all work) of one replica's GPUs above their idle power; 0 where the GPU's
    spec has no such part."""
    if gpu.busy_power_w == 0:
        return 0.0, 0.0
    return tp * (gpu.busy_power_w - gpu.idle_power_w), tp * (gpu.power_w - gpu.idle_power_w)
