"""Training speed: environment steps per second, and the environment's share of the wall time."""

from __future__ import annotations

import time

from l3env.envs.sb3 import make_vec_env
from l3env.experiments.train import algorithms
from l3env.experiments.train.config import hyperparams_of

STEPS_A_ROLLOUT = 64


def training_speed(
    algo: str = "maskable-ppo", num_envs: int = 256, rollouts: int = 4, decision: str = "iteration"
) -> tuple[float, float]:
    """(environment steps/s, share of wall time spent in the environment) of the algorithm with its own settings.

    GPT-175B on the L3 system, Azure conversations at 0.9 of capacity; one iteration a step, or ``decision``. The first
    rollout is not counted.
    """
    algorithms.set_up_torch()
    env = make_vec_env(num_envs, seed=0, utilization=0.9, decision=decision, reward_scale=100.0)
    known = hyperparams_of(algo) | {"num_envs": num_envs, "n_steps": STEPS_A_ROLLOUT}
    model = algorithms.build(algo, env, known, seed=0)
    rollout = num_envs * STEPS_A_ROLLOUT
    model.learn(rollout)
    in_env_s, start_s = env.seconds_in_env, time.perf_counter()
    model.learn(rollouts * rollout, reset_num_timesteps=False)
    wall_s = time.perf_counter() - start_s
    return rollouts * rollout / wall_s, (env.seconds_in_env - in_env_s) / wall_s
