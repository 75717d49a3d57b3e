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
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from l3env.engine.engine import Slo
from l3env.errors import L3EnvError
from l3env.machine.tables import DEFAULT_BLOCK_TOKENS
from l3env.policy.registry import make_policy
from l3env.requests.registry import load_trace
from l3env.runs.driver import run_policy, training_window
from l3env.study.sweep import compiled, full_load, loaded, spread

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


@dataclass(frozen=True)
class CapacityJob:
    """One search: a policy on a system, one seed of the trace."""

    policy: str
    system: str
    model: str
    trace: str
    seed: int
    target_frac: float
    tolerance_frac: float
    slo: Slo
    tp: int | None = None


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


def search(job: CapacityJob) -> tuple[CapacityJob, Bracket, dict[str, float]]:
    """One seed's bracket, and the run's figures at its lower end (none where that is 0)."""
    tables = compiled(job.system, job.model, job.tp, DEFAULT_BLOCK_TOKENS)
    workload, training = loaded(job.trace, job.seed), training_window(loaded(job.trace, 0))

    def serve(load: float, record: bool) -> dict[str, float]:
        policy = make_policy(job.policy)
        outcome = run_policy(tables, workload.at_load(load), policy, slo=job.slo, training=training, record=record)
        return outcome.metrics

    start = full_load(job.system, job.model, job.tp, DEFAULT_BLOCK_TOKENS, job.trace) / 2
    found = bracket(
        lambda load: serve(load, False)["slo_attainment_frac"] >= job.target_frac, start, job.tolerance_frac
    )
    return job, found, serve(found.low, True) if found.low > 0 else {}


def capacities(
    jobs: Sequence[CapacityJob],
    *,
    backend: str = "loky",
    workers_count: int = -1,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[dict[str, Any]]:
    """A row per policy, system, model and trace: ``capacity_load`` and ``capacity_requests_per_s`` with ``_low`` and
    ``_high``, the brackets they come from, and means over seeds of the figures at capacity (AT_CAPACITY).

    Raises:
        L3EnvError: a target or tolerance that is none; all requests of a trace arrive at once.
    """
    for job in jobs:
        make_policy(job.policy)
        if not 0 < job.target_frac <= 1:
            raise L3EnvError(f"target = {job.target_frac}; expected a share of requests above 0, at most 1")
        if not 0 < job.tolerance_frac < 1:
            raise L3EnvError(f"tolerance = {job.tolerance_frac}; expected a number between 0 and 1")
    for trace in {job.trace for job in jobs}:
        load_trace(trace)  # says where an embedded profile stands in
    found: dict[CapacityJob, tuple[Bracket, dict[str, float]]] = {}
    for job, span, figures in spread(search, jobs, backend=backend, workers_count=workers_count):
        found[job] = (span, figures)
        if progress is not None:
            progress(len(found), len(jobs), f"{job.policy} on {job.system}, seed {job.seed}")
    groups: dict[tuple[str, ...], list[CapacityJob]] = {}
    for job in jobs:
        groups.setdefault((job.policy, job.system, job.model, job.trace), []).append(job)
    return [_row(group, [found[job] for job in group]) for group in groups.values()]


def _row(jobs: list[CapacityJob], found: list[tuple[Bracket, dict[str, float]]]) -> dict[str, Any]:
    brackets = [span for span, _ in found]
    first, rate = jobs[0], loaded(jobs[0].trace, 0).rate_per_s
    loads = dict(zip(("", "_low", "_high"), interval(brackets), strict=True))
    row: dict[str, Any] = {"policy": first.policy, "system": first.system, "model": first.model, "trace": first.trace}
    row |= {"target_frac": first.target_frac, "seeds_count": len(jobs)}
    row |= {f"capacity_load{end}": load for end, load in loads.items()}
    row |= {f"capacity_requests_per_s{end}": load * rate for end, load in loads.items()}
    row["brackets"] = [{"seed": job.seed, "low": b.low, "high": b.high} for job, b in zip(jobs, brackets, strict=True)]
    row["runs_count"] = sum(b.runs_count for b in brackets)
    known = [figures for _, figures in found if figures]
    row |= {name: float(np.mean([f[name] for f in known])) if known else math.nan for name in AT_CAPACITY}
    return row
