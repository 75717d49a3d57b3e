"""Goodput of a policy, guarded or plain, over that of its opponents: interquartile means with bootstrap intervals.

As Agarwal et al. (NeurIPS 2021, arXiv 2108.13264) recommend: the mean of the middle half of all ratios, cells x seeds,
and its 95 % interval from a bootstrap that draws seeds anew within each cell (stratified).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from l3env.errors import L3EnvError
from l3env.search.objective import FIGURES, Objective

CELL = ["system", "model", "trace", "utilization"]
TRIM_FRAC = 0.25
POLICIES = {
    "l3": "l3",
    "best_constant": "best-constant",
    "best_constant_global": "best-constant-global",
    "best_constant_in_order": "best-constant-in-order",
}
RESAMPLES = 2000
LEVEL = 0.95


def interquartile_mean(values: Any, axis: int | None = None) -> Any:
    """Mean without the lowest and the highest quarter."""
    return stats.trim_mean(values, TRIM_FRAC, axis=axis)


def interval(ratios: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the IQM of (C, S) ratios; both ends equal where there is one seed."""
    if ratios.shape[1] < 2:
        both = float(interquartile_mean(ratios))
        return both, both

    def statistic(*cells: NDArray[np.float64], axis: int = -1) -> Any:
        return interquartile_mean(np.concatenate(cells, axis=axis), axis=axis)

    found = stats.bootstrap(
        tuple(ratios),
        statistic,
        n_resamples=RESAMPLES,
        batch=200,
        confidence_level=LEVEL,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def summarise(
    rows: Sequence[dict[str, Any]],
    learned: str,
    heuristics: Sequence[str],
    objective: Objective = Objective.GUARDED,
) -> dict[str, Any]:
    """The figures of ``l3env evaluate --json``.

    Args:
        rows: one per cell, policy and seed.
        learned: the policy that is judged.
        heuristics: those that ``best heuristic`` is chosen among, in each cell by its mean goodput over seeds.
        objective: what goodput is here: guarded (below one request's share it counts as that) or plain.
    """
    goodput, requests_count, cells = _arrays(rows, FIGURES[objective])
    ours = goodput[learned]
    known = [name for name in heuristics if name in goodput]
    opponents = {name: goodput[policy] for name, policy in POLICIES.items() if policy in goodput}
    best_names: list[str | None] = [None] * len(cells)
    if known:
        means = np.array([goodput[name].mean(axis=1) for name in known])
        best = np.argmax(means, axis=0)
        best_names = [known[k] for k in best]
        opponents["best_heuristic"] = np.array([goodput[known[k]][c] for c, k in enumerate(best)])
    floor = 1.0 / requests_count[:, None]  # one request: no ratio is infinite or negative
    ratios = {name: np.maximum(ours, floor) / np.maximum(theirs, floor) for name, theirs in opponents.items()}
    figures: dict[str, Any] = {"policy": learned, "objective": str(objective)}
    figures |= {"cells_count": len(cells), "seeds_count": ours.shape[1]}
    for name, ratio in ratios.items():
        low, high = interval(ratio)
        figures |= {f"iqm_vs_{name}": float(interquartile_mean(ratio)), f"iqm_vs_{name}_low": low}
        figures |= {f"iqm_vs_{name}_high": high, f"worst_cell_vs_{name}": float(ratio.mean(axis=1).min())}
    figures["cells"] = [
        dict(zip(CELL, cell, strict=True))
        | {"best_heuristic": best_names[c]}
        | {f"vs_{name}": float(ratio[c].mean()) for name, ratio in ratios.items()}
        | {"goodput_frac": {policy: float(values[c].mean()) for policy, values in goodput.items()}}
        for c, cell in enumerate(cells)
    ]
    return figures


def _arrays(
    rows: Sequence[dict[str, Any]], figure: str
) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.float64], list[tuple[Any, ...]]]:
    """((C, S) goodput by policy, (C,) requests, cells). Raises L3EnvError where a run is missing."""
    cells = {cell: c for c, cell in enumerate(dict.fromkeys(tuple(row[name] for name in CELL) for row in rows))}
    seeds_count = 1 + max(row["seed"] for row in rows)
    policies = dict.fromkeys(row["policy"] for row in rows)
    goodput = {policy: np.full((len(cells), seeds_count), np.nan) for policy in policies}
    requests_count = np.ones(len(cells))
    for row in rows:
        c = cells[tuple(row[name] for name in CELL)]
        goodput[row["policy"]][c, row["seed"]] = row[figure]
        requests_count[c] = max(requests_count[c], row["requests_count"])
    for policy, values in goodput.items():
        if np.isnan(values).any():
            raise L3EnvError(f"evaluation: {policy} lacks {int(np.isnan(values).sum())} of {values.size} runs")
    return goodput, requests_count, list(cells)
