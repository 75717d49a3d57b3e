"""Decode attention beside memory: DIMM-PIM, rank-PIM, HBM-PIM and the host CPU.

Placement (arXiv 2504.17584, sections 4-5).

* MHA: a head fills a rank and a request's heads spread over all ranks: every rank has the same load. One lane and one
  pool.
* GQA: a request's layer sits in one rank, its KV in one channel. Its layers go over the R ranks of the channel in turn,
  requests staggered, so at every layer requests of equal stagger share a rank. Channels x R lanes, one pool a channel.
* HBM-PIM and the host CPU spread every request evenly: one lane, one pool.

A lane is what computes serially: an iteration waits for its slowest lane. In DIMM ranks its time is linear in tokens
and requests, with coefficients fitted to the command-level simulator (``l3env/machine/dimm``); elsewhere it is linear
in tokens, in closed form.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from l3env.errors import SpecError
from l3env.machine.dimm.stored import load_fit
from l3env.machine.specs import AttentionForm, ModelSpec, PimSpec
from l3env.units import FP16_BYTES

SAME_SPEED_FRAC = 1e-3  # a fit is of a memory, and holds for no other: ranks that differ by less are the same


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
    if is_dimm(pim) and pim.fit is None:
        warnings.warn(f"{pim.name}: no fit is named, so attention in its ranks follows the closed form", stacklevel=2)
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


def compute_passes(pim: PimSpec, model: ModelSpec, form: AttentionForm | None = None, query_tokens: int = 1) -> int:
    """How often each element must be fetched: ceil(N_gqa / N_cmr) (arXiv 2504.17584, section 5, T_comp).

    N_cmr counts 16-bit elements: smaller ones come more to a fetch and share its multiply-accumulates. Several query
    tokens of a request are as many more queries.
    """
    queries = query_tokens * (form or model.stored_form).queries_per_kv_head
    return math.ceil(queries * FP16_BYTES / (pim.macs_per_element_count * model.bytes_per_kv_element))


def fetched_bytes(pim: PimSpec, model: ModelSpec, form: AttentionForm | None = None, query_tokens: int = 1) -> float:
    """Bytes of one KV token that the PUs fetch in a step, all layers: keys and values once per pass.

    A latent is fetched as key and as value (arXiv 2405.04434: the value is part of the key).
    """
    each = form or model.stored_form
    elements = each.kv_heads_count * (each.key_size + each.value_size)
    passes = compute_passes(pim, model, each, query_tokens)
    return model.layers_count * elements * passes * model.bytes_per_kv_element


def stream_token_s(
    pim: PimSpec,
    model: ModelSpec,
    lane_bytes_per_s: float,
    form: AttentionForm | None = None,
    query_tokens: int = 1,
) -> float:
    """Closed form, per KV token resident in a lane, all layers: its K and V streamed once per pass.

    Cross-chip movement of scores is hidden behind computing (bubble-free pipelining; T_comm <= T_comp holds for the
    N_hc the paper uses: 8 for MHA, 1 for GQA-8).
    """
    return fetched_bytes(pim, model, form, query_tokens) / lane_bytes_per_s


@dataclass(frozen=True)
class RankModel:
    """The fitted kind of attention that a model has in a rank, at this PIM's speed.

    Attributes:
        streaming_frac: share of the rank's raw bandwidth that streams KV, for long contexts.
        job_s, batch_s: per layer: each job, and filling and draining the pipeline once.
        heads_per_job_count: KV heads of one request that a rank works on at once.
    """

    streaming_frac: float
    job_s: float
    batch_s: float
    heads_per_job_count: int


def rank_model(pim: PimSpec, model: ModelSpec) -> RankModel | None:
    """Looks up the fit that the PIM names; None where there is none: not DIMM ranks of 8 x 16 banks, heads not 128 x 16
    bit, or an N_gqa that was not fitted. Another N_cmr scales all times alike.

    Raises:
        SpecError: the fit is of a memory of another speed.
    """
    fit = load_fit(pim.fit) if is_dimm(pim) and pim.fit else None
    if fit is not None and abs(rank_bytes_per_s(pim) / fit.rank_bytes_per_s - 1) > SAME_SPEED_FRAC:
        raise SpecError(
            f"{pim.name}: fit = {pim.fit!r} is of {fit.pim}, whose ranks stream {fit.rank_bytes_per_s:.4g} bytes/s; "
            f"these stream {rank_bytes_per_s(pim):.4g}: expected a fit of this memory (l3env.experiments.fit_pim makes "
            "one), or none, for the closed form"
        )
    kind = fit.find(model.gqa_group_count) if fit else None
    known = (pim.chips_per_rank_count, pim.banks_per_chip_count, model.head_size, model.bytes_per_kv_element)
    if model.mla is not None or fit is None or kind is None or known != (8, 16, 128, FP16_BYTES):
        return None
    job_token_bytes = kind.heads_per_job_count * 2 * model.head_size * FP16_BYTES
    slower = fit.rank_bytes_per_s / rank_bytes_per_s(pim) * compute_passes(pim, model) / kind.passes_count
    return RankModel(
        streaming_frac=job_token_bytes * kind.passes_count / (kind.token_s * fit.rank_bytes_per_s),
        job_s=kind.job_s * slower,
        batch_s=kind.batch_s * slower,
        heads_per_job_count=kind.heads_per_job_count,
    )


def rank_bytes_per_s(pim: PimSpec) -> float:
    """What one rank's PUs stream with rows open."""
    return pim.internal_bytes_per_s / (pim.channels_count * pim.ranks_per_channel_count)


def lane_token_s(pim: PimSpec, model: ModelSpec, lane_bytes_per_s: float) -> float:
    """Decode attention per KV token resident in a lane, all layers: the fit's slope, else the closed form."""
    closed_s = stream_token_s(pim, model, lane_bytes_per_s)
    fitted = rank_model(pim, model)
    return closed_s if fitted is None else closed_s * pim.internal_utilisation_frac / fitted.streaming_frac


def verify_token_s(pim: PimSpec, model: ModelSpec, lane_bytes_per_s: float) -> float:
    """As ``lane_token_s`` with two query tokens of each request at once: more passes where one query fills the PUs."""
    once = fetched_bytes(pim, model)
    return lane_token_s(pim, model, lane_bytes_per_s) * fetched_bytes(pim, model, query_tokens=2) / once


def lane_request_s(pim: PimSpec, model: ModelSpec, lane_bytes_per_s: float) -> float:
    """Decode attention per request in a lane, all layers, whatever its length: query, output, rows half full.

    With MHA a request's heads spread over the lane's ranks: each gets its share, on average over layers and requests.
    """
    fitted = rank_model(pim, model)
    if fitted is None:
        return 0.0
    ranks = lane_bytes_per_s / (rank_bytes_per_s(pim) * pim.internal_utilisation_frac)
    jobs = model.kv_heads_count / fitted.heads_per_job_count
    if model.gqa_group_count > 1:
        jobs = math.ceil(jobs)
    return model.layers_count * jobs / ranks * fitted.job_s


def batch_s(pim: PimSpec, model: ModelSpec) -> float:
    """Filling and draining the pipeline of a rank, once per layer and sub-batch."""
    fitted = rank_model(pim, model)
    return 0.0 if fitted is None else model.layers_count * fitted.batch_s
