"""The batched environment: Gymnasium's API, and the same trajectories as single environments."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

import l3env.threads
from l3env.env import ServingEnv
from l3env.errors import L3EnvError, PlanError
from l3env.observe import LEVELS
from l3env.vector_env import ServingVectorEnv

OPTIONS = {"trace": "profile:azure-conv-2023?n=400", "load": 0.5, "episode_requests": 40, "interval_s": 2.0}


def make(num_envs: int, **kwargs: object) -> ServingVectorEnv:
    return gymnasium.make_vec("l3env/Serving-v0", num_envs=num_envs, **{**OPTIONS, **kwargs})  # type: ignore[return-value]


def random_actions(rng: np.random.Generator, num_envs: int) -> np.ndarray:
    return np.stack([rng.integers(0, len(levels), num_envs) for levels in LEVELS.values()], axis=1)


def test_make_vec_reaches_the_batched_engine() -> None:
    envs = make(3)
    assert isinstance(envs, ServingVectorEnv)
    assert envs.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    obs, info = envs.reset(seed=0)
    assert envs.observation_space.contains(obs)
    assert info["action_mask"].shape == (3, sum(len(levels) for levels in LEVELS.values()))
    assert envs.action_space.shape == (3, len(LEVELS))


@pytest.mark.parametrize("decision", ["interval", "iteration", "event"])
@pytest.mark.parametrize("system", ["l3-dgx-a100", "gpu-dgx-a100"])
def test_trajectories_equal_single_environments(system: str, decision: str) -> None:
    """Observations, rewards, masks and ends, bit for bit, through the first episode of each."""
    count = 4
    envs = make(count, system=system, decision=decision)
    singles = [ServingEnv(system=system, decision=decision, **OPTIONS) for _ in range(count)]
    obs, info = envs.reset(seed=7)
    for i, single in enumerate(singles):
        first, single_info = single.reset(seed=7 + i)
        np.testing.assert_array_equal(obs[i], first)
        np.testing.assert_array_equal(info["action_mask"][i], single_info["action_mask"])
    rng = np.random.default_rng(0)
    running = set(range(count))
    while running:
        actions = random_actions(rng, count)
        obs, rewards, terminated, truncated, info = envs.step(actions)
        assert not truncated.any()
        for i in sorted(running):
            single_obs, reward, done, _, single_info = singles[i].step(actions[i])
            assert rewards[i] == reward
            assert terminated[i] == done
            assert info["elapsed_s"][i] == single_info["elapsed_s"]
            np.testing.assert_array_equal(info["final_obs"][i] if done else obs[i], single_obs)
            if done:
                final = info["final_info"]["metrics"][i]
                assert info["_final_info"][i]
                assert final["slo_attainment_frac"] == single_info["metrics"]["slo_attainment_frac"]
                running.remove(i)
            else:
                np.testing.assert_array_equal(info["action_mask"][i], single_info["action_mask"])


def test_episodes_go_on_as_a_single_environment_that_is_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an end the next episode is what ``reset()`` of the single environment draws; threads change nothing."""
    seen = []
    for threads in (1, 2):
        monkeypatch.setattr(l3env.threads, "_limit", threads)
        envs, single = make(2), ServingEnv(**OPTIONS)  # type: ignore[arg-type]
        envs.reset(seed=3)
        single.reset(seed=3)
        rng = np.random.default_rng(1)
        ends, trace = 0, []
        while ends < 3:
            actions = random_actions(rng, 2)
            obs, rewards, terminated, _, _ = envs.step(actions)
            single_obs, reward, done, _, _ = single.step(actions[0])
            assert rewards[0] == reward
            if done:
                ends += 1
                single_obs, _ = single.reset()
            np.testing.assert_array_equal(obs[0], single_obs)
            trace.append((obs.tobytes(), rewards.tobytes(), terminated.tobytes()))
        seen.append(trace)
    assert seen[0] == seen[1]


def test_truncation_at_max_episode_steps() -> None:
    envs = gymnasium.make_vec("l3env/Serving-v0", num_envs=2, max_episode_steps=5, **OPTIONS)
    envs.reset(seed=0)
    rng = np.random.default_rng(0)
    for step in range(1, 11):
        _, _, terminated, truncated, info = envs.step(random_actions(rng, 2))
        assert not terminated.any()
        assert truncated.all() == (step % 5 == 0)
        assert ("final_obs" in info) == (step % 5 == 0)


def test_data_handed_out_is_not_reused() -> None:
    envs = make(2)
    obs, info = envs.reset(seed=0)
    copies = obs.copy(), info["action_mask"].copy(), info["clock_s"].copy()
    again = envs.step(random_actions(np.random.default_rng(0), 2))
    np.testing.assert_array_equal(obs, copies[0])
    np.testing.assert_array_equal(info["action_mask"], copies[1])
    np.testing.assert_array_equal(info["clock_s"], copies[2])
    assert not np.shares_memory(again[0], obs)


def test_bad_input_is_refused() -> None:
    envs = make(2)
    with pytest.raises(PlanError, match="before reset"):
        envs.step(random_actions(np.random.default_rng(0), 2))
    envs.reset(seed=0)
    with pytest.raises(PlanError, match="expected shape"):
        envs.step(np.full((2, len(LEVELS)), 99))
    with pytest.raises(PlanError, match="3 seeds for 2 environments"):
        envs.reset(seed=[1, 2, 3])
    with pytest.raises(L3EnvError, match="unknown reset options"):
        envs.reset(options={"wind": 1})
