"""Runs the cells of a study over joblib: local processes, or any backend that joblib knows (Ray for many machines).

A cell's result depends on the cell alone, so neither the number of workers nor the backend nor an interruption changes
a bit of the dataset.
"""

from __future__ import annotations

import platform
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from joblib import Parallel, delayed, parallel_config

from l3env.engine import Slo
from l3env.errors import L3EnvError
from l3env.policy import make_policy
from l3env.runner import compile_pair, load_at_capacity, run_policy, training_window
from l3env.study.config import StudyCell, StudyConfig
from l3env.study.store import CellResult, StudyStore
from l3env.tables import Tables
from l3env.trace_registry import load_trace
from l3env.workload import Workload

Job = TypeVar("Job")
Result = TypeVar("Result")

compiled = lru_cache(maxsize=32)(compile_pair)  # a worker meets the same machine and trace again and again


@lru_cache(maxsize=4)
def loaded(trace: str, seed: int) -> Workload:
    """A trace; see ``load_trace``."""
    return load_trace(trace, seed=seed)


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
        L3EnvError: a policy cannot be made, or ``out`` belongs to another study. What goes wrong within a cell is
            recorded there and does not stop the others.
    """
    config.check_policies()
    store = StudyStore(out, config)
    jobs = store.missing(retry_failed=retry_failed)
    total = sum(1 for _ in config.cells())
    done = total - len(jobs)
    if progress is not None:
        progress(done, total, "")
    calls = [(cell, config.slo, config.tp, config.block_tokens) for cell in jobs]
    for cell, result in spread(run_cell, calls, backend=backend, workers_count=workers_count):
        store.write(cell, result)
        done += 1
        if progress is not None:
            progress(done, total, f"{cell.policy}, {cell.system}, {cell.trace}, seed {cell.seed}")
    return store


def spread(
    function: Callable[[Job], Result], jobs: Iterable[Job], *, backend: str, workers_count: int
) -> Iterator[Result]:
    """Results in the order in which they end."""
    with parallel_config(backend=backend, n_jobs=workers_count):
        parallel = Parallel(return_as="generator_unordered", batch_size=1, pre_dispatch="2*n_jobs")
        yield from parallel(delayed(function)(job) for job in jobs)


def run_cell(job: tuple[StudyCell, Slo, int | None, int]) -> tuple[StudyCell, CellResult]:
    """One run; whatever goes wrong becomes part of the result."""
    cell, slo, tp, block_tokens = job
    start = time.perf_counter()
    row: dict[str, Any] = {"policy": cell.policy, "system": cell.system, "model": cell.model, "trace": cell.trace}
    row |= {"load": cell.load, "utilization": cell.utilization, "seed": cell.seed, "error": None}
    requests, timeline, trace_text = None, None, ""
    try:
        tables = compiled(cell.system, cell.model, tp, block_tokens)
        if cell.utilization is not None:
            row["load"] = cell.utilization * full_load(cell.system, cell.model, tp, block_tokens, cell.trace)
        outcome = _serve(cell, tables, row["load"], slo)
        row |= outcome.metrics
        requests, timeline = outcome.requests, outcome.timeline
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"
        trace_text = "" if isinstance(error, L3EnvError) else traceback.format_exc()
    wall_s = time.perf_counter() - start
    return cell, CellResult(row, requests, timeline, trace_text, wall_s, platform.node())


def _serve(cell: StudyCell, tables: Tables, load: float, slo: Slo) -> Any:
    workload = loaded(cell.trace, cell.seed)
    if load != 1.0:
        workload = workload.at_load(load)
    training = training_window(loaded(cell.trace, 0))
    return run_policy(tables, workload, make_policy(cell.policy), slo=slo, training=training)
