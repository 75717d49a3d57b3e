"""The batched environment: Gymnasium's API, and the same trajectories as single environments."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

import l3env.threads
from l3env.envs.serving import ServingEnv
from l3env.envs.vector import ServingVectorEnv
from l3env.errors import L3EnvError, PlanError
from l3env.policy.levels import LEVELS
from tests.envs.factories import OPTIONS, batched, random_actions


def test_make_vec_reaches_the_batched_engine() -> None:
    envs = batched(3)
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
    envs = batched(count, system=system, decision=decision)
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
                for name in ("slo_attainment_frac", "guarded_goodput_requests_per_s", "longest_wait_s", "starved_frac"):
                    assert final[name] == single_info["metrics"][name]
                assert {each: single_info["metrics"][each] for each in final} == final
                running.remove(i)
            else:
                np.testing.assert_array_equal(info["action_mask"][i], single_info["action_mask"])


def test_episodes_go_on_as_a_single_environment_that_is_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an end the next episode is what ``reset()`` of the single environment draws; threads change nothing."""
    seen = []
    for threads in (1, 2):
        monkeypatch.setattr(l3env.threads, "_limit", threads)
        envs, single = batched(2), ServingEnv(**OPTIONS)  # type: ignore[arg-type]
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
    envs = batched(2)
    obs, info = envs.reset(seed=0)
    copies = obs.copy(), info["action_mask"].copy(), info["clock_s"].copy()
    again = envs.step(random_actions(np.random.default_rng(0), 2))
    np.testing.assert_array_equal(obs, copies[0])
    np.testing.assert_array_equal(info["action_mask"], copies[1])
    np.testing.assert_array_equal(info["clock_s"], copies[2])
    assert not np.shares_memory(again[0], obs)


def test_bad_input_is_refused() -> None:
    envs = batched(2)
    with pytest.raises(PlanError, match="before reset"):
        envs.step(random_actions(np.random.default_rng(0), 2))
    envs.reset(seed=0)
    with pytest.raises(PlanError, match="expected shape"):
        envs.step(np.full((2, len(LEVELS)), 99))
    with pytest.raises(PlanError, match="3 seeds for 2 environments"):
        envs.reset(seed=[1, 2, 3])
    with pytest.raises(L3EnvError, match="unknown reset options"):
        envs.reset(options={"wind": 1})


SHORT_RUN = """
import hashlib, sys
import gymnasium, numpy as np
import l3env
digest = hashlib.sha256()
for name in ("Serving-v0", "ServingRequests-v0"):
    envs = gymnasium.make_vec(
        f"l3env/{name}", num_envs=2, trace="profile:azure-conv-2023?n=60", load=0.8,
        episode_requests=8, decision="event",
        system=["l3-dgx-a100", "gpu-dgx-a100"], model="qwen-72b", slo_form=sys.argv[1],
    )
    obs, _ = envs.reset(seed=3)
    rng = np.random.default_rng(0)
    for _ in range(25):
        if name == "Serving-v0":
            actions = np.stack([rng.integers(0, n, 2) for n in envs.single_action_space.nvec], axis=1)
            seen = [obs]
        else:
            actions = rng.uniform(-1, 1, envs.action_space.shape).astype(np.float32)
            seen = [obs["state"], obs["requests"]]
        for part in seen:
            digest.update(np.round(part.astype(float), 5).tobytes())
        obs, rewards, *_ = envs.step(actions)
        digest.update(rewards.tobytes())
print(digest.hexdigest())
"""


@pytest.mark.parametrize("form", ["p99-gap", "token-deadlines"])
def test_the_same_with_and_without_compilation(form: str) -> None:
    """Two environments over two machines, through several episodes, in fresh processes."""
    seen = []
    for compiled in ("0", "1"):
        variables = {**os.environ, "NUMBA_DISABLE_JIT": compiled}
        command = [sys.executable, "-c", SHORT_RUN, form]
        seen.append(subprocess.run(command, env=variables, check=True, capture_output=True, text=True).stdout)
    assert seen[0] == seen[1]


def test_episodes_draw_from_lists_and_ranges() -> None:
    """Machines, traces and loads are drawn for each episode, fixed by reset options, and repeat with the seed."""
    options = {
        "system": ["l3-dgx-a100", "gpu-dgx-a100"],
        "model": ["gpt-175b", "qwen-72b"],
        "trace": ["profile:azure-conv-2023?n=300", "profile:azure-code-2023?n=300"],
        "load": [0.2, 0.6],
        "episode_requests": 20,
    }
    single = ServingEnv(**options)  # type: ignore[arg-type]
    drawn = set()
    for seed in range(40):
        single.reset(seed=seed)
        episode = single.episode
        drawn.add((single.episodes.names[episode.pair_idx], single.episodes.traces[episode.trace_idx]))
        assert 0.2 <= episode.load <= 0.6
        assert single.engine is not None
        assert single.engine.pair(0) is single.episodes.pairs[episode.pair_idx]
    assert len(drawn) == 8
    fixed = {"system": "gpu-dgx-a100", "model": "qwen-72b", "trace": options["trace"][1], "load": 0.3}
    single.reset(seed=0, options=fixed)
    assert single.episodes.names[single.episode.pair_idx] == ("gpu-dgx-a100", "qwen-72b")
    assert single.episode.load == 0.3
    envs = ServingVectorEnv(4, **options)
    obs, info = envs.reset(seed=10)
    for i in range(4):
        first, single_info = single.reset(seed=10 + i)
        np.testing.assert_array_equal(obs[i], first)
        np.testing.assert_array_equal(info["action_mask"][i], single_info["action_mask"])
    with pytest.raises(L3EnvError, match="this environment has"):
        single.reset(options={"system": "cpu-offload-dgx-a100"})
    with pytest.raises(L3EnvError, match="range"):
        ServingEnv(load=[2.0, 1.0])
    with pytest.raises(L3EnvError, match="different names"):
        ServingEnv(system=[])


def test_an_error_in_a_thread_reaches_the_caller() -> None:
    def fails(first: int, last: int) -> None:
        if last == 100:
            raise ValueError("the last piece")

    with pytest.raises(ValueError, match="the last piece"):
        l3env.threads.share_out(fails, 100)
    done = np.zeros(1000, np.int64)
    l3env.threads.share_out(lambda first, last: done.__setitem__(slice(first, last), done[first:last] + 1), 1000)
    assert (done == 1).all()


def test_only_loops_that_take_long_are_shared_out() -> None:
    """A quick loop runs alone, a slow one in pieces from its second time on; every item is done once either way."""
    done, calls = np.zeros(100, np.int64), []

    def quick(first: int, last: int) -> None:
        calls.append(last - first)
        done[first:last] += 1

    def slow(first: int, last: int) -> None:
        quick(first, last)
        time.sleep(2 * l3env.threads.WORTH_S)

    with l3env.threads.at_most(2):
        for work, pieces in ((quick, [100, 100]), (slow, [100, 25, 25, 25, 25])):
            calls.clear()
            sharer = l3env.threads.Sharer()
            for _ in range(2):
                sharer(work, 100)
            assert calls == pieces
    assert (done == 4).all()
