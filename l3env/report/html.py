"""One self-contained HTML page per study or comparison: interactive, opens offline, needs nothing beside it.

The page holds plotly.js, its own script (``page/``) and the figures as JSON; a content policy in its head forbids any
request. Python computes what needs the requests (intervals, latency distributions, time lines); the page chooses.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from plotly.offline import get_plotlyjs

from l3env.files import write_text
from l3env.report.bootstrap import HIGHER_IS_BETTER, intervals
from l3env.report.folder import plain
from l3env.report.names import loads_of, policy_labels, stand_in, unique, utilization_of
from l3env.report.over_time import bin_means, binned
from l3env.report.plots import LATENCY_TITLES, cdf
from l3env.report.style import COLOURS
from l3env.runs.compare import Comparison

PAGE = Path(__file__).parent / "page"
CDF_POINTS = 120
TIME_POINTS = 120
DIGITS = 5  # of curves; tables have them all
FIGURES = {
    "goodput_requests_per_s": "goodput (requests/s)",
    "guarded_goodput_requests_per_s": "guarded goodput (requests/s)",
    "slo_attainment_frac": "share of requests within the SLO",
    "output_tokens_per_s": "output (tokens/s)",
    "ttft_mean_s": "mean TTFT (s)",
    "ttft_p99_s": "TTFT p99 (s)",
    "longest_wait_s": "longest wait for a first token (s)",
    "starved_frac": "share of requests starved",
    "tbt_p99_s": "TBT p99 (s)",
    "tpot_mean_s": "mean TPOT (s)",
    "e2e_mean_s": "mean end-to-end latency (s)",
    "energy_j_per_token": "energy (J/token)",
}
TIME_TITLES = {
    "kv_hbm_frac": "KV in HBM",
    "kv_pim_frac": "KV in PIM memory",
    "gpu_busy_frac": "GPU busy",
    "pim_busy_frac": "PIM busy",
    "batch_count": "batch",
    "waiting_count": "waiting requests",
}
SCENARIO = ["system", "model", "trace"]


def write_html(comparison: Comparison, title: str, path: Path) -> Path:
    """Writes the page, whole or not at all."""
    data = plain(page_data(comparison))
    command = "l3env compare --config config.json" if comparison.config.one_machine else "l3env sweep config.json"
    parts = {
        "title": html.escape(title),
        "command": html.escape(command),
        "style": (PAGE / "report.css").read_text(encoding="utf-8"),
        "script": (PAGE / "report.js").read_text(encoding="utf-8"),
        "plotly": get_plotlyjs(),
        "data": json.dumps(data, allow_nan=False, separators=(",", ":")).replace("</", "<\\/"),
    }
    write_text(path, Template((PAGE / "report.html").read_text(encoding="utf-8")).substitute(parts))
    return path


def page_data(comparison: Comparison) -> dict[str, Any]:
    """All that the page shows."""
    done, failed = comparison.done, comparison.failed
    labels = policy_labels(comparison.config.policies)
    places = {policy: i for i, policy in enumerate(labels)}
    by_utilization = "utilization" in done and done["utilization"].notna().all()
    seeds = int(done["seed"].nunique()) if len(done) else 0
    return {
        "facts": f"{len(done):,} runs, {seeds} seed{'s' if seeds != 1 else ''}, {len(failed):,} failed",
        "config": json.dumps(comparison.config.to_json(), indent=2),
        "policies": [
            {"ref": policy, "label": labels[policy], "colour": COLOURS[i % len(COLOURS)]}
            for policy, i in places.items()
        ],
        "figures": [
            {"name": name, "title": title, "sign": 1 if name in HIGHER_IS_BETTER else -1}
            for name, title in FIGURES.items()
        ],
        "x_title": "utilization (times what the machine serves)" if by_utilization else "load (times the trace's rate)",
        "time_titles": TIME_TITLES,
        "groups": list(_groups(comparison, done, places)),
        "failed": [{"run": row["key"], "error": row["error"]} for row in failed.to_dict("records")],
    }


def _groups(comparison: Comparison, done: pd.DataFrame, places: dict[str, int]) -> Iterator[dict[str, Any]]:
    """A group is a system, model, trace and load."""
    for names, scenario in done.groupby(SCENARIO, sort=False):
        spans = _spans(comparison, scenario)
        for load in loads_of(scenario):
            rows = scenario[scenario["load"] == load]
            level = utilization_of(scenario, load)
            by_load = math.isnan(level)
            head = dict(zip(SCENARIO, names, strict=True)) | {
                "trace": f"{names[2]}{stand_in(rows)}",
                "load": load,
                "x": load if by_load else level,
            }
            head["level"] = f"load {load:.4g}" if by_load else f"utilization {level:.4g}"
            policies = unique(rows["policy"])
            horizon_s = float(rows["makespan_s"].max())
            yield head | {
                "policies": [
                    {
                        "policy": places[policy],
                        "figures": {name: _figure(rows, spans, policy, load, name) for name in FIGURES},
                        "cdf": _latencies(comparison, rows[rows["policy"] == policy]),
                        "time": _over_time(comparison, rows[rows["policy"] == policy], horizon_s),
                    }
                    for policy in policies
                ],
                "seeds": [
                    [
                        {"policy": places[row["policy"]], "figures": {name: row.get(name) for name in FIGURES}}
                        for row in of_seed.to_dict("records")
                    ]
                    for _, of_seed in rows.groupby("seed")
                ],
            }


def _spans(comparison: Comparison, scenario: pd.DataFrame) -> dict[tuple[str, float, str], tuple[float, float]]:
    """Intervals of a scenario by policy, load and figure."""
    rows = intervals(scenario, comparison.requests)
    keys = zip(rows["policy"], rows["load"].astype(float), rows["figure"], strict=True)
    return dict(zip(keys, zip(rows["low"], rows["high"], strict=True), strict=True))


def _figure(
    rows: pd.DataFrame, spans: dict[tuple[str, float, str], tuple[float, float]], policy: str, load: float, name: str
) -> dict[str, float]:
    values = rows.loc[rows["policy"] == policy, name].to_numpy(dtype=float) if name in rows else np.empty(0)
    known = values[np.isfinite(values)]
    low, high = spans.get((policy, load, name), (math.nan, math.nan))
    return {"mean": float(known.mean()) if known.size else math.nan, "low": low, "high": high}


def _latencies(comparison: Comparison, runs: pd.DataFrame) -> dict[str, dict[str, list[float]]]:
    """Distribution of each latency over the requests of all seeds."""
    found = [comparison.requests[key] for key in runs["key"] if key in comparison.requests]
    frames = [frame for frame in found if len(frame)]
    curves = {}
    for name in LATENCY_TITLES:
        x, y = cdf(frames, name)
        some = np.unique(np.linspace(0, max(x.size - 1, 0), min(CDF_POINTS, x.size)).round().astype(int))
        curves[name] = {"x": _short(x[some]), "y": _short(y[some])}
    return curves


def _over_time(comparison: Comparison, runs: pd.DataFrame, horizon_s: float) -> dict[str, list[float]] | None:
    """Curves of TIME_TITLES for the first seed; None where the run was not recorded."""
    frame = comparison.timelines.get(runs.sort_values("seed")["key"].iloc[0])
    if frame is None or frame.empty:
        return None
    means = binned(frame, horizon_s)
    curves = {name: getattr(means, name) for name in TIME_TITLES if hasattr(means, name)}
    curves |= {name: _busy(frame, horizon_s, means.middle_s.size, name) for name in ("gpu_busy_frac", "pim_busy_frac")}
    every = means.middle_s.size // TIME_POINTS
    thin = {name: values.reshape(-1, every).mean(axis=1) for name, values in curves.items()}
    return {"at_s": _short(means.middle_s.reshape(-1, every).mean(axis=1))} | {n: _short(v) for n, v in thin.items()}


def _busy(frame: pd.DataFrame, horizon_s: float, bins_count: int, name: str) -> NDArray[np.float64]:
    """Share of each bin that a device is busy, mean of replicas."""
    column = name.replace("_frac", "_s")
    edges = np.linspace(0.0, max(horizon_s, 1e-12), bins_count + 1)
    total = np.zeros(bins_count)
    parts = [part.sort_values("end_s") for _, part in frame.groupby("replica")]
    for part in parts:
        if column not in part:
            continue
        end_s = part["end_s"].to_numpy(dtype=float)
        length_s = np.minimum(part["duration_s"].to_numpy(dtype=float), np.diff(end_s, prepend=0.0))
        share = part[column].to_numpy(dtype=float) / np.maximum(length_s, 1e-300)
        total += bin_means(edges, end_s - length_s, length_s, np.where(length_s > 0, share, 0.0))
    return total / max(len(parts), 1)


def _short(values: NDArray[np.float64]) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]
