"""GRPO against PPO with masks at equal environment steps, on two cells, several seeds.

    python -m l3env.experiments.learning.grpo_ppo --out runs/grpo-ppo --steps 1500000 --seeds 3

Prints for each cell and algorithm the goodput of the best model on the evaluation window (not seen in training or in
choosing it) and draws the learning curves: goodput on the validation window, the same episodes for all runs. Every run
is a process; finished ones are kept in their folders, and a run that was cut off goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
from rich.console import Console

from l3env.experiments.learning.cells import Cell, Job, run_job
from l3env.experiments.learning.pictures import compared_curves
from l3env.experiments.train.config import TrainConfig, hyperparams_of
from l3env.experiments.train.run import train
from l3env.files import write_text

CELLS = (  # where settings matter much: see docs/learning-grid.md
    Cell("l3-dgx-a100", "qwen-72b", "mooncake-conversation", 0.9),
    Cell("l3-dgx-a100", "gpt-175b", "azure-conv-2023", 0.9),
)
ALGORITHMS = ("maskable-ppo", "grpo")
WORKLOAD_SEEDS = 5
EVALUATIONS = 15  # of each run, on the validation window

err = Console(stderr=True)


@dataclass(frozen=True)
class Run:
    """One training."""

    cell: Cell
    algo: str
    seed: int
    steps: int
    episode_requests: int
    out: Path


def one(run: Run) -> dict[str, Any]:
    """Trains once and judges the best model; a result that is there already is read."""
    path = run.out / "result.json"
    if path.exists():
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return known
    config = TrainConfig(
        algo=run.algo,
        systems=(run.cell.system,),
        models=(run.cell.model,),
        traces=(run.cell.trace,),
        utilization=(run.cell.utilization,),
        env={"episode_requests": run.episode_requests},
        total_steps=run.steps,
        eval_steps=max(run.steps // EVALUATIONS, 1),
        checkpoint_steps=max(run.steps // 5, 1),
        seed=run.seed,
        hyperparams=hyperparams_of(run.algo),
    )
    network = train(config, run.out)
    goodput = [row["slo_attainment_frac"] for row in run_job(Job(run.cell, run.algo, (str(network),), WORKLOAD_SEEDS))]
    row = asdict(run.cell) | {"algo": run.algo, "seed": run.seed, "goodput_frac": float(np.mean(goodput))}
    write_text(path, json.dumps(row) + "\n")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/grpo-ppo"))
    parser.add_argument("--steps", type=int, default=1_500_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episode-requests", type=int, default=500)
    parser.add_argument("--workers", type=int, default=-1)
    given = parser.parse_args()
    os.environ["L3ENV_THREADS"] = "1"  # a process a core
    runs = [
        Run(cell, algo, seed, given.steps, given.episode_requests, given.out / f"cell{c}" / f"{algo}-{seed}")
        for c, cell in enumerate(CELLS)
        for algo in ALGORITHMS
        for seed in range(given.seeds)
    ]
    rows = joblib.Parallel(given.workers)(joblib.delayed(one)(run) for run in runs)
    write_text(given.out / "rows.json", json.dumps(rows, indent=2) + "\n")
    report(rows)
    compared_curves(
        {
            f"{cell.system}, {cell.model}, {cell.trace}": {
                algo: [run.out for run in runs if (run.cell, run.algo) == (cell, algo)] for algo in ALGORITHMS
            }
            for cell in CELLS
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
