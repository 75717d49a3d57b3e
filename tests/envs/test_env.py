"""The Gymnasium environment: its API, its rewards, and that it is the same engine as the offline runner."""

from __future__ import annotations

import json

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import l3env
from l3env import FixedKnobs, Workload
from l3env.choices import Budget
from l3env.envs.observe.features import FEATURES, FEATURES_COUNT
from l3env.envs.reward import REWARDS
from l3env.envs.serving import ServingEnv
from l3env.errors import L3EnvError, PlanError
from l3env.policy.levels import LEVELS, action_of, knobs_of
from l3env.runs.driver import run_policy
from tests.envs.factories import OPTIONS, single


def play(env: ServingEnv, seed: int, **options: object) -> tuple[float, list[np.ndarray], dict]:
    """One episode of random legal actions; returns the summed reward, the observations, the last info."""
    rng = np.random.default_rng(seed)
    obs, info = env.reset(seed=seed, options=options or None)
    total, seen, terminated = 0.0, [obs], False
    sizes = env.action_space.nvec  # type: ignore[attr-defined]
    while not terminated:
        heads = np.split(info["action_mask"], np.cumsum(sizes)[:-1])
        action = np.array([rng.choice(np.flatnonzero(head)) for head in heads])
        obs, reward, terminated, truncated, info = env.step(action)
        assert not truncated
        total += reward
        seen.append(obs)
    return total, seen, info


@pytest.mark.parametrize("system", ["l3-dgx-a100", "gpu-dgx-a100", "hbm-pim-dgx-a100"])
@pytest.mark.parametrize("decision", ["interval", "iteration", "event"])
def test_gymnasium_check_env(system: str, decision: str) -> None:
    check_env(single(system=system, decision=decision), skip_render_check=True)


def test_sb3_check_env() -> None:
    checker = pytest.importorskip("stable_baselines3.common.env_checker", reason="needs the train extra")
    checker.check_env(single())


def test_spec_is_json() -> None:
    env = gymnasium.make("l3env/Serving-v0", trace=OPTIONS["trace"], system="gpu-dgx-a100", model="opt-66b")
    assert env.spec is not None
    assert json.loads(env.spec.to_json())["kwargs"]["system"] == "gpu-dgx-a100"


def test_registration_is_idempotent() -> None:
    import importlib

    importlib.reload(l3env)
    assert "l3env/Serving-v0" in gymnasium.registry


@pytest.mark.parametrize("decision", ["interval", "iteration", "event"])
def test_observations_stay_in_their_ranges_and_all_are_finite(decision: str) -> None:
    env = single(decision=decision, load=1.5)
    _, seen, _ = play(env, 3)
    stacked = np.array(seen)
    assert stacked.shape[1] == FEATURES_COUNT == len(env.feature_names()) == len({name for name, _ in FEATURES})
    assert np.isfinite(stacked).all()
    assert stacked.min() >= 0
    assert stacked.max() <= 1


def test_goodput_reward_sums_to_the_reported_attainment() -> None:
    total, _, info = play(single(), 1)
    assert info["metrics"]["slo_attainment_frac"] > 0.2
    assert total == pytest.approx(info["metrics"]["slo_attainment_frac"], abs=1e-12)


def test_guarded_reward_sums_to_the_guarded_attainment() -> None:
    """One request, then all others at once: the last ones wait beyond the guard."""
    burst = l3env.Workload.build("burst", np.append(0.0, np.full(299, 20.0)), np.full(300, 1500), np.full(300, 20))
    env = single(reward="guarded-goodput", interval_s=20.0)
    env.reset(seed=0, options={"workload": burst})
    total, terminated, info = 0.0, False, {}
    while not terminated:
        _, reward, terminated, _, info = env.step(action_of(l3env.Knobs(prefill_budget_tokens=2048)))
        total += reward
    figures = info["metrics"]
    assert 0 < figures["beyond_guard_count"] < 300
    assert figures["slo_attainment_frac"] > 0
    assert total == pytest.approx(figures["guarded_attainment_frac"], abs=1e-12)
    met_count = figures["slo_attainment_frac"] * 300
    assert total * 300 == pytest.approx(met_count - figures["beyond_guard_count"])


@pytest.mark.parametrize("name", sorted(REWARDS))
def test_rewards_do_not_depend_on_where_steps_end(name: str) -> None:
    """Every reward is a sum over time: the same knobs give the same total at any step length."""
    knobs = action_of(l3env.Knobs(prefill_budget_tokens=512, headroom_frac=0.01))
    totals = []
    for decision, interval_s in (("interval", 0.5), ("interval", 7.0), ("iteration", 1.0), ("event", 3.0)):
        env = single(decision=decision, interval_s=interval_s, reward=name)
        env.reset(seed=0, options={"start": 0, "replica": 0})
        total, terminated = 0.0, False
        while not terminated:
            _, reward, terminated, _, _ = env.step(knobs)
            total += reward
        totals.append(total)
    assert totals[0] != 0
    np.testing.assert_allclose(totals, totals[0], rtol=1e-9)


def test_latency_reward_is_minus_the_mean_time_in_system() -> None:
    total, _, info = play(single(reward="latency"), 2)
    assert info["metrics"]["finished_count"] == OPTIONS["episode_requests"]
    # Little's law: requests in the system integrated over iterations = the sum of their times; a request that arrives
    # inside an iteration is counted from its end on, so the integral is a little smaller
    assert -total == pytest.approx(info["metrics"]["e2e_mean_s"], rel=0.1)
    assert -total <= info["metrics"]["e2e_mean_s"]


def test_env_and_offline_runner_give_the_same_numbers() -> None:
    env = single()
    workload = env.episodes.workloads[0].head(80)
    action = action_of(l3env.Knobs(prefill_budget_tokens=1024, headroom_frac=0.05))
    for decision in ("interval", "iteration", "event"):
        env = single(decision=decision, load=1.0)
        _, info = env.reset(seed=0, options={"workload": workload})
        terminated = False
        while not terminated:
            _, _, terminated, _, info = env.step(action)
        offline = run_policy(env.episodes.pairs[0], workload, FixedKnobs("same", knobs_of(action)))
        assert info["metrics"] == pytest.approx(offline.metrics, rel=0, abs=0, nan_ok=True)


def test_seeds_repeat_and_differ() -> None:
    env = single()
    one, again, other = (play(env, seed)[1] for seed in (1, 1, 2))
    assert len(one) == len(again)
    assert all((a == b).all() for a, b in zip(one, again, strict=True))
    assert len(one) != len(other) or any((a != b).any() for a, b in zip(one, other, strict=True))


def test_observations_are_fresh_arrays() -> None:
    env = single()
    first, _ = env.reset(seed=0)
    before = first.copy()
    env.step(env.action_space.sample())
    np.testing.assert_array_equal(first, before)


def test_observation_is_blind_to_true_output_lengths() -> None:
    workload = single().episodes.workloads[0].head(50)
    longer = Workload.build("longer", workload.arrival_s, workload.prompt_tokens, workload.output_tokens + 400)
    action = action_of(l3env.Knobs(prefill_budget_tokens=512))
    seen = []
    for each in (workload, longer):
        env = single(decision="iteration", load=1.0)
        obs, info = env.reset(seed=0, options={"workload": each})
        rows = [obs]
        while info["finished_count"] == 0:
            obs, _, _, _, info = env.step(action)
            rows.append(obs)
        seen.append(rows[:-1])
    count = min(map(len, seen))
    assert count > 5
    np.testing.assert_array_equal(seen[0][:count], seen[1][:count])


def test_masks_close_what_does_nothing() -> None:
    def legal(env: ServingEnv) -> dict[str, np.ndarray]:
        env.reset(seed=0)
        sizes = [len(levels) for levels in LEVELS.values()]
        return dict(zip(LEVELS, np.split(env.action_masks(), np.cumsum(sizes)[:-1]), strict=True))

    gpu, pim = legal(single(system="gpu-dgx-a100")), legal(single())
    assert gpu["sub_batching"].tolist() == [True, False, False]
    assert gpu["hbm_share_frac"].sum() == 1
    for budget in (Budget.ALIGN, Budget.ALIGN_WHEN_FULL):
        assert not gpu["prefill_budget_tokens"][LEVELS["prefill_budget_tokens"].index(budget)]
    assert pim["sub_batching"].all()
    assert pim["hbm_share_frac"].all()
    assert all(head.any() for head in (*gpu.values(), *pim.values()))
    predicting = legal(single(predictor="srtf-predicted"))
    assert predicting["order"].all()
    assert pim["order"].sum() == len(LEVELS["order"]) - 1


def test_action_round_trip() -> None:
    space = single().action_space
    space.seed(0)
    for _ in range(50):
        action = space.sample()
        np.testing.assert_array_equal(action_of(knobs_of(action)), action)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"decision": "now"}, "decision = 'now'"),
        ({"interval_s": 0}, "interval_s"),
        ({"episode_requests": 0}, "episode_requests"),
        ({"reward": "money"}, "unknown reward 'money'"),
        ({"system": "l4"}, "unknown system 'l4'"),
        ({"trace": "azure"}, "azure"),
        ({"utilization": 0.9, "trace": "openr1?n=20"}, "utilization has no meaning"),
    ],
)
def test_bad_arguments_are_one_clear_error(kwargs: dict, message: str) -> None:
    with pytest.raises(L3EnvError, match=message):
        single(**kwargs)


def test_bad_steps_are_refused() -> None:
    env = single()
    with pytest.raises(PlanError, match="before reset"):
        env.step(env.action_space.sample())
    env.reset(seed=0)
    with pytest.raises(PlanError, match="expected one of MultiDiscrete"):
        env.step(np.array([99] * len(LEVELS)))
    with pytest.raises(L3EnvError, match="unknown reset options wind"):
        env.reset(options={"wind": 1})
    with pytest.raises(L3EnvError, match="start = 9999"):
        env.reset(options={"start": 9999})


def test_own_reward_function() -> None:
    env = ServingEnv(trace=OPTIONS["trace"], episode_requests=20, reward=lambda before, after: np.full(len(after), 2.5))
    env.reset(seed=0)
    assert env.step(env.action_space.sample())[1] == 2.5
