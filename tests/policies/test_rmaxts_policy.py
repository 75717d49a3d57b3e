"""The planner: copies of the present, what it may not know, its decisions."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

import l3env
from l3env import Knobs, View, Workload
from l3env.choices import Order, SubBatching
from l3env.engine.engine import Engine, Slo
from l3env.engine.kernels.run import Stop, Until
from l3env.engine.rollout import Rollouts, present_idx
from l3env.errors import PolicyError
from l3env.machine.tables import Tables
from l3env.policies.best_constant import BestConstant
from l3env.policies.imagined import Known, Lengths
from l3env.policies.rmaxts import SCENARIOS, RMaxTS, _Search, portfolio
from l3env.policy.protocol import FixedKnobs
from l3env.runs.driver import run_policy
from l3env.search.tune import Case, serve_each

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
    lengths = Lengths(earlier.prompt_tokens, earlier.output_tokens)
    for emitted in (0, 500, 990):
        drawn = lengths.draw(np.full(20000, 100), np.full(20000, emitted), rng)
        assert drawn.min() > emitted
        assert drawn.max() <= 1000
        assert drawn.mean() == pytest.approx((emitted + 1 + 1000) / 2, rel=0.02)
    beyond = lengths.draw(np.full(100, 100), np.full(100, 2000), rng)
    assert (beyond > 2000).all()


@pytest.mark.parametrize(
    "changes",
    [{}, {"intrinsic": False}, {"gamma": 1.0}, {"virtual_loss": False}, {"beyond": False}, {"clear_errors": 1.0}],
)
def test_runs_as_a_policy(tables: Tables, changes: dict[str, float]) -> None:
    trace = l3env.load_trace("profile:azure-conv-2023?n=60").at_load(0.4)
    policy = RMaxTS(**{"simulations": 64, **changes})
    outcome = run_policy(tables, trace, policy, training=trace, record=False)
    assert outcome.metrics["finished_count"] == 60
    assert outcome.metrics["simulations_mean_count"] <= policy.simulations + SCENARIOS + len(policy.actions)
    assert outcome.metrics["decision_ms"] > 0
    again = run_policy(tables, trace, RMaxTS(**{"simulations": 64, **changes}), training=trace, record=False)
    assert again.metrics["makespan_s"] == outcome.metrics["makespan_s"]


def test_needs_earlier_requests(tables: Tables) -> None:
    with pytest.raises(PolicyError, match="rmaxts needs earlier requests"):
        RMaxTS().prepare(tables, None)
    assert math.isfinite(RMaxTS.decision_interval_s)


def halfway(tables: Tables) -> tuple[Engine, Workload]:
    """A run in which some requests have finished, some run, some wait and some are to come."""
    rng = np.random.default_rng(3)
    workload = Workload.build(
        "half", np.arange(200.0), rng.permutation(np.arange(20, 6020, 30)), rng.integers(1, 400, 200)
    )
    engine = Engine(tables, 1, 200)
    engine.reset(0, workload)
    SETTINGS[1].write(engine.knobs, 0)
    engine.run(0, Until.TIME, 120.0)
    return engine, workload


def test_a_view_knows_the_lengths_of_finished_requests_alone(tables: Tables) -> None:
    engine, workload = halfway(tables)
    view = View(engine, 0)
    finished = view.finished
    assert 0 < finished.size < 120
    assert finished.size == engine.state.env["finished_count"][0]
    for name in ("arrival_s", "prompt_tokens", "output_tokens"):
        np.testing.assert_array_equal(finished[name], getattr(workload, name)[finished["idx"]])
    assert not set(finished["idx"]) & set(view.present["idx"])
    assert finished.size + view.present.size == view.arrived_count


def test_stretches_keep_order_gaps_and_lengths(tables: Tables) -> None:
    engine, workload = halfway(tables)
    view = View(engine, 0)
    rng = np.random.default_rng(0)
    earlier = Workload.build("earlier", np.arange(60.0) / 2, np.arange(60) + 7000, np.arange(60) + 1)
    known = Known(view, earlier, replicas_count=2)
    drawn = known.draw_lengths(rng)
    assert (drawn > view.present["emitted_tokens"]).all()
    pairs = {
        (int(p), int(o)) for p, o in zip(view.finished["prompt_tokens"], view.finished["output_tokens"], strict=True)
    }
    pairs |= {(int(p), int(o)) for p, o in zip(view.present["prompt_tokens"], drawn, strict=True)}
    arrived = {int(p): i for i, p in enumerate(workload.prompt_tokens)}
    future = known.arrivals(50, True, drawn, rng)
    assert future is not None
    assert set(zip(future.prompt_tokens.tolist(), future.output_tokens.tolist(), strict=True)) <= pairs
    order = np.array([arrived[int(p)] for p in future.prompt_tokens])
    assert (np.diff(order) == 1).sum() >= 48  # once around the end at most
    np.testing.assert_allclose(np.diff(future.arrival_s)[np.diff(order) == 1], 1.0)
    assert future.arrival_s[0] > view.now_s
    other = known.arrivals(20, False, drawn, rng)
    assert other is not None
    assert set((other.prompt_tokens - 7000) - (other.prompt_tokens[0] - 7000) % 2) <= set(
        range(0, 60, 2)
    )  # a replica's
    np.testing.assert_array_equal(other.output_tokens, other.prompt_tokens - 6999)
    gap_s = (50 * 1.0 + view.now_s) / (50 + view.arrived_count)  # earlier: one in two of two a second
    steps = np.diff(other.arrival_s)
    np.testing.assert_allclose(steps, gap_s, rtol=0.02)


def test_on_track_is_who_has_kept_all_limits_so_far(tables: Tables) -> None:
    engine, _ = halfway(tables)
    view = View(engine, 0)
    present = view.present
    rollouts = Rollouts(tables, 1, 1)
    view.imagine(rollouts, 0, present["emitted_tokens"] + 10)
    rollouts.start(0, 0)
    expected = 0
    for row in present:
        if row["emitted_tokens"] == 0 or row["prefill_left_tokens"] > 0 or row["pool"] < 0:
            continue
        mean_gap_s = (view.now_s - row["first_token_s"]) / max(row["emitted_tokens"] - 1, 1)
        expected += row["first_token_s"] <= row["ttft_deadline_s"] and mean_gap_s <= row["tbt_slo_s"]
    assert rollouts.on_track().tolist() == [expected]
    assert expected > 0


def test_a_node_is_tried_on_every_scenario_before_it_is_expanded(tables: Tables) -> None:
    training = l3env.load_trace("profile:azure-conv-2023?n=120").at_load(1.0)
    engine = busy(tables, SETTINGS[0])
    policy = RMaxTS(600)
    policy.prepare(tables, training)
    policy.decide(View(engine, 0))
    allowed = list(range(1, len(policy.actions)))
    search = _Search(policy, View(engine, 0).now_s, allowed)
    while search.count < policy.simulations:
        search.batch()
    assert len(search.children[0]) == len(allowed)
    assert any(search.children[1:])
    for node, children in enumerate(search.children):
        assert len(search.advantages[node]) <= SCENARIOS
        if node and children:
            assert len(search.advantages[node]) == SCENARIOS
        keys = [search.paths[child][-1] for child in children]
        assert len(set(keys)) == len(keys)
        assert (search.paths[node][-1] if node else 0) not in keys  # no change is no child
    assert not search.nodes["tree_running"].any()


def test_actions_complement_the_best_constant(tables: Tables) -> None:
    training = l3env.load_trace("profile:azure-conv-2023?n=300").at_load(0.6)
    constant = BestConstant()
    constant.prepare(tables, training)
    actions = portfolio(constant, tables, training)
    assert actions[0] == constant.knobs
    assert len(set(actions)) == len(actions) > 1
    met = [serve_each(Case(tables, training.at_load(load)), actions)[0] for load in (1.0, 1.5)]
    parts = np.concatenate([np.stack([p.mean(axis=1) for p in np.array_split(m, 8, axis=1)]) for m in met]).T
    reached = np.maximum.accumulate(parts, axis=0).sum(axis=1)
    gains = np.diff(reached)
    assert (gains > 0).all()
    assert (np.diff(gains) <= 1e-12).all()  # each the greatest gain there was, so never more than the one before


def test_requests_served_under_settings_are_those_of_a_run(tables: Tables) -> None:
    trace = l3env.load_trace("profile:azure-conv-2023?n=150").at_load(0.6)
    met_mask, _ = serve_each(Case(tables, trace), SETTINGS)
    for knobs, met in zip(SETTINGS, met_mask, strict=True):
        outcome = run_policy(tables, trace, FixedKnobs("fixed", knobs))
        np.testing.assert_array_equal(met == 1, outcome.requests["slo_met"].astype(bool))
        waited = (outcome.requests["wait_s"] > np.maximum(60, 10 * outcome.requests["ttft_slo_s"])).to_numpy()
        np.testing.assert_array_equal(met == -1, waited)


def test_who_may_replace_the_default_has_held_up_in_this_run(tables: Tables) -> None:
    """A finished run, all lengths known: its replay is the run, and what each action would have served is a run's."""
    training = l3env.load_trace("profile:azure-conv-2023?n=300").at_load(0.6)
    served = l3env.load_trace("profile:azure-conv-2023?n=120", seed=1).at_load(0.9)
    policy = RMaxTS()
    policy.prepare(tables, training)
    engine = Engine(tables, 1, len(served))
    engine.reset(0, served)
    SETTINGS[0].write(engine.knobs, 0)
    engine.run(0)
    known = Known(View(engine, 0), training, 1)
    replay = known.replay(np.empty(0, np.int64))
    np.testing.assert_array_equal(replay.output_tokens, served.output_tokens)
    np.testing.assert_allclose(replay.arrival_s, served.arrival_s - served.arrival_s[0])
    runs = [run_policy(tables, replay, FixedKnobs("fixed", knobs), record=False) for knobs in policy.actions]
    met = [outcome.metrics["slo_attainment_frac"] for outcome in runs]
    assert policy._allowed(known) == [a for a in range(1, len(met)) if met[a] >= met[0]]
    policy._chosen = 1
    assert policy._allowed(known) == list(range(1, len(met)))
