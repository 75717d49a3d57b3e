"""Fits the synthetic prover (``traces/prover/model.py``) to published shares of single-pass sampling, to nothing else.

    python -m l3env.experiments.reproduce.fit_prover --minutes 3 --out runs/fit-prover --workers 16

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
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.cli.shared import progress_bar
from l3env.experiments.reproduce.proof_search import (
    ABLATIONS,
    RMAXTS,
    SINGLE_PASS,
    SINGLE_PASS_SHARES,
    TREE_SAMPLES,
    samples_needed,
)
from l3env.jit import kernel
from l3env.runs.cell import Result
from l3env.runs.content import sources_sha256
from l3env.runs.jobs import run_jobs
from l3env.runs.store import Job, Store
from l3env.runs.workers import Workers
from l3env.traces.prover.model import MOST_STEPS, ProofModel, mix, unit

START = {"tail": 1.433, "live_p": 0.027, "live_q": 0.182, "error_p": 0.109, "stuck": 0.197}  # of an earlier fit
STEP = 0.25  # of the logarithm of each parameter, at the start
THEOREMS = 4 * 244
LEAST_CHANCE = 1e-6  # what 32 x 6,400 samples would find once in five
CERTAIN = 0.5
MOST_STATES = 4_000
BUDGETS = (32, 64, 128, 400, 1600, 3200, TREE_SAMPLES, 4 * TREE_SAMPLES, 16 * TREE_SAMPLES, 32 * TREE_SAMPLES)


@dataclass(frozen=True)
class Fit:
    """A set of parameters and how far its single-pass shares are from the published ones (root mean square)."""

    model: ProofModel
    loss: float
    tried_count: int


@kernel
def walk(
    code: Any,
    steps: int,
    live: float,
    right: float,
    tail: float,
    stuck: float,
    most: int,
    states: Any,
    ranks: Any,
    at: Any,
) -> float:
    """Chance that one generated proof proves a theorem: the sum over its proofs of how likely each is.

    Walks the live states, likely continuations first, as long as a continuation is likelier than LEAST_CHANCE, and at
    most ``most`` states; the rest counts with its expectation over states. Stops at CERTAIN (32 samples do then).

    Args:
        states, ranks, at: scratch, (steps,) uint64, int64, float64: state, next rank and chance so far by depth.
    """
    states[0], ranks[0] = code, 1
    at[0] = right * unit(mix(code, np.uint64(4))) ** stuck
    onward = live * right / (1.0 + stuck)  # a step at a random state: right, and to a live one
    found, depth, visited = 0.0, 0, 0
    while depth >= 0 and found < CERTAIN:
        rank = ranks[depth]
        chance = at[depth] * (float(rank) ** -tail - float(rank + 1) ** -tail)
        if chance < LEAST_CHANCE or visited >= most:
            found += at[depth] * float(rank) ** -tail * live * onward ** (steps - depth - 1)
            depth -= 1
            continue
        ranks[depth] += 1
        visited += 1
        state = mix(states[depth], np.uint64(rank))
        if unit(mix(state, np.uint64(3))) > live:
            continue
        if depth + 1 == steps:
            found += chance
            continue
        depth += 1
        states[depth], ranks[depth] = state, 1
        at[depth] = chance * right * unit(mix(state, np.uint64(4))) ** stuck
    return found


def success_chance(
    code: Any, steps: int, live: float, right: float, tail: float, stuck: float, most: int = MOST_STATES
) -> float:
    """``walk`` with its own scratch."""
    scratch = np.zeros(MOST_STEPS, np.uint64), np.zeros(MOST_STEPS, np.int64), np.zeros(MOST_STEPS)
    return float(walk(code, steps, live, right, tail, stuck, most, *scratch))


def chances(model: ProofModel, count: int) -> NDArray[np.float64]:
    """(count,) chance of one sample, theorem by theorem."""
    t = model.theorems(count)
    rows = zip(t.code, t.steps, t.live_frac, t.right_frac, strict=True)
    return np.array([success_chance(*row, model.tail, model.stuck) for row in rows])


def loss(model: ProofModel, count: int = THEOREMS) -> float:
    """Root mean square difference of the expected single-pass shares from the published ones."""
    chance = chances(model, count)
    squares = [(np.mean(1 - (1 - chance) ** k) - share) ** 2 for k, share in SINGLE_PASS_SHARES.items()]
    return float(np.sqrt(np.mean(squares)))


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
        now = loss(_with(start, values), count)
        tried += 1
        if now < least:
            best, least, width = values, now, width * 1.5
        else:
            width = max(width * 1.5**-0.25, 0.02)
    return Fit(_with(start, best), least, tried)


def _with(model: ProofModel, values: Mapping[str, float]) -> ProofModel:
    changes: dict[str, Any] = dict(values)
    return replace(model, **changes)


def judged(found: Fit, dead_frac: float, count: int = THEOREMS, longest: int = 32 * TREE_SAMPLES) -> dict[str, Any]:
    """Shares proved by every method at some budgets, for one ``dead_frac``."""
    model = replace(found.model, dead_frac=dead_frac)
    methods = {"single-pass": SINGLE_PASS, "RMaxTS": RMAXTS} | {name: method for name, (method, _) in ABLATIONS.items()}
    row: dict[str, Any] = {"loss": found.loss, "tried_count": found.tried_count, "model": asdict(model)}
    for name, method in methods.items():
        most = min(longest, 16 * TREE_SAMPLES) if name in ABLATIONS else longest
        needed = samples_needed(model, count, method, most)
        row[name] = {str(k): float((needed <= k).mean()) for k in BUDGETS if k <= most}
    return row


@dataclass(frozen=True)
class Study:
    """One fit and all that follows from it."""

    mean_steps: float
    seed: int
    seconds: float
    dead_fracs: tuple[float, ...]
    theorems_count: int
    longest: int

    def job(self) -> Job:
        depends = {"study": self, "l3env": sources_sha256(Path(__file__))}
        return Job(f"{self.mean_steps:g}-{self.seed}", {"mean_steps": self.mean_steps}, depends, partial(studied, self))


def studied(study: Study) -> Result:
    """A row for each ``dead_frac``."""
    found = fit(study.mean_steps, study.seed, study.seconds, study.theorems_count)
    rows = [judged(found, dead_frac, study.theorems_count, study.longest) for dead_frac in study.dead_fracs]
    return {"rows": rows}, {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0, help="of each fit")
    parser.add_argument("--mean-steps", default="2,2.5,3,3.5,4,5,6,8")
    parser.add_argument("--dead", default="0.1,0.3,1")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--theorems", type=int, default=THEOREMS, help="that are fitted and judged")
    parser.add_argument("--longest", type=int, default=32 * TREE_SAMPLES, help="samples that methods are judged up to")
    parser.add_argument("--workers", type=int, default=-1)
    parser.add_argument("--out", type=Path, default=Path("runs/fit-prover"))
    asked = parser.parse_args()
    dead_fracs = tuple(float(each) for each in asked.dead.split(","))
    jobs = [
        Study(float(steps), seed, 60 * asked.minutes, dead_fracs, asked.theorems, asked.longest).job()
        for steps, seed in itertools.product(asked.mean_steps.split(","), range(asked.seeds))
    ]
    store = Store(asked.out)
    store.begin()
    with progress_bar("fitting") as progress:
        ended = run_jobs(jobs, store, workers=Workers(count=asked.workers), progress=progress)
    rows = [row for done in ended.of_all() for row in done.figures["rows"]]
    rows.sort(key=lambda row: row["loss"])
    for row in rows:
        model, single, tree = row["model"], row["single-pass"], row["RMaxTS"]
        gains = " ".join(f"{tree[k] - single[k]:+.3f}" for k in single)
        budget = max(row[next(iter(ABLATIONS))], key=int)
        leads = " ".join(f"{tree[budget] - row[name][budget]:+.3f}" for name in ABLATIONS)
        print(f"loss {row['loss']:.4f} steps {model['mean_steps']:g} dead {model['dead_frac']:g}: {gains} | {leads}")


if __name__ == "__main__":
    main()
