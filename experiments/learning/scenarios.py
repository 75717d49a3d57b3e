"""Scenarios (system, model, trace, utilization), and policies judged on them.

Policies learn from the first part of a trace's span and are judged on the rest. Common random numbers: the requests of
a scenario depend on its trace and on the seed alone (0: the window itself; others: resampled within it). Utilization
refers to each window's own capacity, so training and evaluation are equally loaded.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from l3env.experiments.train.windows import in_window
from l3env.machine.pair import compile_pair
from l3env.machine.tables import Tables
from l3env.requests.registry import load_trace
from l3env.requests.workload import Workload
from l3env.runs.cell import Cell
from l3env.runs.jobs import Progress
from l3env.runs.plan import run_cells
from l3env.runs.saturation import load_at_capacity
from l3env.runs.store import Store
from l3env.runs.workers import HERE, Workers
from l3env.search.objective import Objective

TRAINING_WINDOW, EVALUATION_WINDOW = "0%:60%", "60%:100%"
SLOW_POLICIES = ("l3", "best-constant", "rmaxts")  # started first, so that no core waits for them at the end
SLOW_TRACE = "openr1"  # long outputs
KEPT = (
    "slo_attainment_frac",
    "goodput_requests_per_s",
    "guarded_attainment_frac",
    "guarded_goodput_requests_per_s",
    "longest_wait_s",
    "starved_frac",
    "beyond_guard_count",
    "requests_count",
    "finished_count",
    "rejected_count",
    "preemptions_count",
    "output_tokens_per_s",
    "ttft_p50_s",
    "ttft_p99_s",
    "tpot_p50_s",
    "tpot_p99_s",
    "makespan_s",
)
TUNED_FOR_ONE = ("best-constant", "best-constant-in-order", "rmaxts")  # policies that are told what requests earn
PLANNING = ("decision_ms", "decisions_count", "simulations_mean_count", "deviations_frac")  # where a policy has them

Row = dict[str, Any]


@dataclass(frozen=True)
class Scenario:
    """What a policy is judged on."""

    system: str
    model: str
    trace: str
    utilization: float
    training_window: str = TRAINING_WINDOW
    window: str = EVALUATION_WINDOW

    @property
    def key(self) -> tuple[str, str, str, float]:
        """What rows of one scenario have in common."""
        return self.system, self.model, self.trace, self.utilization

    def cell(self, policy: str, seed: int = 0) -> Cell:
        """A policy in it, on the window that it has not seen."""
        return Cell(
            policy,
            self.system,
            self.model,
            in_window(self.trace, self.window),
            utilization=self.utilization,
            seed=seed,
            training=in_window(self.trace, self.training_window),
            record=False,
        )


@dataclass(frozen=True)
class Judged:
    """A row for each scenario, policy and seed, and how many of them a folder had already."""

    rows: list[Row]
    taken_count: int


def judge(
    scenarios: Sequence[Scenario],
    policies: Mapping[str, Sequence[str]],
    seeds_count: int = 1,
    *,
    store: Store | None = None,
    workers: Workers = HERE,
    progress: Progress | None = None,
) -> Judged:
    """Every policy in every scenario.

    Args:
        policies: what rows call each -> references to run; several (of several training seeds) take the seeds in turn.

    Raises:
        L3EnvError: a run failed; the others have ended and are in the store.
    """
    asked = {
        (scenario, name, seed): scenario.cell(refs[seed % len(refs)], seed)
        for name, refs in policies.items()
        for scenario in scenarios
        for seed in range(seeds_count)
    }
    cells = sorted(dict.fromkeys(asked.values()), key=_is_quick)
    ended = run_cells(cells, store=store, workers=workers, progress=progress)
    done = dict(zip(cells, ended.of_all(), strict=True))
    rows = []
    for (scenario, name, seed), cell in asked.items():
        figures = done[cell].figures
        row: Row = dict(zip(("system", "model", "trace", "utilization"), scenario.key, strict=True))
        row |= {"policy": name, "seed": seed} | {each: figures[each] for each in KEPT}
        rows.append(row | {each: figures[each] for each in PLANNING if each in figures} | {"wall_s": done[cell].wall_s})
    return Judged(rows, ended.taken_count)


def add_objective(parser: argparse.ArgumentParser) -> None:
    """The option that says what requests earn."""
    text = "guarded: who waits beyond the guard costs as much as a met SLO earns; plain: it costs nothing"
    parser.add_argument("--objective", choices=[*map(str, Objective)], default="guarded", help=text)


def tuned_for(ref: str, objective: Objective) -> str:
    """The reference of a policy that is tuned or planned for an objective where it is one that can be."""
    base, mark, _ = ref.partition("?")
    if base not in TUNED_FOR_ONE or objective == Objective.GUARDED or "objective=" in ref:
        return ref
    return f"{ref}{'&' if mark else '?'}objective={objective}"


def _is_quick(cell: Cell) -> tuple[bool, bool]:
    return not cell.policy.startswith(SLOW_POLICIES), SLOW_TRACE not in cell.trace


@functools.lru_cache(maxsize=8)
def tables_of(system: str, model: str) -> Tables:
    return compile_pair(system, model)


@functools.lru_cache(maxsize=16)
def _workload(trace: str, window: str, seed: int) -> Workload:
    return load_trace(in_window(trace, window), seed=seed)


@functools.lru_cache(maxsize=64)
def _full_load(system: str, model: str, trace: str, window: str) -> float:
    return load_at_capacity(tables_of(system, model), _workload(trace, window, 0))


def requests(scenario: Scenario, window: str, seed: int = 0) -> Workload:
    """A window's requests at the scenario's load."""
    load = scenario.utilization * _full_load(scenario.system, scenario.model, scenario.trace, window)
    return _workload(scenario.trace, window, seed).at_load(load)
