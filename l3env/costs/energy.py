"""Energy per operation, as coefficients (joules per token, pair or byte). Sources of the values: the presets.

Dynamic energy only; static power is charged by time. Compute is counted per multiply-accumulate, memory per byte
moved through HBM and caches (AttAcc's accounting; its I/O slip of bits for bytes is not copied).
"""

from __future__ import annotations

import numpy as np

from l3env.costs.gpu import linear_flop_and_bytes, linear_shapes
from l3env.costs.link import decode_request_bytes
from l3env.specs import GpuSpec, ModelSpec, SystemSpec
from l3env.units import FP16_BYTES


def gpu_byte_j(gpu: GpuSpec) -> float:
    """A byte from HBM through the caches to the registers."""
    return gpu.hbm_j_per_byte + gpu.cache_j_per_byte


def fc_j(model: ModelSpec, gpu: GpuSpec, tp: int) -> tuple[float, float]:
    """(per batch, per token) energy of the linear layers of all GPUs of a replica: weights once, the rest by token."""
    at = np.array([0.0, 1.0])
    energy = np.zeros(2)
    for k, n in linear_shapes(model, tp):
        flop, moved = linear_flop_and_bytes(model, at, k, n)
        energy += flop / 2 * gpu.mac_j + moved * gpu_byte_j(gpu)
    energy *= model.layers_count * tp
    return float(energy[0]), float(energy[1] - energy[0])


def all_reduce_token_j(system: SystemSpec, model: ModelSpec, tp: int) -> float:
    """Interconnect energy per token: two ring all-reduces a layer, 2 (tp - 1) messages over a link each."""
    message = model.hidden_size * FP16_BYTES
    return 2 * model.layers_count * 2 * (tp - 1) * message * system.gpu_link.j_per_byte


def attention_pair_j(model: ModelSpec, mac_j: float) -> float:
    """Multiply-accumulates of one (query, key) pair over all heads and layers: score and context."""
    return 2 * model.layers_count * model.heads_count * model.head_size * mac_j


def hbm_token_j(model: ModelSpec, gpu: GpuSpec) -> float:
    """Decode attention on the GPU per KV token."""
    return model.kv_bytes_per_token * gpu_byte_j(gpu) + attention_pair_j(model, gpu.mac_j)


def pim_token_j(system: SystemSpec, model: ModelSpec) -> float:
    """Decode attention beside memory per KV token: cell reads plus multiply-accumulates."""
    assert system.pim is not None
    return model.kv_bytes_per_token * system.pim.cell_j_per_byte + attention_pair_j(model, system.pim.mac_j)


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
    pim = system.pim.static_power_w / (system.gpus_count / tp) if system.pim is not None else 0.0
    return tp * system.gpu.idle_power_w + pim
