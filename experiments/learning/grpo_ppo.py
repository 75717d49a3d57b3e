"""GRPO against PPO with masks at equal environment steps, on two cells, several seeds.

    python -m l3env.experiments.learning.grpo_ppo --out runs/grpo-ppo --steps 1500000 --seeds 3

Prints for each cell and algorithm the goodput of the best model on the evaluation window (not seen in training or in
choosing it) and draws the learning curves: goodput on the validation window, the same episodes for all runs. Every run
is a process; finished ones are kept, and a run that was cut off goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from l3env.cli.shared import err, progress_bar
from l3env.experiments.learning.pictures import compared_curves
from l3env.experiments.learning.scenarios import Scenario, judge
from l3env.experiments.train.config import TrainConfig, hyperparams_of
from l3env.experiments.train.run import train
from l3env.files import write_text
from l3env.runs.cell import Result
from l3env.runs.content import inputs_sha256, sources_sha256
from l3env.runs.jobs import run_jobs
from l3env.runs.store import Job, Store
from l3env.runs.workers import Workers

SCENARIOS = (  # where settings matter much: see docs/learning-grid.md
    Scenario("l3-dgx-a100", "qwen-72b", "mooncake-conversation", 0.9),
    Scenario("l3-dgx-a100", "gpt-175b", "azure-conv-2023", 0.9),
)
ALGORITHMS = ("maskable-ppo", "grpo")
WORKLOAD_SEEDS = 5
EVALUATIONS = 15  # of each run, on the validation window


@dataclass(frozen=True)
class Run:
    """One training."""

    scenario: Scenario
    config: TrainConfig
    out: Path

    def job(self) -> Job:
        """The training and its verdict."""
        place = asdict(self.scenario)
        row = place | {"algo": self.config.algo, "seed": self.config.seed}
        named = inputs_sha256([self.scenario.system], [self.scenario.model], [self.scenario.trace])
        depends = {"row": row, "config": self.config, "inputs": named, "l3env": sources_sha256(Path(__file__))}
        return Job(f"{self.out.parent.name}.{self.out.name}", row, depends, partial(trained, self))


def trained(run: Run) -> Result:
    """Trains, going on from the last checkpoint in the folder, and judges the best model."""
    network = train(run.config, run.out)
    rows = judge([run.scenario], {run.config.algo: (str(network),)}, WORKLOAD_SEEDS).rows
    return {"goodput_frac": float(np.mean([row["slo_attainment_frac"] for row in rows]))}, {}


def config_of(scenario: Scenario, algo: str, seed: int, steps: int, episode_requests: int) -> TrainConfig:
    return TrainConfig(
        algo=algo,
        systems=(scenario.system,),
        models=(scenario.model,),
        traces=(scenario.trace,),
        utilization=(scenario.utilization,),
        env={"episode_requests": episode_requests},
        total_steps=steps,
        eval_steps=max(steps // EVALUATIONS, 1),
        checkpoint_steps=max(steps // 5, 1),
        seed=seed,
        hyperparams=hyperparams_of(algo),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/grpo-ppo"))
    parser.add_argument("--steps", type=int, default=1_500_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episode-requests", type=int, default=500)
    parser.add_argument("--workers", type=int, default=-1)
    given = parser.parse_args()
    runs = [
        Run(each, config_of(each, algo, seed, given.steps, given.episode_requests), given.out / f"cell{c}" / name)
        for c, each in enumerate(SCENARIOS)
        for algo in ALGORITHMS
        for seed in range(given.seeds)
        for name in [f"{algo}-{seed}"]
    ]
    store = Store(given.out)
    store.begin()
    with progress_bar("training") as progress:
        ended = run_jobs(
            [run.job() for run in runs], store, workers=Workers(count=given.workers), progress=progress
        ).of_all()
    rows = [each.flat() for each in ended]
    write_text(given.out / "rows.json", json.dumps(rows, indent=2) + "\n")
    report(rows)
    compared_curves(
        {
            f"{each.system}, {each.model}, {each.trace}": {
                algo: [run.out for run in runs if (run.scenario, run.config.algo) == (each, algo)]
                for algo in ALGORITHMS
            }
            for each in SCENARIOS
        },
        given.out / "grpo-ppo.png",
    )


def report(rows: list[dict[str, Any]]) -> None:
    """Goodput of each seed, and the ratio of the means, by cell."""
    for (system, model, trace), cell in pd.DataFrame(rows).groupby(["system", "model", "trace"], sort=False):
        by_algo = {algo: cell[cell["algo"] == algo]["goodput_frac"].to_numpy() for algo in ALGORITHMS}
        ppo, grpo = (by_algo[algo].mean() for algo in ALGORITHMS)
        each = "; ".join(f"{algo} {', '.join(f'{x:.3f}' for x in found)}" for algo, found in by_algo.items())
        err.print(
            f"{system}, {model}, {trace}: PPO {ppo:.3f}, GRPO {grpo:.3f}, ratio {grpo / ppo:.3f} ({each})",
            highlight=False,
        )


if __name__ == "__main__":
    main()
