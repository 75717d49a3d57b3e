"""Scores of single requests: what they do in the engine, and both environments."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from l3env import FixedKnobs, Knobs, View, run_policy
from l3env.choices import Order, Status
from l3env.engine.engine import Until
from l3env.envs.observe.request_rows import REQUEST_FEATURES
from l3env.envs.observe.requests import RequestObserver, fixed_knobs
from l3env.envs.requests import ServingRequestsEnv, ServingRequestsVectorEnv
from l3env.errors import L3EnvError, PlanError
from tests.engine.beside_reference import STOPS, compare, start
from tests.engine.engine_cases import cases
from tests.envs.factories import OPTIONS

NAMES = [name for name, _ in REQUEST_FEATURES]
SLOW_OK = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@settings(SLOW_OK, max_examples=80)
@given(
    case=cases(max_requests=25),
    seed=st.integers(0, 2**32 - 1),
    budget=st.sampled_from([7, 100, -1]),
    in_order=st.booleans(),
)
def test_scores_decide_who_is_admitted_and_preempted_as_in_the_reference(case, seed, budget, in_order) -> None:
    engine, reference = start(case)
    rng = np.random.default_rng(seed)
    knobs = fixed_knobs({"prefill_budget_tokens": budget, "sub_batching": 0, "prefill_in_order": in_order})
    observer = RequestObserver(engine, has_predictor=True, visible=30, knobs=knobs)
    limits = np.ones(1)
    observer.look()
    for _ in range(3000):
        scores = rng.uniform(-1, 1, (1, 60)).round(1)  # with ties
        shown = observer.seen[0].copy()
        for r, score in zip(shown, scores[0], strict=True):
            if r >= 0:
                reference.requests[r].score = score
        stop = reference.step(knobs)
        flat, masks = observer.step(observer.check(scores), Until.ITERATIONS, limits)
        assert ((flat >= 0) & (flat <= 1)).all()
        assert (masks == (observer.seen >= 0)).all()
        if stop != "running":
            break
    assert stop in STOPS
    compare(engine, reference)
    event(f"preemptions: {reference.totals.preemptions > 0}")


def test_rows_are_the_requests_one_by_one() -> None:
    env = ServingRequestsEnv(**OPTIONS, visible=8, knobs={"prefill_budget_tokens": 256})
    rng = np.random.default_rng(0)
    obs, info = env.reset(seed=0)
    counts = set()
    for _ in range(60):
        view = View(env.engine, 0)
        waiting, running = view.waiting(limit=8, order=Order.FCFS), view.running
        rows = [dict(zip(NAMES, row, strict=True)) for row in obs["requests"]]
        assert [row["present"] for row in rows] == info["action_mask"].tolist()
        assert sum(row["present"] for row in rows[:8]) == len(waiting)
        assert sum(row["present"] for row in rows[8:]) == min(len(running), 8)
        seen = env._observer.seen[0]
        assert seen[: len(waiting)].tolist() == waiting["idx"].tolist()
        by_idx = {int(each["idx"]): each for each in (*waiting, *running)}
        for r, row in zip(seen, rows, strict=True):
            if r < 0:
                assert not any(row.values())
                continue
            each = by_idx[int(r)]
            assert row["running"] == (each["status"] != Status.WAITING)
            assert row["prefilling"] == (each["status"] == Status.PREFILL)
            age_s, slo_s = view.now_s - each["arrival_s"], each["ttft_deadline_s"] - each["arrival_s"]
            assert row["age"] == pytest.approx(age_s / (age_s + slo_s), rel=1e-5, abs=1e-7)
            assert row["emitted"] == pytest.approx(each["emitted_tokens"] / (each["emitted_tokens"] + 256), rel=1e-5)
            start_s = each["ttft_deadline_s"] - each["ttft_alone_s"]
            first_s = each["first_token_s"]
            late = view.now_s > start_s if np.isnan(first_s) else first_s > each["ttft_deadline_s"]
            assert row["late"] == late
            counts.add((bool(row["running"]), bool(late)))
        obs, _, terminated, _, info = env.step(rng.uniform(-1, 1, 16).astype(np.float32))
        if terminated:
            break
    assert len(counts) >= 3


def test_held_back_requests_wait_until_nothing_runs() -> None:
    env = ServingRequestsEnv(**OPTIONS, visible=40, decision="iteration")
    _, info = env.reset(seed=1)
    terminated, most = False, 0
    while not terminated:
        _, _, terminated, _, info = env.step(np.full(80, -1.0, np.float32))
        assert env.engine is not None
        most = max(most, int(env.engine.state.env["running_count"][0]))
    assert most == 1 or info["finished_count"] == 40  # one at a time: new arrivals within a step are unscored
    assert info["finished_count"] == 40


@pytest.mark.parametrize("decision", ["interval", "iteration"])
def test_check_env(decision: str) -> None:
    env = gymnasium.make("l3env/ServingRequests-v0", decision=decision, **OPTIONS)
    check_env(env.unwrapped, skip_render_check=True)
    sb3 = pytest.importorskip("stable_baselines3.common.env_checker", reason="needs the train extra")
    sb3.check_env(env.unwrapped)


def test_the_batched_form_equals_single_ones() -> None:
    envs = gymnasium.make_vec("l3env/ServingRequests-v0", num_envs=3, **OPTIONS)
    assert isinstance(envs, ServingRequestsVectorEnv)
    singles = [ServingRequestsEnv(**OPTIONS) for _ in range(3)]
    obs, _ = envs.reset(seed=5)
    assert envs.observation_space.contains(obs)
    for i, single in enumerate(singles):
        first, _ = single.reset(seed=5 + i)
        np.testing.assert_array_equal(obs["requests"][i], first["requests"])
    rng = np.random.default_rng(0)
    running = {0, 1, 2}
    while running:
        scores = rng.uniform(-1, 1, (3, 32)).astype(np.float32)
        obs, rewards, terminated, _, info = envs.step(scores)
        for i in sorted(running):
            alone, reward, done, _, alone_info = singles[i].step(scores[i])
            assert rewards[i] == reward
            assert terminated[i] == done
            seen = info["final_obs"][i] if done else {name: part[i] for name, part in obs.items()}
            for name in ("state", "requests"):
                np.testing.assert_array_equal(seen[name], alone[name])
            if done:
                running.remove(i)
            else:
                np.testing.assert_array_equal(info["action_mask"][i], alone_info["action_mask"])


def test_all_scores_zero_is_first_come_first_served() -> None:
    """The neutral action gives what the plain order gives under the same knobs."""
    scored = ServingRequestsEnv(**OPTIONS, knobs={"prefill_budget_tokens": 512})
    scored.reset(seed=2)
    terminated = False
    while not terminated:
        _, _, terminated, _, info = scored.step(np.zeros(32, np.float32))
    plain = FixedKnobs("plain", Knobs(prefill_budget_tokens=512))
    offline = run_policy(scored.episodes.pairs[0], scored.episode.workload, plain)
    assert info["metrics"]["preemptions_count"] == 0
    assert info["metrics"] == pytest.approx(offline.metrics, rel=0, abs=0, nan_ok=True)


def test_knobs_beside_the_scores_are_set_by_level() -> None:
    """The range from -1 to 1 in equal parts; a score is a score whatever follows it."""
    levels = {"prefill_budget_tokens": (64, 256, 1024), "hbm_share_frac": (0.0, 1.0)}
    env = ServingRequestsEnv(**OPTIONS, action_knobs=levels)
    _, info = env.reset(seed=0)
    assert env.action_space.shape == info["action_mask"].shape == (34,)
    assert env.knob_levels() == levels
    assert info["action_mask"][-2:].all()
    wanted = {-1.0: 64, -0.34: 64, -0.33: 256, 0.33: 256, 0.34: 1024, 1.0: 1024}
    for entry, tokens in wanted.items():
        env.step(np.array([*np.linspace(-1, 1, 32), entry, -entry], np.float32))
        assert env.engine is not None
        assert env.engine.knobs["prefill_budget_tokens"][0] == tokens
        assert env.engine.knobs["hbm_share_frac"][0] == (entry <= 0)


def test_a_knob_with_one_level_is_a_fixed_knob() -> None:
    """Single and batched: the same rewards with the knob in ``knobs`` as behind the scores."""
    fixed = ServingRequestsEnv(**OPTIONS, knobs={"prefill_budget_tokens": 512})
    chosen = ServingRequestsEnv(**OPTIONS, action_knobs={"prefill_budget_tokens": [512]})
    envs = ServingRequestsVectorEnv(2, **OPTIONS, action_knobs={"prefill_budget_tokens": [512]})
    for each in (fixed, chosen, envs):
        each.reset(seed=4)
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.uniform(-1, 1, 32).astype(np.float32)
        entry = np.append(scores, np.float32(rng.uniform(-1, 1)))
        one, other = fixed.step(scores), chosen.step(entry)
        both = envs.step(np.array([entry, entry]))
        np.testing.assert_array_equal(one[0]["requests"], other[0]["requests"])
        assert one[1:4] == other[1:4]
        assert both[1][0] == one[1]


def test_by_deadline_those_who_cannot_meet_theirs_come_last() -> None:
    few = {"load": 3.0, "decision": "iteration", "knobs": {"prefill_budget_tokens": 64}}
    env = ServingRequestsEnv(**OPTIONS | few, visible=4, show="deadline")
    env.reset(seed=0)
    terminated, lost = False, 0
    while not terminated:
        view = View(env.engine, 0)
        order = view.waiting(limit=4, order=Order.EARLIEST_DEADLINE_HOPELESS_LAST)["idx"]
        waiting = view.waiting(limit=100)
        late = view.now_s > waiting["ttft_deadline_s"] - waiting["ttft_alone_s"]
        by_hand = waiting["idx"][np.lexsort([waiting["ttft_deadline_s"], late])][:4]
        assert env._observer.seen[0, : len(order)].tolist() == order.tolist() == by_hand.tolist()
        lost += bool(late.any() and not late.all())
        _, _, terminated, _, _ = env.step(np.zeros(8, np.float32))
    assert lost > 3


def test_at_events_a_new_request_is_scored_before_it_is_scheduled() -> None:
    """All scores 1 but for arrivals yet unseen, which have 0: nobody is ever scheduled with that."""
    env = ServingRequestsEnv(**OPTIONS, visible=40, decision="event")
    env.reset(seed=0)
    terminated = False
    while not terminated:
        _, _, terminated, _, _ = env.step(np.ones(80, np.float32))
        assert env.engine is not None
        req = env.engine.state.req[0, :40]
        begun = (req["prefilled_tokens"] > 0) | ~np.isnan(req["first_token_s"])
        assert (req["score"][begun] == 1).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"show": "size"}, "show = 'size'; expected one of arrival, deadline"),
        ({"action_knobs": {"victim": [0]}}, "action_knobs: 'victim'"),
        ({"action_knobs": {"headroom_frac": []}}, "action_knobs: 'headroom_frac'"),
        ({"action_knobs": {"headroom_frac": [2.0]}}, "knobs: headroom_frac = 2.0"),
        ({"action_knobs": ["headroom"]}, "action_knobs = "),
    ],
)
def test_wrong_settings_are_one_clear_error(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(L3EnvError, match=message):
        ServingRequestsEnv(**OPTIONS, **wrong)


def test_bad_input_is_refused() -> None:
    env = ServingRequestsEnv(**OPTIONS)
    env.reset(seed=0)
    with pytest.raises(PlanError):
        env.step(np.full(32, 2.0, np.float32))
    with pytest.raises(PlanError, match="'order' cannot be set"):
        ServingRequestsEnv(**OPTIONS, knobs={"order": 1})
    envs = ServingRequestsVectorEnv(2, **OPTIONS)
    envs.reset(seed=0)
    with pytest.raises(PlanError, match="numbers from -1 to 1"):
        envs.step(np.full((2, 32), np.nan, np.float32))
