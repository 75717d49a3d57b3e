"""Decode attention beside memory: DIMM-PIM, rank-PIM, HBM-PIM and the host CPU, in closed form.

Placement (arXiv 2504.17584, sections 4-5).

* MHA: a head fills a rank and a request's heads spread over all ranks: every rank has the same load. One lane and one
  pool.
* GQA: a request's layer sits in one rank, its KV in one channel. Its layers go over the R ranks of the channel in turn,
  requests staggered, so at every layer requests of equal stagger share a rank. Channels x R lanes, one pool a channel.
* HBM-PIM and the host CPU spread every request evenly: one lane, one pool.

A lane is what computes serially: an iteration waits for its slowest lane.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from l3env.errors import SpecError
from l3env.specs import ModelSpec, PimSpec


@dataclass(frozen=True)
class Layout:
    """How one replica's requests spread over its share of the PIM memory.

    Attributes:
        lane_pool: pool of each lane, counted from 0 within PIM.
        pool_bytes: capacity of each pool.
        lane_bytes_per_s: what one lane streams of KV, row switches and refresh included.
    """

    lane_pool: tuple[int, ...]
    pool_bytes: tuple[float, ...]
    lane_bytes_per_s: float

    @property
    def lanes_count(self) -> int:
        return len(self.lane_pool)

    @property
    def pools_count(self) -> int:
        return len(self.pool_bytes)


def is_dimm(pim: PimSpec) -> bool:
    """Is the KV laid out over DIMM ranks (rather than spread evenly)?"""
    return pim.kind in ("dimm-bank", "dimm-rank")


def layout(pim: PimSpec, model: ModelSpec, replicas_count: int) -> Layout:
    """The share of one of ``replicas_count`` equal replicas ("replicas share the PIM memory equally").

    Raises:
        SpecError: the channels of a DIMM system do not divide by the replicas.
    """
    bandwidth = pim.internal_bytes_per_s * pim.internal_utilisation_frac / replicas_count
    capacity = pim.capacity_bytes / replicas_count
    if not is_dimm(pim):
        return Layout((0,), (capacity,), bandwidth)
    if pim.channels_count % replicas_count:
        raise SpecError(
            f"{pim.name}: {pim.channels_count} channels cannot be shared equally by {replicas_count} replicas; "
            "choose a tensor-parallel degree whose replica count divides the channels"
        )
    channels = pim.channels_count // replicas_count
    staggers = pim.ranks_per_channel_count
    if model.gqa_group_count == 1:
        return Layout((0,), (capacity,), bandwidth)
    lane_pool = tuple(channel for channel in range(channels) for _ in range(staggers))
    return Layout(lane_pool, (capacity / channels,) * channels, bandwidth / (channels * staggers))


def compute_passes(pim: PimSpec, model: ModelSpec) -> int:
    """How often each element must be fetched: ceil(N_gqa / N_cmr) (arXiv 2504.17584, section 5, T_comp)."""
    return math.ceil(model.gqa_group_count / pim.macs_per_element_count)


def lane_token_s(pim: PimSpec, model: ModelSpec, lane_bytes_per_s: float) -> float:
    """Decode attention per KV token resident in a lane, all layers: its K and V streamed once per pass.

    Cross-chip movement of scores is hidden behind computing (bubble-free pipelining; T_comm <= T_comp holds for the
    N_hc the paper uses: 8 for MHA, 1 for GQA-8).
    """
    return model.kv_bytes_per_token * compute_passes(pim, model) / lane_bytes_per_s
