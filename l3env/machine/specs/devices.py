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
    fp8_mac_j: Annotated[NotNegative, "one of matrix products in 8 bit; 0: as 16 bit"] = 0.0
    hbm_j_per_byte: NotNegative
    cache_j_per_byte: Annotated[NotNegative, "L2 + L1 + register file, per byte streamed through"]
    busy_power_w: Annotated[
        NotNegative,
        "drawn while kernels run, idle power included, beside their work; power_w then bounds both; 0: none",
    ] = 0.0
    # linear operations
    sm_count: Annotated[Natural, Meta(le=10_000), "multiprocessors that tiles go over in waves; 0: no tiles"] = 0
    sm_bytes_per_s: Annotated[NotNegative, Meta(le=1e13), "operands that one of them takes in; 0: no limit"] = 0.0
    tile_start_s: Annotated[Seconds, "filling and draining a tile's pipeline"] = 0.0
    tile_wave_frac: Annotated[Share, "share of a last, partly filled wave that is waited for"] = 0.0
    split_s: Annotated[Seconds, "joining products split along their inner size"] = 0.0
    split_bytes_per_s: Annotated[NotNegative, Meta(le=1e15), "rate of its partial sums; 0: no splitting"] = 0.0
    roofline_exponent: Annotated[NotNegative, Meta(le=100.0), "p-norm of compute and memory time; 0: the larger"] = 0.0
    linear_launch_s: Annotated[Seconds, "per linear operation"] = 0.0
    sustained_slowdown_frac: Annotated[
        NotNegative, Meta(le=2.0), "longer that large products take under a lasting load, at the power limit"
    ] = 0.0
    prefill_slowdown_frac: Annotated[NotNegative, Meta(le=2.0), "the same of prefill attention, where measured"] = 0.0
    fp8_utilisation_frac: Annotated[Share, "of the FP8 FLOP/s; 0: as 16 bit"] = 0.0
    fp8_sm_bytes_per_s: Annotated[NotNegative, Meta(le=1e13), "FP8 operands that one takes in; 0: as 16 bit"] = 0.0
    block_launch_s: Annotated[Seconds, "more per FP8 product with scales for blocks: its input's scales"] = 0.0
    quantise_launch_s: Annotated[Seconds, "inputs of FP8 products with one scale: the largest value, then all"] = 0.0
    quantise_element_s: Annotated[Seconds, "per element of a row, one after the other"] = 0.0
    quantise_crowd_frac: Annotated[NotNegative, Meta(le=10.0), "more of that per 64 rows from 64 to 256"] = 0.0
    quantise_row_s: Annotated[Seconds, "per row"] = 0.0
    quantise_bytes_per_s: Annotated[NotNegative, Meta(le=1e14), "no less than its bytes at this rate; 0: free"] = 0.0
    elementwise_launch_s: Annotated[Seconds, "norms, RoPE, KV write, activation of a layer"] = 0.0
    elementwise_utilisation_frac: Annotated[Share, "of the bandwidth; 0: free"] = 0.0
    # routed experts of a layer, as grouped products
    expert_launch_s: Annotated[Seconds, "routing, sorting and joining, beside the products' launches"] = 0.0
    expert_utilisation_frac: Annotated[Share, "of the FLOP/s; 0: as linear operations"] = 0.0
    expert_memory_utilisation_frac: Annotated[Share, "of the bandwidth; 0: as linear operations"] = 0.0
    expert_row_moves: Annotated[NotNegative, Meta(le=100.0), "more times that experts' rows move"] = 0.0
    expert_token_moves: Annotated[NotNegative, Meta(le=100.0), "times that chosen rows of all ranks' tokens move"] = 0.0
    fp8_expert_launch_s: Annotated[Seconds, "in 8 bit"] = 0.0
    fp8_expert_row_moves: Annotated[NotNegative, Meta(le=100.0), "in 8 bit"] = 0.0
    fp8_expert_token_moves: Annotated[NotNegative, Meta(le=100.0), "in 8 bit"] = 0.0
    fp8_expert_utilisation_frac: Annotated[Share, "of the FP8 FLOP/s; 0: as linear operations"] = 0.0
    fp8_expert_memory_utilisation_frac: Annotated[Share, "of the bandwidth; 0: as linear operations"] = 0.0
    # attention of a batch in one layer
    attention_head_launch_frac: Annotated[float, Meta(ge=-1.0, le=1.0), "more launch per 128 of head size"] = 0.0
    prefill_launch_s: Seconds = 0.0
    prefill_utilisation_frac: Annotated[Share, "of the FLOP/s; 0: as linear operations"] = 0.0
    prefill_latent_utilisation_frac: Annotated[NotNegative, Meta(le=2.0), "MLA's wider keys; 0: as others"] = 0.0
    prefill_softmax_size: Annotated[NotNegative, Meta(le=1e4), "a pair's exponential costs this much head size"] = 0.0
    prefill_tile_rows: Annotated[Count, Meta(le=4_096), "queries of a tile: fewer cost as much"] = 1
    prefill_packs_heads: Annotated[bool, "a tile takes all query heads of a KV head"] = True
    prefill_splits_keys: Annotated[bool, "few tiles share long histories between multiprocessors"] = True
    prefill_tile_s: Annotated[Seconds, "beginning and end of a tile"] = 0.0
    prefill_tail_frac: Annotated[NotNegative, Meta(le=10.0), "share of the longest tile that is waited for"] = 0.0
    prefill_exponent: Annotated[NotNegative, Meta(le=100.0), "p-norm of work and longest tile; 0: the larger"] = 0.0
    prefill_kv_moves: Annotated[NotNegative, Meta(le=100.0), "times that new K and V move, beside computing"] = 0.0
    prefill_query_moves: Annotated[NotNegative, Meta(le=100.0), "the same of queries and outputs"] = 0.0
    decode_launch_s: Seconds = 0.0
    decode_split_s: Annotated[Seconds, "more where KV of 512 tokens and more is split between multiprocessors"] = 0.0
    decode_regroup_s: Annotated[Seconds, "more where several requests have shared KV heads"] = 0.0
    decode_utilisation_frac: Annotated[Share, "of the bandwidth; 0: as linear operations"] = 0.0
    decode_query_moves: Annotated[NotNegative, Meta(le=100.0), "times that queries and outputs move"] = 1.0
    decode_tile_s: Annotated[Seconds, "a (request, KV head) of size 128 on a multiprocessor, past the first each"] = 0.0
    decode_exponent: Annotated[NotNegative, Meta(le=100.0), "p-norm of reading and tiles; 0: the larger"] = 0.0
    decode_head_bytes_per_s: Annotated[NotNegative, Meta(le=1e13), "of heads with KV of their own, where not split"] = (
        0.0
    )
    decode_compute_utilisation_frac: Annotated[Share, "of the FLOP/s; 0: as linear ones"] = 0.0
    latent_decode_utilisation_frac: Annotated[Share, "of the bandwidth, for latents; 0: as others"] = 0.0
    latent_launch_s: Annotated[Seconds, "small kernels of a latent attention block: norms, absorbed products"] = 0.0
    latent_token_s: Annotated[Seconds, "and per new token: latents and their norms"] = 0.0
    latent_head_s: Annotated[Seconds, "and per new token and head: copies of queries, keys and values"] = 0.0
    # attention on KV of 8 bit
    fp8_kv_launch_s: Annotated[Seconds, "more launch"] = 0.0
    fp8_kv_prefill_utilisation_frac: Annotated[NotNegative, Meta(le=4.0), "of the 16-bit FLOP/s; 0: as 16 bit"] = 0.0
    fp8_kv_prefill_tile_s: Annotated[Seconds, "more for a tile"] = 0.0
    fp8_kv_decode_utilisation_frac: Annotated[Share, "of the bandwidth; 0: as 16 bit"] = 0.0
    fp8_kv_cache_bytes_per_s: Annotated[NotNegative, Meta(le=1e14), "of the L2 cache; 0: as 16 bit"] = 0.0
    # measurements that repeat on the same data; layers of a model evict each other
    cache_bytes: Annotated[NotNegative, Meta(le=1e10), "data of up to this size is read from the L2 cache"] = 0.0
    cache_bytes_per_s: Annotated[NotNegative, Meta(le=1e14), "at this rate"] = 0.0
    sources: Mapping[str, str] = field(default_factory=dict)

    def contradictions(self) -> list[str]:
        """What values say against each other."""
        exponents = {name: getattr(self, name) for name in ("roofline_exponent", "prefill_exponent", "decode_exponent")}
        problems = [f"{name} = {value}: expected 0 or >= 1" for name, value in exponents.items() if 0 < value < 1]
        beside = ("decode_split_s", "decode_regroup_s", "decode_head_bytes_per_s")
        if self.decode_tile_s == 0:
            problems += [f"{name} > 0: needs decode_tile_s" for name in beside if getattr(self, name) > 0]
        tiled = ("decode_tile_s", "prefill_tile_s", "prefill_tail_frac")
        if self.sm_count == 0:
            problems += [f"{name} > 0: needs sm_count" for name in tiled if getattr(self, name) > 0]
        if self.busy_power_w and not self.idle_power_w <= self.busy_power_w <= self.power_w:
            problems.append(f"busy_power_w = {self.busy_power_w}: expected 0 or from idle_power_w to power_w")
        return problems


@dataclass(frozen=True, kw_only=True)
class LinkSpec:
    """A link, one direction."""

    name: str
    bytes_per_s: Annotated[Positive, Meta(le=1e13)]
    utilisation_frac: Fraction
    latency_s: Annotated[Seconds, "per transfer (PCIe) or per all-reduce (GPU interconnect)"]
    hop_s: Annotated[Seconds, "more latency of an all-reduce per rank beyond two"] = 0.0
    one_shot_utilisation_frac: Annotated[
        Share, "of the rate at which each rank reads small messages of all others; 0: large and small go alike"
    ] = 0.0
    two_shot_s: Annotated[Seconds, "what large messages wait for in between: summed in parts, then shared"] = 0.0
    switch_utilisation_frac: Annotated[
        NotNegative, Meta(le=2.0), "of the rate from 8 ranks on, where switches sum up (NVLink SHARP); 0: as others"
    ] = 0.0
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
