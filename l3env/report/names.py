"""How reports name things: contract columns, policies, loads, headings."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import PurePath

import numpy as np
import pandas as pd

from l3env.runs.compare import Comparison

LATENCIES = ("ttft", "tbt", "tpot", "e2e")
CONTRACT_COLUMNS: tuple[str, ...] = (
    *("policy", "system", "model", "trace", "load", "seed"),
    *("requests_count", "finished_count", "rejected_count", "preemptions_count", "iterations_count", "makespan_s"),
    *("output_tokens_per_s", "requests_per_s", "goodput_requests_per_s", "slo_attainment_frac"),
    *("guarded_goodput_requests_per_s", "guarded_attainment_frac"),
    *("longest_wait_s", "starved_frac", "beyond_guard_count"),
    *(f"{name}_{part}_s" for name in LATENCIES for part in ("mean", "p50", "p90", "p99")),
    *("gpu_busy_frac", "pim_busy_frac", "gpu_bubble_frac", "pim_bubble_frac", "batch_mean_count"),
    *("kv_hbm_peak_frac", "kv_pim_peak_frac", "energy_j_per_token", "wall_s"),
)
OF_OBJECT = re.compile(r"@[0-9a-f]{10}$")  # see ``l3env.given``
NAME_CHARS = 60  # longer names of traces are cut in headings


def contract_order(results: pd.DataFrame) -> pd.DataFrame:
    """The contract's columns first, in its order (NaN where a result lacks one), then all others."""
    others = [column for column in results.columns if column not in CONTRACT_COLUMNS]
    return results.reindex(columns=[*CONTRACT_COLUMNS, *others])


def unique(values: Iterable[str]) -> list[str]:
    """Values in the order of their first appearance."""
    return list(dict.fromkeys(values))


def policy_labels(policies: Iterable[str]) -> dict[str, str]:
    """What to call each policy: ``folder/file.py:Class`` is ``Class``, ``folder/file.py`` is ``file.py``, as long as no
    other policy is called so."""
    refs = unique(policies)
    short = {
        ref: ref.rpartition(":")[2] if ".py:" in ref else PurePath(ref).name if ".py" in ref else OF_OBJECT.sub("", ref)
        for ref in refs
    }
    longer = {ref: PurePath(ref.rpartition(":")[0]).stem + ":" + short[ref] if ".py:" in ref else ref for ref in refs}
    for clearer in (longer, {ref: ref for ref in refs}):
        taken = Counter(short.values())
        short = {ref: clearer[ref] if taken[name] > 1 else name for ref, name in short.items()}
    return short


def short_name(spec: str) -> str:
    """A preset, trace or file as headings show it: folders left out, cut where very long."""
    path, mark, options = spec.partition("?")
    name = OF_OBJECT.sub("", PurePath(path).name.removesuffix(".toml") + mark + options)
    return name if len(name) <= NAME_CHARS else name[: NAME_CHARS - 1] + "…"


def loads_of(results: pd.DataFrame) -> list[float]:
    """The loads of a comparison, ascending."""
    return sorted({float(load) for load in results["load"].dropna()})


def load_label(results: pd.DataFrame, load: float) -> str:
    """``load 1.5``, or ``utilization 0.9 (load 1.37)`` where that is what was asked for."""
    value = utilization_of(results, load)
    return f"load {load:.3g}" if math.isnan(value) else f"utilization {value:.3g} (load {load:.3g})"


def utilization_of(results: pd.DataFrame, load: float) -> float:
    """The utilization that a load stands for; NaN where loads were asked for."""
    if "utilization" not in results:
        return math.nan
    asked = results.loc[results["load"] == load, "utilization"].to_numpy(dtype=float)
    return float(asked[0]) if asked.size else math.nan


def heading(comparison: Comparison, load: float | None = None) -> str:
    """System, model, trace and load (all of them where None) in one line."""
    config, results = comparison.config, comparison.results
    shown = loads_of(results) if load is None else [load]
    text = load_label(results, shown[0]) if len(shown) == 1 else f"{len(shown)} loads"
    names = [", ".join(map(short_name, each)) for each in (config.systems, config.models, config.traces)]
    return " · ".join([*names[:2], names[2] + stand_in(results), text])


def stand_in(results: pd.DataFrame) -> str:
    """What follows a trace's name where its embedded profile was served in its place."""
    stood_in = "stands_in_for" in results and results["stands_in_for"].notna().any()
    return " (embedded profile)" if stood_in else ""


def has_pim(results: pd.DataFrame) -> bool:
    """True where any run used PIM."""
    return bool(np.nansum(results[["pim_busy_frac", "kv_pim_peak_frac"]].to_numpy(dtype=float)) > 0)


def cell_frames(
    frames: Mapping[str, pd.DataFrame], results: pd.DataFrame, policy: str, load: float
) -> list[pd.DataFrame]:
    """The frames of a policy at a load, seed by seed; without those that are not there."""
    mask = (results["policy"] == policy) & (results["load"] == load)
    found = [frames[key] for key in results[mask].sort_values("seed")["key"] if key in frames]
    return [frame for frame in found if len(frame)]


def mean_of(results: pd.DataFrame, policy: str, load: float, figure: str) -> float:
    """Mean over seeds; NaN where no seed has the figure."""
    if figure not in results:
        return math.nan
    mask = (results["policy"] == policy) & (results["load"] == load)
    values = results.loc[mask, figure].to_numpy(dtype=float)
    values = values[np.isfinite(values)]
    return float(values.mean()) if values.size else math.nan


def decimals(value: float) -> int:
    """Digits behind the point that show three significant ones."""
    size = abs(value)
    if not math.isfinite(size) or size == 0:
        return 0
    return int(np.clip(2 - math.floor(math.log10(size)), 0, 6))


def number(value: float) -> str:
    """Three significant digits, thousands marked; ``-`` for NaN."""
    return f"{value:,.{decimals(value)}f}" if math.isfinite(value) else "-"
