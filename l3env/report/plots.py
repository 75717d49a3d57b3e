"""Pictures of a comparison. Each function draws one and returns it; ``style.save`` writes it."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter
from numpy.typing import NDArray

from l3env.report.bootstrap import GOODPUT
from l3env.report.names import cell_frames, has_pim, heading, load_label, loads_of, mean_of, number, utilization_of
from l3env.report.style import legend_below, looks, say, time_text
from l3env.runs.compare import Comparison

PANELS_MAX = 3  # loads side by side
LINE_POINTS = 2000
LATENCY_TITLES = {"ttft_s": "time to first token", "tpot_s": "time per output token", "e2e_s": "end-to-end latency"}
BUSY, BUBBLE, IDLE = "#4477AA", "#EE9944", "#E8E8E8"


def shown_loads(results: pd.DataFrame) -> list[float]:
    """All loads, or lowest, middle and highest where there are more than fit."""
    loads = loads_of(results)
    if len(loads) <= PANELS_MAX:
        return loads
    return [loads[i] for i in np.linspace(0, len(loads) - 1, PANELS_MAX).round().astype(int)]


def latency_cdf(comparison: Comparison) -> Figure:
    """Share of requests whose latency is at most x; a row per load. Rejected requests never get there."""
    results, loads = comparison.done, shown_loads(comparison.done)
    look = looks(results["policy"])
    figure = Figure(figsize=(12, 1.3 + 3.1 * len(loads) + 0.25 * math.ceil(len(look) / 6)))
    figure.suptitle(heading(comparison, loads[0] if len(loads) == 1 else None))
    panels = figure.subplots(len(loads), len(LATENCY_TITLES), squeeze=False, sharey=True, sharex="col")
    for i, (row, load) in enumerate(zip(panels, loads, strict=True)):
        for axes, (column, title) in zip(row, LATENCY_TITLES.items(), strict=True):
            drawn = False
            for policy, style in look.items():
                values, shares = cdf(cell_frames(comparison.requests, results, policy, load), column)
                if values.size:
                    axes.plot(values, shares, color=style.colour, linestyle=style.line)
                    drawn = True
            if drawn:
                _log_time_axis(axes)
            else:
                say(axes, "no finished request")
            if i == len(loads) - 1:
                axes.set_xlabel(title)
            elif i == 0:
                axes.set_title(title)
        row[0].set_ylabel(("" if len(loads) == 1 else load_label(results, load) + "\n") + "share of requests")
        row[0].set_ylim(0, 1.02)
        row[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    legend_below(figure, [style.handle for style in look.values()])
    return figure


def cdf(frames: list[pd.DataFrame], column: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Latencies ascending and the share of requests up to each, at LINE_POINTS places at most.

    The share is of all requests that can have that latency; only those with two tokens or more have a TPOT.
    """
    if not frames:
        return np.empty(0), np.empty(0)
    pooled = pd.concat([frame[["output_tokens", column]] for frame in frames])
    values = pooled[column].to_numpy(dtype=float)
    total = int((pooled["output_tokens"] > 1).sum()) if column == "tpot_s" else values.size
    values = np.sort(values[np.isfinite(values) & (values > 0)])
    if values.size == 0:
        return values, values
    places = np.unique(np.linspace(0, values.size - 1, min(LINE_POINTS, values.size)).round().astype(int))
    shares = (places + 1) / max(total, 1)
    return np.concatenate([values[:1], values[places]]), np.concatenate([[0.0], shares])


def _log_time_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(numticks=7))
    axes.xaxis.set_major_formatter(time_text)
    axes.xaxis.set_minor_formatter(NullFormatter())


def utilisation(comparison: Comparison) -> Figure:
    """Share of the makespan that each device is busy, waits for the other within an iteration, or has no work."""
    results, loads = comparison.done, shown_loads(comparison.done)
    look, devices = looks(results["policy"]), ("gpu", "pim") if has_pim(results) else ("gpu",)
    figure = Figure(figsize=(2.5 + 4.2 * max(len(loads), 1.6), 1.4 + 0.2 * (len(devices) + 1) * (len(look) + 1)))
    figure.suptitle(heading(comparison, loads[0] if len(loads) == 1 else None))
    panels = figure.subplots(1, len(loads), squeeze=False, sharey=True)[0]
    places, names = [], []
    step = 2.8 if len(devices) > 1 else 1.3
    for i, style in enumerate(look.values()):
        for j, device in enumerate(devices):
            places.append(i * step + j)
            names.append(f"{style.label}  {device.upper()}" if j == 0 else device.upper())
    for axes, load in zip(panels, loads, strict=True):
        shares = np.array([_shares(results, policy, load, device) for policy in look for device in devices])
        left = np.zeros(len(places))
        for column, colour in enumerate((BUSY, BUBBLE, IDLE)):
            axes.barh(places, shares[:, column], left=left, height=0.85, color=colour)
            left += np.nan_to_num(shares[:, column])
        for place, row in zip(places, shares, strict=True):
            if np.isfinite(row[0]):
                _bar_text(axes, row[0], place)
        axes.set(xlim=(0, 1), xlabel="share of makespan", title="" if len(loads) == 1 else load_label(results, load))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(visible=False, axis="y")
        axes.margins(y=0.02)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(places, names)
    panels[0].invert_yaxis()
    labels = {"busy": BUSY, "bubble (waits for the other device)": BUBBLE, "idle (no work)": IDLE}
    legend_below(figure, [Patch(color=colour, label=label) for label, colour in labels.items()])
    return figure


def _bar_text(axes: Axes, share: float, place: float) -> None:
    inside = share > 0.12
    axes.text(
        share - 0.01 if inside else share + 0.01,
        place,
        f"{share:.0%}",
        ha="right" if inside else "left",
        va="center",
        fontsize=7,
        color="white" if inside else "black",
    )


def _shares(results: pd.DataFrame, policy: str, load: float, device: str) -> tuple[float, float, float]:
    """Busy, bubble and idle share of the makespan. Iterations last for busy / (1 - bubble), whichever device tells."""
    busy = {name: mean_of(results, policy, load, f"{name}_busy_frac") for name in ("gpu", "pim")}
    bubble = {name: mean_of(results, policy, load, f"{name}_bubble_frac") for name in ("gpu", "pim")}
    teller = max(busy, key=lambda name: np.nan_to_num(busy[name]))
    iterating = min(busy[teller] / max(1 - bubble[teller], 1e-12), 1.0)
    return busy[device], max(iterating - busy[device], 0.0), 1 - iterating


def goodput(comparison: Comparison, rows: pd.DataFrame) -> Figure:
    """Bars with 95 % intervals; a panel per load."""
    results, loads = comparison.done, shown_loads(comparison.done)
    look = looks(results["policy"])
    figure = Figure(figsize=(2.5 + 4.2 * max(len(loads), 1.4), 1.3 + 0.36 * len(look)))
    figure.suptitle(heading(comparison, loads[0] if len(loads) == 1 else None))
    panels = figure.subplots(1, len(loads), squeeze=False, sharey=True)[0]
    reaches = []
    for axes, load in zip(panels, loads, strict=True):
        values = np.array([mean_of(results, policy, load, GOODPUT) for policy in look])
        errors = np.array([_error(rows, policy, load, value) for policy, value in zip(look, values, strict=True)]).T
        places = np.arange(len(look))
        axes.barh(places, np.nan_to_num(values), height=0.7, color=[style.colour for style in look.values()])
        for colour, width in (("white", 2.8), ("#333333", 1.2)):  # rimmed, so that it shows on every bar
            axes.errorbar(
                values, places, xerr=errors, fmt="none", ecolor=colour, capsize=3, elinewidth=width, capthick=width
            )
        reaches.append(float(np.nanmax(values + errors[1], initial=0.0)))
        for place, value, error in zip(places, values, errors[1], strict=True):
            text = "no result" if math.isnan(value) else number(value)
            end = (np.nan_to_num(value + error), place)
            axes.annotate(text, end, xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_xlabel("goodput (requests/s)")
        axes.set_title("" if len(loads) == 1 else load_label(results, load))
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
    for axes in panels:
        axes.set_xlim(0, 1.15 * max(reaches) or 1.0)
    panels[0].set_yticks(range(len(look)), [style.label for style in look.values()])
    panels[0].invert_yaxis()
    return figure


def _error(rows: pd.DataFrame, policy: str, load: float, value: float) -> tuple[float, float]:
    """How far the interval reaches below and above a value; 0 where there is none."""
    row = rows[(rows["policy"] == policy) & (rows["load"] == load) & (rows["figure"] == GOODPUT)]
    low, high = (float(row[name].iloc[0]) if len(row) else math.nan for name in ("low", "high"))
    return tuple(np.maximum(np.nan_to_num([value - low, high - value]), 0.0))


def front(comparison: Comparison) -> Figure:
    """Share of requests within the SLO against TTFT p99, a point per policy and a panel per load; the line joins those
    that no other policy beats in both."""
    results, loads = comparison.done, shown_loads(comparison.done)
    look = looks(results["policy"])
    columns = 4 if len(loads) == 1 else 6
    figure = Figure(figsize=(2.5 + 4.2 * max(len(loads), 1.4), 4.4 + 0.25 * math.ceil(len(look) / columns)))
    figure.suptitle(heading(comparison, loads[0] if len(loads) == 1 else None))
    panels = figure.subplots(1, len(loads), squeeze=False, sharey=True)[0]
    for axes, load in zip(panels, loads, strict=True):
        tails = np.array([mean_of(results, policy, load, "ttft_p99_s") for policy in look])
        shares = np.array([mean_of(results, policy, load, "slo_attainment_frac") for policy in look])
        known = np.isfinite(tails) & (tails > 0)
        if not known.any():
            say(axes, "no request was served")
            continue
        best = on_front(tails, shares)
        axes.plot(tails[best], shares[best], color="#777777", linewidth=1, drawstyle="steps-post", zorder=1)
        for tail, share, style in zip(tails, shares, look.values(), strict=True):
            axes.plot(tail, share, color=style.colour, marker=style.marker, markersize=6, linestyle="")
        _log_time_axis(axes)
        axes.set(xlabel="TTFT p99", title="" if len(loads) == 1 else load_label(results, load))
    panels[0].set(ylabel="share of requests within the SLO", ylim=(-0.02, 1.02))
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    legend_below(figure, [each.dot for each in look.values()], columns=columns)
    return figure


def on_front(tails_s: NDArray[np.float64], shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """Places of those of which no other has both a tail as short and a share as large and one of them better, by
    ascending tail; what is not finite is none."""
    order = np.lexsort((-shares, tails_s))
    chosen: list[int] = []
    for i in order[np.isfinite(tails_s[order])].tolist():
        if not chosen or shares[i] > shares[chosen[-1]]:
            chosen.append(i)
    return np.array(chosen, np.int64)


def load_curve(comparison: Comparison, rows: pd.DataFrame) -> Figure:
    """Throughput, goodput with its interval, and TTFT p99 against load."""
    results, loads = comparison.done, loads_of(comparison.done)
    look = looks(results["policy"])
    figure = Figure(figsize=(12, 4.2 + 0.25 * math.ceil(len(look) / 6)))
    figure.suptitle(heading(comparison))
    panels = figure.subplots(1, 3)
    utilizations = [utilization_of(results, load) for load in loads]
    by_load = any(math.isnan(u) for u in utilizations)
    x = loads if by_load else utilizations
    titles = ("output (tokens/s)", "goodput (requests/s)", "TTFT p99")
    span = max(x) - min(x)
    for axes, figure_name, title in zip(panels, ("output_tokens_per_s", GOODPUT, "ttft_p99_s"), titles, strict=True):
        for i, (policy, style) in enumerate(look.items()):
            values = np.array([mean_of(results, policy, load, figure_name) for load in loads])
            axes.plot(x, values, color=style.colour, linestyle=style.line, marker="o", markersize=3.5)
            if figure_name == GOODPUT:
                errors = np.array([_error(rows, policy, load, v) for load, v in zip(loads, values, strict=True)]).T
                beside = np.array(x) + 0.008 * span * (i - (len(look) - 1) / 2)  # so that they do not hide each other
                axes.errorbar(beside, values, yerr=errors, fmt="none", ecolor=style.colour, elinewidth=1, capsize=2)
        axes.set(ylabel=title, xlabel="load (x the trace's rate)" if by_load else "utilization (x capacity)")
    for axes in panels[:2]:
        axes.set_ylim(bottom=0)
    _log_latency(panels[2], results)
    legend_below(figure, [style.handle for style in look.values()])
    return figure


def _log_latency(axes: Axes, results: pd.DataFrame) -> None:
    if np.isfinite(results["ttft_p99_s"].to_numpy(dtype=float)).any():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(time_text)
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        say(axes, "no request was served")
