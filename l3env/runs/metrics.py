"""From engine arrays to the figures people compare: TTFT, TBT, TPOT, goodput, utilisation, energy.

Definitions. TTFT: first token minus arrival. TBT: time between consecutive tokens of a request, over all tokens (stalls
and recomputation included; percentiles from bins of 1 %). TPOT: a request's mean TBT, over requests. Goodput: requests
that met their SLO per second. Makespan: the clock when the last replica is done. Busy: device time over makespan and
replicas. Bubble: share of iteration time that a device waits for the other. Prefix hits: share of the prompts' prefix
ids (blocks), or of their tokens, found cached at a request's first admission; 0 where the prefix cache is off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from l3env.choices import Status
from l3env.engine.engine import Engine
from l3env.engine.state import GAP_BINS, GAP_LOW_S, GAP_RATIO, PrefixArrays

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


@dataclass(frozen=True)
class Outcome:
    """One run.

    Attributes:
        metrics: the figures of a result row, by name.
        requests: one row per request.
        timeline: time line per replica, iterations merged where there were many.
    """

    metrics: dict[str, float]
    requests: pd.DataFrame
    timeline: pd.DataFrame


def collect(engine: Engine, replicas: Sequence[int], request_rows: Sequence[NDArray[np.int64]]) -> Outcome:
    """Figures of a system whose replicas are the environments ``replicas``.

    Args:
        request_rows: for each replica, the rows of the whole workload that it served.
    """
    frames = [request_frame(engine, e, rows) for e, rows in zip(replicas, request_rows, strict=True)]
    requests = pd.concat(frames).sort_values("row", ignore_index=True)
    timeline = pd.concat([timeline_frame(engine, e, i) for i, e in enumerate(replicas)], ignore_index=True)
    return Outcome(summary(engine, replicas, requests), requests, timeline)


def request_frame(engine: Engine, e: int, rows: NDArray[np.int64]) -> pd.DataFrame:
    """One row per request of environment ``e``: times in seconds, NaN where it did not come to that."""
    count = int(engine.state.env["requests_count"][e])
    req = engine.state.req[e, :count]
    truth = engine.state.truth[e, :count].astype(np.int64)
    gaps = np.maximum(truth - 1, 1)
    tpot = np.where(truth > 1, (req["finish_s"] - req["first_token_s"]) / gaps, np.nan)
    prefix = engine.state.prefix
    hit_tokens = prefix.req["hit_tokens"][e, : req.size] if isinstance(prefix, PrefixArrays) else np.zeros(req.size)
    status = np.array([s.name.lower() for s in Status])[req["status"]]
    return pd.DataFrame(
        {
            "row": rows,
            "replica": e,
            "arrival_s": req["arrival_s"],
            "prompt_tokens": req["prompt_tokens"].astype(np.int64),
            "output_tokens": truth,
            "status": pd.Categorical(status, [s.name.lower() for s in Status]),
            "ttft_s": req["first_token_s"] - req["arrival_s"],
            "tpot_s": tpot,
            "e2e_s": req["finish_s"] - req["arrival_s"],
            "finish_s": req["finish_s"],
            "first_token_s": req["first_token_s"],
            "ttft_slo_s": req["ttft_slo_s"],
            "tbt_slo_s": req["tbt_slo_s"],
            "slo_met": req["slo_met"].astype(bool),
            "preemptions_count": req["preemptions_count"].astype(np.int64),
            "prefix_hit_tokens": hit_tokens.astype(np.int64),
        }
    )


def timeline_frame(engine: Engine, e: int, replica: int) -> pd.DataFrame:
    """The recorded time line of environment ``e``; empty where it was not recorded."""
    count = int(engine.state.env["log_count"][e])
    log = engine.state.log[e, :count]
    frame = pd.DataFrame({name: log[name].copy() for name in log.dtype.names or ()})
    capacity = engine.tables.pool_blocks[int(engine.state.env["table_idx"][e])]
    frame["kv_hbm_frac"] = frame.pop("hbm_blocks") / max(int(capacity[0]), 1)
    pair = engine.pair(e)
    frame["kv_pim_frac"] = frame.pop("pim_blocks") / max(pair.pim_tokens // pair.block_tokens, 1)
    frame.insert(0, "replica", replica)
    return frame


def gap_quantile_s(histogram: NDArray[np.int64], quantile: float) -> float:
    """Quantile of the gaps between tokens: geometric middle of the bin it falls into; NaN where there are none."""
    total = int(histogram.sum())
    if total == 0:
        return float("nan")
    place = int(np.searchsorted(np.cumsum(histogram), quantile * total))
    return float(GAP_LOW_S * GAP_RATIO ** (place + 0.5))


def totals(env: NDArray[np.void]) -> dict[str, float]:
    """Counts and rates of a system, from the totals of its replicas (ENV_DTYPE rows) alone."""
    makespan = float(env["clock_s"].max())
    span = max(makespan, 1e-300)
    requests, met = int(env["requests_count"].sum()), int(env["slo_met_count"].sum())
    finished = int(env["finished_count"].sum())
    return {
        "requests_count": requests,
        "finished_count": finished,
        "rejected_count": int(env["rejected_count"].sum()),
        "preemptions_count": int(env["preemptions_count"].sum()),
        "iterations_count": int(env["iterations_count"].sum()),
        "makespan_s": makespan,
        "output_tokens_per_s": int(env["output_tokens"].sum()) / span,
        "requests_per_s": finished / span,
        "goodput_requests_per_s": met / span,
        "slo_attainment_frac": met / requests,
    }


def summary(engine: Engine, replicas: Sequence[int], requests: pd.DataFrame) -> dict[str, float]:
    """The figures of one result row."""
    env = engine.state.env[list(replicas)]
    replica_count = len(replicas)
    row = totals(env)
    makespan = row["makespan_s"]
    span = max(makespan, 1e-300)
    busy = max(float(env["busy_s"].sum()), 1e-300)
    has_pim = any(engine.pair(e).has_pim for e in replicas)
    tokens = int(env["output_tokens"].sum())
    static_j = sum(float(engine.tables.coef["static_w"][i]) for i in env["table_idx"]) * makespan
    row |= _distribution("ttft", requests["ttft_s"])
    row |= _gaps(engine, replicas, requests)
    row |= _distribution("tpot", requests["tpot_s"])
    row |= _distribution("e2e", requests["e2e_s"])
    row |= {
        "gpu_busy_frac": float(env["gpu_busy_s"].sum()) / (span * replica_count),
        "pim_busy_frac": float(env["pim_busy_s"].sum()) / (span * replica_count),
        "gpu_bubble_frac": 1 - float(env["gpu_busy_s"].sum()) / busy,
        "pim_bubble_frac": 1 - float(env["pim_busy_s"].sum()) / busy if has_pim else 0.0,
        "pim_imbalance_frac": float(env["imbalance_s"].sum()) / max(float(env["pim_busy_s"].sum()), 1e-300),
        "batch_mean_count": float(env["decode_tokens"].sum()) / max(int(env["iterations_count"].sum()), 1),
        "queue_mean_count": float(env["queue_s"].sum()) / span,
        "kv_hbm_peak_frac": _peak(engine, replicas, 0, 1),
        "kv_pim_peak_frac": _peak(engine, replicas, 1, None),
        "recomputed_tokens_frac": float(env["recomputed_tokens"].sum()) / max(int(env["prefill_tokens"].sum()), 1),
        "energy_j_per_token": (float(env["energy_j"].sum()) + static_j) / max(tokens, 1),
    }
    return row | _prefix_hits(engine, replicas)


def _prefix_hits(engine: Engine, replicas: Sequence[int]) -> dict[str, float]:
    prefix = engine.state.prefix
    names = ("ids_count", "hits_count", "prompt_tokens", "hit_tokens", "evictions_count")
    found = dict.fromkeys(names, 0)
    if isinstance(prefix, PrefixArrays):
        found = {name: int(prefix.env[name][list(replicas)].sum()) for name in names}
    return {
        "prefix_hit_frac": found["hits_count"] / max(found["ids_count"], 1),
        "prefix_hit_tokens_frac": found["hit_tokens"] / max(found["prompt_tokens"], 1),
        "prefix_evictions_count": found["evictions_count"],
    }


def _distribution(name: str, values: pd.Series[Any]) -> dict[str, float]:
    known = values.to_numpy(dtype=float)
    known = known[np.isfinite(known)]
    if known.size == 0:
        return {f"{name}_{part}_s": float("nan") for part in ("mean", *QUANTILES)}
    row = {f"{name}_mean_s": float(known.mean())}
    return row | {f"{name}_{part}_s": float(np.quantile(known, q)) for part, q in QUANTILES.items()}


def _gaps(engine: Engine, replicas: Sequence[int], requests: pd.DataFrame) -> dict[str, float]:
    histogram = engine.state.gap_hist[list(replicas)].sum(axis=0)
    done = requests[requests["tpot_s"].notna()]
    gaps = float((done["output_tokens"] - 1).sum())
    total_s = float((done["finish_s"] - done["first_token_s"]).sum())
    row = {"tbt_mean_s": total_s / gaps if gaps else float("nan")}
    recorded = histogram.size == GAP_BINS
    return row | {
        f"tbt_{part}_s": gap_quantile_s(histogram, q) if recorded else float("nan") for part, q in QUANTILES.items()
    }


def _peak(engine: Engine, replicas: Sequence[int], first: int, last: int | None) -> float:
    fractions = [0.0]
    for e in replicas:
        capacity = engine.tables.pool_blocks[int(engine.state.env["table_idx"][e])][first:last]
        peak = engine.state.pool["peak"][e][first:last]
        fractions += [float(p) / float(c) for p, c in zip(peak, capacity, strict=True) if c > 0]
    return max(fractions)
