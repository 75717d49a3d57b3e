"""Cells (system, model, trace, utilization), and policies run on them: many at once, results kept one line each.

Policies learn from the first part of a trace's span and are judged on the rest. Common random numbers: the requests of
a cell depend on its trace and on the seed alone (0: the window itself; others: resampled within it). Utilization refers
to each window's own capacity, so training and evaluation are equally loaded.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import joblib

from l3env.engine.engine import Slo
from l3env.errors import L3EnvError
from l3env.experiments.train.windows import in_window
from l3env.machine.pair import compile_pair
from l3env.machine.tables import Tables
from l3env.policy.registry import make_policy
from l3env.requests.registry import load_trace
from l3env.requests.workload import Workload
from l3env.runs.driver import run_policy
from l3env.runs.saturation import load_at_capacity

TRAINING_WINDOW, EVALUATION_WINDOW = "0%:60%", "60%:100%"
SLOW = ("l3", "best-constant", "rmaxts")  # started first, so that no core waits for them at the end
KEPT = (
    "slo_attainment_frac",
    "goodput_requests_per_s",
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
PLANNING = ("decision_ms", "decisions_count", "simulations_mean_count", "deviations_frac")  # where a policy has them

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """What a policy is judged on."""

    system: str
    model: str
    trace: str
    utilization: float
    training_window: str = TRAINING_WINDOW
    window: str = EVALUATION_WINDOW

    @property
    def key(self) -> tuple[str, str, str, float]:
        """What rows of one cell have in common."""
        return self.system, self.model, self.trace, self.utilization


@dataclass(frozen=True)
class Job:
    """One policy on one cell, all seeds.

    Attributes:
        name: what rows call the policy.
        refs: what to run, references of policies; several (of several training seeds) take the workload seeds in turn.
    """

    cell: Cell
    name: str
    refs: tuple[str, ...]
    seeds_count: int

    @property
    def key(self) -> str:
        """The same for the same work."""
        return json.dumps(asdict(self), sort_keys=True)


@functools.lru_cache(maxsize=8)
def tables_of(system: str, model: str) -> Tables:
    return compile_pair(system, model)


@functools.lru_cache(maxsize=16)
def _workload(trace: str, window: str, seed: int) -> Workload:
    return load_trace(in_window(trace, window), seed=seed)


@functools.lru_cache(maxsize=64)
def _full_load(system: str, model: str, trace: str, window: str) -> float:
    return load_at_capacity(tables_of(system, model), _workload(trace, window, 0))


def requests(cell: Cell, window: str, seed: int = 0) -> Workload:
    """A window's requests at the cell's load."""
    load = cell.utilization * _full_load(cell.system, cell.model, cell.trace, window)
    return _workload(cell.trace, window, seed).at_load(load)


def run_job(job: Job) -> list[Row]:
    """One row a seed."""
    cell = job.cell
    tables = tables_of(cell.system, cell.model)
    training = requests(cell, cell.training_window)
    rows = []
    for seed in range(job.seeds_count):
        policy = make_policy(job.refs[seed % len(job.refs)])
        start_s = time.perf_counter()
        outcome = run_policy(
            tables, requests(cell, cell.window, seed), policy, slo=Slo(), training=training, record=False
        )
        row: Row = {"system": cell.system, "model": cell.model, "trace": cell.trace, "utilization": cell.utilization}
        row |= {"policy": job.name, "seed": seed} | {name: outcome.metrics[name] for name in KEPT}
        row |= {name: outcome.metrics[name] for name in PLANNING if name in outcome.metrics}
        rows.append(row | {"wall_s": time.perf_counter() - start_s})
    return rows


def run_jobs(
    jobs: Sequence[Job],
    store: Path | None = None,
    *,
    workers: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Row]:
    """Rows of all jobs in their order; those found in ``store`` are not run again, new ones go there as they come."""
    done = {} if store is None else read_store(store)
    wanted = [job for job in jobs if job.key not in done]
    wanted.sort(key=lambda job: not job.name.startswith(SLOW))
    finished = len(jobs) - len(wanted)
    for job, rows in _in_parallel(wanted, workers or joblib.cpu_count()):
        done[job.key] = rows
        finished += 1
        if store is not None:
            append_store(store, job.key, rows)
        if progress is not None:
            progress(finished, len(jobs), f"{job.name} on {job.cell.system}, {job.cell.model}")
    return [row for job in jobs for row in done[job.key]]


def _in_parallel(jobs: list[Job], workers: int) -> Iterator[tuple[Job, list[Row]]]:
    if workers == 1 or len(jobs) <= 1:
        yield from ((job, run_job(job)) for job in jobs)
        return
    before = os.environ.get("L3ENV_THREADS")
    os.environ["L3ENV_THREADS"] = "1"  # a process a core: the engine's own threads would compete
    try:
        parallel = joblib.Parallel(n_jobs=workers, return_as="generator_unordered", pre_dispatch="2*n_jobs")
        yield from parallel(joblib.delayed(_labelled)(job) for job in jobs)
    finally:
        os.environ.pop("L3ENV_THREADS")
        if before is not None:
            os.environ["L3ENV_THREADS"] = before


def _labelled(job: Job) -> tuple[Job, list[Row]]:
    return job, run_job(job)


def read_store(path: Path) -> dict[str, list[Row]]:
    """Finished jobs by key. A last line that an interrupt cut off is dropped; any other bad line is an error."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")
    if lines[-1]:
        path.write_text("".join(f"{line}\n" for line in lines[:-1]), encoding="utf-8")
    done = {}
    for number, line in enumerate(lines[:-1], start=1):
        try:
            entry = json.loads(line)
            done[entry["job"]] = entry["rows"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise L3EnvError(f"{path}, line {number}: expected a finished job as JSON: {error!r}") from None
    return done


def append_store(path: Path, key: str, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"job": key, "rows": rows}) + "\n")
