"""The observation of an agent: all groups of features, one after the other.

Work per environment does not grow with the requests present: what concerns many of them comes from sums, running means
and the histogram that the state keeps.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from l3env.envs.observe.arriving import Arrivals, write_arrivals
from l3env.envs.observe.interval import Interval, write_interval
from l3env.envs.observe.machine import Machine, write_machine
from l3env.envs.observe.memory import Memory, write_memory
from l3env.envs.observe.prices import Prices, write_prices
from l3env.envs.observe.running import Running, write_running
from l3env.envs.observe.waiting import Waiting, write_waiting
from l3env.errors import L3EnvError
from l3env.jit import inner, kernel

GROUPS = (Waiting, Running, Memory, Prices, Interval, Arrivals, Machine)
WAITING, RUNNING, MEMORY, PRICES, INTERVAL, ARRIVALS, MACHINE, FEATURES_COUNT = accumulate(map(len, GROUPS), initial=0)

FEATURES: tuple[tuple[str, str], ...] = tuple((each.name, each.text) for group in GROUPS for each in group)
"""Name and text of each column."""


def columns_of(names: Iterable[str]) -> NDArray[np.int64]:
    """(n,) columns of features by name, whatever their places in the version that wrote the names down.

    Raises L3EnvError for features that there are not.
    """
    wanted, known = list(names), [name for name, _ in FEATURES]
    if unknown := sorted(set(wanted) - set(known)):
        raise L3EnvError(f"features: there is no {', '.join(unknown)}; expected some of {', '.join(known)}")
    return np.array([known.index(name) for name in wanted], np.int64)


@inner
def write_row(t, s, mark, machine, e, row):
    """All features of environment ``e`` into ``row``; moves its mark.

    ``machine`` keeps the last group between calls; it is filled where the mark is new. What a group measures by stands
    in the mark: the machine's pace, then free memory, then the mean TBT SLO of what runs.
    """
    if mark["is_old"] == 0:
        write_machine(t, s, e, mark, machine)
        mark["is_old"] = 1
    write_memory(t, s, e, mark, row[MEMORY:PRICES])
    write_waiting(t, s, e, mark, row[WAITING:RUNNING])
    write_running(s, e, mark, row[RUNNING:MEMORY])
    write_prices(t, s, e, mark, row[PRICES:INTERVAL])
    write_interval(s, e, mark, row[INTERVAL:ARRIVALS])
    write_arrivals(s, e, mark, row[ARRIVALS:MACHINE])
    for i in range(len(machine)):
        row[MACHINE + i] = machine[i]


@kernel
def write_features(t, s, marks, machine, first, last, out):
    """Features of environments first..last - 1 into ``out`` (E, F), ordered as FEATURES; moves the marks."""
    for e in range(first, last):
        write_row(t, s, marks[e], machine[e], e, out[e])
