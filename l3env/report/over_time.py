"""The picture of KV occupancy, batch and queue over time, and the averages over replicas and bins that it shows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from l3env.report.names import cell_frames, has_pim, heading, loads_of
from l3env.report.style import legend_below, looks, say
from l3env.runs.compare import Comparison

BINS_COUNT = 240
TIME_UNITS = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "s"))
PANELS = {
    "kv": "KV in use, mean of replicas",
    "batch_count": "batch (requests), mean of replicas",
    "waiting_count": "waiting requests, all replicas",
}
OTHERS = "#DDDDDD"


@dataclass(frozen=True)
class Binned:
    """Means over bins of time, (BINS_COUNT,) each."""

    middle_s: NDArray[np.float64]
    kv_hbm_frac: NDArray[np.float64]  # mean of replicas
    kv_pim_frac: NDArray[np.float64]  # mean of replicas
    batch_count: NDArray[np.float64]  # decoded requests an iteration, 0 while idle; mean of replicas
    waiting_count: NDArray[np.float64]  # sum of replicas


def timeline(comparison: Comparison) -> Figure:
    """KV occupancy, batch and queue over time, a row per policy: the first seed, the highest load."""
    results = comparison.done
    load, seed = max(loads_of(results)), int(results["seed"].min())
    look, pim = looks(results["policy"]), has_pim(results)
    first = results[results["seed"] == seed]
    frames = {policy: cell_frames(comparison.timelines, first, policy, load) for policy in look}
    known = {policy: found[0] for policy, found in frames.items() if found}
    horizon_s = max((float(frame["end_s"].max()) for frame in known.values()), default=0.0)
    lines = {policy: binned(frame, horizon_s) for policy, frame in known.items()}
    unit_s, unit = next((pair for pair in TIME_UNITS if horizon_s > 10 * pair[0]), TIME_UNITS[-1])
    figure = Figure(figsize=(12, 1.5 + 1.05 * len(look)))
    figure.suptitle(f"{heading(comparison, load)} · seed {seed}")
    panels = figure.subplots(len(look), len(PANELS), squeeze=False, sharex=True, sharey="col")
    for (policy, style), row in zip(look.items(), panels, strict=True):
        if policy in lines:
            _draw_row(row, lines, policy, style.colour, pim, unit_s)
        else:
            for axes in row:
                say(axes, "not recorded")
        row[0].set_ylabel(style.label, rotation=0, ha="right", va="center", color=style.colour, fontweight="bold")
    for title, top, bottom in zip(PANELS.values(), panels[0], panels[-1], strict=True):
        top.set_title(title)
        top.set_ylim(bottom=0)
        bottom.set_xlabel(f"time ({unit})")
    fullest = max((max(line.kv_hbm_frac.max(), line.kv_pim_frac.max()) for line in lines.values()), default=1.0)
    panels[0, 0].set_ylim(0, min(1.05, max(1.15 * float(fullest), 0.01)))
    panels[0, 0].yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[0, 0].set_xlim(0, horizon_s / unit_s or 1.0)
    _legend(figure, pim, len(look) > 1)
    return figure


def _draw_row(
    row: NDArray[np.object_], lines: dict[str, Binned], policy: str, colour: str, pim: bool, unit_s: float
) -> None:
    own = lines[policy]
    time = own.middle_s / unit_s
    row[0].plot(time, own.kv_hbm_frac, color=colour, linewidth=1.2)
    if pim:
        row[0].fill_between(time, own.kv_pim_frac, color=colour, alpha=0.3, linewidth=0)
    for axes, name in zip(row[1:], list(PANELS)[1:], strict=True):
        for other, line in lines.items():
            if other != policy:
                axes.plot(time, getattr(line, name), color=OTHERS, linewidth=0.6)
        axes.plot(time, getattr(own, name), color=colour, linewidth=1.2)


def _legend(figure: Figure, pim: bool, several: bool) -> None:
    own = Line2D([], [], color="#444444", linewidth=1.2, label="HBM" if pim else "this policy")
    handles: list[Line2D | Patch] = [own]
    if pim:
        handles.append(Patch(color="#444444", alpha=0.3, linewidth=0, label="PIM"))
    if several:
        handles.append(Line2D([], [], color=OTHERS, label="the other policies"))
    legend_below(figure, handles)


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
