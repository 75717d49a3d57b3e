"""Finds the weights of ``requests-agent``: CMA-ES through the environment ``l3env/ServingRequests-v0``.

    python -m l3env.experiments.learning.evolve_agent --out runs/requests-agent --generations 20 --seed 0

Tasks are those of ``evolve``, on the training windows; all candidates serve the same requests in one batched
environment. An interrupted search goes on from its last generation.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.envs.requests import ServingRequestsVectorEnv
from l3env.experiments.learning.evolve import (
    UTILIZATIONS,
    Task,
    begun,
    check_objective,
    keep,
    log_generation,
    losses_of,
    tasks_of,
)
from l3env.experiments.learning.grid import MODELS, SYSTEMS, TRACES
from l3env.experiments.learning.scenarios import TRAINING_WINDOW, add_objective
from l3env.experiments.train.windows import in_window
from l3env.files import write_text
from l3env.policies.requests_agent import GENES, INTERVAL_S, SCORES, SETTINGS, START, VISIBLE, Agent, weights_of
from l3env.runs.driver import warm_up
from l3env.search.objective import FIGURES, Objective

VARIANTS = {
    "all": GENES,
    "scores": (*SCORES, "budget.one", "share.one"),
    "knobs": tuple(name for name in GENES if name not in SCORES),
}
"""What is searched: everything; scores and fixed knobs; the knobs, under the scores of START."""

SPREAD = 0.1  # standard deviation of the first generation
STRETCH_REQUESTS = {"azure": 1000, "mooncake": 300, "openr1": 150, "splice": 600}  # of a task, by how a trace begins


def environment(num_envs: int, **kwargs: Any) -> ServingRequestsVectorEnv:
    """As the agent expects it. Its reward is minus the time in the system, which decides between equal candidates."""
    return ServingRequestsVectorEnv(
        num_envs, decision="event", interval_s=INTERVAL_S, reward="latency", **SETTINGS | kwargs
    )


def serve(
    envs: ServingRequestsVectorEnv, agent: Agent, options: dict[str, Any], seed: int = 0
) -> tuple[NDArray[np.object_], NDArray[np.float64]]:
    """Every environment serves the same episode once; (metrics, mean time in the system (s)), (E,) each."""
    metrics, present_s = np.full(envs.num_envs, None, dtype=object), np.zeros(envs.num_envs)
    going = np.ones(envs.num_envs, bool)
    obs, infos = envs.reset(seed=[seed] * envs.num_envs, options=options)
    while going.any():
        obs, rewards, terminated, _, infos = envs.step(agent.act(obs, infos["action_mask"]))
        present_s -= np.where(going, rewards, 0.0)
        for e in np.flatnonzero(terminated & going):
            metrics[e] = infos["final_info"]["metrics"][e]
        going &= ~terminated
    return metrics, present_s


@functools.cache
def training_envs(system: str, model: str, trace: str, num_envs: int) -> ServingRequestsVectorEnv:
    """Over stretches of a training window."""
    count = next((count for name, count in STRETCH_REQUESTS.items() if trace.startswith(name)), 300)
    where = {"system": system, "model": model, "trace": in_window(trace, TRAINING_WINDOW)}
    return environment(num_envs, episode_requests=count, **where)


def try_out(
    task: Task, candidates: NDArray[np.float64], objective: Objective = Objective.GUARDED
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(P, genes) -> (what a request earns, mean time in the system (s)), (P,) each."""
    place = task.scenario
    envs = training_envs(place.system, place.model, place.trace, len(candidates))
    seed = int(task.begin_frac * 2**31)  # draws where the stretch begins, and the replica
    metrics, present_s = serve(envs, Agent(candidates), {"utilization": place.utilization}, seed)
    return np.array([each[FIGURES[objective]] for each in metrics]), present_s


def search(
    out: Path,
    variant: str,
    generations: int,
    population: int,
    seed: int,
    seconds: float,
    objective: Objective = Objective.GUARDED,
) -> None:
    """Runs, or goes on, until the generations are done or the time is up."""
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "search.pkl"
    check_objective(out / "requests-agent.json", objective)
    start = weights_of(START)
    searched = np.array([GENES.index(name) for name in VARIANTS[variant]])
    strategy = begun(kept, start[searched], SPREAD, population, seed)
    config = {
        "objective": objective,
        "variant": variant,
        "seed": seed,
        "population": population,
        "training_window": TRAINING_WINDOW,
    }
    config |= {"systems": SYSTEMS, "models": MODELS, "traces": TRACES, "utilizations": UTILIZATIONS}
    config |= {"visible": VISIBLE, "interval_s": INTERVAL_S, "stretch_requests": STRETCH_REQUESTS}
    begin_s = time.monotonic()
    while strategy.countiter < generations and time.monotonic() - begin_s < seconds:
        tasks = tasks_of(strategy.countiter, seed)
        asked = strategy.ask()
        tried = np.tile(start, (population + 1, 1))
        tried[:, searched] = [*asked, strategy.mean]
        found_each = (try_out(task, tried, objective) for task in tasks)
        earned, present_s = (np.array(each) for each in zip(*found_each, strict=True))
        strategy.tell(asked, losses_of(earned[:, :-1], present_s[:, :-1]))
        keep(kept, strategy)
        found = start.copy()
        found[searched] = strategy.mean
        write_agent(out / "requests-agent.json", found, config | {"generations": int(strategy.countiter)})
        log_generation(out, strategy, earned, begin_s)


def write_agent(path: Path, weights: NDArray[np.float64], config: Mapping[str, object]) -> None:
    """As ``read_agent`` reads it."""
    command = shlex.join(["python", "-m", "l3env.experiments.learning.evolve_agent", *sys.argv[1:]])
    named = {name: round(float(value), 4) for name, value in zip(GENES, weights, strict=True)}
    write_text(path, json.dumps({"weights": named, "config": config, "command": command}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/requests-agent"))
    parser.add_argument("--variant", choices=VARIANTS, default="all")
    parser.add_argument("--generations", type=int, default=20)
    parser.add_argument("--population", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after the generation that reaches it")
    add_objective(parser)
    given = parser.parse_args()
    warm_up()
    numbers = given.generations, given.population, given.seed, given.seconds
    search(given.out, given.variant, *numbers, Objective(given.objective))


if __name__ == "__main__":
    main()
