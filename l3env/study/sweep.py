"""Runs the cells of a study over joblib: local processes, or any backend that joblib knows (Ray for many machines).

A cell's result depends on the cell alone, so neither the number of workers nor the backend nor an interruption changes
a bit of the dataset.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar

from joblib import Parallel, cpu_count, delayed, parallel_config
from joblib.externals.loky.process_executor import TerminatedWorkerError

from l3env.engine.engine import Slo
from l3env.errors import L3EnvError
from l3env.machine.pair import compile_pair
from l3env.machine.tables import Tables
from l3env.policy.registry import make_policy
from l3env.requests.registry import load_trace
from l3env.requests.workload import Workload
from l3env.runs.capacity import load_at_capacity
from l3env.runs.driver import run_policy, training_window
from l3env.study.config import StudyCell, StudyConfig
from l3env.study.store import CellResult, StudyStore

WATCH_S = 1.0  # between looks at whether the parent is alive
CellJob = tuple[StudyCell, Slo, int | None, int]  # the cell, SLO, tensor-parallel degree, block size
Job = TypeVar("Job")
Result = TypeVar("Result")

compiled = lru_cache(maxsize=32)(compile_pair)  # a worker meets the same machine and trace again and again


@lru_cache(maxsize=4)
def loaded(trace: str, seed: int) -> Workload:
    """A trace; see ``load_trace``. Its notes have been shown once, by whoever planned the runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_trace(trace, seed=seed)


def fingerprint(workload: Workload) -> str:
    """Tells whether two runs served the same requests, on whatever machine and with whichever file of that name."""
    columns = (workload.arrival_s, workload.prompt_tokens, workload.output_tokens, workload.parent_idx)
    return hashlib.sha256(b"".join(column.tobytes() for column in columns)).hexdigest()[:16]


@lru_cache(maxsize=256)
def full_load(system: str, model: str, tp: int | None, block_tokens: int, trace: str) -> float:
    """The load of utilization 1."""
    return load_at_capacity(compiled(system, model, tp, block_tokens), loaded(trace, 0))


def run_study(
    config: StudyConfig,
    out: Path,
    *,
    backend: str = "loky",
    workers_count: int = -1,
    retry_failed: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> StudyStore:
    """Runs the cells that ``out`` does not have yet; each is written when it ends.

    Args:
        backend: a joblib backend: ``loky`` (local processes), ``threading``, ``sequential``, or a registered one.
        workers_count: of these at a time; -1: as many as the backend has cores.
        retry_failed: run failed cells again.
        progress: called with (cells done, cells in all, what has just ended).

    Raises:
        L3EnvError: a policy, system, model or trace cannot be loaded, or ``out`` belongs to another study. What goes
            wrong within a cell is recorded there and does not stop the others.
    """
    config.check()
    store = StudyStore(out, config)
    jobs = store.missing(retry_failed=retry_failed)
    total = sum(1 for _ in config.cells())
    done = total - len(jobs)
    if progress is not None:
        progress(done, total, "")
    calls = {cell: (cell, config.slo, config.tp, config.block_tokens) for cell in jobs}
    for cell, result in run_cells(calls, backend=backend, workers_count=workers_count):
        store.write(cell, result)
        done += 1
        if progress is not None:
            progress(done, total, f"{cell.policy}, {cell.system}, {cell.trace}, seed {cell.seed}")
    return store


def run_cells(
    calls: dict[StudyCell, CellJob], *, backend: str, workers_count: int
) -> Iterator[tuple[StudyCell, CellResult]]:
    """Results as they come. A run that takes its process down (out of memory, a crash) fails; the others go on.

    Which run it was cannot be seen from outside, so those that were under way are run again, one by one.
    """
    left = dict(calls)
    under_way = 3 * max(workers_count, cpu_count() if workers_count < 0 else 1)
    while left:
        try:
            for cell, result in spread(run_cell, list(left.values()), backend=backend, workers_count=workers_count):
                del left[cell]
                yield cell, result
        except TerminatedWorkerError:
            for cell in list(left)[:under_way]:
                yield cell, _alone(left.pop(cell))


def _alone(job: CellJob) -> CellResult:
    """A run in a process of its own."""
    try:
        return next(spread(run_cell, [job], backend="loky", workers_count=2))[1]  # one worker would be this process
    except TerminatedWorkerError:
        row = _identity(job[0]) | {"error": "WorkerDied: the run took its process down: out of memory, or a crash"}
        return CellResult(row, None, None, "", math.nan, platform.node())


def spread(
    function: Callable[[Job], Result], jobs: Iterable[Job], *, backend: str, workers_count: int
) -> Iterator[Result]:
    """Results in the order in which they end."""
    with parallel_config(backend=backend, n_jobs=workers_count):
        parallel = Parallel(return_as="generator_unordered", batch_size=1, pre_dispatch="2*n_jobs")
        yield from parallel(delayed(_call)(function, job, os.getpid()) for job in jobs)


def _call(function: Callable[[Job], Result], job: Job, caller_pid: int) -> Result:
    """What a worker runs. It ends with its parent: a killed sweep would leave idle workers behind."""
    if os.getppid() == caller_pid:
        _end_with_parent(caller_pid)
    return function(job)


@cache
def _end_with_parent(parent_pid: int) -> None:
    """Watches, once a process, whether the parent is still there."""

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(WATCH_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_cell(job: CellJob) -> tuple[StudyCell, CellResult]:
    """One run; whatever goes wrong becomes part of the result."""
    cell, slo, tp, block_tokens = job
    start = time.perf_counter()
    row = _identity(cell)
    requests, timeline, trace_text = None, None, ""
    try:
        tables = compiled(cell.system, cell.model, tp, block_tokens)
        if cell.utilization is not None:
            row["load"] = cell.utilization * full_load(cell.system, cell.model, tp, block_tokens, cell.trace)
        row["requests_sha256"] = fingerprint(loaded(cell.trace, cell.seed))
        outcome = _serve(cell, tables, row["load"], slo)
        row |= outcome.metrics
        requests, timeline = outcome.requests, outcome.timeline
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"
        trace_text = "" if isinstance(error, L3EnvError) else traceback.format_exc()
    wall_s = time.perf_counter() - start
    return cell, CellResult(row, requests, timeline, trace_text, wall_s, platform.node())


def _identity(cell: StudyCell) -> dict[str, Any]:
    row: dict[str, Any] = {"policy": cell.policy, "system": cell.system, "model": cell.model, "trace": cell.trace}
    row |= {"load": cell.load, "utilization": cell.utilization, "seed": cell.seed}
    return row | {"prefix_cache": "off", "error": None}  # studies run without one


def _serve(cell: StudyCell, tables: Tables, load: float, slo: Slo) -> Any:
    workload = loaded(cell.trace, cell.seed)
    if load != 1.0:
        workload = workload.at_load(load)
    training = training_window(loaded(cell.trace, 0))
    return run_policy(tables, workload, make_policy(cell.policy), slo=slo, training=training)
