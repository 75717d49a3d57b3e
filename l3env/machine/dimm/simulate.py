"""Runs the simulator: a setup and the lengths of the jobs, in; seconds, counts and the command trace, out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l3env.errors import SpecError
from l3env.machine.dimm.bank_level import attend_pipelined, attend_serial
from l3env.machine.dimm.bus import Command, machine
from l3env.machine.dimm.rank_level import attend_rank
from l3env.machine.dimm.setup import RankSetup, params
from l3env.units import FP16_BYTES


@dataclass(frozen=True)
class Outcome:
    """What one run took.

    Attributes:
        seconds: from the first command to the last result in the rank PU, the host's rewriting included.
        cycles: the same without the host's rewriting, in clock cycles.
        columns_count: column reads of all banks (of one chip; the others do the same).
        bursts_count: external bursts between rank PU and chips.
        activations_count, refreshes_count: ACT and REF commands.
        trace: runs of commands (TRACE_DTYPE) in the order issued, not of time; empty unless asked for.
    """

    seconds: float
    cycles: int
    columns_count: int
    bursts_count: int
    activations_count: int
    refreshes_count: int
    trace: NDArray[np.void]


def simulate(
    setup: RankSetup, lengths: Sequence[int] | NDArray[np.int64], *, trace_rows: int = 0, refresh_due: int | None = None
) -> Outcome:
    """Decode attention of one layer in one rank.

    Args:
        lengths: KV tokens of each job. A job is ``setup.heads_per_job`` KV heads of one request.
        trace_rows: room for the command trace, in runs.
        refresh_due: cycle at which the first REF is due, by default one tREFI after the start.

    Raises:
        SpecError: a length below 1, or no room for the trace.
    """
    tokens = np.asarray(lengths, dtype=np.int64)
    if tokens.ndim != 1 or tokens.size == 0 or tokens.min() < 1:
        raise SpecError(f"lengths = {lengths!r}: expected at least one job of at least one token")
    p = params(setup)
    due = setup.dram.refi_cycles if refresh_due is None else refresh_due
    m = machine(p.banks, trace_rows, due)
    if not setup.bank_level:
        cycles = attend_rank(p, m, tokens)
    elif setup.pipelined:
        cycles = attend_pipelined(p, m, tokens)
    else:
        cycles = attend_serial(p, m, tokens)
    state = m.state[0]
    rows = int(state["trace_rows"])
    if 0 < trace_rows < rows:
        raise SpecError(f"trace_rows = {trace_rows}: the run has {rows}")
    seconds = cycles * setup.dram.tck_s
    if not setup.hardware_relayout:
        seconds += host_relayout_s(setup, len(tokens))
    return Outcome(
        seconds=float(seconds),
        cycles=int(cycles),
        columns_count=int(state["columns"]),
        bursts_count=int(state["bursts"]),
        activations_count=int(state["activations"]),
        refreshes_count=int(state["refreshes"]),
        trace=m.trace[: rows if trace_rows else 0],
    )


def job_transfer_bytes(setup: RankSetup) -> int:
    """Q, new K, new V and output of one job, one decode step."""
    return 2 * (setup.queries_per_kv_head + 1) * setup.head_size * FP16_BYTES * setup.heads_per_job


def host_relayout_s(setup: RankSetup, jobs: int) -> float:
    """The host reads and rewrites what is transferred, for all ranks of a channel, before and after attention.

    Every rank of a layer gets as much; they share one channel, and the last one waits for all.
    """
    channel_bytes_per_s = setup.chips * setup.dram.column_bytes / (setup.dram.bl_cycles * setup.dram.tck_s)
    return 2 * jobs * job_transfer_bytes(setup) * setup.ranks_per_channel / channel_bytes_per_s


def expand(trace: NDArray[np.void]) -> NDArray[np.int64]:
    """(N, 3) single commands (cycle, command, bank) in order of time."""
    counts = trace["count"]
    which = np.repeat(np.arange(len(trace)), counts)
    step = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = trace[which]
    single = np.stack([rows["cycle"] + step * rows["stride"], rows["command"], rows["bank"]], axis=1)
    return single[np.lexsort((single[:, 2], single[:, 0]))]


__all__ = ["Command", "Outcome", "RankSetup", "expand", "host_relayout_s", "job_transfer_bytes", "simulate"]
