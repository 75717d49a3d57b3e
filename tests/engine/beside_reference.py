"""An engine beside the reference simulator: begun alike, and compared request by request and sum by sum."""

import numpy as np
from hypothesis import HealthCheck, settings

from l3env.choices import Status
from l3env.engine.engine import Stop
from l3env.engine.state import GAP_LOW_S, GAP_RATIO
from tests.engine.engine_cases import Case
from tests.engine.reference_simulator import ReferenceSimulator

RTOL = 1e-9
STOPS = {"running": Stop.RUNNING, "done": Stop.DONE, "stalled": Stop.STALLED}
STATUS = {
    "future": Status.FUTURE,
    "waiting": Status.WAITING,
    "prefill": Status.PREFILL,
    "decode": Status.DECODE,
    "finished": Status.FINISHED,
    "rejected": Status.REJECTED,
}
COUNTS = {  # ours -> the engine's name
    "iterations": "iterations_count",
    "output_tokens": "output_tokens",
    "prefill_tokens": "prefill_tokens",
    "recomputed_tokens": "recomputed_tokens",
    "decode_tokens": "decode_tokens",
    "preemptions": "preemptions_count",
}
TIMES = ("busy_s", "gpu_busy_s", "pim_busy_s", "energy_j")
SLOW_OK = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def start(case: Case):
    """Engine and reference at time 0, with the same deadlines."""
    engine = case.engine()
    req = engine.state.req[0]
    return engine, ReferenceSimulator(
        case.tables,
        case.workload,
        case.predicted_tokens,
        req["ttft_slo_s"],
        req["ttft_alone_s"],
        req["draft_class"],
        case.eviction,
    )


def or_nan(values):
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def compare(engine, reference):
    """Every request and every sum agree."""
    req, env, totals = engine.state.req[0], engine.state.env[0], reference.totals
    requests = reference.requests
    assert req["status"].tolist() == [STATUS[r.status] for r in requests]
    assert req["preemptions_count"].tolist() == [r.preemptions for r in requests]
    for name in ("first_s", "finish_s"):
        field = {"first_s": "first_token_s"}.get(name, name)
        np.testing.assert_allclose(req[field], or_nan(getattr(r, name) for r in requests), rtol=RTOL, err_msg=field)
    settled = [r.idx for r in requests if r.status != "future"]
    np.testing.assert_allclose(req["arrival_s"][settled], [requests[i].arrival_s for i in settled], rtol=RTOL)
    for ours, theirs in COUNTS.items():
        assert int(env[theirs]) == getattr(totals, ours), theirs
    for name in TIMES:
        np.testing.assert_allclose(env[name], getattr(totals, name), rtol=RTOL, err_msg=name)
    np.testing.assert_allclose(env["clock_s"], reference.now, rtol=RTOL)
    used = [reference.used(pool) for pool in range(len(reference.capacity))]
    assert engine.state.pool["used"][0, : len(used)].tolist() == used
    compare_gaps(engine.state.gap_hist[0], [gap for r in requests for gap in r.gaps_s])


def compare_gaps(histogram, gaps_s):
    """Sorted, each gap lies in the bin the engine put it in, or at its very edge."""
    places = np.repeat(np.arange(histogram.size), histogram)
    assert places.size == len(gaps_s)
    expected = np.log(np.maximum(np.sort(gaps_s), GAP_LOW_S) / GAP_LOW_S) / np.log(GAP_RATIO)
    assert (places <= expected + 1e-4).all()
    assert (expected - 1e-4 <= places + 1).all()
