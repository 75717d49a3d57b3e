"""DDR4's rules, restated apart from the simulator: replays a command trace and names every rule that is broken.

Written from JESD79-4's definitions of the parameters; knows nothing of how the simulator schedules.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from l3env.machine.dimm.bus import Command
from l3env.machine.specs import DramSpec

COLUMNS = (Command.MAC, Command.RD)
BURSTS = (Command.RD_RB, Command.WR_SB)


def broken_rules(commands: np.ndarray, d: DramSpec, refresh_until: int = 0) -> list[str]:
    """Commands (cycle, command, bank) in order of time; ``refresh_until``: check that REFs keep up until then."""
    problems = []

    def expect(ok: bool, rule: str, row: np.ndarray) -> None:
        if not ok:
            problems.append(f"{rule}: {Command(row[1]).name} of bank {row[2]} at {row[0]}")

    open_since: dict[int, int] = {}
    last: dict[tuple[int, str], int] = defaultdict(lambda: -(10**9))
    activates: list[int] = []
    group_activates: dict[int, int] = defaultdict(lambda: -(10**9))
    group_reads: dict[int, int] = defaultdict(lambda: -(10**9))
    refreshes: list[int] = []
    on_bus: dict[int, int] = {}  # cycle -> command on the command bus
    pins_free, last_write, last_read = -(10**9), -(10**9), -(10**9)
    for row in commands:
        cycle, kind, bank = (int(x) for x in row)
        if kind == Command.WR_R:  # between host and buffer chip: another bus
            continue
        broadcast = kind == Command.MAC and on_bus.get(cycle) == Command.MAC
        expect(cycle not in on_bus or broadcast, "one command a cycle", row)
        on_bus[cycle] = kind
        expect(not refreshes or cycle >= refreshes[-1] + d.rfc_cycles, "tRFC", row)
        group = bank % d.bank_groups_count
        if kind == Command.ACT:
            expect(bank not in open_since, "ACT of an open bank", row)
            expect(cycle >= last[bank, "pre"] + d.rp_cycles, "tRP", row)
            expect(cycle >= last[bank, "act"] + d.rc_cycles, "tRC", row)
            expect(not activates or cycle >= activates[-1] + d.rrd_s_cycles, "tRRD_S", row)
            expect(cycle >= group_activates[group] + d.rrd_l_cycles, "tRRD_L", row)
            expect(len(activates) < 4 or cycle >= activates[-4] + d.faw_cycles, "tFAW", row)
            activates.append(cycle)
            group_activates[group] = open_since[bank] = last[bank, "act"] = cycle
        elif kind == Command.PRE:
            expect(bank in open_since, "PRE of a closed bank", row)
            expect(cycle >= open_since.pop(bank, 0) + d.ras_cycles, "tRAS", row)
            expect(cycle >= last[bank, "column"] + d.rtp_cycles, "tRTP", row)
            last[bank, "pre"] = cycle
        elif kind in COLUMNS:
            expect(bank in open_since and cycle >= open_since[bank] + d.rcd_cycles, "tRCD", row)
            expect(cycle >= last[bank, "column"] + d.ccd_l_cycles, "tCCD_L of a bank", row)
            last[bank, "column"] = cycle
        elif kind == Command.REF:
            expect(not open_since, "REF with open rows", row)
            closed = max((when for (_, what), when in last.items() if what == "pre"), default=-(10**9))
            expect(cycle >= closed + d.rp_cycles, "tRP before REF", row)
            refreshes.append(cycle)
            expect(cycle < (len(refreshes) + 8) * d.refi_cycles, "REF postponed by more than 8 tREFI", row)
            expect(cycle >= pins_free, "REF while data is on the pins", row)
        if kind == Command.RD or kind in BURSTS:  # whatever uses the pins of the chips
            begins = cycle + (d.wl_cycles if kind == Command.WR_SB else d.cl_cycles)
            expect(begins >= pins_free, "data collides on the pins", row)
            pins_free = begins + d.bl_cycles
            expect(cycle >= max(last_read, last_write) + d.ccd_s_cycles, "tCCD_S", row)
            if kind == Command.WR_SB:
                last_write = cycle
            else:
                expect(cycle >= last_write + d.wl_cycles + d.bl_cycles + d.wtr_l_cycles, "tWTR_L", row)
                last_read = cycle
        if kind == Command.RD:
            expect(cycle >= group_reads[group] + d.ccd_l_cycles, "tCCD_L of a group", row)
            group_reads[group] = cycle
    due = int(refresh_until / d.refi_cycles) - 8
    return problems + [f"the {k + 1}th REF is missing at {refresh_until}" for k in range(len(refreshes), due)]
