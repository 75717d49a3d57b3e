"""Devices: GPUs, links, DRAM dies, and memory that computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

from l3env.machine.specs.fields import Count, Fraction, Natural, NotNegative, Positive, Seconds, Share


@dataclass(frozen=True, kw_only=True)
class GpuSpec:
    """One GPU. Data-sheet peaks; the share of them that is reached is in the utilisation fields.

    Without the fields that have defaults it is a plain roofline, the larger of compute and memory time. They are what a
    measured GPU adds, see ``costs/gpu.py``; ``l3env calibrate`` and ``experiments/gpu/fit.py`` fit them.
    """

    name: str
    fp16_flop_per_s: Annotated[Positive, Meta(le=1e17)]
    fp8_flop_per_s: Annotated[NotNegative, Meta(le=1e17), "for weights of 8 bit; 0: no faster than 16 bit"] = 0.0
    fp8_output_bytes_per_s: Annotated[NotNegative, Meta(le=1e14), "FP8 products' outputs follow at; 0: beside"] = 0.0
    hbm_bytes: Annotated[Positive, Meta(le=1e13)]
    hbm_bytes_per_s: Annotated[Positive, Meta(le=1e14)]
    compute_utilisation_frac: Fraction
    memory_utilisation_frac: Fraction
    reserved_bytes: Annotated[NotNegative, "CUDA context, libraries: never available to weights or KV"]
    power_w: Annotated[Positive, Meta(le=1e4)]
    idle_power_w: NotNegative
    mac_j: Annotated[NotNegative, "one multiply-accumulate"]
    hbm_j_per_byte: NotNegative
    cache_j_per_byte: Annotated[NotNegative, "L2 + L1 + register file, per byte streamed through"]
    # linear operations
    sm_count: Annotated[Natural, Meta(le=10_000), "multiprocessors that tiles go over in waves; 0: no tiles"] = 0
    tile_wave_frac: Annotated[Share, "share of a last, partly filled wave that is waited for"] = 0.0
    tile_ramp_frac: Annotated[NotNegative, Meta(le=10.0), "what a 128 x 128 tile takes longer for loading operands"] = (
        0.0
    )
    roofline_exponent: Annotated[NotNegative, Meta(le=100.0), "p-norm of compute and memory time; 0: the larger"] = 0.0
    linear_launch_s: Annotated[Seconds, "per linear operation"] = 0.0
    elementwise_launch_s: Annotated[Seconds, "norms, RoPE, KV write, activation of a layer"] = 0.0
    elementwise_utilisation_frac: Annotated[Share, "of the bandwidth; 0: free"] = 0.0
    # prefill attention of one request in one layer
    prefill_launch_s: Seconds = 0.0
    prefill_utilisation_frac: Annotated[Share, "of the FLOP/s; 0: as linear operations"] = 0.0
    prefill_latent_utilisation_frac: Annotated[Share, "MLA's wider keys; 0: as others"] = 0.0
    prefill_query_s: Annotated[Seconds, "per new token: the longest tile runs on alone"] = 0.0
    prefill_history_launch_s: Annotated[Seconds, "more where there is a history"] = 0.0
    prefill_tile_tokens: Annotated[float, Meta(ge=1.0, le=4096), "fewer new tokens cost as much on a history"] = 1.0
    prefill_chunk_ratio: Annotated[NotNegative, Meta(le=100.0), "new tokens' pairs cost this on a history"] = 1.0
    prefill_history_ratio: Annotated[NotNegative, Meta(le=100.0), "pairs of a new token with history cost this"] = 1.0
    # decode attention of a batch in one layer
    decode_launch_s: Seconds = 0.0
    decode_utilisation_frac: Annotated[Share, "of the bandwidth; 0: as linear operations"] = 0.0
    decode_tail_frac: Annotated[Share, "least share of a wave that a started one takes"] = 0.0
    decode_compute_utilisation_frac: Annotated[Share, "of the FLOP/s; 0: as linear ones"] = 0.0
    sources: Mapping[str, str] = field(default_factory=dict)

    def contradictions(self) -> list[str]:
        """What values say against each other."""
        problems = []
        if 0 < self.roofline_exponent < 1:
            problems.append(f"roofline_exponent = {self.roofline_exponent}: expected 0 or >= 1")
        if self.decode_tail_frac > 0 and self.sm_count == 0:
            problems.append("decode_tail_frac > 0: needs sm_count")
        return problems


@dataclass(frozen=True, kw_only=True)
class LinkSpec:
    """A link, one direction."""

    name: str
    bytes_per_s: Annotated[Positive, Meta(le=1e13)]
    utilisation_frac: Fraction
    latency_s: Annotated[Seconds, "per transfer (PCIe) or per all-reduce (GPU interconnect)"]
    j_per_byte: NotNegative
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DramSpec:
    """One DRAM die: its geometry, and timing constraints in clock cycles (names as in JESD79-4)."""

    name: str
    tck_s: Annotated[Positive, Meta(le=1e-6)]
    row_bytes: Count
    column_bytes: Annotated[Count, "what one column read delivers"]
    bank_groups_count: Annotated[Count, Meta(le=8)]
    banks_per_group_count: Annotated[Count, Meta(le=8)]
    bl_cycles: Annotated[Count, "data of one column on the pins"]
    ccd_s_cycles: Count
    ccd_l_cycles: Count
    rrd_s_cycles: Count
    rrd_l_cycles: Count
    faw_cycles: Count
    rcd_cycles: Count
    ras_cycles: Count
    rp_cycles: Count
    rc_cycles: Count
    cl_cycles: Count
    wl_cycles: Count
    wtr_s_cycles: Count
    wtr_l_cycles: Count
    wr_cycles: Count
    rtp_cycles: Count
    refi_cycles: Count
    rfc_cycles: Count
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def banks_count(self) -> int:
        return self.bank_groups_count * self.banks_per_group_count


@dataclass(frozen=True, kw_only=True)
class PimSpec:
    """Memory that holds KV and computes decode attention beside it, for one host.

    DIMM kinds are built from ranks: ``channels x ranks_per_channel`` ranks of ``chips_per_rank`` chips. HBM-PIM and
    the host CPU give their aggregate ``internal_bytes_per_s`` and one channel, one rank.
    """

    name: str
    kind: Literal["dimm-bank", "dimm-rank", "hbm-pim", "hbm-pim-ext", "host-cpu"]
    capacity_bytes: Annotated[Positive, Meta(le=1e16)]
    channels_count: Count
    ranks_per_channel_count: Count
    chips_per_rank_count: Count
    banks_per_chip_count: Count
    channel_bytes_per_s: Annotated[Positive, Meta(le=1e15), "external bus of one channel"]
    internal_bytes_per_s: Annotated[Positive, Meta(le=1e15), "sum over the host of what the PUs stream, rows open"]
    internal_utilisation_frac: Annotated[Fraction, "share left after row switches and refresh"]
    macs_per_element_count: Annotated[Count, "N_cmr: multiply-accumulates a PU does per element it fetches"]
    rankset_overlap: Annotated[bool, "a transfer blocks one rankset only"] = False
    holds_weights: Annotated[bool, "the capacity is the GPUs' own HBM"] = False
    cell_j_per_byte: NotNegative
    mac_j: NotNegative
    io_j_per_byte: Annotated[NotNegative, "a byte through the pins"]
    static_power_w: NotNegative
    fit: Annotated[
        str | None,
        "times of a rank, fitted to the command-level simulator with this memory's timings: pim_fit/NAME or a "
        "TOML file; without it attention in DIMM ranks follows the closed form",
    ] = None
    sources: Mapping[str, str] = field(default_factory=dict)
