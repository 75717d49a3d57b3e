"""Time lines of several replicas on one grid of time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

BINS_COUNT = 240


@dataclass(frozen=True)
class Binned:
    """Means over bins of time, (BINS_COUNT,) each."""

    middle_s: NDArray[np.float64]
    kv_hbm_frac: NDArray[np.float64]  # mean of replicas
    kv_pim_frac: NDArray[np.float64]  # mean of replicas
    batch_count: NDArray[np.float64]  # decoded requests an iteration, 0 while idle; mean of replicas
    waiting_count: NDArray[np.float64]  # sum of replicas


def binned(frame: pd.DataFrame, horizon_s: float) -> Binned:
    """Averages a time line over equal bins from 0 to ``horizon_s``.

    A row's state (KV, queue) holds from its end to the end of the replica's next row, and is 0 after the last (a
    replica that is done holds nothing). Its batch holds while its iterations ran.
    """
    edges = np.linspace(0.0, max(horizon_s, 1e-12), BINS_COUNT + 1)
    sums = {name: np.zeros(BINS_COUNT) for name in ("kv_hbm_frac", "kv_pim_frac", "waiting_count", "batch_count")}
    replicas = [part.sort_values("end_s") for _, part in frame.groupby("replica")]
    for part in replicas:
        end_s = part["end_s"].to_numpy(dtype=float)
        length_s = np.append(np.diff(end_s), 0.0)
        for name in ("kv_hbm_frac", "kv_pim_frac", "waiting_count"):
            sums[name] += bin_means(edges, end_s, length_s, part[name].to_numpy(dtype=float))
        batch = part["decode_tokens"].to_numpy(dtype=float) / np.maximum(part["iterations_count"].to_numpy(), 1)
        duration_s = np.minimum(part["duration_s"].to_numpy(dtype=float), np.diff(end_s, prepend=0.0))
        sums["batch_count"] += bin_means(edges, end_s - duration_s, duration_s, batch)
    count = max(len(replicas), 1)
    return Binned(
        (edges[:-1] + edges[1:]) / 2,
        sums["kv_hbm_frac"] / count,
        sums["kv_pim_frac"] / count,
        sums["batch_count"] / count,
        sums["waiting_count"],
    )


def bin_means(
    edges: NDArray[np.float64], start_s: NDArray[np.float64], length_s: NDArray[np.float64], value: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mean over each bin of a function that is ``value[i]`` from ``start_s[i]`` for ``length_s[i]``, else 0.

    Pieces are in order and do not overlap.
    """
    times = np.column_stack([start_s, start_s + length_s]).ravel()
    integral = np.cumsum(np.column_stack([np.zeros_like(value), value * length_s]).ravel())
    at_edges = np.interp(edges, times, integral, left=0.0)
    return np.asarray(np.diff(at_edges) / np.diff(edges))
