"""A comparison as JSON, CSV files and pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from l3env.files import write_text
from l3env.report import plots
from l3env.report.bootstrap import intervals
from l3env.report.names import contract_order, loads_of
from l3env.report.over_time import timeline
from l3env.report.style import save
from l3env.runs.compare import Comparison


def to_json(comparison: Comparison) -> dict[str, Any]:
    """``config``, ``results`` (a row per policy, load and seed) and ``intervals``; strict JSON, null for NaN."""
    rows = intervals(comparison.done, comparison.requests)
    return {
        "config": plain(comparison.config.to_json()),
        "results": plain(contract_order(comparison.results).to_dict("records")),
        "intervals": plain(rows.to_dict("records")),
    }


def plain(value: Any) -> Any:
    """Python's own types all the way down; None for what JSON has no number for."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is pd.NA or value is pd.NaT or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return value


def write_results(comparison: Comparison, out: Path) -> list[Path]:
    """Writes ``results.csv``, ``intervals.csv`` and the pictures into ``out``; each file whole or not at all.

    Returns:
        The files, in the order of writing: ``load_curve.png`` is among them where there are several loads.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = intervals(comparison.done, comparison.requests)
    written = []
    for name, frame in (("results.csv", contract_order(comparison.results)), ("intervals.csv", rows)):
        write_text(out / name, frame.to_csv(index=False))
        written.append(out / name)
    pictures: dict[str, Callable[[], Figure]] = {
        "front.png": lambda: plots.front(comparison),
        "goodput.png": lambda: plots.goodput(comparison, rows),
        "latency_cdf.png": lambda: plots.latency_cdf(comparison),
        "timeline.png": lambda: timeline(comparison),
        "utilisation.png": lambda: plots.utilisation(comparison),
    }
    if comparison.done.empty:
        return written
    if len(loads_of(comparison.done)) > 1:
        pictures["load_curve.png"] = lambda: plots.load_curve(comparison, rows)
    for name, draw in pictures.items():
        save(draw, out / name)
        written.append(out / name)
    return written
