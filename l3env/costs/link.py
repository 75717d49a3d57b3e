"""Transfers between the GPUs and the PIM side: bytes and times."""

from __future__ import annotations

from l3env.costs.pim import is_dimm
from l3env.specs import ModelSpec, SystemSpec
from l3env.units import FP16_BYTES


def decode_request_bytes(model: ModelSpec) -> float:
    """Per decoding request and step: Q and new K, V to the memory, the attention output back; all layers."""
    q_and_output = 2 * model.layers_count * model.heads_count * model.head_size * FP16_BYTES
    return q_and_output + model.kv_bytes_per_token


def transfer_bytes_per_s(system: SystemSpec, tp: int) -> float:
    """One replica's bandwidth to its PIM share: its GPUs' links in sum, no more than its DIMM channels."""
    assert system.pim is not None
    assert system.pim_link is not None
    replicas = system.gpus_count // tp
    links = tp * system.pim_link.bytes_per_s * system.pim_link.utilisation_frac
    if not (is_dimm(system.pim) or system.pim.kind == "host-cpu"):
        return links
    return min(links, system.pim.channels_count * system.pim.channel_bytes_per_s / replicas)


def exposed_transfer_frac(system: SystemSpec) -> float:
    """Share of transfer time during which a given rank cannot compute.

    A transfer fills all channel buses through one rankset; with rankset overlap the others go on computing, so each
    rank is blocked for 1 / ranksets of the transfers (arXiv 2504.17584, section 4: -75 % with 4 ranksets). Otherwise
    every transfer blocks all ranks.
    """
    assert system.pim is not None
    return 1 / system.pim.ranks_per_channel_count if system.pim.rankset_overlap else 1.0
