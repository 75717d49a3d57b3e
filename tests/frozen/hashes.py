"""Results as parts: a short SHA-256 of exact bytes, and a number or two to read."""

from __future__ import annotations

import hashlib
import json
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
MEASURED = ("wall_s", "decision_ms")  # by the clock on the wall: no two runs are alike

Parts = dict[str, str]


def digest(*pieces: bytes) -> str:
    """The first 16 hex digits of the SHA-256 of some bytes."""
    return hashlib.sha256(b"".join(pieces)).hexdigest()[:16]


def digest_of(value: Any) -> str:
    """The same of what JSON can hold: its floats as the shortest text that gives them back."""
    return digest(json.dumps(value, sort_keys=True).encode())


def column(values: Any) -> str:
    """Digest of the exact numbers of an array, and their mean; texts count as theirs."""
    array = np.asarray(values)
    if array.dtype.kind == "b":
        array = array.astype(np.uint8)
    elif array.dtype.kind in "iu":
        array = array.astype(np.int64)
    elif array.dtype.kind != "f":
        array = np.frombuffer("\n".join(map(str, array.tolist())).encode(), np.uint8)
    elif array.dtype != np.float32:
        array = array.astype(np.float64)
    known = array[np.isfinite(array)]
    return f"{digest(np.ascontiguousarray(array).tobytes())} {float(known.mean()) if known.size else 0:.9g}"


def columns(arrays: Iterable[Any]) -> str:
    """One digest of several arrays."""
    return digest(*(column(array).encode() for array in arrays))


def known_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The figures every run has, in order."""
    return {name: float(metrics[name]) for name in METRICS if name in metrics}


def parts_of(outcome: Outcome) -> Parts:
    """A run: its table of requests, its time line, its figures, and those of the policy or the client alone."""
    table, line = outcome.requests, outcome.timeline
    known = known_metrics(outcome.metrics)
    own = {
        name: float(value)
        for name, value in sorted(outcome.metrics.items())
        if name not in known and name not in MEASURED
    }
    parts = {
        "requests": columns(table[name].astype(str) if name == "status" else table[name] for name in REQUESTS),
        "timeline": columns(line[name] for name in TIMELINE if name in line),
        "metrics": digest_of(known),
    }
    if own:
        parts["own metrics"] = digest_of(own)
    return parts | {name: repr(known[name]) for name in SHOWN} | {name: repr(value) for name, value in own.items()}
