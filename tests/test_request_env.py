"""Scores of single requests: what they do in the engine, and both environments."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from engine_cases import cases
from gymnasium.utils.env_checker import check_env
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from test_engine_reference import STOPS, compare, start

from l3env import FixedKnobs, Knobs, View, run_policy
from l3env.engine import Until
from l3env.errors import PlanError
from l3env.observe_requests import REQUEST_FEATURES, RequestObserver, fixed_knobs
from l3env.request_env import ServingRequestsEnv, ServingRequestsVectorEnv
from l3env.state import Order, Status

OPTIONS = {"trace": "profile:azure-conv-2023?n=400", "load": 0.6, "episode_requests": 40, "interval_s": 2.0}
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
    env = ServingRequestsEnv(**OPTIONS, visible=8, knobs={"prefill_budget_tokens": 256})  # type: ignore[arg-type]
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
    env = ServingRequestsEnv(**OPTIONS, visible=40, decision="iteration")  # type: ignore[arg-type]
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
    singles = [ServingRequestsEnv(**OPTIONS) for _ in range(3)]  # type: ignore[arg-type]
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
    scored = ServingRequestsEnv(**OPTIONS, knobs={"prefill_budget_tokens": 512})  # type: ignore[arg-type]
    scored.reset(seed=2)
    terminated = False
    while not terminated:
        _, _, terminated, _, info = scored.step(np.zeros(32, np.float32))
    plain = FixedKnobs("plain", Knobs(prefill_budget_tokens=512))
    offline = run_policy(scored.episodes.pairs[0], scored.episode.workload, plain)
    assert info["metrics"]["preemptions_count"] == 0
    assert info["metrics"] == pytest.approx(offline.metrics, rel=0, abs=0, nan_ok=True)


def test_bad_input_is_refused() -> None:
    env = ServingRequestsEnv(**OPTIONS)  # type: ignore[arg-type]
    env.reset(seed=0)
    with pytest.raises(PlanError):
        env.step(np.full(32, 2.0, np.float32))
    with pytest.raises(PlanError, match="'order' cannot be set"):
        ServingRequestsEnv(**OPTIONS, knobs={"order": 1})  # type: ignore[arg-type]
    envs = ServingRequestsVectorEnv(2, **OPTIONS)
    envs.reset(seed=0)
    with pytest.raises(PlanError, match="numbers from -1 to 1"):
        envs.step(np.full((2, 32), np.nan, np.float32))
