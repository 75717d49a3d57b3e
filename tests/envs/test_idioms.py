"""Gymnasium's and Stable-Baselines3's idioms: honoured, or refused with the reason; none is dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import vector as wrappers
from stable_baselines3.common.vec_env import DummyVecEnv

from l3env.envs.sb3 import make_vec_env
from l3env.envs.vector import ServingVectorEnv
from l3env.errors import L3EnvError, PlanError
from tests.envs.factories import OPTIONS, batched, for_sb3, random_actions, single

MODES = list(AutoresetMode)
SHORT: dict[str, Any] = {**OPTIONS, "episode_requests": 4, "interval_s": 20.0}


def short(mode: AutoresetMode | str, num_envs: int = 3) -> ServingVectorEnv:
    return ServingVectorEnv(num_envs, autoreset_mode=mode, **SHORT)


def test_all_modes_see_the_same_episodes() -> None:
    """Rewards by episode are those of the usual mode; only where the next one begins differs."""
    returns: dict[AutoresetMode, list[list[float]]] = {}
    for mode in MODES:
        env, rng = short(mode), np.random.default_rng(0)
        env.reset(seed=7)
        totals: list[list[float]] = [[0.0] for _ in range(3)]
        while min(len(each) for each in totals) < 4:
            ended_before = env._ended.copy()
            _, rewards, terminated, truncated, info = env.step(random_actions(np.random.default_rng(1), 3))
            ended = terminated | truncated
            assert not (ended & ended_before).any()
            assert (rewards[ended_before] == 0).all()
            for e in range(3):
                totals[e][-1] += float(rewards[e])
                if ended[e]:
                    totals[e].append(0.0)
            if ended.any():
                told = info["final_info"] if mode == AutoresetMode.SAME_STEP else info
                assert [each is not None for each in told["metrics"]] == ended.tolist()
                assert ("final_obs" in info) == (mode == AutoresetMode.SAME_STEP)
            if mode == AutoresetMode.DISABLED and ended.any():
                with pytest.raises(PlanError, match="reset_mask"):
                    env.step(random_actions(rng, 3))
                env.reset(options={"reset_mask": ended})
        returns[mode] = [each[:3] for each in totals]
    assert returns[MODES[0]] == returns[MODES[1]] == returns[MODES[2]]


def test_the_step_after_an_end_gives_the_first_observation() -> None:
    env, plain = short("NextStep", 1), short("SameStep", 1)
    env.reset(seed=3)
    plain.reset(seed=3)
    actions, terminated = random_actions(np.random.default_rng(2), 1), np.zeros(1, bool)
    while not terminated[0]:
        obs, _, terminated, _, info = env.step(actions)
        first, _, _, _, other = plain.step(actions)
    np.testing.assert_array_equal(obs[0], other["final_obs"][0])
    assert info["metrics"][0] == other["final_info"]["metrics"][0]
    obs, reward, terminated, _, info = env.step(actions)
    np.testing.assert_array_equal(obs, first)
    assert reward[0] == 0
    assert not terminated[0]
    assert info["elapsed_s"][0] == 0


def test_a_mask_resets_those_alone() -> None:
    env = short(AutoresetMode.DISABLED)
    with pytest.raises(PlanError, match="before the first reset"):
        env.reset(options={"reset_mask": np.array([True, False, False])})
    env.reset(seed=0)
    env.step(random_actions(np.random.default_rng(0), 3))
    clock_s = env.engine.state.env["clock_s"].copy()
    env.reset(options={"reset_mask": np.array([False, True, False])})
    after_s = env.engine.state.env["clock_s"]
    assert (after_s[[0, 2]] == clock_s[[0, 2]]).all()
    assert after_s[1] != clock_s[1]
    for wrong in (np.zeros(3, bool), np.ones(2, bool), np.ones(3)):
        with pytest.raises(L3EnvError, match="reset_mask"):
            env.reset(options={"reset_mask": wrong})


@pytest.mark.parametrize(
    ("env_id", "wrap"),
    [
        ("l3env/Serving-v0", wrappers.NormalizeObservation),
        ("l3env/Serving-v0", lambda env: wrappers.RescaleObservation(env, 0, 1)),
        ("l3env/Serving-v0", lambda env: wrappers.DtypeObservation(env, np.float64)),
        ("l3env/ServingRequests-v0", wrappers.FlattenObservation),
        ("l3env/Serving-v0", wrappers.NormalizeReward),
        ("l3env/Serving-v0", wrappers.RecordEpisodeStatistics),
    ],
)
def test_vector_wrappers_work(env_id: str, wrap: Any) -> None:
    env = wrap(gymnasium.make_vec(env_id, num_envs=2, autoreset_mode=AutoresetMode.NEXT_STEP, **SHORT))
    assert env.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    obs, _ = env.reset(seed=0)
    for _ in range(4):
        obs, *_ = env.step(env.action_space.sample())
    assert np.isfinite(obs).all()


def test_what_is_not_known_is_refused_with_the_right_names() -> None:
    with pytest.raises(L3EnvError, match="did you mean episode_requests"):
        single(episode_request=3)
    with pytest.raises(L3EnvError, match="did you mean utilization"):
        batched(2, utilisation=0.5)
    with pytest.raises(L3EnvError, match="did you mean visible"):
        gymnasium.make_vec("l3env/ServingRequests-v0", num_envs=2, visble=3, **OPTIONS)
    with pytest.raises(L3EnvError, match="not rendered"):
        batched(2, render_mode="rgb_array")
    with pytest.raises(L3EnvError, match="NextStep"):
        batched(2, autoreset_mode="never")
    with pytest.raises(L3EnvError, match="in the same step"):
        make_vec_env(2, autoreset_mode="NextStep", **OPTIONS)


def test_sb3_options_hold_for_the_next_reset_alone() -> None:
    """As under ``DummyVecEnv`` of the same environments."""
    ours = for_sb3(2, seed=0)
    theirs = DummyVecEnv([lambda: single()] * 2)
    for env in (ours, theirs):
        env.seed(0)
        seen = []
        for _ in range(2):
            env.set_options({"start": 0, "replica": 0})
            seen.append(env.reset())
        np.testing.assert_array_equal(seen[0], seen[1])
        assert not np.array_equal(env.reset(), seen[0])  # drawn again
        env.set_options({"nonsense": 1})
        with pytest.raises(L3EnvError, match="nonsense"):
            env.reset()
    ours.set_options([{"start": 0, "replica": 0}, {"start": 30, "replica": 0}])
    first, second = ours.reset()
    assert not np.array_equal(first, second)


def test_sb3_reset_infos_are_those_of_the_last_starts() -> None:
    env = make_vec_env(2, seed=0, **SHORT)
    env.reset()
    assert [sorted(info) for info in env.reset_infos] == [["action_mask", "clock_s", "elapsed_s"]] * 2
    before = list(env.reset_infos)
    dones = np.zeros(2, bool)
    while not dones.all():
        _, _, now, _ = env.step(random_actions(np.random.default_rng(0), 2))
        dones |= now
    assert all(now is not then for now, then in zip(env.reset_infos, before, strict=True))


def test_sb3_attributes_are_set_or_refused() -> None:
    env = for_sb3(2, seed=0)
    env.set_attr("load", 3.0)
    assert env.get_attr("load") == [(3.0, 3.0)] * 2
    plain = for_sb3(2, seed=0, load=3.0)
    np.testing.assert_array_equal(env.reset(), plain.reset())
    for name, value in (("loads", 3.0), ("system", "gpu-dgx-a100"), ("load", -1.0)):
        with pytest.raises(L3EnvError, match=name):
            env.set_attr(name, value)
    with pytest.raises(L3EnvError, match="no indices"):
        env.set_attr("load", 1.0, indices=[0])


def test_info_says_what_was_drawn() -> None:
    mixed: dict[str, Any] = {**OPTIONS, "system": ["l3-dgx-a100", "gpu-dgx-a100"], "load": [0.5, 2.0]}
    mixed |= {"model": "llama-3-8b", "ttft_scale": [2.0, 4.0]}
    names = ["load", "model", "requests_count", "slo_form", "system", "tbt_scale", "trace", "ttft_scale"]
    env = gymnasium.make("l3env/Serving-v0", **mixed).unwrapped
    several = ServingVectorEnv(4, **mixed)
    _, infos = several.reset(seed=5)
    assert infos["_drawn"].all()
    for e in range(4):
        _, info = env.reset(seed=5 + e)
        assert sorted(info["drawn"]) == names
        assert info["drawn"] == infos["drawn"][e]
        assert info["drawn"]["requests_count"] == len(env.episode.workload)  # type: ignore[attr-defined]
    assert len({drawn["load"] for drawn in infos["drawn"]}) == 4
    assert "drawn" not in env.step(env.action_space.sample())[-1]


def test_fewer_requests_than_replicas(tmp_path: Path) -> None:
    """Episodes are drawn over the replicas that have requests; another one is refused with the reason."""
    path = tmp_path / "two.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,100,10\n1,200,20\n")
    env = gymnasium.make("l3env/Serving-v0", system="gpu-dgx-a100", model="llama-3-8b", trace=str(path)).unwrapped
    prompts = set()
    for seed in range(20):
        env.reset(seed=seed)
        prompts.add(int(env.engine.state.req["prompt_tokens"][0, 0]))  # type: ignore[attr-defined]
    assert prompts == {100, 200}
    env.reset(options={"replica": 1})
    with pytest.raises(L3EnvError, match="only so many of 8"):
        env.reset(options={"replica": 2})
