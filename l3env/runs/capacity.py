"""The capacity of a system under a policy: the highest load at which a share of the requests meets its SLO.

One seed gives one load. It is bracketed by doubling or halving from half the load that saturates the system, then the
bracket is bisected (on a logarithmic scale, as loads are ratios) until its ends are within a tolerance. What is found
is the first load above which the share was missed; below it the share was met wherever it was tried.

Confidence: seeds are independent draws of the workload, so the logarithms of their capacities get Student's 95 %
interval, its lower bound from the brackets' lower ends and its upper one from the upper ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from l3env.errors import L3EnvError
from l3env.runs.cell import Cell, Ready, Result, serve
from l3env.runs.jobs import Progress
from l3env.runs.plan import run_cells
from l3env.runs.store import Done, Store
from l3env.runs.workers import HERE, Workers

CONFIDENCE = 0.95
DOUBLINGS_MAX = 10
HALVINGS_MAX = 12
AT_CAPACITY = ("output_tokens_per_s", "goodput_requests_per_s", "ttft_p99_s", "tbt_p99_s", "energy_j_per_token")


@dataclass(frozen=True)
class Bracket:
    """Loads between which the capacity lies. ``low`` is 0 where no load met the share, ``high`` inf where all did."""

    low: float
    high: float
    runs_count: int


def bracket(met: Callable[[float], bool], start: float, tolerance_frac: float) -> Bracket:
    """The bracket of the largest load with ``met``: ``high <= (1 + tolerance) low``; see above for the search."""
    runs = 1
    if met(start):
        low, high = start, 2 * start
        while met(high):
            runs += 1
            low, high = high, 2 * high
            if runs > DOUBLINGS_MAX:
                return Bracket(low, math.inf, runs)
        runs += 1
    else:
        low, high = start / 2, start
        while not met(low):
            runs += 1
            low, high = low / 2, low
            if runs > HALVINGS_MAX:
                return Bracket(0.0, high, runs)
        runs += 1
    while high > (1 + tolerance_frac) * low:
        middle = math.sqrt(low * high)
        runs += 1
        if met(middle):
            low = middle
        else:
            high = middle
    return Bracket(low, high, runs)


def interval(brackets: Sequence[Bracket]) -> tuple[float, float, float]:
    """(estimate, lower, upper) of the capacity from the brackets of independent seeds.

    The estimate is the geometric mean of the lower ends. One seed has no spread: its bounds are its bracket's. Where a
    seed never met the share the estimate and lower bound are 0; where one always did, the upper bound is infinite.
    """
    lows, highs = np.array([b.low for b in brackets]), np.array([b.high for b in brackets])
    if (lows == 0).any():
        return 0.0, 0.0, float(highs.max())
    low, high = np.log(lows), np.log(highs)
    if len(brackets) == 1:
        return float(lows[0]), float(lows[0]), float(highs[0])
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, len(brackets) - 1) / math.sqrt(len(brackets))
    upper = math.inf if np.isinf(high).any() else math.exp(high.mean() + reach * high.std(ddof=1))
    return math.exp(low.mean()), math.exp(low.mean() - reach * low.std(ddof=1)), upper


def search(ready: Ready, target_frac: float, tolerance_frac: float) -> Result:
    """One seed's bracket, and the run's figures at its lower end (none where that is 0). The cell is at utilization 1;
    what its policy learns from is at the load that is tried."""

    def serve_at(load: float, record: bool) -> dict[str, Any]:
        cell = replace(ready.cell, record=record)
        return serve(replace(ready, cell=cell, load=load, training_load=load))[0]

    start = ready.load / 2
    found = bracket(lambda load: serve_at(load, False)["slo_attainment_frac"] >= target_frac, start, tolerance_frac)
    figures = serve_at(found.low, True) if found.low > 0 else {}
    known = {name: figures.get(name, math.nan) for name in AT_CAPACITY}
    return known | asdict(found) | {"rate_per_s": ready.workload.rate_per_s}, {}


def capacities(
    cells: Sequence[Cell],
    *,
    target_frac: float = 0.9,
    tolerance_frac: float = 0.02,
    store: Store | None = None,
    workers: Workers = HERE,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """A row per policy, system, model and trace: ``capacity_load`` and ``capacity_requests_per_s`` with ``_low`` and
    ``_high``, the brackets they come from, and means over seeds of the figures at capacity (AT_CAPACITY); or the error.

    Args:
        cells: at utilization 1, as from a grid with that alone.

    Raises:
        L3EnvError: a target or tolerance that is none; no cell can be run.
    """
    if not 0 < target_frac <= 1:
        raise L3EnvError(f"target = {target_frac}; expected a share of requests above 0, at most 1")
    if not 0 < tolerance_frac < 1:
        raise L3EnvError(f"tolerance = {tolerance_frac}; expected a number between 0 and 1")
    asked = {"target_frac": target_frac, "tolerance_frac": tolerance_frac}
    ended = run_cells(cells, search, asked, store=store, workers=workers, progress=progress)
    groups: dict[tuple[str, ...], list[Done]] = {}
    for cell, done in zip(cells, ended.done, strict=True):
        groups.setdefault((cell.policy, cell.system, cell.model, cell.trace), []).append(done)
    return [_row(found, target_frac) for found in groups.values()]


def _row(found: Sequence[Done], target_frac: float) -> dict[str, Any]:
    first = found[0]
    row = {name: first.row.get(name) for name in ("policy", "system", "model", "trace", "stands_in_for")}
    row |= {name: value for name, value in first.row.items() if name.startswith("slo_")}
    row |= {"prefix_cache": first.row["prefix_cache"], "target_frac": target_frac, "seeds_count": len(found)}
    errors = [done.error for done in found if done.error is not None]
    row["error"] = errors[0] if errors else None
    if errors:
        return row
    brackets = [Bracket(done.figures["low"], done.figures["high"], done.figures["runs_count"]) for done in found]
    loads = dict(zip(("", "_low", "_high"), interval(brackets), strict=True))
    row |= {f"capacity_load{end}": load for end, load in loads.items()}
    row |= {f"capacity_requests_per_s{end}": load * first.figures["rate_per_s"] for end, load in loads.items()}
    row["brackets"] = [
        {"seed": done.row["seed"], "low": b.low, "high": b.high} for done, b in zip(found, brackets, strict=True)
    ]
    row["runs_count"] = sum(b.runs_count for b in brackets)
    figures = {name: [done.figures[name] for done in found if done.figures["low"] > 0] for name in AT_CAPACITY}
    return row | {name: float(np.mean(values)) if values else math.nan for name, values in figures.items()}
