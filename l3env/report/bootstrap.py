"""Bootstrap confidence intervals of the main figures, and of differences to the best policy.

What is resampled are seeds where there are three or more, else blocks of consecutive requests: neighbours in a queue
share their fate, so single requests are not independent. Every policy is resampled alike (common random numbers), which
makes differences between policies much surer than the policies' own intervals.

Intervals are percentiles of the bootstrap means, their distance from the mean stretched by
``sqrt(n / (n - 1)) t(n - 1) / z``. Plain percentiles of few units are too narrow (three seeds cover 75 % at best); the
stretched ones have the width of Student's interval and keep the skewness. See Hesterberg 2015, "What Teachers Should
Know About the Bootstrap", section 3.2 (narrowness bias), who corrects the percentiles to the same end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from l3env.engine.guard import beyond_guard
from l3env.report.names import loads_of, unique, utilization_of

CONFIDENCE = 0.95
RESAMPLES = 2000
MIN_SEEDS = 3
BLOCK_REQUESTS = 50  # smaller where that leaves fewer than MIN_BLOCKS, larger where it leaves more than MAX_BLOCKS
MIN_BLOCKS = 20
MAX_BLOCKS = 100  # long blocks follow slow swings of the queue; more than some dozens of blocks add no precision

GOODPUT = "goodput_requests_per_s"
GUARDED = "guarded_goodput_requests_per_s"
HIGHER_IS_BETTER = (GOODPUT, GUARDED, "slo_attainment_frac", "output_tokens_per_s", "requests_per_s")
SEED_FIGURES = (
    *HIGHER_IS_BETTER,
    *("ttft_mean_s", "ttft_p99_s", "tbt_mean_s", "tbt_p99_s", "tpot_mean_s", "e2e_mean_s", "e2e_p99_s"),
    *("longest_wait_s", "starved_frac", "energy_j_per_token", "gpu_busy_frac", "pim_busy_frac"),
)
REQUEST_FIGURES = (GOODPUT, GUARDED, "slo_attainment_frac", "ttft_mean_s", "tpot_mean_s", "e2e_mean_s")
UNRANKED = ("gpu_busy_frac", "pim_busy_frac")  # neither more nor less is better
INTERVAL_COLUMNS = (
    *("policy", "load", "utilization", "figure", "mean", "low", "high", "resampled", "units_count"),
    *("best_policy", "difference_mean", "difference_low", "difference_high"),
)


@dataclass(frozen=True)
class Units:
    """K units to resample, for each of P policies and M figures their sums and the number of values in these."""

    resampled: str  # "seeds" or "requests"
    figures: tuple[str, ...]
    sums: NDArray[np.float64]  # (K, P, M)
    counts: NDArray[np.float64]  # (K, P, M)


def intervals(results: pd.DataFrame, requests: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """95 % intervals per policy, load and figure.

    Args:
        results: one row per policy, load and seed.
        requests: requests by the rows' ``key``; needed where there are fewer than three seeds.

    Returns:
        Columns ``INTERVAL_COLUMNS``. Differences are policy minus the best policy of that figure and load, paired; NaN
        where neither more nor less is better. Bounds are NaN where there are fewer than two units.
    """
    rows: list[dict[str, object]] = []
    for load in loads_of(results):
        group = results[results["load"] == load]
        policies = unique(group["policy"])
        seeded = group["seed"].nunique() >= MIN_SEEDS
        units = seed_units(group, policies) if seeded else request_units(group, policies, requests)
        head = {"load": load, "utilization": utilization_of(results, load)}
        rows += [head | row for row in _rows(units, policies)]
    return pd.DataFrame(rows, columns=list(INTERVAL_COLUMNS))


def seed_units(group: pd.DataFrame, policies: list[str]) -> Units:
    """A unit per seed: the figures of its result row."""
    seeds = sorted(set(group["seed"]))
    values = np.full((len(seeds), len(policies), len(SEED_FIGURES)), np.nan)
    figures = group.reindex(columns=list(SEED_FIGURES)).to_numpy(dtype=float)
    for policy, seed, row in zip(group["policy"], group["seed"], figures, strict=True):
        values[seeds.index(seed), policies.index(policy)] = row
    known = np.isfinite(values)
    return Units("seeds", SEED_FIGURES, np.where(known, values, 0.0), known.astype(float))


def request_units(group: pd.DataFrame, policies: list[str], requests: Mapping[str, pd.DataFrame]) -> Units:
    """A unit per block of consecutive requests, the blocks of several seeds one after the other.

    Goodput counts requests that met their SLO within the run's steady window; guarded goodput, less those that waited
    beyond the guard.
    """
    parts: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    shape = (len(policies), len(REQUEST_FIGURES))
    for seed in sorted(set(group["seed"])):
        cells = group[group["seed"] == seed]
        frames = {policy: requests.get(key) for policy, key in zip(cells["policy"], cells["key"], strict=True)}
        count = max(
            (int(frame["row"].max()) + 1 for frame in frames.values() if frame is not None and len(frame)), default=0
        )
        size = block_size(count)
        blocks = max(-(-count // size), 1)
        sums, counts = np.zeros((blocks, *shape)), np.zeros((blocks, *shape))
        window_s = cells["steady_window_s" if "steady_window_s" in cells else "makespan_s"]
        for policy, of_run_s in zip(cells["policy"], window_s, strict=True):
            frame = frames[policy]
            if frame is None or frame.empty:
                continue
            p = policies.index(policy)
            block = frame["row"].to_numpy() // size
            for m, values in enumerate(_request_values(frame, float(of_run_s))):
                known = np.isfinite(values)
                sums[:, p, m] = np.bincount(block, np.where(known, values, 0.0), minlength=blocks)
                counts[:, p, m] = np.bincount(block, known, minlength=blocks)
        parts.append((sums, counts))
    return Units(
        "requests", REQUEST_FIGURES, np.concatenate([s for s, _ in parts]), np.concatenate([c for _, c in parts])
    )


def block_size(requests_count: int) -> int:
    """Requests in a block."""
    return max(min(BLOCK_REQUESTS, requests_count // MIN_BLOCKS), -(-requests_count // MAX_BLOCKS), 1)


def _request_values(frame: pd.DataFrame, window_s: float) -> list[NDArray[np.float64]]:
    """Values of REQUEST_FIGURES, in that order, whose means are the figures."""
    met = frame["slo_met"].to_numpy(dtype=float)
    finish_s, arrival_s = frame["finish_s"].to_numpy(dtype=float), frame["arrival_s"].to_numpy(dtype=float)
    inside = finish_s - np.nanmin(arrival_s) <= window_s
    rate = len(frame) / window_s if window_s > 0 else np.nan
    waited_s = frame["wait_s" if "wait_s" in frame else "ttft_s"].to_numpy(dtype=float)  # of older results
    lost = beyond_guard(waited_s, frame["ttft_slo_s"].to_numpy(dtype=float))
    earned = met * inside * rate
    return [
        earned,
        earned - lost * rate,
        met,
        *(frame[name].to_numpy(dtype=float) for name in ("ttft_s", "tpot_s", "e2e_s")),
    ]


def _rows(units: Units, policies: list[str]) -> list[dict[str, object]]:
    """Interval rows of one load."""
    mean, draws = bootstrap_means(units)
    used = (units.counts > 0).sum(axis=0)  # (P, M)
    low, high = bounds(mean, draws, used)
    fractions = np.array([name.endswith("_frac") for name in units.figures])
    low = np.where([name == GUARDED for name in units.figures], low, np.maximum(low, 0.0))
    high = np.where(fractions, np.minimum(high, 1.0), high)
    best = best_policies(mean, units.figures)  # (M,)
    columns = np.arange(len(units.figures))
    gap = mean - mean[best, columns]
    gap_low, gap_high = bounds(gap, draws - draws[:, best, columns][:, None, :], np.minimum(used, used[best, columns]))
    rows: list[dict[str, object]] = []
    for p, policy in enumerate(policies):
        for m, figure in enumerate(units.figures):
            row: dict[str, object] = {"policy": policy, "figure": figure, "resampled": units.resampled}
            row |= {"mean": mean[p, m], "low": low[p, m], "high": high[p, m], "units_count": int(used[p, m])}
            if figure not in UNRANKED and np.isfinite(mean[best[m], m]):
                row |= {"best_policy": policies[best[m]], "difference_mean": gap[p, m]}
                row |= {"difference_low": gap_low[p, m], "difference_high": gap_high[p, m]}
            rows.append(row)
    return rows


def bootstrap_means(units: Units) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(P, M) means and (B, P, M) means of resamples; NaN where no value is known."""
    count, *shape = units.sums.shape
    sums, counts = units.sums.reshape(count, -1), units.counts.reshape(count, -1)
    rng = np.random.default_rng(0)
    weights = rng.multinomial(count, np.full(count, 1 / max(count, 1)), size=RESAMPLES).astype(float)  # (B, K)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sums.sum(axis=0) / counts.sum(axis=0)
        draws = (weights @ sums) / (weights @ counts)
    return mean.reshape(shape), draws.reshape(-1, *shape)


def bounds(
    mean: NDArray[np.float64], draws: NDArray[np.float64], units_count: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lower and upper bounds (P, M) around ``mean`` from ``draws`` (B, P, M); NaN below two units."""
    tail = (1 - CONFIDENCE) / 2
    known = np.isfinite(draws)
    filled = np.where(known.any(axis=0), draws, 0.0)  # keeps nanquantile from warning where nothing is known
    low, high = np.nanquantile(filled, [tail, 1 - tail], axis=0)
    n = np.maximum(units_count, 2)
    stretch = np.sqrt(n / (n - 1)) * stats.t.ppf(1 - tail, n - 1) / stats.norm.ppf(1 - tail)
    enough = (units_count >= 2) & np.isfinite(mean)
    return (
        np.where(enough, mean - stretch * (mean - low), np.nan),
        np.where(enough, mean + stretch * (high - mean), np.nan),
    )


def best_policies(mean: NDArray[np.float64], figures: tuple[str, ...]) -> NDArray[np.int64]:
    """(M,) index of the best policy of each figure; the first of equals, 0 where none has it."""
    signs = np.array([1.0 if name in HIGHER_IS_BETTER else -1.0 for name in figures])
    best: NDArray[np.int64] = np.argmax(np.where(np.isfinite(mean), mean * signs, -np.inf), axis=0)
    return best
