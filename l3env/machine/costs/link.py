"""Transfers between the GPUs and the PIM side: bytes and times."""

from __future__ import annotations

from l3env.machine.costs.pim import is_dimm
from l3env.machine.specs import AttentionForm, ModelSpec, SystemSpec
from l3env.units import FP16_BYTES


def decode_request_bytes(model: ModelSpec, form: AttentionForm | None = None) -> float:
    """Per decoding request and step: Q and new KV to the memory, the attention output back; all layers.

    ``form`` is that of the KV in the memory, by default as the model stores it.
    """
    each = form or model.stored_form
    q_and_output = model.layers_count * (each.query_elements + each.output_elements) * FP16_BYTES
    return q_and_output + model.form_bytes_per_token(each)


def transfer_bytes_per_s(system: SystemSpec, tp: int) -> float:
    """One replica's bandwidth to its PIM share: its GPUs' links in sum, no more than its DIMM channels."""
    assert system.pim is not None
    assert system.pim_link is not None
    replicas = max(system.host_gpus_count // tp, 1)
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
