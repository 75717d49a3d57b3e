"""One rank as simulated: geometry, layout of K and V in rows, what the processing units can do.

From arXiv 2504.17584 (sections 2 and 4): a processing unit (PU) beside every bank that reads one 8-byte column per chip
each tCCD_L; a shared buffer per chip; a rank PU on the buffer chip that adds partial scores, does the softmax by chunks
and rearranges bits; ``N_hc`` chips a head; ``N_cmr`` multiply-accumulates per element fetched; adder tree for scores,
accumulators for the context. The rest is assumed here, and follows from it as said:

* **A tile** is what one row in every bank holds of K: 64 N_hc tokens of a head (16 banks x 1 KiB / (256 B / N_hc)), and
  as many of V. The next tile is in other rows, so each pass over a tile opens one row per bank.
* **K**: a token's slice of E_h / N_hc elements lies in one bank, tokens dealt to the banks in turn. The query is
  the same for all banks (one copy in the shared buffer), the adder tree sums a column's 4 products, and every bank
  makes whole (per chip) scores.
* **V**: a column holds 4 elements of one token, as in K; a token's slice lies across the banks, so that the
  probabilities are the same for the banks that share tokens (the shared buffer's purpose) and each bank accumulates few
  elements. Where a slice has fewer columns than there are banks, bank sets take tokens in turn and the rank PU adds
  their outputs.
* **Chips in lockstep**: all get the same commands. A rank works on ``N_chips / N_hc`` heads of one request at once;
  where a layer has fewer KV heads, a head's tokens are split over the spare chips.
* **Buffers** are double: result registers and probabilities in the shared buffer hold two tiles, queries and
  accumulators two jobs. Scores are read while a pass makes them, and a context pass may begin before the last of its
  probabilities is there, as long as none comes late.
* **Command bus**: one command a cycle. PIM_MAC is broadcast on every eighth cycle (tCCD_L), and every bank whose row is
  open takes part (score or context as its row says); bursts have every fourth (tCCD_S); others take what is free.
* **Refresh**: all banks, at the end of a pass, postponed up to 4 tREFI and then issued together (JESD79-4 allows 8);
  nothing else happens during tRFC.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from l3env.errors import SpecError
from l3env.machine import specs
from l3env.machine.specs import DramSpec
from l3env.units import FP16_BYTES


def ddr4() -> DramSpec:
    return specs.load("dram/ddr4-3200")


@dataclass(frozen=True, kw_only=True)
class RankSetup:
    """What one rank is and does.

    Attributes:
        queries_per_kv_head: N_gqa.
        macs_per_element: N_cmr.
        chips_per_head: N_hc; only for bank-level PUs.
        token_split: chips (groups of N_hc) over which the tokens of one head are split.
        bank_level: PUs beside every bank, or on the rank's buffer chip only.
        pipelined: internal and external buses at once, tile by tile; or score, softmax, context one after the other.
        hardware_relayout: the rank PU rearranges what passes; or the host reads and rewrites it (both directions).
        host_input: Q comes over the channel while attention runs (PIM_WR_R); or is there at the start.
        refresh: issue REF.
        ranks_per_channel: ranks that share the channel when the host rearranges data of all of them.
        softmax_cycles: latency of the rank PU from the last score of a tile to its probabilities (assumed: 40 ns).
        result_cycles: latency of a bank PU from its last column to its result (assumed: one column time).
        refresh_postponed: REFs issued together at least.
    """

    dram: DramSpec = field(default_factory=ddr4)
    chips: int = 8
    head_size: int = 128
    queries_per_kv_head: int = 1
    macs_per_element: int = 8
    chips_per_head: int = 8
    token_split: int = 1
    bank_level: bool = True
    pipelined: bool = True
    hardware_relayout: bool = True
    host_input: bool = True
    refresh: bool = True
    ranks_per_channel: int = 4
    softmax_cycles: int = 64
    result_cycles: int = 8
    refresh_postponed: int = 4

    def __post_init__(self) -> None:
        if self.chips % (self.chips_per_head * self.token_split):
            raise SpecError(
                f"chips_per_head = {self.chips_per_head}, token_split = {self.token_split}: "
                f"expected a product that divides {self.chips} chips"
            )

    @property
    def passes(self) -> int:
        """How often each column is fetched: ceil(N_gqa / N_cmr)."""
        return math.ceil(self.queries_per_kv_head / self.macs_per_element)

    @property
    def heads_per_job(self) -> int:
        """KV heads that the rank works on at once; on rank-level PUs one after the other."""
        return self.chips // (self.chips_per_head * self.token_split) if self.bank_level else 1

    @property
    def bus_bytes_per_s(self) -> float:
        """B_rk: the rank's bus, one burst of all chips each tCCD_S."""
        return self.chips * self.dram.column_bytes / (self.dram.ccd_s_cycles * self.dram.tck_s)

    @property
    def bank_bytes_per_s(self) -> float:
        """B_bk: one bank PU of one chip, a column each tCCD_L."""
        return self.dram.column_bytes / (self.dram.ccd_l_cycles * self.dram.tck_s)

    @property
    def chips_per_head_bound(self) -> float:
        """Largest N_hc with T_comm <= T_comp (arXiv 2504.17584, section 4)."""
        units = self.bank_bytes_per_s * self.dram.banks_count * self.queries_per_kv_head * self.chips
        return self.head_size * self.bus_bytes_per_s * self.passes / units


def best_mapping(queries_per_kv_head: int, kv_heads: int, macs_per_element: int = 8, chips: int = 8) -> tuple[int, int]:
    """(N_hc, token_split) of a layer.

    N_hc is the largest power of two up to half the bound: the paper's 8 for MHA and 1 for GQA-8; it leaves the bus room
    for queries, outputs and turning round. Where the KV heads are then too few for the chips, N_hc goes up to the bound
    before tokens are split: each split needs the queries and makes partial outputs of its own.
    """
    setup = RankSetup(chips=chips, queries_per_kv_head=queries_per_kv_head, macs_per_element=macs_per_element)
    bound = setup.chips_per_head_bound

    def power_of_two(most: float) -> int:
        return int(min(chips, max(1, 2 ** math.floor(math.log2(most) + 1e-9))))

    chips_per_head = power_of_two(bound / 2)
    if kv_heads * chips_per_head < chips:
        chips_per_head = min(power_of_two(bound), chips // power_of_two(kv_heads))
    return chips_per_head, max(1, chips // (chips_per_head * power_of_two(kv_heads)))


class Params(NamedTuple):
    """A setup as kernels take it: cycles and counts."""

    banks: int
    groups: int
    bl: int
    ccd_s: int
    ccd_l: int
    rrd_s: int
    rrd_l: int
    faw: int
    rcd: int
    ras: int
    rp: int
    rc: int
    cl: int
    wl: int
    wtr_l: int
    rtp: int
    refi: int  # 0: no refresh
    rfc: int
    refresh_postponed: int
    passes: int
    queries: int
    token_split: int
    tile_tokens: int  # per chip
    k_columns: int  # of a token in its bank
    v_columns: int  # of a token in each of its banks
    v_banks: int  # banks that a token of V lies in
    scores_per_burst: int  # of one chip
    query_bursts: int  # rank PU to shared buffers, per job
    output_bursts: int  # result registers to rank PU, per job
    host_bursts: int  # channel to rank PU, per job; 0: Q is there
    rescale_columns: int  # PU slots to rescale the accumulators when the running maximum changes
    softmax: int
    result: int


def params(setup: RankSetup) -> Params:
    d = setup.dram
    element = FP16_BYTES
    per_column = d.column_bytes // element
    chips_per_head = setup.chips_per_head if setup.bank_level else setup.chips  # plain DIMMs: a burst of all chips
    slice_columns = max(1, setup.head_size // chips_per_head // per_column)
    v_banks = min(d.banks_count, slice_columns)
    v_columns = slice_columns // v_banks
    queries = setup.queries_per_kv_head
    partial_sets = d.banks_count // v_banks
    heads = setup.heads_per_job
    host = setup.head_size * queries * element * heads // (setup.chips * d.column_bytes)
    return Params(
        banks=d.banks_count,
        groups=d.bank_groups_count,
        bl=d.bl_cycles,
        ccd_s=d.ccd_s_cycles,
        ccd_l=d.ccd_l_cycles,
        rrd_s=d.rrd_s_cycles,
        rrd_l=d.rrd_l_cycles,
        faw=d.faw_cycles,
        rcd=d.rcd_cycles,
        ras=d.ras_cycles,
        rp=d.rp_cycles,
        rc=d.rc_cycles,
        cl=d.cl_cycles,
        wl=d.wl_cycles,
        wtr_l=d.wtr_l_cycles,
        rtp=d.rtp_cycles,
        refi=d.refi_cycles if setup.refresh else 0,
        rfc=d.rfc_cycles,
        refresh_postponed=setup.refresh_postponed,
        passes=setup.passes,
        queries=queries,
        token_split=setup.token_split,
        tile_tokens=d.banks_count * d.row_bytes // (slice_columns * d.column_bytes),
        k_columns=slice_columns,
        v_columns=v_columns,
        v_banks=v_banks,
        scores_per_burst=per_column,
        query_bursts=queries * slice_columns,
        output_bursts=queries * slice_columns * partial_sets,
        host_bursts=host if setup.host_input else 0,
        rescale_columns=v_columns * setup.passes,
        softmax=setup.softmax_cycles,
        result=setup.result_cycles,
    )
