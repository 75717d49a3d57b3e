"""The VecEnv: Stable-Baselines3's conventions, and the same numbers as the batched environment."""

from __future__ import annotations

import itertools
import pickle

import gymnasium
import numpy as np
import pytest
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecNormalize

from l3env.envs.sb3 import settings_of
from l3env.envs.serving import ServingEnv
from l3env.envs.vector import ServingVectorEnv
from l3env.errors import L3EnvError
from l3env.knobs import Knobs
from l3env.policy.levels import LEVELS, action_of
from tests.envs.factories import OPTIONS, for_sb3, random_actions

LEVELS_COUNT = sum(len(levels) for levels in LEVELS.values())


def test_check_env_of_the_single_environment() -> None:
    check_env(ServingEnv(**OPTIONS), warn=True)


def test_same_numbers_as_the_batched_environment() -> None:
    """Through ends of episodes; the episode's record is the sum of its rewards and the report's attainment."""
    ours, plain = for_sb3(3, seed=5, reward_scale=10.0), ServingVectorEnv(3, **OPTIONS)
    obs = ours.reset()
    expected, _ = plain.reset(seed=5)
    np.testing.assert_array_equal(obs, expected)
    rng = np.random.default_rng(0)
    returns, ends = np.zeros(3), 0
    while ends < 5:
        actions = random_actions(rng, 3)
        obs, rewards, dones, infos = ours.step(actions)
        expected, plain_rewards, terminated, truncated, info = plain.step(actions)
        np.testing.assert_array_equal(obs, expected)
        np.testing.assert_array_equal(rewards, (10.0 * plain_rewards).astype(np.float32))
        np.testing.assert_array_equal(dones, terminated | truncated)
        np.testing.assert_array_equal(ours.env_method("action_masks"), info["action_mask"])
        returns += plain_rewards
        for e in np.flatnonzero(dones):
            ends += 1
            np.testing.assert_array_equal(infos[e]["terminal_observation"], info["final_obs"][e])
            assert infos[e]["TimeLimit.truncated"] is False
            assert infos[e]["episode"]["r"] == pytest.approx(returns[e], abs=1e-12)
            assert infos[e]["episode"]["r"] == pytest.approx(infos[e]["metrics"]["slo_attainment_frac"], abs=1e-12)
            returns[e] = 0.0


def test_truncation_is_marked_as_such() -> None:
    envs = for_sb3(2, max_episode_steps=3)
    envs.reset()
    rng = np.random.default_rng(0)
    for step in range(1, 7):
        _, _, dones, infos = envs.step(random_actions(rng, 2))
        assert dones.all() == (step % 3 == 0)
        if dones.all():
            assert [info["TimeLimit.truncated"] for info in infos] == [True, True]
            assert [info["episode"]["l"] for info in infos] == [3, 3]
        else:
            assert infos[0] is infos[1]
            assert infos[0] == {}


def test_arrays_handed_out_are_fresh() -> None:
    """Rollout buffers keep references, so nothing may be written into them later."""
    envs = for_sb3(4)
    rng = np.random.default_rng(0)
    kept, copies = [envs.reset()], []
    copies.append(kept[0].copy())
    for _ in range(40):
        obs, rewards, dones, _ = envs.step(random_actions(rng, 4))
        masks = envs.action_masks()
        for array in (obs, rewards, dones, masks):
            kept.append(array)
            copies.append(array.copy())
    for array, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_masks_reach_sb3_contrib() -> None:
    envs = for_sb3(4, system="gpu-dgx-a100")
    envs.reset()
    assert is_masking_supported(envs)
    masks = get_action_masks(envs)
    assert masks.shape == (4, LEVELS_COUNT)
    assert not masks.all()
    starts = np.cumsum([0, *(len(levels) for levels in LEVELS.values())])
    assert all(masks[:, a:b].any(axis=1).all() for a, b in itertools.pairwise(starts))
    np.testing.assert_array_equal(envs.env_method("action_masks", indices=[1, 3]), masks[[1, 3]])


def test_vec_env_attributes() -> None:
    envs = for_sb3(3)
    assert envs.get_attr("num_envs", indices=[0, 2]) == [3, 3]
    assert not envs.has_attr("no_such_thing")
    assert envs.env_is_wrapped(Monitor) == [True] * 3
    assert envs.env_is_wrapped(gymnasium.wrappers.TimeLimit) == [False] * 3
    with pytest.raises(L3EnvError, match="share their attributes"):
        envs.set_attr("max_episode_steps", 3, indices=[0])
    envs.set_attr("max_episode_steps", 3)
    assert envs.get_attr("max_episode_steps") == [3] * 3
    assert list(envs.seed(4)) == [4, 5, 6]


def test_equal_seeds_give_equal_episodes() -> None:
    envs = for_sb3(4)
    envs.seed_each([7, 7, 8, 8])
    obs = envs.reset()
    np.testing.assert_array_equal(obs[0], obs[1])
    np.testing.assert_array_equal(obs[2], obs[3])
    same = random_actions(np.random.default_rng(0), 1).repeat(4, axis=0)
    seen = [envs.step(same)[0] for _ in range(5)]
    for obs in seen:
        np.testing.assert_array_equal(obs[0], obs[1])
    assert any((obs[0] != obs[2]).any() for obs in seen)


def test_discrete_actions_stand_for_settings() -> None:
    names = ("order", "prefill_budget_tokens")
    settings = settings_of(names)
    assert len(settings) == len(LEVELS["order"]) * len(LEVELS["prefill_budget_tokens"])
    assert len(np.unique(settings, axis=0)) == len(settings)
    base = action_of(Knobs())
    others = [i for i, name in enumerate(LEVELS) if name not in names]
    assert (settings[:, others] == base[others]).all()
    one, all_knobs = for_sb3(2, seed=1, discrete=names), for_sb3(2, seed=1)
    one.reset()
    all_knobs.reset()
    masks = one.action_masks()
    assert masks.shape == (2, len(settings))
    assert masks.any(axis=1).all()
    for action in (0, 17, len(settings) - 1):
        left, right = one.step(np.full(2, action)), all_knobs.step(settings[[action, action]])
        np.testing.assert_array_equal(left[0], right[0])
    with pytest.raises(L3EnvError, match="expected some of"):
        settings_of(["colour"])


def test_it_goes_on_from_a_pickle() -> None:
    """What a checkpoint needs: a restored copy steps as the original does, resets included."""
    envs = for_sb3(3, seed=2)
    envs.reset()
    rng = np.random.default_rng(0)
    for _ in range(10):
        envs.step(random_actions(rng, 3))
    copy = pickle.loads(pickle.dumps(envs))
    ends = 0
    for _ in range(100):
        actions = random_actions(rng, 3)
        left, right = envs.step(actions), copy.step(actions)
        for a, b in zip(left[:3], right[:3], strict=True):
            np.testing.assert_array_equal(a, b)
        ends += int(left[2].sum())
    assert ends > 3


def test_evaluate_policy_and_wrappers_take_it() -> None:
    model = PPO("MlpPolicy", for_sb3(2), n_steps=8, batch_size=16, device="cpu")
    envs = for_sb3(2, seed=0, reward_scale=100.0)
    mean, _ = evaluate_policy(model, envs, n_eval_episodes=2, warn=True)
    assert 0 <= mean <= 1  # the record is not scaled
    normalised = VecNormalize(for_sb3(2), norm_obs=False)
    normalised.reset()
    assert normalised.step(random_actions(np.random.default_rng(0), 2))[0].shape == (2, *envs.observation_space.shape)


@pytest.mark.parametrize("algorithm", [PPO, A2C, MaskablePPO])
def test_on_policy_algorithms_learn_a_little(algorithm: type) -> None:
    batch = {} if algorithm is A2C else {"batch_size": 16}
    model = algorithm("MlpPolicy", for_sb3(4, seed=0), n_steps=8, seed=0, device="cpu", **batch)
    before = [p.detach().clone() for p in model.policy.parameters()]
    model.learn(64)
    assert model.num_timesteps == 64
    assert any((a != b).any() for a, b in zip(before, model.policy.parameters(), strict=True))


def test_dqn_on_a_discrete_space() -> None:
    model = DQN("MlpPolicy", for_sb3(4, seed=0, discrete=("order",)), learning_starts=16, batch_size=16, device="cpu")
    model.learn(64)
    assert model.num_timesteps == 64
