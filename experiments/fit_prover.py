"""Fits the synthetic prover (``traces/proofs.py``) to published shares of single-pass sampling, and to nothing else.

    python -m experiments.fit_prover --minutes 3 --out runs/fit-prover --workers 16

Fitted: five shape parameters, to the seven single-pass shares of arXiv 2408.08152 (32 to 32 x 6,400 samples), for each
of some mean lengths of proofs (``--mean-steps``) and several random starts. Two parameters are left that single-pass
sampling does not tell: proofs of any mean length fit its curve, and ``dead_frac``, how often tactics are right where
nothing can be proved any more, does not enter it at all. So each fit is then run with RMaxTS and its ablations at
several ``dead_frac``: what the tree gains, and when, follows from these two. docs/prover.md has the table, and which of
them the defaults of ``ProofModel`` are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np

from experiments.reproduce.prover import ABLATIONS, PAPER, RMAXTS, SINGLE_PASS, TREE_SAMPLES, samples_needed
from l3env.runner import write_text
from traces.proofs import ProofModel

SINGLE_PASS_SHARES = {32: 0.500, 64: 0.507, 128: 0.516} | {samples: single for samples, (single, _) in PAPER.items()}
START = {"tail": 1.0, "live_p": 0.06, "live_q": 0.25, "error_p": 0.15, "stuck": 0.3}
STEP = 0.25  # of the logarithm of each parameter, at the start
THEOREMS = 2 * 244
JUDGED_THEOREMS = 4 * 244
BUDGETS = (32, 64, 128, 400, 1600, 3200, TREE_SAMPLES, 4 * TREE_SAMPLES, 16 * TREE_SAMPLES, 32 * TREE_SAMPLES)


@dataclass(frozen=True)
class Fit:
    """A set of parameters and how far its single-pass shares are from the published ones (root mean square)."""

    model: ProofModel
    loss: float
    tried_count: int


def loss(model: ProofModel, count: int = THEOREMS, give_up: float = float("inf")) -> float:
    """Root mean square difference of the single-pass shares; infinite as soon as it must be above ``give_up``."""
    squares, shares = 0.0, SINGLE_PASS_SHARES
    for most in (128, 3200, 4 * TREE_SAMPLES, max(shares)):  # the first are cheap, and tell most misfits
        needed = samples_needed(model, count, SINGLE_PASS, most)
        squares = sum(((needed <= k).mean() - share) ** 2 for k, share in shares.items() if k <= most)
        if squares > give_up**2 * len(shares):
            return float("inf")
    return float(np.sqrt(squares / len(shares)))


def fit(mean_steps: float, seed: int, seconds: float, count: int = THEOREMS) -> Fit:
    """A (1 + 1) evolution strategy on the logarithms: wider after a success, narrower after a failure, so that about a
    fifth succeed (Rechenberg 1973)."""
    rng, end = np.random.default_rng(seed), time.monotonic() + seconds
    jump = {name: value * np.exp(STEP * rng.normal()) for name, value in START.items()}
    best: Mapping[str, float] = jump if seed else START
    start = replace(ProofModel(), mean_steps=mean_steps)
    least, width, tried = loss(_with(start, best), count), STEP, 1
    while time.monotonic() < end:
        values = {name: float(value * np.exp(width * rng.normal())) for name, value in best.items()}
        now = loss(_with(start, values), count, give_up=least)
        tried += 1
        if now < least:
            best, least, width = values, now, width * 1.5
        else:
            width = max(width * 1.5**-0.25, 0.02)
    return Fit(_with(start, best), least, tried)


def _with(model: ProofModel, values: Mapping[str, float]) -> ProofModel:
    changes: dict[str, Any] = dict(values)
    return replace(model, **changes)


def judged(
    found: Fit, dead_frac: float, count: int = JUDGED_THEOREMS, longest: int = 32 * TREE_SAMPLES
) -> dict[str, Any]:
    """Shares proved by every method at some budgets, for one ``dead_frac``."""
    model = replace(found.model, dead_frac=dead_frac)
    methods = {"single-pass": SINGLE_PASS, "RMaxTS": RMAXTS} | {name: method for name, (method, _) in ABLATIONS.items()}
    row: dict[str, Any] = {"loss": found.loss, "tried_count": found.tried_count, "model": asdict(model)}
    for name, method in methods.items():
        most = min(longest, 16 * TREE_SAMPLES) if name in ABLATIONS else longest
        needed = samples_needed(model, count, method, most)
        row[name] = {str(k): float((needed <= k).mean()) for k in BUDGETS if k <= most}
    return row


def study(
    mean_steps: float, seed: int, seconds: float, dead_fracs: list[float], count: int, longest: int, out: Path
) -> None:
    """One fit and all that follows from it, in a file a ``dead_frac``."""
    found = fit(mean_steps, seed, seconds, count)
    for dead_frac in dead_fracs:
        row = judged(found, dead_frac, 2 * count, longest)
        write_text(out / f"{mean_steps:g}-{seed}-{dead_frac:g}.json", json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0, help="of each fit")
    parser.add_argument("--mean-steps", default="2,2.5,3,3.5,4,5,6,8")
    parser.add_argument("--dead", default="0.1,0.3,1")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--theorems", type=int, default=THEOREMS, help="that are fitted; twice as many are judged")
    parser.add_argument("--longest", type=int, default=32 * TREE_SAMPLES, help="samples that methods are judged up to")
    parser.add_argument("--workers", type=int, default=-1)
    parser.add_argument("--out", type=Path, default=Path("runs/fit-prover"))
    asked = parser.parse_args()
    os.environ["L3ENV_THREADS"] = "1"  # a process a core
    asked.out.mkdir(parents=True, exist_ok=True)
    dead_fracs = [float(each) for each in asked.dead.split(",")]
    joblib.Parallel(asked.workers)(
        joblib.delayed(study)(
            float(steps), seed, 60 * asked.minutes, dead_fracs, asked.theorems, asked.longest, asked.out
        )
        for steps, seed in itertools.product(asked.mean_steps.split(","), range(asked.seeds))
    )
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(asked.out.glob("*-*-*.json"))]
    rows.sort(key=lambda row: row["loss"])
    for row in rows:
        model, single, tree = row["model"], row["single-pass"], row["RMaxTS"]
        gains = " ".join(f"{tree[k] - single[k]:+.3f}" for k in single)
        budget = max(row[next(iter(ABLATIONS))], key=int)
        leads = " ".join(f"{tree[budget] - row[name][budget]:+.3f}" for name in ABLATIONS)
        print(f"loss {row['loss']:.4f} steps {model['mean_steps']:g} dead {model['dead_frac']:g}: {gains} | {leads}")


if __name__ == "__main__":
    main()
