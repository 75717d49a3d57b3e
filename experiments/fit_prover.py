"""Fits the synthetic prover's seven shape parameters (``traces/proofs.py``) to six published shares of proved theorems.

    python -m experiments.fit_prover --minutes 10

Fitted to: single-pass at 3,200, 4 x, 16 x and 32 x 6,400 samples; RMaxTS at 3,200 and 4 x 6,400 (arXiv 2408.08152).
Not fitted to: RMaxTS at 16 x and 32 x 6,400. The ablations are not in the loss either, but START was chosen among
random parameters as a place where they lie below the full method: where proofs die out soon once nothing can be proved
any more (a small ``dead_frac``), whether a tree still grows says something about where the proof is. With parameters
of equal loss but a large ``dead_frac`` RMaxTS gains as much and its ablations do as well as it does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from experiments.reproduce.prover import FITTED_TREE, PAPER, RMAXTS, SINGLE_PASS, samples_needed
from traces.proofs import ProofModel

START: dict[str, Any] = {
    "tail": 1.2,
    "mean_steps": 5.9,
    "live_p": 0.1,
    "live_q": 0.25,
    "error_p": 0.25,
    "stuck": 0.67,
    "dead_frac": 0.13,
}
STEP = {  # of the logarithm
    "tail": 0.25,
    "mean_steps": 0.25,
    "live_p": 0.18,
    "live_q": 0.18,
    "error_p": 0.28,
    "stuck": 0.28,
    "dead_frac": 0.21,
}
THEOREMS = 2 * 244
TREE_WEIGHT = 2.0


def loss(model: ProofModel, count: int = THEOREMS, give_up: float = float("inf")) -> float:
    """Root of the summed squared differences of the shares; infinite as soon as it is above ``give_up``."""
    needed = samples_needed(model, count, SINGLE_PASS, max(PAPER))
    squares = sum(((needed <= samples).mean() - paper) ** 2 for samples, (paper, _) in PAPER.items())
    for samples in FITTED_TREE:
        if squares > give_up**2:
            return float("inf")
        needed = samples_needed(model, count, RMAXTS, samples)
        squares += TREE_WEIGHT * ((needed <= samples).mean() - PAPER[samples][1]) ** 2
    return float(np.sqrt(squares))


def neighbour(values: Mapping[str, float], rng: np.random.Generator) -> dict[str, Any]:
    """All parameters moved a little, within their bounds."""
    moved: dict[str, Any] = {name: float(value * np.exp(STEP[name] * rng.normal())) for name, value in values.items()}
    moved["mean_steps"] = max(moved["mean_steps"], 1.05)
    moved["dead_frac"] = min(moved["dead_frac"], 1.0)
    return moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    rng, end = np.random.default_rng(asked.seed), time.monotonic() + 60 * asked.minutes
    best, least = START, loss(replace(ProofModel(), **START))
    while time.monotonic() < end:
        values = neighbour(best, rng)
        now = loss(replace(ProofModel(), **values), give_up=least)
        if now < least:
            best, least = values, now
            print(f"{least:.4f}", {name: round(value, 3) for name, value in best.items()}, flush=True)


if __name__ == "__main__":
    main()
