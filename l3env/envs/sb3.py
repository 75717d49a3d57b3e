"""Stable-Baselines3's face of the batched environment: a VecEnv over the same arrays, with action masks.

    from l3env.sb3 import make_vec_env
    model = MaskablePPO("MlpPolicy", make_vec_env(64, trace="azure-conv-2023", utilization=0.9))

Needs the extra ``train``. There is no object per environment: one call steps all, and environments that have not ended
share one empty info.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv

from l3env.envs.vector import ServingVectorEnv, mode_of
from l3env.errors import L3EnvError
from l3env.knobs import Knobs
from l3env.policy.levels import LEVELS, Levels, action_of, sizes_of

Indices = int | Iterable[int] | None


def make_vec_env(
    num_envs: int = 64,
    *,
    seed: int | None = None,
    discrete: Sequence[str] | None = None,
    reward_scale: float = 1.0,
    **kwargs: Any,
) -> ServingVecEnv:
    """E environments as a VecEnv.

    Args:
        seed: environment i starts from seed + i.
        discrete: names of knobs; the action is then one number that stands for a setting of these, the others keep the
            defaults of ``Knobs`` (for algorithms that need a Discrete space, such as DQN).
        reward_scale: rewards are multiplied by it; ``infos[i]["episode"]["r"]`` is not.
        kwargs: as for ``ServingEnv``, and ``max_episode_steps``.

    Raises:
        L3EnvError: something wrong with the arguments.
    """
    if mode_of(kwargs.get("autoreset_mode", AutoresetMode.SAME_STEP)) != AutoresetMode.SAME_STEP:
        raise L3EnvError("autoreset_mode: Stable-Baselines3 starts episodes anew in the same step; expected SameStep")
    return ServingVecEnv(ServingVectorEnv(num_envs, **kwargs), seed=seed, discrete=discrete, reward_scale=reward_scale)


def settings_of(discrete: Sequence[str], levels: Levels = LEVELS) -> NDArray[np.int64]:
    """(A, knobs) the action that each number stands for: all combinations of some knobs' levels."""
    unknown = [name for name in discrete if name not in levels]
    if unknown or not discrete:
        raise L3EnvError(f"discrete = {list(discrete)}; expected some of {', '.join(levels)}")
    base = action_of(Knobs(), levels)
    columns = [list(levels).index(name) for name in discrete]
    choices = list(itertools.product(*(range(len(levels[name])) for name in discrete)))
    settings = np.repeat(base[None], len(choices), axis=0)
    settings[:, columns] = choices
    return settings


class ServingVecEnv(VecEnv):
    """``ServingVectorEnv`` as Stable-Baselines3 expects it.

    Observations, rewards and ends are fresh arrays at each step, since rollout buffers keep references. Ended episodes
    have ``terminal_observation``, ``TimeLimit.truncated``, ``metrics`` and, as ``Monitor`` gives it, ``episode``.
    """

    def __init__(
        self,
        env: ServingVectorEnv,
        *,
        seed: int | None = None,
        discrete: Sequence[str] | None = None,
        reward_scale: float = 1.0,
    ) -> None:
        self.env = env
        self.settings = None if discrete is None else settings_of(discrete, env.levels)
        self.reward_scale = reward_scale
        space = env.single_action_space if self.settings is None else gymnasium.spaces.Discrete(len(self.settings))
        super().__init__(env.num_envs, env.single_observation_space, space)
        self._next_seed: int | Sequence[int | None] | None = seed
        self._nothing: dict[str, Any] = {}
        self._masks = np.ones((0, 0), bool)
        self._actions = np.zeros((0, 0), np.int64)
        self._returns = np.zeros(env.num_envs)
        self._lengths = np.zeros(env.num_envs, np.int64)
        self._start_s = time.perf_counter()
        self.seconds_in_env = 0.0

    def reset(self) -> NDArray[np.float32]:
        """Starts E episodes; seeds given before are used once."""
        seed, self._next_seed = self._next_seed, None
        obs, info = self.env.reset(seed=seed, options=[options or None for options in self._options])
        self._masks = info["action_mask"]
        self._note_resets(range(self.num_envs), info)
        self._returns[:] = 0.0
        self._lengths[:] = 0
        self._reset_seeds()
        self._reset_options()
        return obs

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """The seed of environment 0 at the next reset; environment i gets seed + i."""
        self._next_seed = seed
        return [None if seed is None else seed + i for i in range(self.num_envs)]

    def seed_each(self, seeds: Sequence[int]) -> None:
        """The seed of each environment at the next reset; equal seeds give equal episodes."""
        self._next_seed = list(seeds)

    def step_async(self, actions: NDArray[np.int64]) -> None:
        """Keeps the actions for ``step_wait``."""
        self._actions = np.asarray(actions)

    def step_wait(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """One decision in every environment."""
        start_s = time.perf_counter()
        actions = self._actions if self.settings is None else self.settings[self._actions.reshape(-1)]
        obs, rewards, terminated, truncated, info = self.env.step(actions)
        self._masks = info["action_mask"]
        dones = terminated | truncated
        self._returns += rewards
        self._lengths += 1
        infos = [self._nothing] * self.num_envs
        ends = np.flatnonzero(dones).tolist()
        self._note_resets(ends, info)
        for e in ends:
            infos[e] = self._ended(e, info, bool(truncated[e]))
        scaled = (rewards * self.reward_scale).astype(np.float32)
        self.seconds_in_env += time.perf_counter() - start_s
        return obs, scaled, dones, infos

    def _note_resets(self, which: Iterable[int], info: dict[str, Any]) -> None:
        for e in which:
            started = {"elapsed_s": 0.0, "clock_s": float(info["clock_s"][e]), "action_mask": self.action_masks()[e]}
            self.reset_infos[e] = started

    def _ended(self, e: int, info: dict[str, Any], truncated: bool) -> dict[str, Any]:
        wall_s = round(time.perf_counter() - self._start_s, 6)
        episode = {"r": float(self._returns[e]), "l": int(self._lengths[e]), "t": wall_s}
        self._returns[e], self._lengths[e] = 0.0, 0
        return {
            "terminal_observation": info["final_obs"][e],
            "TimeLimit.truncated": truncated,
            "metrics": info["final_info"]["metrics"][e],
            "episode": episode,
        }

    def close(self) -> None:
        """Nothing is held open."""
        self.env.close()

    def action_masks(self) -> NDArray[np.bool_]:
        """(E, levels) legal levels, the knobs' heads one after the other. With ``discrete``: (E, settings)."""
        if self.settings is None:
            return self._masks
        return setting_masks(self._masks, self.settings, self.env.levels)

    def get_attr(self, attr_name: str, indices: Indices = None) -> list[Any]:
        """The attribute is one for all environments; of what episodes are drawn from, too."""
        home = next((each for each in (self.env, self.env.episodes) if hasattr(each, attr_name)), self.env)
        value = getattr(self if attr_name == "action_masks" else home, attr_name)
        return [value] * len(self._which(indices))

    def set_attr(self, attr_name: str, value: Any, indices: Indices = None) -> None:
        """Sets what episodes are drawn from (``episodes.CHANGEABLE``) for all environments, from their next start on.

        Raises L3EnvError for another attribute, and for some of the environments only.
        """
        if len(self._which(indices)) != self.num_envs:
            raise L3EnvError(f"set_attr({attr_name!r}): environments share their attributes; expected no indices")
        self.env.change(attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Indices = None, **kwargs: Any) -> Any:
        """``action_masks`` (rows of the environments asked for), or a method of the batched environment."""
        which = self._which(indices)
        if method_name == "action_masks":
            return self.action_masks()[which]
        value = getattr(self.env, method_name)(*args, **kwargs)
        return [value] * len(which)

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Indices = None) -> list[bool]:
        """True for ``Monitor``, whose records of episodes are in the infos."""
        return [issubclass(Monitor, wrapper_class)] * len(self._which(indices))

    def _which(self, indices: Indices) -> list[int]:
        return list(self._get_indices(indices))


def setting_masks(masks: NDArray[np.bool_], settings: NDArray[np.int64], levels: Levels = LEVELS) -> NDArray[np.bool_]:
    """(E, A) which settings use only legal levels; all of them where none does."""
    starts = np.cumsum([0, *sizes_of(levels)][:-1])
    legal: NDArray[np.bool_] = np.all(masks[:, starts + settings], axis=2)
    return legal | ~np.any(legal, axis=1, keepdims=True)
