"""Comparisons and studies: a grid of cells, run or taken from a folder, as a table with every request beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from l3env.engine.engine import Slo
from l3env.errors import L3EnvError
from l3env.given import reference
from l3env.machine.specs import ModelSpec, SystemSpec
from l3env.policy.registry import PolicyLike
from l3env.requests.workload import Workload
from l3env.runs.grid import Grid
from l3env.runs.jobs import Progress
from l3env.runs.plan import run_cells
from l3env.runs.store import REQUESTS, TIMELINES, Frames, Store
from l3env.runs.workers import HERE, Workers


@dataclass(frozen=True)
class Comparison:
    """Results of a grid.

    Attributes:
        results: a row per cell that has run, named by the column ``key``; those that failed have an ``error`` and no
            figures.
        requests, timelines: of those that did not fail, by key.
        taken_count: how many of the rows were there already.
    """

    config: Grid
    results: pd.DataFrame
    requests: Mapping[str, pd.DataFrame]
    timelines: Mapping[str, pd.DataFrame]
    taken_count: int = 0

    @cached_property
    def done(self) -> pd.DataFrame:
        """The rows with figures."""
        return self.results[self.results["error"].isna()] if "error" in self.results else self.results

    @cached_property
    def failed(self) -> pd.DataFrame:
        """The rows without."""
        return self.results.drop(self.done.index)


def compare(
    policies: Sequence[PolicyLike],
    system: str | SystemSpec,
    model: str | ModelSpec,
    trace: str | Workload,
    *,
    load: float | Sequence[float] | None = None,
    utilization: float | Sequence[float] | None = None,
    seeds: int = 1,
    slo: Slo | None = None,
    tp: int | None = None,
    prefix_cache: str = "off",
    training: str | None = None,
    patience_s: float | None = None,
    out: str | Path | None = None,
    fresh: bool = False,
    workers: Workers = HERE,
    progress: Progress | None = None,
) -> Comparison:
    """Runs every policy on the same workloads.

    Args:
        policies: names, ``file.py:Class``, policy classes or objects. Each run gets a fresh copy of an object.
        system: a preset's name, a TOML file or a spec.
        model: likewise.
        trace: a trace spec, see ``load_trace``, or a workload.
        load: arrival rates as multiples of the trace's own, by default 1; or
        utilization: as multiples of what the reference policy serves at saturation on this system.
        seeds: seed 0 is the trace itself, further ones are resampled from it (generated traces are drawn anew).
        prefix_cache: ``off``, or how cached prompt segments are given up: ``lru``, ``lfu``, ``tree``, ``score``.
        training: trace of earlier requests to learn from, by default the first fifth of the trace itself.
        patience_s: after so many seconds without a first token a client leaves; None: never.
        out: folder that keeps the results, see ``run_grid``, as for what follows.
        fresh: forget what it holds.
        workers: who runs the cells.
        progress: told of each that ends.

    Raises:
        L3EnvError: anything wrong with the input, before the first cell runs.
    """
    if load is not None and utilization is not None:
        raise L3EnvError(f"load = {load}, utilization = {utilization}; expected one of them")
    loads = () if utilization is not None else tuple(np.atleast_1d(1.0 if load is None else load).tolist())
    utilizations = () if utilization is None else tuple(np.atleast_1d(utilization).tolist())
    grid = Grid(
        tuple(map(reference, policies)),
        (reference(system),),
        (reference(model),),
        (reference(trace),),
        loads,
        utilizations,
        seeds,
        tp,
        slo=slo or Slo(),
        training=training,
        prefix_cache=prefix_cache,
        patience_s=patience_s,
    )
    return run_grid(grid, out=out, fresh=fresh, workers=workers, progress=progress)


def run_grid(
    grid: Grid,
    *,
    out: str | Path | None = None,
    fresh: bool = False,
    workers: Workers = HERE,
    progress: Progress | None = None,
) -> Comparison:
    """Runs the cells of a grid.

    Args:
        out: folder that keeps the results. Cells that it has are not run again unless something that they follow from
            has changed: a file, a spec, the requests, this package. Cells of other grids stay in it.
        fresh: forget what the folder holds.
        workers: who runs them.
        progress: called with (cells done, cells in all, name of the one that has just ended).

    Raises:
        L3EnvError: a policy, system, model or trace cannot be loaded, or none of the cells can be run. What goes wrong
            within a cell is recorded in its row and does not stop the others.
    """
    grid.check()
    store = None if out is None else Store(out)
    if store is not None:
        store.begin(fresh=fresh)
        write_shown(store, grid)
    cells = grid.cells()
    ended = run_cells(cells, store=store, workers=workers, progress=progress)
    keys = [cell.key for cell in cells]
    rows = [done.flat() | {"key": key} for key, done in zip(keys, ended.done, strict=True)]
    if store is not None:
        return _of_store(store, grid, rows, ended.taken_count)
    done = {key: each for key, each in zip(keys, ended.done, strict=True) if each.error is None}
    requests, timelines = ({key: each.frames[kind] for key, each in done.items()} for kind in (REQUESTS, TIMELINES))
    return Comparison(grid, pd.DataFrame(rows), requests, timelines, ended.taken_count)


def _of_store(store: Store, grid: Grid, rows: list[dict[str, object]], taken_count: int) -> Comparison:
    keys = [str(row["key"]) for row in rows if row["error"] is None]
    table = pd.DataFrame(rows) if rows else pd.DataFrame(columns=["key", "error"])
    return Comparison(grid, table, Frames(store, REQUESTS, keys), Frames(store, TIMELINES, keys), taken_count)


def write_shown(store: Store, grid: Grid) -> None:
    """Makes a folder show this grid: beside the policies that it shows already, where all else is the same.

    Raises:
        L3EnvError: the folder is of something else.
    """
    known = store.config()
    if known is not None:
        try:
            grid = grid.with_policies_of(Grid.from_json(known))
        except L3EnvError as error:
            raise L3EnvError(
                f"{store.folder} holds something else: config.json: {error}; choose another --out"
            ) from None
    store.write_config(grid.to_json())


def read_comparison(folder: str | Path) -> Comparison:
    """What a folder shows, finished or not. Raises L3EnvError where there is nothing."""
    store = Store(folder)
    config = store.config()
    if config is None:
        raise L3EnvError(f"{folder}: no results here (no config.json)")
    try:
        grid = Grid.from_json(config)
    except L3EnvError as error:
        raise L3EnvError(f"{folder}/config.json: {error}") from None
    return _of_store(store, grid, store.rows(cell.key for cell in grid.cells()), 0)
