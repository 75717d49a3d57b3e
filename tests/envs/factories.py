"""Environments over a short trace, each made the way its users make it."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from l3env.envs.sb3 import ServingVecEnv, make_vec_env
from l3env.envs.serving import ServingEnv
from l3env.envs.vector import ServingVectorEnv
from l3env.policy.levels import LEVELS

OPTIONS: dict[str, Any] = {
    "trace": "profile:azure-conv-2023?n=400",
    "load": 0.5,
    "episode_requests": 40,
    "interval_s": 2.0,
}


def single(**options: Any) -> ServingEnv:
    return gymnasium.make("l3env/Serving-v0", **OPTIONS | options).unwrapped  # type: ignore[return-value]


def batched(num_envs: int, **options: Any) -> ServingVectorEnv:
    return gymnasium.make_vec("l3env/Serving-v0", num_envs=num_envs, **OPTIONS | options)  # type: ignore[return-value]


def for_sb3(num_envs: int = 4, **options: Any) -> ServingVecEnv:
    return make_vec_env(num_envs, **OPTIONS | options)


def random_actions(rng: np.random.Generator, num_envs: int) -> np.ndarray:
    return np.stack([rng.integers(0, len(levels), num_envs) for levels in LEVELS.values()], axis=1)
