"""The planner: copies of the present, what it may not know, its decisions."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

import l3env
from l3env import Knobs, View, Workload
from l3env.engine import Engine, Slo
from l3env.errors import PolicyError
from l3env.kernels.run import Stop, Until
from l3env.rollout import Rollouts, present_idx
from l3env.runner import run_policy
from l3env.state import Order, SubBatching
from l3env.tables import Tables
from policies.rmaxts import Lengths, RMaxTS

PAIR = ("l3-dgx-a100", "gpt-175b")
SETTINGS = (
    Knobs(),
    Knobs(prefill_budget_tokens=512, budget_counts_decodes=True, order=Order.EARLIEST_DEADLINE_HOPELESS_LAST),
    Knobs(prefill_budget_tokens=1024, sub_batching=SubBatching.ADAPTIVE, hbm_share_frac=0.1),
)


@pytest.fixture(scope="module")
def tables() -> Tables:
    return l3env.compile_pair(*PAIR)


def busy(tables: Tables, knobs: Knobs, seed: int = 0, count: int = 120, slo: Slo | None = None) -> Engine:
    """An engine in the middle of things, all requests arrived."""
    rng = np.random.default_rng(seed)
    workload = Workload.build(
        "busy", np.sort(rng.random(count)) * 20, rng.integers(20, 6000, count), rng.integers(1, 600, count)
    )
    engine = Engine(tables, 1, count)
    engine.reset(0, workload, slo=slo)
    knobs.write(engine.knobs, 0)
    engine.run(0, Until.TIME, 25.0)
    engine.await_work(0, 1)
    assert engine.state.env["arrived_count"][0] == count
    return engine


@pytest.mark.parametrize("knobs", SETTINGS)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("form", ["mean-tbt", "token-deadlines"])
def test_a_copy_with_the_true_lengths_goes_on_as_the_original(
    tables: Tables, knobs: Knobs, seed: int, form: str
) -> None:
    """All that decides the future is in the copy: same clock, tokens and finishing times, to the bit."""
    slo = Slo(form=form)
    live = busy(tables, knobs, seed, slo=slo)
    idx = present_idx(live, 0)
    assert idx.size == live.state.env["waiting_count"][0] + live.state.env["running_count"][0] > 10
    rollouts = Rollouts(tables, 2, 1)
    rollouts.imagine(live, 0, idx, 0, live.state.truth[0, idx].astype(np.int64), None, slo)
    for trial in (0, 1):
        rollouts.start(trial, 0)
        knobs.write(rollouts.engine.knobs, trial)
    rollouts.run_until(np.full(2, 1e9))
    live.run(0)
    assert live.stop(0) == Stop.DONE
    for name in ("clock_s", "output_tokens", "slo_met_count", "preemptions_count", "busy_s", "finished_count"):
        assert rollouts.env[name].tolist() == [live.state.env[name][0]] * 2, name
    for trial in (0, 1):
        for name in ("finish_s", "first_token_s", "slo_met"):
            copied = rollouts.engine.state.req[name][trial, : idx.size]
            np.testing.assert_array_equal(copied, live.state.req[name][0, idx])


def test_trials_do_not_disturb_one_another_or_the_scenario(tables: Tables) -> None:
    live = busy(tables, SETTINGS[0])
    idx = present_idx(live, 0)
    before = live.state.req.tobytes()
    rollouts = Rollouts(tables, 3, 2)
    rng = np.random.default_rng(0)
    emitted = View(live, 0).present["emitted_tokens"]
    for scenario in (0, 1):
        rollouts.imagine(live, 0, idx, scenario, emitted + rng.integers(1, 500, idx.size), None, Slo())

    def outcome(starts: list[int]) -> list[float]:
        for trial, scenario in enumerate(starts):
            rollouts.start(trial, scenario)
            SETTINGS[trial].write(rollouts.engine.knobs, trial)
        rollouts.run_until(np.full(3, 1e9))
        return rollouts.env["present_s"].tolist()

    first = outcome([0, 0, 0])
    outcome([1, 1, 1])
    assert outcome([0, 0, 0]) == first
    assert outcome([1, 0, 1])[1] == first[1]
    assert live.state.req.tobytes() == before


def test_imagined_arrivals_are_served(tables: Tables) -> None:
    live = busy(tables, SETTINGS[0])
    idx, now_s = present_idx(live, 0), float(live.state.env["clock_s"][0])
    future = Workload.build("future", now_s + np.array([1.0, 2.0, 500.0]), [100, 5000, 10], [5, 50, 500])
    rollouts = Rollouts(tables, 1, 1)
    rollouts.imagine(live, 0, idx, 0, View(live, 0).present["emitted_tokens"] + 1, future, Slo())
    rollouts.start(0, 0)
    SETTINGS[0].write(rollouts.engine.knobs, 0)
    rollouts.run_until(np.full(1, 1e9))
    req = rollouts.engine.state.req[0, idx.size : idx.size + 3]
    assert (req["finish_s"] > future.arrival_s).all()
    alone_s, _ = live.alone_latencies(future.prompt_tokens)
    np.testing.assert_allclose(req["ttft_slo_s"], 5 * alone_s)
    assert req["first_token_s"][2] == pytest.approx(now_s + 500 + alone_s[2], rel=1e-6)  # by then the machine is empty


def test_true_lengths_of_unfinished_requests_change_no_decision(tables: Tables) -> None:
    """What a request will come to, and who is still to come, is overwritten: the plan stays the same."""
    training = l3env.load_trace("profile:azure-conv-2023?n=120").at_load(0.3)
    live = busy(tables, SETTINGS[1], count=60)
    chosen = []
    for case in range(3):
        rng = np.random.default_rng(case)
        if case:
            status = live.state.req["status"][0]
            open_mask = status < 5  # not finished, not rejected
            emitted = np.zeros(status.size, np.int64)
            present = View(live, 0).present
            emitted[present["idx"]] = present["emitted_tokens"]
            live.state.truth[0, open_mask] = emitted[open_mask] + rng.integers(1, 4000, int(open_mask.sum()))
        policy = RMaxTS(96)
        policy.prepare(tables, training)
        view = View(live, 0)
        policy.decide(view)
        search_state = [policy._rollouts.env["present_s"].tolist(), policy._rollouts.env["slo_met_count"].tolist()]
        chosen.append(search_state)
    assert chosen[0] == chosen[1] == chosen[2]


def test_a_trial_starts_within_100_us_at_1000_live_requests() -> None:
    """The least of many, since others use the machine too."""
    tables = l3env.compile_pair("l3-dgx-a100", "deepseek-prover-v1.5-7b")
    count = 1000
    engine = Engine(tables, 1, count)
    engine.reset(0, Workload.build("many", np.zeros(count), np.full(count, 200), np.full(count, 400)))
    Knobs().write(engine.knobs, 0)
    engine.run(0, Until.ITERATIONS, 20)
    idx = present_idx(engine, 0)
    assert idx.size == count
    rollouts = Rollouts(tables, 2, 1)
    rollouts.imagine(engine, 0, idx, 0, np.full(count, 401), None, Slo())
    times = []
    for _ in range(300):
        start = time.perf_counter()
        rollouts.start(1, 0)
        times.append(time.perf_counter() - start)
    assert min(times) < 100e-6


def test_lengths_follow_what_was_emitted() -> None:
    rng = np.random.default_rng(0)
    outputs = np.arange(1, 1001)
    earlier = Workload.build("earlier", np.arange(1000.0), np.full(1000, 100), outputs)
    lengths = Lengths(earlier)
    for emitted in (0, 500, 990):
        drawn = lengths.draw(np.full(20000, 100), np.full(20000, emitted), rng)
        assert drawn.min() > emitted
        assert drawn.max() <= 1000
        assert drawn.mean() == pytest.approx((emitted + 1 + 1000) / 2, rel=0.02)
    beyond = lengths.draw(np.full(100, 100), np.full(100, 2000), rng)
    assert (beyond > 2000).all()


@pytest.mark.parametrize("changes", [{}, {"intrinsic": False}, {"gamma": 1.0}, {"simulations": 32}])
def test_runs_as_a_policy(tables: Tables, changes: dict[str, float]) -> None:
    trace = l3env.load_trace("profile:azure-conv-2023?n=60").at_load(0.4)
    policy = RMaxTS(**{"simulations": 64, **changes})
    outcome = run_policy(tables, trace, policy, training=trace, record=False)
    assert outcome.metrics["finished_count"] == 60
    assert outcome.metrics["simulations_mean_count"] >= policy.simulations
    assert outcome.metrics["decision_ms"] > 0
    again = run_policy(tables, trace, RMaxTS(**{"simulations": 64, **changes}), training=trace, record=False)
    assert again.metrics["makespan_s"] == outcome.metrics["makespan_s"]


def test_needs_earlier_requests(tables: Tables) -> None:
    with pytest.raises(PolicyError, match="rmaxts needs earlier requests"):
        RMaxTS().prepare(tables, None)
    assert math.isfinite(RMaxTS.decision_interval_s)
