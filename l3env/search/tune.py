"""Search for the best fixed knobs of one cell (system, model, workload at its load) or of several.

All settings serve the same requests (common random numbers), side by side in one engine. Random draws first, then
coordinate search from the best: every change of one knob, then the improving changes together, until none improves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from l3env.choices import Budget, Order, SubBatching
from l3env.engine.engine import Engine, Slo
from l3env.engine.guard import beyond_guard, waits_s
from l3env.engine.state import row_bytes
from l3env.errors import L3EnvError
from l3env.knobs import ABOUT, Knobs, Need
from l3env.machine.tables import Tables
from l3env.policy.levels import LEVELS, Levels, available, lasting, useful
from l3env.requests.workload import Workload
from l3env.runs.driver import replica_shares
from l3env.search.objective import Objective, earned, relative

RANDOM_COUNT = 64
ROUNDS_COUNT = 4
ENGINE_BYTES = 512e6  # of environments run side by side
TIE_BREAK = 1e-4  # weight of time in the system: decides between settings that earn the same

ACTIONS: Levels = lasting(LEVELS)
"""The settings that an agent's actions can reach, but for the one that admits nobody for ever."""

GRID: Levels = {**ACTIONS, **{name: about.levels for name, about in ABOUT.items() if about.tuned and not about.acts}}
"""All settings: those of every built-in heuristic with fixed knobs are among them."""

STARTS = (
    Knobs(),
    Knobs(headroom_frac=0.0),
    Knobs(prefill_budget_tokens=512, budget_counts_decodes=True),
    Knobs(prefill_budget_tokens=512, budget_counts_decodes=True, order=Order.EARLIEST_DEADLINE_HOPELESS_LAST),
    Knobs(prefill_budget_tokens=512, budget_counts_decodes=True, order=Order.SHORTEST_PROMPT_HOPELESS_LAST),
    Knobs(prefill_budget_tokens=Budget.ALIGN_WHEN_FULL, sub_batching=SubBatching.ADAPTIVE),
)
"""Settings tried besides the random ones, where the grid has them: those of the built-in heuristics."""


@dataclass(frozen=True)
class Case:
    """What a setting is tried on: a machine and requests at their load.

    Attributes:
        one_replica: the requests are those of one replica, as an environment's episode; else all replicas share them.
        predicted_tokens: (N,) predicted output lengths; without them, no setting that needs them is tried.
    """

    tables: Tables
    workload: Workload
    slo: Slo = field(default_factory=Slo)
    one_replica: bool = False
    predicted_tokens: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        knobs: the best setting.
        goodput_frac: (C,) share of requests that met their SLO under it, by cell.
        guarded_frac: (C,) the same less those that waited beyond the guard.
        tried: one row per setting tried: the knobs, ``goodput_frac`` and ``guarded_frac`` (means over cells), ``value``
            (what was compared).
        around: for each knob of the grid, ``value`` at each of its levels while the others are the best ones.
        grid: what was searched: of knobs that do nothing on the cells' machines, one level.
    """

    knobs: Knobs
    goodput_frac: NDArray[np.float64]
    guarded_frac: NDArray[np.float64]
    tried: pd.DataFrame
    around: dict[str, NDArray[np.float64]]
    grid: Levels


def tune(
    cells: Sequence[Case],
    *,
    grid: Levels = GRID,
    objective: Objective = Objective.GUARDED,
    random_count: int = RANDOM_COUNT,
    rounds_count: int = ROUNDS_COUNT,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Tuned:
    """The best fixed knobs for a cell, or the best on average over several.

    What is compared is what a request earns (``objective``), in each cell relative to the most that a setting tried
    earns or costs there, averaged over cells; of equal ones, that with less time in the system.

    Args:
        objective: whether requests that wait beyond the guard cost something.
        progress: called with (settings tried, settings known to be tried in all, what).
    """
    search = _Search(list(cells), _useful(grid, cells), objective, progress)
    search.try_all(_starts(search.grid))
    search.try_all(_random(search.grid, random_count, np.random.default_rng(seed)))
    for _ in range(rounds_count):
        best = search.best()
        changes = _changes(search.grid, best)
        search.try_all(changes)
        better = [each for each in changes if search.value(each) > search.value(best)]
        better.sort(key=search.value, reverse=True)
        search.try_all(_together(best, better))
        if search.best() == best:
            break
    best = search.best()
    search.try_all(_changes(search.grid, best))
    if search.best() != best:  # the last round still found a better one: its neighbours are the ones to know
        best = search.best()
        search.try_all(_changes(search.grid, best))
    return search.result(best)


def probe(
    cells: Sequence[Case], knobs: Knobs, *, grid: Levels = GRID, objective: Objective = Objective.GUARDED
) -> Tuned:
    """A setting, and every change of one of its knobs: ``around`` says what each would give.

    Raises L3EnvError for a value that the grid does not have.
    """
    search = _Search(list(cells), _useful(grid, cells), objective, None)
    try:
        levels_of = search.grid.items()
        setting = tuple(levels.index(getattr(knobs, name)) if len(levels) > 1 else 0 for name, levels in levels_of)
    except ValueError:
        raise L3EnvError(f"probe: {knobs} has a value that is not in the grid") from None
    search.try_all([setting, *_changes(search.grid, setting)])
    return search.result(setting)


Setting = tuple[int, ...]  # a level of each knob of the grid


class _Search:
    """Every setting tried so far and how it did, (S, C)."""

    def __init__(
        self,
        cells: list[Case],
        grid: Levels,
        objective: Objective,
        progress: Callable[[int, int, str], None] | None,
    ) -> None:
        self.cells, self.grid, self.objective, self.progress = cells, grid, objective, progress
        self.row: dict[Setting, int] = {}
        self.met, self.guarded = np.zeros((0, len(cells))), np.zeros((0, len(cells)))
        self.present_s = np.zeros((0, len(cells)))
        self._values = np.zeros(0)

    def try_all(self, settings: Sequence[Setting]) -> None:
        new = [each for each in dict.fromkeys(settings) if each not in self.row]
        if not new:
            return
        knobs = [_knobs(self.grid, each) for each in new]
        met, guarded, present_s = np.zeros((3, len(new), len(self.cells)))
        for c, cell in enumerate(self.cells):
            if self.progress is not None:
                done = len(self.row) * len(self.cells) + c * len(new)
                self.progress(done, (len(self.row) + len(new)) * len(self.cells), "settings x cells")
            outcomes, present_s[:, c] = serve_each(cell, knobs)
            met[:, c] = earned(outcomes, Objective.PLAIN).mean(axis=1)
            guarded[:, c] = earned(outcomes, Objective.GUARDED).mean(axis=1)
        self.row |= {each: len(self.row) + i for i, each in enumerate(new)}
        self.met = np.concatenate([self.met, met])
        self.guarded = np.concatenate([self.guarded, guarded])
        self.present_s = np.concatenate([self.present_s, present_s])
        share = relative(self.guarded if self.objective == Objective.GUARDED else self.met, axis=0)
        slow = self.present_s / np.maximum(self.present_s.max(axis=0), 1e-12)
        self._values = share.mean(axis=1) - TIE_BREAK * slow.mean(axis=1)

    def value(self, setting: Setting) -> float:
        return float(self._values[self.row[setting]])

    def best(self) -> Setting:
        return list(self.row)[int(np.argmax(self._values))]

    def result(self, best: Setting) -> Tuned:
        tried = pd.DataFrame(
            [{name: int_or_float(getattr(_knobs(self.grid, each), name)) for name in self.grid} for each in self.row]
        )
        tried["goodput_frac"], tried["guarded_frac"] = self.met.mean(axis=1), self.guarded.mean(axis=1)
        tried["value"] = self._values
        around = {}
        for k, (name, levels) in enumerate(self.grid.items()):
            line = [(*best[:k], i, *best[k + 1 :]) for i in range(len(levels))]
            around[name] = np.array([self.value(each) for each in line])
        met, guarded = (of[self.row[best]].copy() for of in (self.met, self.guarded))
        return Tuned(_knobs(self.grid, best), met, guarded, tried, around, self.grid)


def serve_each(cell: Case, knobs: Sequence[Knobs]) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """Serves a cell under each setting: ((S, N) 1 for a request that met its SLO, -1 for one that waited beyond the
    guard, else 0; (S,) mean time in the system (s))."""
    replicas = 1 if cell.one_replica else cell.tables.replicas_count
    shares = [rows for rows in replica_shares(cell.workload, replicas) if rows.size]
    parts = [cell.workload.select(rows) for rows in shares]
    predicted = [None if cell.predicted_tokens is None else cell.predicted_tokens[rows] for rows in shares]
    capacity = max(len(part) for part in parts)
    jobs = [(s, i) for s in range(len(knobs)) for i in range(len(parts))]
    batch = int(
        np.clip(ENGINE_BYTES // (capacity * row_bytes(drafts=cell.tables.model.draft_modules_count > 0)), 1, len(jobs))
    )
    engine = Engine(cell.tables, batch, capacity)
    outcomes, present_s = np.zeros((len(knobs), len(cell.workload)), np.int8), np.zeros(len(knobs))
    for first in range(0, len(jobs), batch):
        some = jobs[first : first + batch]
        for e in range(batch):
            s, i = some[e % len(some)]  # the last batch may be short: its first jobs again
            engine.reset(e, parts[i], slo=cell.slo, predicted_tokens=predicted[i])
            knobs[s].write(engine.knobs, e)
        engine.run_to_end()
        for e, (s, i) in enumerate(some):
            req, clock_s = engine.state.req[e, : len(parts[i])], engine.state.env["clock_s"][e]
            outcomes[s, shares[i]] = req["slo_met"] - beyond_guard(waits_s(req, clock_s), req["ttft_slo_s"])
            present_s[s] += float(engine.state.env["present_s"][e])
    return outcomes, present_s / len(cell.workload)


def int_or_float(value: Any) -> float:
    """A level as a plain number."""
    return float(value) if isinstance(value, float) else int(value)


def _useful(grid: Levels, cells: Sequence[Case]) -> Levels:
    """Levels that do something in one of the cells, predicted lengths taken for known where all have them; of knobs of
    which none does, the first."""
    has = frozenset[Need]().union(*(available(cell.tables) for cell in cells))
    if all(cell.predicted_tokens is not None for cell in cells):
        has |= {Need.PREDICTOR}
    kept = {
        name: tuple(level for level, does in zip(levels, useful(name, levels, has), strict=True) if does)
        for name, levels in grid.items()
    }
    return {name: levels or grid[name][:1] for name, levels in kept.items()}


def _knobs(grid: Levels, setting: Setting) -> Knobs:
    return Knobs(**{name: levels[i] for (name, levels), i in zip(grid.items(), setting, strict=True)})


def _starts(grid: Levels) -> list[Setting]:
    """STARTS with each knob at its level, or at the first where the grid does not have it."""
    levels_of = [
        [levels.index(value) if (value := getattr(knobs, name)) in levels else 0 for name, levels in grid.items()]
        for knobs in STARTS
    ]
    return [tuple(each) for each in levels_of]


def _random(grid: Levels, count: int, rng: np.random.Generator) -> list[Setting]:
    draws = np.stack([rng.integers(len(levels), size=count) for levels in grid.values()], axis=1)
    return [tuple(row) for row in draws.tolist()]


def _changes(grid: Levels, setting: Setting) -> list[Setting]:
    """Every change of one knob."""
    return [
        (*setting[:k], i, *setting[k + 1 :])
        for k, levels in enumerate(grid.values())
        for i in range(len(levels))
        if i != setting[k]
    ]


def _together(setting: Setting, better: Sequence[Setting]) -> list[Setting]:
    """Improving changes of different knobs, best first, put on top of one another."""
    combined, found, changed = list(setting), [], set()
    for each in better:
        k = next(i for i in range(len(setting)) if each[i] != setting[i])
        if k not in changed:
            changed.add(k)
            combined[k] = each[k]
            found.append(tuple(combined))
    return found
