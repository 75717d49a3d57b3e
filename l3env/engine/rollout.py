"""Copies of an environment's present to try things out on: what a planning policy simulates with.

A *scenario* is the present of a live environment with output lengths and further arrivals as somebody imagines them;
nothing of the truth is in it. *Trials* start as copies of scenarios, which is a copy of memory, and run compiled, side
by side, on all cores.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from l3env.choices import ORDERS_COUNT
from l3env.engine import state as st
from l3env.engine.engine import Engine, Slo
from l3env.engine.kernels import snapshot
from l3env.engine.kernels.run import Until
from l3env.machine.tables import Tables
from l3env.requests.workload import Workload

PER_REQUEST = ("req", "truth", "lists")  # (E, N) fields of State that a trial needs; heaps apart
PER_ENV = ("env", "sub", "lane", "lane_class", "group", "pool", "phase", "prompts", "heap_len")  # () where absent


class Rollouts:
    """Scenarios and trials of environments on one machine.

    Args:
        tables: the machine.
        trials_count: how many run side by side.
        scenarios_count: how many presents are kept.
    """

    def __init__(self, tables: Tables, trials_count: int, scenarios_count: int) -> None:
        self.tables = tables
        self.trials_count, self.scenarios_count = trials_count, scenarios_count
        self._room(256, ())

    def _room(self, capacity: int, prefix: st.PrefixArrays | tuple[()]) -> None:
        """Memory for so many requests, and for a prefix cache as large as the given one."""
        self.capacity = capacity
        self.engine = Engine(self.tables, self.trials_count, capacity)
        self._source = Engine(self.tables, self.scenarios_count, capacity)
        self._rows = np.zeros(self.scenarios_count, np.int64)  # requests of each scenario
        present = [name for name in PER_ENV if not isinstance(getattr(self.engine.state, name), tuple)]
        self._pairs = [
            (_bytes(getattr(self._source.state, name)), _bytes(getattr(self.engine.state, name))) for name in present
        ]
        self._row_pairs = [
            (_bytes(getattr(self._source.state, name)), _bytes(getattr(self.engine.state, name)))
            for name in PER_REQUEST
        ]
        self._heaps = _bytes(self._source.state.heap), _bytes(self.engine.state.heap)
        self._scratch_idx = np.zeros(1, np.int32)
        if not isinstance(prefix, st.PrefixArrays):
            return
        sizes = _sizes(prefix)
        for engine in (self._source, self.engine):
            engine.state = st.with_prefix_room(engine.state, *sizes)
        for name in st.PrefixArrays._fields:
            source, target = (getattr(engine.state.prefix, name) for engine in (self._source, self.engine))
            pairs = self._row_pairs if name == "req" else self._pairs
            pairs.append((_bytes(source), _bytes(target)))

    def imagine(
        self,
        live: Engine,
        e: int,
        idx: NDArray[np.int64],
        scenario: int,
        output_tokens: NDArray[np.int64],
        future: Workload | None,
        slo: Slo,
    ) -> None:
        """Makes the present of ``live``'s environment ``e`` a scenario.

        Args:
            idx: (n,) the requests that are there, ascending.
            output_tokens: (n,) imagined lengths, longer than what each has emitted.
            future: imagined arrivals, from now on; root requests, which share no prefix.
        """
        more, prefix = 0 if future is None else len(future), live.state.prefix
        if idx.size + more > self.capacity:
            self._room(2 * (idx.size + more), prefix)
        if _sizes(prefix) != _sizes(self.engine.state.prefix):
            self._room(self.capacity, prefix)
        if self._scratch_idx.size < live.state.req.shape[1]:
            self._scratch_idx = np.zeros(live.state.req.shape[1], np.int32)
        source = self._source
        snapshot.extract(live.state, e, idx, output_tokens, more, self._scratch_idx, source.state, scenario)
        source.state.env["table_idx"][scenario] = 0
        self._rows[scenario] = idx.size + more
        if future is not None:
            first, last = idx.size, idx.size + more
            req = source.state.req
            req["arrival_s"][scenario, first:last] = future.arrival_s
            req["prompt_tokens"][scenario, first:last] = future.prompt_tokens
            source.state.truth[scenario, first:last] = future.output_tokens
            req["predicted_tokens"][scenario, first:last] = future.output_tokens
            source.set_limits(scenario, future, slo, first)
            source.state.env["requests_count"][scenario] = last

    def start(self, trial: int, scenario: int) -> None:
        """Makes a trial a copy of a scenario."""
        rows = int(self._rows[scenario])
        for source, target in self._pairs:
            target[trial] = source[scenario]
        for source, target in self._row_pairs:
            target[trial, :rows] = source[scenario, :rows]
        built = int(self._source.state.env["heaps_built"][scenario])
        source, target = self._heaps
        for h in range(source.shape[1]):
            if h >= ORDERS_COUNT or built >> h & 1:
                target[trial, h, :rows] = source[scenario, h, :rows]

    def run_until(self, times_s: NDArray[np.float64]) -> None:
        """Runs every trial under its knobs to its time, (trials,) in seconds."""
        self.engine.run_all(Until.TIME, times_s)

    def on_track(self) -> NDArray[np.int64]:
        """(trials,) running requests that have kept every limit of their SLO so far and await their last token."""
        found = np.zeros(self.trials_count, np.int64)
        snapshot.count_on_track(self.engine.state, found)
        return found

    def beyond_guard_count(self) -> NDArray[np.int64]:
        """(trials,) requests that waited for their first token longer than the guard allows, or do so still."""
        return self.engine.beyond_guard_count()

    def hold(self, knobs: NDArray[np.void]) -> None:
        """The knobs of the trials until they are set anew: (trials,) rows of KNOB_DTYPE."""
        self.engine.knobs[:] = knobs

    @property
    def pool_blocks(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """((trials, P) blocks of memory pools in use, (P,) what each pool has)."""
        return self.engine.state.pool["used"].copy(), self.engine.tables.pool_blocks[0].copy()

    @property
    def env(self) -> NDArray[np.void]:
        """(trials,) ENV_DTYPE rows."""
        return self.engine.state.env


def present_idx(live: Engine, e: int) -> NDArray[np.int64]:
    """Indices of the requests that wait or run in an environment, ascending."""
    env = live.state.env
    found = np.empty(int(env["waiting_count"][e] + env["running_count"][e]), np.int64)
    count = snapshot.find_present(live.state, e, found)
    return found[:count]


def _sizes(prefix: st.PrefixArrays | tuple[()]) -> tuple[int, ...]:
    """Ids, segments and slots that there is room for; () without a prefix cache."""
    if not isinstance(prefix, st.PrefixArrays):
        return ()
    return prefix.ids.shape[1], prefix.segment.shape[1], prefix.slot.shape[2]


def _bytes(array: NDArray[np.generic]) -> NDArray[np.uint8]:
    """The same memory as bytes, last axis: one item. NumPy copies padded records field by field, bytes at once."""
    return array.view(np.uint8).reshape(*array.shape, array.dtype.itemsize)
