"""Decode attention with PUs on the buffer chip only: K and V come over the rank's bus, a burst of all chips a tCCD_S.

Rows are those of plain DIMMs (8 KiB over 8 chips), consecutive bursts in different bank groups (tCCD_S instead of
tCCD_L), the next set of rows opened while one streams. A job is one KV head. Softmax is the same rank PU's: a tile of K
one ahead of V hides it.
"""

from __future__ import annotations

from l3env.jit import helper, kernel
from l3env.machine.dimm.bank_level import arrival, ceil_div
from l3env.machine.dimm.bus import BURST_PERIOD, BURST_PHASE, Command, open_row, record, refresh_if_due, slot


@helper
def read_set(p, m, number, bursts, gate):
    """One row in each bank group, ``bursts`` of them in turn, ``passes`` times; returns when the data has arrived."""
    st = m.state[0]
    refresh_if_due(p, m)
    base = number % (p.banks // p.groups) * p.groups
    used = min(bursts, p.groups)
    first = max(st["bus_last"] + p.ccd_s, gate, st["resume"])
    for i in range(used):
        open_row(p, m, base + i)
        first = max(first, m.bank[base + i]["act"] + p.rcd - i * p.ccd_s)
    for b in range(p.banks):  # the same bank group again: tCCD_L
        first = max(first, m.bank[b]["column"] + p.ccd_l - (b % p.groups) * p.ccd_s)
    first = slot(first, BURST_PHASE, BURST_PERIOD)
    stride = max(p.ccd_s * used, p.ccd_l)
    for i in range(used):
        count = ceil_div(bursts - i, p.groups) * p.passes
        bank = m.bank[base + i]
        cycle = first + i * p.ccd_s
        record(m, cycle, Command.RD, base + i, count, stride)
        bank["column"] = cycle + (count - 1) * stride
        bank["pre_ok"] = max(bank["act"] + p.ras, bank["column"] + p.rtp)
        st["bus_last"] = max(st["bus_last"], bank["column"])
        st["columns"] += count
    return st["bus_last"] + p.cl + p.bl


@kernel
def attend_rank(p, m, lengths):
    """All jobs as one stream of tiles, K one tile ahead of V. Returns the end."""
    set_bursts = p.groups * p.tile_tokens * p.k_columns // p.banks  # a row in every bank group
    tokens_per_set = set_bursts // p.k_columns
    number, bursts_before, ready, done = 0, 0, 0, 0
    for job in range(lengths.shape[0]):
        gate = arrival(p, m, job)
        for start in range(0, lengths[job], tokens_per_set):
            bursts = min(tokens_per_set, lengths[job] - start) * p.k_columns
            done = read_set(p, m, number, bursts, gate)
            number += 1
            if bursts_before > 0:  # V of the tile before
                done = read_set(p, m, number, bursts_before, ready)
                number += 1
                ready = max(ready, done)
            bursts_before, ready = bursts, done + p.softmax
    return read_set(p, m, number, bursts_before, ready)
