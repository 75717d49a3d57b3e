"""From engine arrays to the figures people compare: TTFT, TBT, TPOT, goodput, utilisation, energy.

Definitions. TTFT: first token minus arrival. TBT: time between consecutive tokens of a request, over all tokens (stalls
and recomputation included; percentiles from bins of 1 %). TPOT: a request's mean TBT, over requests. Time begins at the
first arrival. Makespan: until the last replica is done. Rates (tokens, requests, goodput: requests that met their SLO)
are those of the steady window, see ``steady_rates``. Busy: device time over makespan and replicas. Bubble: share of
iteration time that a device waits for the other. Prefix hits: share of the prompts' prefix ids (blocks), or of their
tokens, found cached at a request's first admission; 0 where the prefix cache is off. Wait: from arrival to the first
token, or to the run's end for who got none; those refused on arrival do not count. Guarded goodput, starved: see
``waiting_figures``. What nothing was measured of is NaN: latencies without requests, energy a token without tokens,
shares of time that never passed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from l3env.choices import Status
from l3env.engine.engine import Engine
from l3env.engine.guard import beyond_guard, waits_s
from l3env.engine.state import GAP_BINS, GAP_LOW_S, GAP_RATIO, GUARD_TTFT_SLOS, PrefixArrays
from l3env.machine.arrays import FIRST_PIM, HBM

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
STEADY_FRAC = 0.9  # of the requests that finish: at the least so many are in the steady window


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


def collect(
    engine: Engine,
    replicas: Sequence[int],
    request_rows: Sequence[NDArray[np.int64]],
    replicas_count: int | None = None,
) -> Outcome:
    """Figures of a system whose replicas are the environments ``replicas``.

    Args:
        request_rows: for each replica, the rows of the whole workload that it served.
        replicas_count: of the whole system, those without requests included; by default, there are none of these.
    """
    frames = [request_frame(engine, e, rows) for e, rows in zip(replicas, request_rows, strict=True)]
    requests = pd.concat(frames).sort_values("row", ignore_index=True)
    timeline = pd.concat([timeline_frame(engine, e, i) for i, e in enumerate(replicas)], ignore_index=True)
    return Outcome(summary(engine, replicas, requests, replicas_count), requests, timeline)


def request_frame(engine: Engine, e: int, rows: NDArray[np.int64]) -> pd.DataFrame:
    """One row per request of environment ``e``: times in seconds, NaN where it did not come to that.

    ``rejected_because``: ``context_tokens`` (longer than the model serves), ``memory`` (fits no pool), or empty.
    """
    count = int(engine.state.env["requests_count"][e])
    req = engine.state.req[e, :count]
    truth = engine.state.truth[e, :count].astype(np.int64)
    gaps = np.maximum(truth - 1, 1)
    tpot = np.where(truth > 1, (req["finish_s"] - req["first_token_s"]) / gaps, np.nan)
    prefix = engine.state.prefix
    hit_tokens = prefix.req["hit_tokens"][e, : req.size] if isinstance(prefix, PrefixArrays) else np.zeros(req.size)
    status = np.array([s.name.lower() for s in Status])[req["status"]]
    too_long = req["prompt_tokens"] + truth > engine.pair(e).model.served_tokens
    reasons = np.where(req["status"] == Status.REJECTED, np.where(too_long, "context_tokens", "memory"), "")
    return pd.DataFrame(
        {
            "row": rows,
            "replica": e,
            "arrival_s": np.where(req["status"] == Status.FUTURE, np.nan, req["arrival_s"]),
            "prompt_tokens": req["prompt_tokens"].astype(np.int64),
            "output_tokens": truth,
            "status": pd.Categorical(status, [s.name.lower() for s in Status]),
            "rejected_because": pd.Categorical(reasons, ["", "context_tokens", "memory"]),
            "ttft_s": req["first_token_s"] - req["arrival_s"],
            "wait_s": waits_s(req, engine.state.env["clock_s"][e]),
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
    frame["kv_hbm_frac"] = frame.pop("hbm_blocks") / max(int(capacity[HBM]), 1)
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


def steady_rates(requests: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """Rates while requests keep coming: a few stragglers at the end do not count as hours of an idle system.

    The steady window goes from the first arrival to the last, or until 9 in 10 of those that finish are done where that
    is later (requests that come at once, queues that outlast the arrivals). Tokens of a request that finishes after
    the window are counted at its own mean pace.

    Args:
        requests: those that arrived, as columns ``arrival_s``, ``first_token_s``, ``finish_s`` (NaN before),
            ``output_tokens``, ``slo_met``.

    Returns:
        ``steady_window_s``; ``output_tokens_per_s``, ``requests_per_s``, ``goodput_requests_per_s``: 0 where nothing
        finished.
    """
    arrival_s, finish_s = requests["arrival_s"], requests["finish_s"]
    done = np.isfinite(finish_s)
    names = ("output_tokens_per_s", "requests_per_s", "goodput_requests_per_s")
    if not done.any():
        return {"steady_window_s": float("nan")} | dict.fromkeys(names, 0.0)
    count = math.ceil(STEADY_FRAC * int(done.sum()))
    enough_s = float(np.partition(finish_s[done], count - 1)[count - 1])
    end_s = max(enough_s, float(arrival_s.max()))
    window_s = end_s - float(arrival_s.min())
    inside = finish_s <= end_s
    first_s, tokens = requests["first_token_s"], requests["output_tokens"]
    begun = done & ~inside & (first_s <= end_s)
    share = (end_s - first_s[begun]) / (finish_s[begun] - first_s[begun])
    emitted = float(tokens[inside].sum()) + float((1 + (tokens[begun] - 1) * share).sum())
    met = float((inside & requests["slo_met"].astype(bool)).sum())
    return {"steady_window_s": window_s} | {
        name: total / window_s for name, total in zip(names, (emitted, float(inside.sum()), met), strict=True)
    }


def waiting_figures(
    requests: Mapping[str, NDArray[Any]], rates: Mapping[str, float], met_count: int, requests_count: int
) -> dict[str, float]:
    """How long requests waited for their first token, and goodput less what that costs (see ``engine.guard``).

    Whoever waits beyond the guard arrived within the steady window, so it counts there, whenever it was served. Where
    nothing finished there is no such window; the time until the last wait's end takes its place.

    Args:
        requests: those that arrived, as columns ``arrival_s``, ``wait_s`` (NaN: refused on arrival), ``ttft_slo_s``.
        rates: of ``steady_rates``.
        met_count: of the whole run, as
        requests_count: those that arrived.

    Returns:
        ``longest_wait_s``; ``starved_frac``: of all requests, those that waited over ten times their TTFT SLO;
        ``beyond_guard_count``; ``guarded_goodput_requests_per_s`` and ``guarded_attainment_frac``: met less those.
    """
    wait_s, arrival_s = requests["wait_s"], requests["arrival_s"]
    waited = np.isfinite(wait_s)
    starved = int((wait_s > GUARD_TTFT_SLOS * requests["ttft_slo_s"]).sum())
    beyond = int(beyond_guard(wait_s, requests["ttft_slo_s"]).sum())
    window_s = rates["steady_window_s"]
    if beyond and not window_s > 0:
        window_s = float((arrival_s + wait_s)[waited].max() - arrival_s.min())
    lost_per_s = beyond / window_s if beyond else 0.0
    return {
        "longest_wait_s": float(wait_s[waited].max()) if waited.any() else float("nan"),
        "starved_frac": starved / requests_count,
        "beyond_guard_count": beyond,
        "guarded_goodput_requests_per_s": rates["goodput_requests_per_s"] - lost_per_s,
        "guarded_attainment_frac": (met_count - beyond) / requests_count,
    }


def totals(engine: Engine, replicas: Sequence[int]) -> dict[str, float]:
    """Counts and rates of a system whose replicas are the environments ``replicas``; quick, for ends of episodes."""
    env = engine.state.env[list(replicas)]
    columns = [_columns(engine, e) for e in replicas]
    joined = {name: np.concatenate([each[name] for each in columns]) for name in columns[0]}
    requests, met = int(env["requests_count"].sum()), int(env["slo_met_count"].sum())
    return {
        "requests_count": requests,
        "finished_count": int(env["finished_count"].sum()),
        "rejected_count": int(env["rejected_count"].sum()),
        "left_count": int(env["left_count"].sum()),
        "rejected_context_count": int(env["rejected_context_count"].sum()),
        "preemptions_count": int(env["preemptions_count"].sum()),
        "iterations_count": int(env["iterations_count"].sum()),
        "output_tokens_count": int(env["output_tokens"].sum()),
        "makespan_s": float(env["clock_s"].max() - joined["arrival_s"].min(initial=env["clock_s"].max())),
        **(rates := steady_rates(joined)),
        "slo_attainment_frac": met / requests,
        **waiting_figures(joined, rates, met, requests),
    }


def _columns(engine: Engine, e: int) -> dict[str, NDArray[Any]]:
    """What ``steady_rates`` and ``waiting_figures`` need of one environment."""
    count = int(engine.state.env["requests_count"][e])
    req = engine.state.req[e, :count]
    here = req["status"] != Status.FUTURE
    names = ("arrival_s", "first_token_s", "finish_s", "slo_met", "ttft_slo_s")
    columns: dict[str, NDArray[Any]] = {name: req[name][here] for name in names}
    columns["wait_s"] = waits_s(req, engine.state.env["clock_s"][e])[here]
    return columns | {"output_tokens": engine.state.truth[e, :count][here]}


def summary(
    engine: Engine, replicas: Sequence[int], requests: pd.DataFrame, replicas_count: int | None = None
) -> dict[str, float]:
    """The figures of one result row; of ``replicas_count`` replicas where some had nothing to serve."""
    env = engine.state.env[list(replicas)]
    count = replicas_count or len(replicas)
    row = totals(engine, replicas)
    makespan = row["makespan_s"]
    busy = float(env["busy_s"].sum())
    has_pim = any(engine.pair(e).has_pim for e in replicas)
    static_w = sum(float(engine.tables.coef["static_w"][i]) for i in env["table_idx"]) * count / len(replicas)
    row |= _distribution("ttft", requests["ttft_s"])
    row |= _gaps(engine, replicas, requests)
    row |= _distribution("tpot", requests["tpot_s"])
    row |= _distribution("e2e", requests["e2e_s"])
    row |= {
        "gpu_busy_frac": _ratio(env["gpu_busy_s"].sum(), makespan * count),
        "pim_busy_frac": _ratio(env["pim_busy_s"].sum(), makespan * count),
        "gpu_bubble_frac": 1 - _ratio(env["gpu_busy_s"].sum(), busy),
        "pim_bubble_frac": 1 - _ratio(env["pim_busy_s"].sum(), busy) if has_pim else 0.0,
        "pim_imbalance_frac": _ratio(env["imbalance_s"].sum(), env["pim_busy_s"].sum()) if has_pim else 0.0,
        "batch_mean_count": _ratio(env["decode_tokens"].sum(), env["iterations_count"].sum()),
        "queue_mean_count": _ratio(env["queue_s"].sum(), makespan),
        "kv_hbm_peak_frac": _peak(engine, replicas, HBM, FIRST_PIM),
        "kv_pim_peak_frac": _peak(engine, replicas, FIRST_PIM, None),
        "recomputed_tokens_frac": _ratio(env["recomputed_tokens"].sum(), env["prefill_tokens"].sum()),
        "energy_j_per_token": _ratio(env["energy_j"].sum() + static_w * makespan, row["output_tokens_count"]),
    }
    return row | _prefix_hits(engine, replicas)


def _ratio(part: Any, whole: Any) -> float:
    """NaN where there is nothing to divide by."""
    return float(part) / float(whole) if whole > 0 else float("nan")


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
