"""Results as parts: a few numbers that hardly any change leaves as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from l3env.runs.metrics import Outcome

REQUESTS = (
    "row", "replica", "arrival_s", "prompt_tokens", "output_tokens", "status", "ttft_s", "tpot_s", "e2e_s", "finish_s",
    "first_token_s", "ttft_slo_s", "tbt_slo_s", "slo_met", "preemptions_count", "prefix_hit_tokens",
)  # fmt: skip
TIMELINE = ("start_s", "end_s", "kv_hbm_frac", "kv_pim_frac")
METRICS = (
    "requests_count", "finished_count", "rejected_count", "preemptions_count", "iterations_count", "makespan_s",
    "output_tokens_per_s", "requests_per_s", "goodput_requests_per_s", "slo_attainment_frac",
    *(f"{name}_{part}_s" for name in ("ttft", "tbt", "tpot", "e2e") for part in ("mean", "p50", "p90", "p99")),
    "gpu_busy_frac", "pim_busy_frac", "gpu_bubble_frac", "pim_bubble_frac", "pim_imbalance_frac", "batch_mean_count",
    "queue_mean_count", "kv_hbm_peak_frac", "kv_pim_peak_frac", "recomputed_tokens_frac", "energy_j_per_token",
    "prefix_hit_frac", "prefix_hit_tokens_frac", "prefix_evictions_count",
)  # fmt: skip
SHOWN = (
    "makespan_s", "ttft_p99_s", "tbt_mean_s", "tpot_p50_s", "slo_attainment_frac", "energy_j_per_token",
    "iterations_count", "preemptions_count", "kv_hbm_peak_frac", "kv_pim_peak_frac", "prefix_hit_tokens_frac",
)  # fmt: skip
SINCE = (  # figures that there were not
    "steady_window_s", "output_tokens_count", "rejected_context_count", "longest_wait_s", "starved_frac",
    "beyond_guard_count", "left_count", "guarded_goodput_requests_per_s", "guarded_attainment_frac",
)  # fmt: skip
MEASURED = ("wall_s", "decision_ms")  # by the clock on the wall: no two runs are alike

Part = list[float] | str
Parts = dict[str, Part]

GOLDEN = (5**0.5 - 1) / 2
DIGITS = 11  # that are kept
RELATIVE, ABSOLUTE = 1e-8, 1e-11
"""Processors differ in the last bit of exp, log and pow; that is no difference."""


def same(old: Part | None, new: Part | None) -> bool:
    """Equal, but for how processors compute."""
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and np.allclose(old, new, RELATIVE, ABSOLUTE, equal_nan=True)
    return old == new


def kept_digits(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]


def numbers(values: Any) -> list[float]:
    """Of all that JSON can hold: its numbers in order."""
    if isinstance(values, Mapping):
        values = [values[name] for name in sorted(values)]
    if isinstance(values, list | tuple):
        return [number for value in values for number in numbers(value)]
    return kept_digits([float(values)])


def column(values: Any) -> list[float]:
    """Two means of an array: one with equal weights, and one with weights that no exchange of two values leaves as it
    is. What is not finite counts by its place; texts count as their bytes."""
    array = np.asarray(values).ravel()
    if array.dtype.kind not in "biuf":
        array = np.frombuffer("\n".join(map(str, array.tolist())).encode(), np.uint8)
    array = array.astype(np.float64)
    weights = np.modf((1.0 + np.arange(array.size)) * GOLDEN)[0]
    known = np.isfinite(array)
    if not known.any():
        return [0.0, float(array.size)]
    unknown = float(weights[~known].sum())
    return kept_digits([float(array[known].mean()), float((weights[known] * array[known]).mean()) + unknown])


def columns(arrays: Iterable[Any]) -> list[float]:
    """Those of several arrays."""
    return [number for array in arrays for number in column(array)]


def known_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The figures every run has, in order."""
    known = {name: float(metrics[name]) for name in METRICS if name in metrics}
    if "steady_window_s" in metrics and "makespan_s" in metrics:
        known |= over_the_makespan(metrics)
    return {name: 0.0 if np.isnan(value) and name in ZERO_ONCE else value for name, value in known.items()}


ZERO_ONCE = ("pim_imbalance_frac", "recomputed_tokens_frac")  # of nothing: NaN now


def over_the_makespan(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Rates as they were when the cells were frozen; those of the steady window are tested in tests/runs."""
    span = float(metrics["makespan_s"]) or float("nan")
    met = float(metrics["slo_attainment_frac"]) * float(metrics["requests_count"])
    return {
        "output_tokens_per_s": float(metrics["output_tokens_count"]) / span,
        "requests_per_s": float(metrics["finished_count"]) / span,
        "goodput_requests_per_s": met / span,
    }


def parts_of(outcome: Outcome) -> Parts:
    """A run: its table of requests, its time line, its figures, and those of the policy or the client alone."""
    table, line = outcome.requests, outcome.timeline
    known = known_metrics(outcome.metrics)
    own = {
        name: float(value)
        for name, value in sorted(outcome.metrics.items())
        if name not in known and name not in MEASURED and name not in SINCE
    }
    parts: Parts = {
        "requests": columns(table[name].astype(str) if name == "status" else table[name] for name in REQUESTS),
        "timeline": columns(line[name] for name in TIMELINE if name in line),
        "metrics": kept_digits(value for name, value in known.items() if name not in SHOWN),
    }
    return parts | {name: kept_digits([value]) for name, value in ({n: known[n] for n in SHOWN} | own).items()}
