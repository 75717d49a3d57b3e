"""State of one rank and its commands: rows, the command bus, the external data bus, refresh.

A function issues its commands at the earliest cycle that DDR4's constraints (JESD79-4) and the slots of the command bus
allow, given all commands issued before it. Regular runs of columns or bursts are one event: nothing can happen inside.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from l3env.jit import inner


class Command(IntEnum):
    ACT = 0
    PRE = 1
    REF = 2
    MAC = 3  # PIM_MAC, this bank's part of the broadcast: reads a column
    RD_RB = 4  # PIM_RD_RB: 8 B of results per chip to the rank PU
    WR_SB = 5  # PIM_WR_SB: 8 B per chip into the shared buffers
    LD_SB = 6  # PIM_LD_SB: operands from the shared buffer into the bank PUs
    WR_R = 7  # PIM_WR_R: the host writes the rank PU's registers, on the channel
    RD = 8  # a column to the rank's bus (rank-level PUs)


class Bus(IntEnum):
    READ = 0
    WRITE = 1


# Cycles of the command bus kept for runs: phase and period. Single commands take any free cycle of the others.
MAC_PHASE, MAC_PERIOD = 0, 8
BURST_PHASE, BURST_PERIOD = 1, 4
COMMAND_WINDOW = 1 << 16  # how far apart commands on the bus may be while being scheduled
LONG_AGO = -(1 << 30)

STATE_DTYPE = np.dtype(
    [(name, np.int64) for name in ("last_act", "act_2", "act_3", "act_4", "last_load")]
    + [(name, np.int64) for name in ("bus_last", "bus_kind", "resume", "refresh_due", "refreshes", "trace_rows")]
    + [(name, np.int64) for name in ("columns", "bursts", "activations")]
    # what has been issued, counted in tiles and jobs: K and V passes, score reads, probability writes, ...
    + [(name, np.int64) for name in ("k_tiles", "v_tiles", "r_tiles", "w_tiles")]
    + [(name, np.int64) for name in ("q_jobs", "k_jobs", "v_jobs", "o_jobs")]
    # and in bursts of the transfer under way
    + [(name, np.int64) for name in ("q_bursts", "w_bursts", "r_bursts", "o_bursts")]
)
BANK_DTYPE = np.dtype([(name, np.int64) for name in ("open", "act", "pre", "pre_ok", "column", "group_act")])
TILE_DTYPE = np.dtype(
    [(name, np.int64) for name in ("tokens", "job", "first", "last", "read", "written", "v_gate", "v_done")]
)
JOB_DTYPE = np.dtype([(name, np.int64) for name in ("q_done", "k_done", "v_done", "o_done")])
TRACE_DTYPE = np.dtype([(name, np.int64) for name in ("cycle", "command", "bank", "count", "stride")])
RING = 4  # tiles and jobs in flight


class Machine(NamedTuple):
    state: NDArray[np.void]  # (1,)
    bank: NDArray[np.void]  # (B,); bank b is in group b % groups
    k_first: NDArray[np.int64]  # (2, B) first column of a score pass, by parity of the tile
    tile: NDArray[np.void]  # (RING,)
    job: NDArray[np.void]  # (RING,)
    taken: NDArray[np.int64]  # (COMMAND_WINDOW,) cycles taken by single commands
    trace: NDArray[np.void]  # (rows,) runs of commands; as many as fit


def machine(banks: int, trace_rows: int, refresh_due: int) -> Machine:
    """A rank with all rows closed and nothing in flight."""
    state = np.zeros(1, STATE_DTYPE)
    for name in ("last_act", "act_2", "act_3", "act_4", "last_load", "bus_last"):
        state[name] = LONG_AGO
    state["refresh_due"] = refresh_due
    bank = np.zeros(banks, BANK_DTYPE)
    for name in ("act", "pre", "pre_ok", "column", "group_act"):
        bank[name] = LONG_AGO
    tile, job = np.zeros(RING, TILE_DTYPE), np.zeros(RING, JOB_DTYPE)
    taken = np.full(COMMAND_WINDOW, -1, np.int64)
    return Machine(state, bank, np.zeros((2, banks), np.int64), tile, job, taken, np.zeros(trace_rows, TRACE_DTYPE))


@inner
def slot(cycle, phase, period):
    """The first cycle of a slot, not before ``cycle``."""
    return cycle + (phase - cycle) % period


@inner
def command_cycle(m, cycle):
    """Takes the first free cycle of the command bus, not before ``cycle``, for a single command."""
    while (
        cycle % MAC_PERIOD == MAC_PHASE
        or cycle % BURST_PERIOD == BURST_PHASE
        or m.taken[cycle % COMMAND_WINDOW] == cycle
    ):
        cycle += 1
    m.taken[cycle % COMMAND_WINDOW] = cycle
    return cycle


@inner
def record(m, cycle, command, bank, count, stride):
    row = m.state[0]["trace_rows"]
    if row < m.trace.shape[0]:
        m.trace[row]["cycle"] = cycle
        m.trace[row]["command"] = command
        m.trace[row]["bank"] = bank
        m.trace[row]["count"] = count
        m.trace[row]["stride"] = stride
    m.state[0]["trace_rows"] = row + 1


@inner
def close_row(p, m, b):
    """PRE, if a row is open: tRAS after ACT, tRTP after the last column."""
    bank = m.bank[b]
    if bank["open"]:
        cycle = command_cycle(m, bank["pre_ok"])
        record(m, cycle, Command.PRE, b, 1, 0)
        bank["open"], bank["pre"] = 0, cycle


@inner
def open_row(p, m, b):
    """ACT of the next row: tRP, tRC, tRRD_S and _L, tFAW, refresh."""
    close_row(p, m, b)
    st, bank, group = m.state[0], m.bank[b], b % p.groups
    cycle = max(bank["pre"] + p.rp, bank["act"] + p.rc, st["last_act"] + p.rrd_s)
    cycle = max(cycle, m.bank[group]["group_act"] + p.rrd_l, st["act_4"] + p.faw, st["resume"])
    cycle = command_cycle(m, cycle)
    record(m, cycle, Command.ACT, b, 1, 0)
    st["act_4"], st["act_3"], st["act_2"], st["last_act"] = st["act_3"], st["act_2"], st["last_act"], cycle
    m.bank[group]["group_act"] = cycle
    bank["open"], bank["act"], bank["pre_ok"] = 1, cycle, cycle + p.ras
    st["activations"] += 1


@inner
def multiply(p, m, b, columns, gate, idle_columns):
    """A bank's PIM_MACs over its open row, from ``gate`` on and after ``idle_columns`` slots of its PU's own work.

    Returns the cycle of its result.
    """
    st, bank = m.state[0], m.bank[b]
    own = max(bank["column"] + p.ccd_l, gate) + idle_columns * p.ccd_l
    first = slot(max(bank["act"] + p.rcd, own, st["resume"]), MAC_PHASE, MAC_PERIOD)
    last = first + (columns - 1) * p.ccd_l
    record(m, first, Command.MAC, b, columns, p.ccd_l)
    bank["column"] = last
    bank["pre_ok"] = max(bank["act"] + p.ras, last + p.rtp)
    st["columns"] += columns
    return last + p.result


@inner
def bus_start(p, m, kind, ready):
    """Where a run of bursts would start: bursts of one direction each tCCD_S, turning round between directions.

    Read to write: CL + BL + 2 - WL; write to read: WL + BL + tWTR_L (JESD79-4).
    """
    st = m.state[0]
    if st["bus_kind"] == kind:
        free = st["bus_last"] + p.ccd_s
    elif kind == Bus.WRITE:
        free = st["bus_last"] + p.cl + p.bl + 2 - p.wl
    else:
        free = st["bus_last"] + p.wl + p.bl + p.wtr_l
    return slot(max(free, ready, st["resume"]), BURST_PHASE, BURST_PERIOD)


@inner
def move(p, m, kind, bank, count, ready):
    """A run of bursts between the rank PU and the chips. Returns when its data has arrived."""
    st = m.state[0]
    first = bus_start(p, m, kind, ready)
    record(m, first, Command.RD_RB if kind == Bus.READ else Command.WR_SB, bank, count, p.ccd_s)
    st["bus_last"], st["bus_kind"] = first + (count - 1) * p.ccd_s, kind
    st["bursts"] += count
    return st["bus_last"] + p.bl + (p.cl if kind == Bus.READ else p.wl)


@inner
def load_operands(p, m, ready):
    """PIM_LD_SB. Returns when the bank PUs have their operands: one column time later."""
    st = m.state[0]
    cycle = command_cycle(m, max(ready, st["resume"]))
    record(m, cycle, Command.LD_SB, -1, 1, 0)
    st["last_load"] = cycle
    return cycle + p.ccd_l


@inner
def refresh_is_due(p, m, now):
    """Are enough REFs owed?"""
    return p.refi > 0 and now >= m.state[0]["refresh_due"] + (p.refresh_postponed - 1) * p.refi


@inner
def columns_end(p, m):
    """The cycle of the last column read so far."""
    now = m.state[0]["resume"]
    for b in range(p.banks):
        now = max(now, m.bank[b]["column"])
    return now


@inner
def refresh(p, m, now):
    """All rows are closed, the buses drain, and all REFs owed at ``now`` are issued."""
    st = m.state[0]
    owed = (now - st["refresh_due"]) // p.refi + 1
    ready = max(st["resume"], st["last_load"] + p.ccd_l)
    ready = max(ready, st["bus_last"] + p.bl + (p.cl if st["bus_kind"] == Bus.READ else p.wl))
    for b in range(p.banks):
        close_row(p, m, b)
        ready = max(ready, m.bank[b]["pre"] + p.rp)
    first = command_cycle(m, ready)
    stride = slot(p.rfc, 0, MAC_PERIOD)
    record(m, first, Command.REF, -1, owed, stride)
    st["resume"] = first + (owed - 1) * stride + p.rfc
    st["refresh_due"] += owed * p.refi
    st["refreshes"] += owed


@inner
def refresh_if_due(p, m):
    """At the end of a pass, with nothing else under way."""
    now = columns_end(p, m)
    if refresh_is_due(p, m, now):
        refresh(p, m, now)
