"""Statistics of a workload, by the definitions of the traces' README."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from l3env.requests.workload import Workload

IDC_WINDOW_S = 10.0
PERCENTILES = (50, 90, 99)


def describe(workload: Workload) -> dict[str, Any]:
    """A flat, JSON-ready summary; None where a quantity has no meaning (no clock, no prefix ids).

    ``requests_count``; ``span_s``; ``rate_per_s`` = (n - 1) / span; ``gap_cv`` = sd over mean of the gaps between
    arrivals; ``idc_10s`` = variance over mean of the arrivals in the whole consecutive 10 s windows from the first
    arrival; prompt and output tokens as ``{prompt,output}_{mean,sd,p50,p90,p99,max}_tokens`` and ``_total_tokens``
    (population sd, linear percentiles); ``prefix_hit_frac``, against an unbounded cache, counting leading blocks
    already seen; ``sessions_count`` and ``dependent_count`` (requests that wait for another), and ``recorded_floor``:
    do they arrive at their recorded times at the earliest, or at the other one's finish + think time, whenever it is?
    """
    summary: dict[str, Any] = {
        "name": workload.name,
        "requests_count": len(workload),
        "span_s": workload.span_s,
        **_arrivals(workload),
    }
    for side, tokens in (("prompt", workload.prompt_tokens), ("output", workload.output_tokens)):
        summary |= _tokens(side, tokens)
    summary["prefix_hit_frac"] = prefix_hit_frac(workload)
    sessions = workload.session_idx[workload.session_idx >= 0]
    summary["sessions_count"] = int(np.unique(sessions).size)
    summary["dependent_count"] = int((workload.parent_idx >= 0).sum())
    summary["recorded_floor"] = workload.recorded_floor
    return summary


def _arrivals(workload: Workload) -> dict[str, float | None]:
    if workload.span_s <= 0:
        return {"rate_per_s": None, "gap_cv": None, "idc_10s": None}
    gaps_s = np.diff(workload.arrival_s)
    return {
        "rate_per_s": (len(workload) - 1) / workload.span_s,
        "gap_cv": float(gaps_s.std() / gaps_s.mean()),
        "idc_10s": idc(workload.arrival_s),
    }


def idc(arrival_s: NDArray[np.float64], window_s: float = IDC_WINDOW_S) -> float | None:
    """Index of dispersion for counts: variance over mean of arrivals in whole consecutive windows; 1 for Poisson."""
    times_s = arrival_s - arrival_s[0]
    windows = int(times_s[-1] // window_s)
    if windows < 2:
        return None
    counts = np.bincount((times_s // window_s).astype(np.int64), minlength=windows)[:windows]
    return float(counts.var() / counts.mean()) if counts.any() else None


def _tokens(side: str, tokens: NDArray[np.int64]) -> dict[str, float]:
    found = {f"{side}_mean_tokens": float(tokens.mean()), f"{side}_sd_tokens": float(tokens.std())}
    for percent, value in zip(PERCENTILES, np.percentile(tokens, PERCENTILES), strict=True):
        found[f"{side}_p{percent}_tokens"] = float(value)
    return {**found, f"{side}_max_tokens": int(tokens.max()), f"{side}_total_tokens": int(tokens.sum())}


def prefix_hit_frac(workload: Workload) -> float | None:
    """Share of prompt blocks that a cache without bound would hold: leading blocks seen in an earlier request."""
    ids, offsets = workload.prefix_ids, workload.prefix_offsets
    if not ids.size:
        return None
    codes = pd.factorize(ids)[0]
    first_place = np.full(int(codes.max()) + 1, ids.size, dtype=np.int64)
    first_place[codes[::-1]] = np.arange(ids.size - 1, -1, -1)  # the last write wins: the first place of each id
    lengths = np.diff(offsets)
    start = np.repeat(offsets[:-1], lengths)
    miss_mask = first_place[codes] >= start
    places = np.where(miss_mask, np.arange(ids.size), np.repeat(offsets[1:], lengths))
    hits = np.minimum.reduceat(places, offsets[:-1][lengths > 0]) - offsets[:-1][lengths > 0]
    return float(hits.sum() / ids.size)
