"""Cells to jobs: what their names stand for is looked up and hashed, then they run, or are taken from a folder."""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from l3env.errors import L3EnvError
from l3env.policy.registry import reference_policy
from l3env.runs.cell import Cell, Result, Saturation, job_name, lookup, serve
from l3env.runs.content import requests_sha256, sources_sha256
from l3env.runs.jobs import Ended, Progress, run_jobs
from l3env.runs.saturation import load_at_capacity
from l3env.runs.store import Done, Job, Store
from l3env.runs.workers import HERE, Workers

Run = Callable[..., Result]  # of a Ready, then keywords
_plans = itertools.count()


def run_cells(
    cells: Sequence[Cell],
    run: Run = serve,
    options: Mapping[str, Any] | None = None,
    *,
    store: Store | None = None,
    workers: Workers = HERE,
    progress: Progress | None = None,
) -> Ended:
    """Results of all cells, in their order: taken from the store where it has them, else run.

    Args:
        run: what is done with a cell that is ready, a module's function; ``options`` are its keywords.

    Raises:
        L3EnvError: none of the cells can be run, or one is there twice. What goes wrong in one of them is its result.
    """
    plan = f"{os.getpid()}-{next(_plans)}"
    places = list(dict.fromkeys(place for cell in cells for place in cell.saturations))
    ended = run_jobs([_saturation_job(place, plan) for place in places], store, workers=workers)
    full = dict(zip(places, ended.done, strict=True))
    jobs: list[Job] = []
    errors: list[Exception] = []
    for cell in cells:
        try:
            jobs.append(_job(cell, run, options or {}, full, plan))
        except Exception as error:
            jobs.append(Job(_name(cell, run), cell.row(), {"error": str(error)}, partial(_fail, error)))
            errors.append(error)
    if errors and len(errors) == len(cells):
        raise errors[0]
    return run_jobs(jobs, store, workers=workers, progress=progress)


def _job(cell: Cell, run: Run, options: Mapping[str, Any], full: Mapping[Saturation, Done], plan: str) -> Job:
    """Raises L3EnvError for what cannot be looked up."""
    look = lookup(plan)
    content = look.content(cell)
    loads = [cell.level * _load(full[place]) for place in cell.saturations] or [cell.level]
    depends = content | {
        "loads": loads,
        "policy": [cell.policy, look.policy(cell.policy)],
        "slo": cell.slo,
        "prefix_cache": cell.prefix_cache,
        "record": cell.record,
        "run": [run.__qualname__, options, sources_sha256(Path(inspect.getfile(run)))],
    }
    stand_ins = ", ".join(look.requests(cell.requests).stand_ins) or None
    row = cell.row() | {"load": loads[0], "requests_sha256": content["requests"][:16], "stands_in_for": stand_ins}
    return Job(_name(cell, run), row, depends, partial(_run, run, options, cell, (loads[0], loads[-1]), content, plan))


def _name(cell: Cell, run: Run) -> str:
    return cell.key if run is serve else f"{run.__name__}.{cell.key}"


def _load(done: Done) -> float:
    if done.error is not None:
        raise L3EnvError(done.error.partition(": ")[2])
    return float(done.figures["load"])


def _run(
    run: Run,
    options: Mapping[str, Any],
    cell: Cell,
    loads: tuple[float, float],
    content: Mapping[str, Any],
    plan: str,
) -> Result:
    """What a worker does: it looks the names up itself, and makes sure that they stand for the same."""
    look = lookup(plan)
    if look.content(cell) != content:
        raise L3EnvError(f"{cell.key}: a file that it names was changed while others ran; give the command again")
    return run(look.ready(cell, *loads), **options)


def _fail(error: Exception) -> NoReturn:
    raise error


def _saturation_job(place: Saturation, plan: str) -> Job:
    """The load that is utilization 1."""
    parts = (place.machine.system, place.machine.model, place.requests.trace)
    row = {"system": place.machine.system, "model": place.machine.model, "trace": place.requests.trace}
    try:
        tables, requests = lookup(plan).tables(place.machine), lookup(plan).requests(place.requests)
    except Exception as error:
        return Job(job_name(place, "saturation", *parts), row, {"error": str(error)}, partial(_fail, error))
    depends = {
        "machine": [tables.system, tables.model, place.machine.tp, place.machine.block_tokens],
        "requests": requests_sha256(requests),
        "prefix_cache": place.prefix_cache,
        "policy": lookup(plan).policy(reference_policy(tables.has_pim)),
        "l3env": sources_sha256(Path(__file__)),
    }
    return Job(job_name(place, "saturation", *parts), row, depends, partial(_saturate, place, plan))


def _saturate(place: Saturation, plan: str) -> Result:
    look = lookup(plan)
    load = load_at_capacity(look.tables(place.machine), look.requests(place.requests), prefix_cache=place.prefix_cache)
    return {"load": load}, {}
