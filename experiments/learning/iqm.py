"""Goodput of a policy over that of its opponents: interquartile means with bootstrap intervals.

As Agarwal et al. (NeurIPS 2021, arXiv 2108.13264) recommend: the mean of the middle half of all ratios, cells x seeds,
and its 95 % interval from a bootstrap that draws seeds anew within each cell (stratified).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

CELL = ["system", "model", "trace", "utilization"]
GOODPUT = "slo_attainment_frac"
TRIM_FRAC = 0.25
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


def summarise(rows: Sequence[dict[str, Any]], learned: str, heuristics: Sequence[str]) -> dict[str, Any]:
    """The figures of ``l3env evaluate --json``.

    Args:
        rows: one per cell, policy and seed.
        learned: the policy that is judged.
        heuristics: those that ``best heuristic`` is chosen among, in each cell by its mean goodput over seeds.
    """
    table = pd.DataFrame(rows).pivot_table(index=CELL, columns=["policy", "seed"], values=GOODPUT, sort=False)
    least = (
        1.0 / pd.DataFrame(rows).groupby(CELL, sort=False)["requests_count"].max()
    )  # one request: no ratio is infinite
    ours = table[learned].to_numpy()
    present = list(dict.fromkeys(table.columns.get_level_values("policy")))
    means = table.T.groupby(level="policy").mean().T
    known = [name for name in heuristics if name in present]
    best_names = means[known].idxmax(axis=1) if known else None
    figures: dict[str, Any] = {"policy": learned, "cells_count": len(table), "seeds_count": ours.shape[1]}
    ratios = {}
    if best_names is not None:
        best = np.array([table.loc[cell, name].to_numpy() for cell, name in best_names.items()])
        ratios["best_heuristic"] = _ratio(ours, best, least)
    for name, policy in (
        ("l3", "l3"),
        ("best_constant", "best-constant"),
        ("best_constant_global", "best-constant-global"),
    ):
        if policy in present:
            ratios[name] = _ratio(ours, table[policy].to_numpy(), least)
    for name, ratio in ratios.items():
        low, high = interval(ratio)
        figures |= {f"iqm_vs_{name}": float(interquartile_mean(ratio)), f"iqm_vs_{name}_low": low}
        figures |= {f"iqm_vs_{name}_high": high, f"worst_cell_vs_{name}": float(ratio.mean(axis=1).min())}
    figures["cells"] = [
        dict(zip(CELL, cell, strict=True))
        | {"best_heuristic": None if best_names is None else best_names.iloc[i]}
        | {f"vs_{name}": float(ratio[i].mean()) for name, ratio in ratios.items()}
        | {"goodput_frac": {policy: _number(means.iloc[i][policy]) for policy in present}}
        for i, cell in enumerate(table.index)
    ]
    return figures


def _ratio(ours: NDArray[np.float64], theirs: NDArray[np.float64], least: pd.Series[Any]) -> NDArray[np.float64]:
    floor = least.to_numpy()[:, None]
    return np.maximum(ours, floor) / np.maximum(theirs, floor)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
