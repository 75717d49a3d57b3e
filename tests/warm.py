"""Kernels are compiled anew for models that guess, for prefix caches, for scorers. Each takes most of a minute: where
several processes run all tests, each compiles its share before it begins, and finds those of the others on disk."""

from __future__ import annotations

from collections.abc import Callable

import gymnasium
import numpy as np

from l3env import BasePolicy, Plan, View, Workload, compile_pair, make_policy, run_policy

DENSE = "l3-dgx-a100", "qwen-72b"
GUESSING, GUESSING_IN_HBM = ("l3-dgx-h200", "deepseek-v3"), ("gpu-dgx-h200", "deepseek-v3")


class Planned(BasePolicy):
    """Admits whoever waits."""

    name = "planned"

    def decide(self, view: View) -> Plan:
        return Plan([int(row["idx"]) for row in view.waiting(8)])


def requests(shared: bool) -> Workload:
    """Two, with the same beginning where they are for a prefix cache."""
    ids = {"prefix_ids": [1, 1], "prefix_offsets": [0, 1, 2], "prefix_block_tokens": 64} if shared else {}
    return Workload.build("warm", [0.0, 0.1], [100, 100], [3, 3], **ids)


def serve(pair: tuple[str, str], policy: str = "fcfs", prefix_cache: str = "off") -> None:
    work = requests(prefix_cache != "off")
    run_policy(compile_pair(*pair), work, make_policy(policy), training=work, prefix_cache=prefix_cache)


def step(pair: tuple[str, str]) -> None:
    system, model = pair
    options = {"workload": requests(False)}
    env = gymnasium.make_vec(
        "l3env/Serving-v0", num_envs=2, system=system, model=model, trace="profile:azure-conv-2023?n=20"
    )
    env.reset(seed=0, options=options)
    env.step(np.zeros(env.action_space.shape, np.int64))
    env.close()


def plan(pair: tuple[str, str], prefix_cache: str = "off") -> None:
    run_policy(compile_pair(*pair), requests(prefix_cache != "off"), Planned(), prefix_cache=prefix_cache)


def prefix_cache_of_a_model_that_guesses() -> None:
    serve(GUESSING_IN_HBM, prefix_cache="lru")


def guesses() -> None:
    step(GUESSING)
    serve(GUESSING)
    plan(GUESSING)


def prefix_cache() -> None:
    serve(DENSE, prefix_cache="lru")
    plan(DENSE, prefix_cache="lru")


def scorer_of_a_model_that_guesses() -> None:
    serve(GUESSING, "request-score")


def scorer() -> None:
    serve(DENSE, "request-score")


def neither() -> None:
    serve(DENSE)
    step(DENSE)
    plan(DENSE)


VARIANTS: tuple[Callable[[], None], ...] = (
    prefix_cache_of_a_model_that_guesses,
    guesses,
    neither,
    prefix_cache,
    scorer,
    scorer_of_a_model_that_guesses,
)
"""In an order that makes two shares alike. What one of them calls shares most of what is compiled, within a process."""


def compile_share(number: int, count: int) -> None:
    """Those of one of so many processes: dealt there and back, so that shares are alike."""
    for i, variant in enumerate(VARIANTS):
        place = i % (2 * count)
        if min(place, 2 * count - 1 - place) == number:
            variant()
