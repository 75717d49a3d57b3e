"""Speed, measured: ``l3env bench [--json]``.

Each figure is the median of several runs, the smallest and largest beside it. Compilation and start are measured in
fresh processes.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

from l3env import BasePolicy, Knobs, Plan, View, Workload, compile_pair, load_trace, make_policy
from l3env.choices import Order, Status
from l3env.engine.engine import Engine
from l3env.machine.tables import Tables
from l3env.policy.protocol import Policy
from l3env.runs.driver import drive
from l3env.threads import THREADS, at_most

SYSTEM, MODEL = "l3-dgx-a100", "gpt-175b"
TRACE = "openr1"
VECTOR_TRACE = "azure-conv-2023"
COMPILED_POLICY = "l3-model"
REPEATS = 5
SCALING_ENVS, SCALING_STEPS = (1, 16, 64, 256, 1024), 50_000
TRAINED = (("maskable-ppo", 256), ("maskable-ppo", 64), ("ppo", 256), ("ppo", 64))  # the first is "train_..."
FIRST_USE = "import l3env; l3env.run_policy(l3env.compile_pair('{0}', '{1}'), l3env.load_trace('openr1?n=20'), "
FIRST_USE += "l3env.make_policy('l3-model'))"


class PlainPython(BasePolicy):
    """A heuristic as a user writes it: looks at the queue and memory at every iteration and returns a Plan."""

    name = "plain-python"

    def decide(self, view: View) -> Knobs | Plan:
        free_tokens = view.pools.free_tokens[1] - 2 * view.running_count * view.pools.block_tokens
        admit = []
        for row in view.waiting(limit=8, order=Order.FCFS):
            free_tokens -= int(row["prompt_tokens"]) + int(row["emitted_tokens"]) + view.pools.block_tokens
            if free_tokens < 0.05 * view.system.pim_tokens:
                break
            admit.append(int(row["idx"]))
        oldest = view.running[view.running["status"] == Status.DECODE]["kv_tokens"]
        return Plan(admit=admit, interleave=oldest.size > 1)


def iterations_per_s(tables: Tables, workload: Workload, policy: Policy) -> float:
    """Iterations per second of one closed-loop run, decisions included, loading of the workload not."""
    engine = Engine(tables, 1, len(workload))
    engine.reset(0, workload)
    start = time.perf_counter()
    drive(engine, 0, policy)
    return float(engine.state.env["iterations_count"][0]) / (time.perf_counter() - start)


def spread(name: str, values: list[float]) -> dict[str, float]:
    """Median under the name, extremes beside it."""
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def repeat(measure: Callable[[], float], count: int = REPEATS) -> list[float]:
    """Several measurements after one that is thrown away."""
    measure()
    return [measure() for _ in range(count)]


def first_use_s(count: int = 1) -> tuple[list[float], list[float]]:
    """(first use with an empty kernel cache, later starts), whole processes, seconds."""
    command = [sys.executable, "-c", FIRST_USE.format(SYSTEM, MODEL)]
    first, later = [], []
    for _ in range(count):
        with tempfile.TemporaryDirectory() as folder:
            env = {**os.environ, "L3ENV_CACHE_DIR": folder}
            first.append(_wall_s(command, env))
            later += [_wall_s(command, env) for _ in range(3)]
    return first, later


def _wall_s(command: list[str], env: dict[str, str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, env=env, check=True, capture_output=True)
    return time.perf_counter() - start


def vector_steps_per_s(num_envs: int = 256, steps: int = 400) -> Callable[[], float]:
    """Steps per second of the batched environment: random knobs, one iteration a step, 0.9 of capacity."""
    envs = gymnasium.make_vec(
        "l3env/Serving-v0",
        num_envs=num_envs,
        system=SYSTEM,
        model=MODEL,
        trace=VECTOR_TRACE,
        utilization=0.9,
        decision="iteration",
    )
    envs.reset(seed=0)
    rng = np.random.default_rng(0)
    levels = envs.single_action_space.nvec  # type: ignore[attr-defined]
    actions = [np.stack([rng.integers(0, n, num_envs) for n in levels], axis=1) for _ in range(64)]

    def measure() -> float:
        start = time.perf_counter()
        for i in range(steps):
            envs.step(actions[i % len(actions)])
        return num_envs * steps / (time.perf_counter() - start)

    return measure


def vector_scaling(progress: Callable[[str], None]) -> dict[str, float]:
    """Steps per second of the batched environment by environments and threads: ``..._{E}x{threads}_per_s``."""
    figures: dict[str, float] = {}
    counts = sorted({1, THREADS})
    for num_envs in SCALING_ENVS:
        progress(f"batched environment, {num_envs} of them")
        measure = vector_steps_per_s(num_envs, max(SCALING_STEPS // num_envs, 100))
        for threads in counts:
            with at_most(threads):
                figures |= spread(f"vector_env_steps_{num_envs}x{threads}_per_s", repeat(measure, 3))
    return figures


def run(
    progress: Callable[[str], None] = lambda text: None,
    *,
    quick: bool = False,
    training_speed: Callable[[str, int], tuple[float, float]] | None = None,
) -> dict[str, Any]:
    """All figures. ``quick`` leaves out the fresh-process ones and repeats less.

    Args:
        training_speed: measures (environment steps/s, the environment's share of the wall time) of a training run with
            an algorithm and so many environments; None where the extra ``train`` is not installed.
    """
    tables = compile_pair(SYSTEM, MODEL)
    small, large = load_trace(f"{TRACE}?n=1000"), load_trace(f"{TRACE}?n=100000")
    count = 2 if quick else REPEATS
    progress("compiled policy, 1,000 and 100,000 requests")
    speeds, ratios = [], []
    iterations_per_s(tables, small, make_policy(COMPILED_POLICY))
    for _ in range(count):
        one = statistics.median(iterations_per_s(tables, small, make_policy(COMPILED_POLICY)) for _ in range(3))
        many = iterations_per_s(tables, large, make_policy(COMPILED_POLICY))
        speeds.append(one)
        ratios.append(many / one)
    figures = spread("engine_iterations_per_s", speeds) | spread("scaling_100k_over_1k", ratios)
    progress("plain Python policy, a Plan at every iteration")
    hundred = load_trace(f"{TRACE}?n=100")
    python_speeds = repeat(lambda: iterations_per_s(tables, hundred, PlainPython()), 1 if quick else 3)
    figures |= spread("python_policy_iterations_per_s", python_speeds)
    progress("batched environment, 256 of them, random knobs, one iteration a step")
    figures |= spread("vector_env_steps_per_s", repeat(vector_steps_per_s(), count))
    for algo, num_envs in () if training_speed is None else TRAINED[:1] if quick else TRAINED:
        assert training_speed is not None
        progress(f"training, {algo}, {num_envs} environments, one iteration a step")
        pairs = [training_speed(algo, num_envs) for _ in range(1 if quick else 3)]
        name = "train" if (algo, num_envs) == TRAINED[0] else f"train_{algo.replace('-', '_')}_{num_envs}"
        figures |= spread(f"{name}_steps_per_s", [speed for speed, _ in pairs])
        figures |= spread(f"{name}_env_share_frac", [share for _, share in pairs])
    if not quick:
        figures |= vector_scaling(progress)
        progress("first use and later starts, in fresh processes")
        first, later = first_use_s()
        figures |= spread("compile_s", first) | spread("cached_start_s", later)
    return figures
