"""Offline comparison: the same workloads under several policies, every replica simulated, results as rows.

Common random numbers: a cell's workload depends on trace, load and seed only, never on the policy.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from l3env.engine.engine import Slo
from l3env.engine.segments import eviction_rule
from l3env.errors import L3EnvError
from l3env.files import write_frame, write_text
from l3env.machine.pair import compile_pair
from l3env.machine.tables import DEFAULT_BLOCK_TOKENS, Tables
from l3env.policy.registry import make_policy
from l3env.requests.registry import load_trace
from l3env.requests.workload import Workload
from l3env.runs.capacity import load_at_capacity
from l3env.runs.driver import run_policy, training_window


@dataclass(frozen=True)
class CompareConfig:
    """Everything that repeats a comparison."""

    policies: tuple[str, ...]
    system: str
    model: str
    trace: str
    loads: tuple[float, ...] = (1.0,)
    utilizations: tuple[float, ...] = ()
    seeds_count: int = 1
    tp: int | None = None
    block_tokens: int = DEFAULT_BLOCK_TOKENS
    slo: Slo = field(default_factory=Slo)
    training: str | None = None  # trace of earlier requests to learn from; None: the first fifth of the trace itself
    prefix_cache: str = "off"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> CompareConfig:
        """The inverse of ``to_json``. Raises L3EnvError for unknown keys."""
        known = dict(raw)
        try:
            known["slo"] = Slo(**known.get("slo", {}))
            for name in ("policies", "loads", "utilizations"):
                known[name] = tuple(known.get(name, ()))
            return cls(**known)
        except TypeError as error:
            raise L3EnvError(f"comparison config: {error}") from None


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    policy: str
    load: float
    utilization: float | None
    seed: int

    @property
    def key(self) -> str:
        """File name of the cell's results."""
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in self.policy)
        return f"{name}.load{self.load:.6g}.seed{self.seed}"


@dataclass(frozen=True)
class Comparison:
    """Results of all cells: rows as the contract names them, requests and time lines by cell key."""

    config: CompareConfig
    results: pd.DataFrame
    requests: dict[str, pd.DataFrame]
    timelines: dict[str, pd.DataFrame]


def compare(
    policies: Sequence[str],
    system: str,
    model: str,
    trace: str,
    *,
    load: float | Sequence[float] = 1.0,
    utilization: float | Sequence[float] | None = None,
    seeds: int = 1,
    slo: Slo | None = None,
    tp: int | None = None,
    prefix_cache: str = "off",
    out: str | Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Comparison:
    """Runs every policy on the same workloads.

    Args:
        policies: names, or ``file.py:Class``.
        system: a preset's name or a TOML file.
        model: likewise.
        trace: a trace spec, see ``load_trace``.
        load: arrival rates as multiples of the trace's own.
        utilization: instead, as multiples of what the reference policy serves at saturation on this system.
        seeds: seed 0 is the trace itself, further ones are resampled from it (generated traces are drawn anew).
        prefix_cache: ``off``, or how cached prompt segments are given up: ``lru``, ``lfu``, ``tree``, ``score``.
        out: folder for the cells' results; cells found there from the same configuration are not run again.
        progress: called with (cells done, cells in all, name of the one now starting).

    Raises:
        L3EnvError: anything wrong with the input, before the first cell runs.
    """
    utilizations = () if utilization is None else tuple(np.atleast_1d(utilization).tolist())
    loads = () if utilizations else tuple(np.atleast_1d(load).tolist())
    config = CompareConfig(
        tuple(policies),
        system,
        model,
        trace,
        loads,
        utilizations,
        seeds,
        tp,
        slo=slo or Slo(),
        prefix_cache=prefix_cache,
    )
    return run_comparison(config, out=out, progress=progress)


def run_comparison(
    config: CompareConfig,
    *,
    out: str | Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Comparison:
    """Runs the cells of a configuration; see ``compare``."""
    if config.seeds_count < 1:
        raise L3EnvError(f"seeds = {config.seeds_count}; expected at least 1")
    tables = compile_pair(config.system, config.model, config.tp, config.block_tokens)
    for ref in config.policies:
        make_policy(ref)
    eviction_rule(config.prefix_cache)
    store = None if out is None else CellStore(Path(out), config)
    base = load_trace(config.trace, seed=0)
    _note_prefix_ids(config, base)
    training = training_window(base) if config.training is None else load_trace(config.training, seed=0)
    rows, requests, timelines = [], {}, {}
    cells = list(_cells(config, tables, base))
    workloads: dict[int, Workload] = {0: base}
    for done, cell in enumerate(cells):
        if progress is not None:
            progress(done, len(cells), f"{cell.policy}, load {cell.load:.3g}, seed {cell.seed}")
        stored = store.read(cell) if store is not None else None
        if stored is None:
            if cell.seed not in workloads:
                workloads[cell.seed] = load_trace(config.trace, seed=cell.seed)
            workload = workloads[cell.seed]
            separate = config.training is not None
            earlier = _earlier(tables, training, cell, separate=separate, prefix_cache=config.prefix_cache)
            if cell.load != 1.0:
                workload = workload.at_load(cell.load)
            start = time.perf_counter()
            outcome = run_policy(
                tables,
                workload,
                make_policy(cell.policy),
                slo=config.slo,
                training=earlier,
                prefix_cache=config.prefix_cache,
            )
            row = _identity(config, cell) | outcome.metrics | {"wall_s": time.perf_counter() - start}
            stored = (row, outcome.requests, outcome.timeline)
            if store is not None:
                store.write(cell, *stored)
        rows.append(stored[0])
        requests[cell.key], timelines[cell.key] = stored[1], stored[2]
    if progress is not None:
        progress(len(cells), len(cells), "done")
    return Comparison(config, pd.DataFrame(rows), requests, timelines)


def _earlier(tables: Tables, training: Workload, cell: Cell, *, separate: bool, prefix_cache: str) -> Workload:
    """The training requests at the cell's load; those of a trace of their own at the cell's utilization."""
    if separate and cell.utilization is not None:
        return training.at_load(cell.utilization * load_at_capacity(tables, training, prefix_cache=prefix_cache))
    return training.at_load(cell.load)


def _note_prefix_ids(config: CompareConfig, base: Workload) -> None:
    if base.prefix_ids.size and config.prefix_cache == "off":
        text = "has prefix ids, and the prefix cache is off; with lru, equal beginnings of prompts share their KV"
    elif not base.prefix_ids.size and config.prefix_cache != "off":
        text = f"has no prefix ids, so prefix cache {config.prefix_cache} has no effect"
    else:
        return
    warnings.warn(f"trace {config.trace} {text}", stacklevel=3)


def _cells(config: CompareConfig, tables: Tables, base: Workload) -> Iterator[Cell]:
    pairs: list[tuple[float, float | None]] = [(load, None) for load in config.loads]
    if config.utilizations:
        full = load_at_capacity(tables, base, prefix_cache=config.prefix_cache)
        pairs = [(utilization * full, utilization) for utilization in config.utilizations]
    for load, utilization in pairs:
        for seed in range(config.seeds_count):
            for policy in config.policies:
                yield Cell(policy, load, utilization, seed)


def _identity(config: CompareConfig, cell: Cell) -> dict[str, Any]:
    return {
        "policy": cell.policy,
        "system": config.system,
        "model": config.model,
        "trace": config.trace,
        "load": cell.load,
        "utilization": cell.utilization,
        "seed": cell.seed,
        "prefix_cache": config.prefix_cache,
    }


class CellStore:
    """Results on disk, one cell at a time, each complete or absent.

    ``config.json`` says what the folder belongs to; a folder of another configuration is refused.
    """

    def __init__(self, folder: Path, config: CompareConfig) -> None:
        self.folder = folder
        wanted = json.loads(json.dumps(config.to_json()))
        path = folder / "config.json"
        if path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                raise L3EnvError(f"{path}: not JSON: {error}; remove the folder or choose another --out") from None
            if {"prefix_cache": "off", **found} != wanted:  # folders from before there was one
                raise L3EnvError(f"{folder} holds results of another configuration; remove it or choose another --out")
        for name in ("cells", "requests", "timelines"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(wanted, indent=2) + "\n")

    def read(self, cell: Cell) -> tuple[dict[str, Any], pd.DataFrame, pd.DataFrame] | None:
        """A finished cell, or None."""
        path = self.folder / "cells" / f"{cell.key}.json"
        if not path.exists():
            return None
        row = json.loads(path.read_text(encoding="utf-8"))
        tables = [pd.read_parquet(self.folder / kind / f"{cell.key}.parquet") for kind in ("requests", "timelines")]
        return row, tables[0], tables[1]

    def write(self, cell: Cell, row: dict[str, Any], requests: pd.DataFrame, timeline: pd.DataFrame) -> None:
        """The row comes last: a cell with a row is whole."""
        for kind, frame in (("requests", requests), ("timelines", timeline)):
            write_frame(self.folder / kind / f"{cell.key}.parquet", frame)
        write_text(self.folder / "cells" / f"{cell.key}.json", json.dumps(row) + "\n")
