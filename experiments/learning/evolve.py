"""Finds the weights of ``request-score``: CMA-ES in many scenarios at once, all candidates on the same requests.

    python -m l3env.experiments.learning.evolve --out runs/evolve --generations 80 --seed 0

In each generation every system, model and trace gives one task: a stretch of its training window (the first 60 % of the
trace's span) at a utilization drawn from 0.6 to 1.2. What counts is what requests earn (``--objective``; by default a
request that waits beyond the guard costs as much as one that meets its SLO earns), over the most that a candidate of
the generation earns or costs on that task, averaged over tasks; time in the system decides between equal candidates.
The mean of the final distribution is the result. An interrupted search goes on from its last generation.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pickle
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cma
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from l3env.engine.engine import Engine
from l3env.engine.state import Score
from l3env.errors import L3EnvError
from l3env.experiments.learning.grid import MODELS, SYSTEMS, TRACES
from l3env.experiments.learning.scenarios import TRAINING_WINDOW, Scenario, add_objective, requests, tables_of
from l3env.files import read_json, whole, write_text
from l3env.policies.request_score import KNOBS, weights_of
from l3env.requests.workload import Workload
from l3env.runs.driver import replica_shares, warm_up
from l3env.runs.workers import Workers, all_of
from l3env.search.objective import Objective, relative
from l3env.search.tune import TIE_BREAK

START: dict[str, float] = {
    "WORK": -1.0,
    "STRETCH": -0.5,
    "GIVEN_UP": 3.0,
    "LEAD": 0.15,
    "LENGTH": -0.2,
    "CAP": 0.3,
    "DUE": -0.2,
    "LEAST_CHUNK": 3.5,
    "STALL": 3.0,
    "ROOM": -0.5,
    "HEADROOM": -3.0,
    "EVICT": -2.0,
}
"""Where the search begins: shortest work first, an iteration as long as the decoding requests can bear."""

SEARCHED = tuple(each for each in Score if each not in (Score.ON, Score.PREDICTED, Score.FLOOR))
STRETCH_REQUESTS = {"azure": 1500, "mooncake": 600, "openr1": 120, "splice": 1000}  # of a task, by how a trace begins
UTILIZATIONS = (0.6, 1.2)
PARTS = 3  # of the candidates, each served by one worker
SPREAD = 0.3  # standard deviation of the first generation

err = Console(stderr=True)


@dataclass(frozen=True)
class Task:
    """A stretch of a scenario's training window, begun at a share of what is possible."""

    scenario: Scenario
    begin_frac: float


def tasks_of(generation: int, seed: int) -> list[Task]:
    """One for every system, model and trace."""
    rng = np.random.default_rng([seed, generation])
    found = []
    for system, model, trace in itertools.product(SYSTEMS, MODELS, TRACES):
        utilization = round(float(rng.uniform(*UTILIZATIONS)), 3)
        found.append(Task(Scenario(system, model, trace, utilization), float(rng.random())))
    return sorted(
        found, key=lambda task: (task.scenario.model, task.scenario.trace[0] not in "os")
    )  # the long ones first


def stretch_of(task: Task) -> Workload:
    """The task's requests."""
    whole = requests(task.scenario, TRAINING_WINDOW)
    wanted = next((count for name, count in STRETCH_REQUESTS.items() if task.scenario.trace.startswith(name)), 1000)
    count = min(wanted * tables_of(task.scenario.system, task.scenario.model).replicas_count, len(whole))
    begin = round(task.begin_frac * (len(whole) - count))
    return whole.stretch(begin, begin + count)


def serve(
    task: Task, candidates: NDArray[np.float64], objective: Objective = Objective.GUARDED
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(P, weights) -> (what a request earns, mean time in the system (s)), (P,) each."""
    tables, workload = tables_of(task.scenario.system, task.scenario.model), stretch_of(task)
    parts = [workload.select(rows) for rows in replica_shares(workload, tables.replicas_count) if rows.size]
    engine = Engine(tables, len(candidates) * len(parts), max(map(len, parts)))
    for e, (weights, part) in enumerate(itertools.product(candidates, parts)):
        engine.reset(e, part)
        KNOBS.write(engine.knobs, e)
        engine.score_with(e, weights)
    engine.run_to_end()
    env = engine.state.env
    lost = engine.beyond_guard_count() if objective == Objective.GUARDED else 0
    earned = (env["slo_met_count"] - lost).reshape(len(candidates), -1).sum(axis=1)
    present_s = env["present_s"].reshape(len(candidates), -1).sum(axis=1)
    return earned / len(workload), present_s / len(workload)


def serve_part(work: tuple[Task, NDArray[np.float64], Objective]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``serve``, of some of the candidates: what one worker does."""
    return serve(*work)


def losses_of(earned: NDArray[np.float64], present_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """(tasks, P) each -> (P,) what the search makes small."""
    share = relative(earned, axis=1)
    slow = present_s / np.maximum(present_s.max(axis=1, keepdims=True), 1e-12)
    return -(share - TIE_BREAK * slow).mean(axis=0)


def full(searched: Sequence[float]) -> NDArray[np.float64]:
    """(len(SEARCHED),) -> (len(Score),) weights."""
    return weights_of({each.name: float(value) for each, value in zip(SEARCHED, searched, strict=True)})


def named(searched: Sequence[float]) -> dict[str, float]:
    return {each.name: round(float(value), 4) for each, value in zip(SEARCHED, searched, strict=True)}


def write_result(path: Path, searched: Sequence[float], config: dict[str, object]) -> None:
    """As ``policies.request_score`` reads it."""
    command = shlex.join(["python", "-m", "l3env.experiments.learning.evolve", *sys.argv[1:]])
    text = {"weights": named(searched), "config": config, "command": command}
    write_text(path, json.dumps(text, indent=2) + "\n")


def check_objective(result: Path, objective: Objective) -> None:
    """Raises L3EnvError where a search that would go on was one for something else."""
    if result.exists():
        known = read_json(result).get("config", {}).get("objective", Objective.PLAIN)
        if known != objective:
            raise L3EnvError(f"{result}: of a search for objective {known}, now {objective}; choose another --out")


def begun(kept: Path, start: Sequence[float], spread: float, population: int, seed: int) -> cma.CMAEvolutionStrategy:
    """The search that was kept in a file, or a new one."""
    if kept.exists():
        return pickle.loads(kept.read_bytes())
    return cma.CMAEvolutionStrategy(start, spread, {"popsize": population, "seed": seed + 1, "verbose": -9})


def keep(kept: Path, strategy: cma.CMAEvolutionStrategy) -> None:
    """Whole, or as it was before."""
    with whole(kept) as file:
        pickle.dump(strategy, file)


def log_generation(out: Path, strategy: cma.CMAEvolutionStrategy, earned: NDArray[np.float64], begin_s: float) -> None:
    """One more line of ``progress.jsonl``; ``earned`` is (tasks, candidates and the mean of before)."""
    line = {"generation": int(strategy.countiter), "earned_of_mean": float(earned[:, -1].mean())}
    line |= {"earned_best": float(earned[:, :-1].mean(axis=0).max()), "spread": float(strategy.sigma)}
    with (out / "progress.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line | {"wall_s": time.monotonic() - begin_s}) + "\n")
    err.print(line, highlight=False)


def search(
    out: Path,
    generations: int,
    population: int,
    seed: int,
    seconds: float,
    workers: int,
    objective: Objective = Objective.GUARDED,
) -> None:
    """Runs, or goes on, until the generations are done or the time is up."""
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "evolve.pkl"
    check_objective(out / "request-score.json", objective)
    strategy = begun(kept, [START.get(each.name, 0.0) for each in SEARCHED], SPREAD, population, seed)
    begin_s = time.monotonic()
    while strategy.countiter < generations and time.monotonic() - begin_s < seconds:
        tasks = tasks_of(strategy.countiter, seed)
        asked = strategy.ask()
        tried = np.array([full(each) for each in [*asked, strategy.mean]])
        work = [(task, part, objective) for task in tasks for part in np.array_split(tried, PARTS)]
        rows = all_of(serve_part, work, Workers(count=workers))
        earned, present_s = (np.concatenate([row[i] for row in rows]).reshape(len(tasks), -1) for i in (0, 1))
        strategy.tell(asked, losses_of(earned[:, :-1], present_s[:, :-1]))
        keep(kept, strategy)
        config = {
            "objective": objective,
            "seed": seed,
            "generations": int(strategy.countiter),
            "population": population,
            "training_window": TRAINING_WINDOW,
            "systems": SYSTEMS,
            "models": MODELS,
            "traces": TRACES,
            "utilizations": UTILIZATIONS,
        }
        write_result(out / "request-score.json", strategy.mean, config)
        log_generation(out, strategy, earned, begin_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/evolve"))
    parser.add_argument("--generations", type=int, default=80)
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after the generation that reaches it")
    parser.add_argument("--workers", type=int, default=-1, help="processes; -1: one a core")
    add_objective(parser)
    given = parser.parse_args()
    warm_up()
    numbers = given.generations, given.population, given.seed, given.seconds, given.workers
    search(given.out, *numbers, Objective(given.objective))


if __name__ == "__main__":
    main()
