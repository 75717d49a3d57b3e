"""GRPO against PPO with masks at equal environment steps, on two cells, several seeds.

    python -m experiments.learning.grpo_ppo --out runs/grpo-ppo --steps 300000 --seeds 3

Prints for each cell and algorithm the goodput of the best model on the evaluation window (not seen in training or in
choosing it) and draws the learning curves.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from rich.console import Console

from experiments.learning.cells import Cell, Job, run_job
from experiments.learning.pictures import learning_curve
from experiments.train.config import TrainConfig, hyperparams
from experiments.train.run import train
from l3env.runner import write_text

CELLS = (
    Cell("l3-dgx-a100", "gpt-175b", "azure-conv-2023", 0.9),
    Cell("gpu-dgx-a100", "qwen-72b", "mooncake-conversation", 0.9),
)
ALGORITHMS = ("maskable-ppo", "grpo")
EPISODE_REQUESTS = 200
WORKLOAD_SEEDS = 5

err = Console(stderr=True)


def one(cell: Cell, algo: str, seed: int, steps: int, out: Path) -> dict[str, Any]:
    """Trains once and judges the best model."""
    config = TrainConfig(
        algo=algo,
        systems=(cell.system,),
        models=(cell.model,),
        traces=(cell.trace,),
        utilization=(cell.utilization,),
        env={"episode_requests": EPISODE_REQUESTS},
        total_steps=steps,
        eval_steps=max(steps // 15, 1),
        checkpoint_steps=max(steps // 5, 1),
        seed=seed,
        hyperparams=hyperparams(algo),
    )
    network = train(config, out)
    rows = run_job(Job(cell, algo, (str(network),), WORKLOAD_SEEDS))
    goodput = float(np.mean([row["slo_attainment_frac"] for row in rows]))
    return {"system": cell.system, "model": cell.model, "algo": algo, "seed": seed, "goodput_frac": goodput}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/grpo-ppo"))
    parser.add_argument("--steps", type=int, default=300_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=-1)
    given = parser.parse_args()
    os.environ["L3ENV_THREADS"] = "1"  # a process a core
    jobs = [
        (cell, algo, seed, given.steps, given.out / f"cell{c}" / f"{algo}-{seed}")
        for c, cell in enumerate(CELLS)
        for algo in ALGORITHMS
        for seed in range(given.seeds)
    ]
    rows = joblib.Parallel(given.workers)(joblib.delayed(one)(*job) for job in jobs)
    write_text(given.out / "rows.json", json.dumps(rows, indent=2) + "\n")
    for c, cell in enumerate(CELLS):
        learning_curve([job[4] for job in jobs if job[0] is cell], given.out / f"cell{c}.png")
        means = {
            algo: np.mean([row["goodput_frac"] for job, row in zip(jobs, rows, strict=True) if job[:2] == (cell, algo)])
            for algo in ALGORITHMS
        }
        ppo, grpo = (float(means[algo]) for algo in ALGORITHMS)
        err.print(
            f"{cell.system}, {cell.model}, {cell.trace}: PPO {ppo:.3f}, GRPO {grpo:.3f}, ratio {grpo / ppo:.3f}",
            highlight=False,
        )


if __name__ == "__main__":
    main()
