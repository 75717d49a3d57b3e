"""A policy that starts near the tuned constant everywhere: imitation of constants tuned on many drawn cells.

    python -m l3env.experiments.learning.imitate --out runs/imitation --cells 2000
    l3env train --algo maskable-ppo --init runs/imitation/policy.npz ...

Each cell is an episode as training draws it (system, model, trace, load, window). A search finds its best fixed knobs
and what each change of one knob costs. The network learns, from what it sees along the way, each knob's levels with
targets proportional to exp(-loss / TAU): where a knob does not matter, the targets say so. First it sees rollouts of
the best and of other settings, then its own (DAgger, Ross et al. 2011, arXiv 1011.0686). Where its own fall short, it
also learns what each change of one knob would have given it there (after AggreVaTe, Ross and Bagnell 2014, arXiv
1406.5979).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from numpy.typing import NDArray

from l3env.cli.shared import err, progress_bar
from l3env.experiments.learning.grid import MODELS, SYSTEMS, TRACES
from l3env.experiments.learning.teacher import (
    TAU,
    Row,
    Seen,
    Source,
    corrections,
    seen_by_network,
    seen_under_settings,
    span_s,
    tuned,
)
from l3env.experiments.train.algorithms import set_up_torch
from l3env.experiments.train.export import interface
from l3env.policies.network import Network
from l3env.policy.levels import LEVELS, Levels
from l3env.runs.cell import Result
from l3env.runs.content import inputs_sha256, sources_sha256
from l3env.runs.jobs import run_jobs
from l3env.runs.store import Job, Store
from l3env.runs.workers import HERE, Workers, all_of

HOLDOUT_FRAC = 0.1  # of cells: never learned from
SIDE_BY_SIDE = 32  # episodes in one engine
EPOCHS, LEAST_STEPS, BATCH, RATE = 20, 400, 2048, 2e-3


# --- learning


def fit(
    obs: NDArray[np.float32],
    masks: NDArray[np.bool_],
    wanted: NDArray[np.float32],
    hidden: Sequence[int],
    seed: int,
    levels: Levels = LEVELS,
) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Layers of a tanh network whose masked softmax over each knob's levels is near the targets (cross-entropy).

    Features are standardised for learning; the first layer takes that over.
    """
    th.manual_seed(seed)
    mean, sd = obs.mean(axis=0), np.maximum(obs.std(axis=0), 0.01)
    x, legal, y = th.as_tensor((obs - mean) / sd), th.as_tensor(masks), th.as_tensor(wanted)
    sizes = [obs.shape[1], *hidden]
    blocks = [block for a, b in itertools.pairwise(sizes) for block in (th.nn.Linear(a, b), th.nn.Tanh())]
    net = th.nn.Sequential(*blocks, th.nn.Linear(sizes[-1], wanted.shape[1]))
    heads = [len(values) for values in levels.values()]
    batches = -(-len(x) // BATCH)
    epochs = max(EPOCHS, -(-LEAST_STEPS // batches))
    steps = epochs * batches
    optimizer = th.optim.Adam(net.parameters(), RATE)
    schedule = th.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    for _ in range(epochs):
        for rows in th.randperm(len(x)).split(BATCH):
            logits = net(x[rows]).masked_fill(~legal[rows], -1e8)
            parts = zip(logits.split(heads, 1), y[rows].split(heads, 1), strict=True)
            loss = -sum((target * head.log_softmax(1)).sum(1).mean() for head, target in parts)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    layers = [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in net if isinstance(m, th.nn.Linear)]
    weight, bias = layers[0]
    layers[0] = ((weight / sd).astype(np.float32), (bias - weight @ (mean / sd)).astype(np.float32))
    return layers


def imitate(
    source: Source,
    out: Path,
    cells_count: int,
    *,
    rounds: int = 3,
    hidden: Sequence[int] = (128, 128),
    workers: Workers = HERE,
    fit_seed: int = 0,
    longest_s: float = math.inf,
    command: str = "",
) -> dict[str, float]:
    """Writes ``policy.npz`` into ``out``; tuned cells are kept there and not tuned again.

    With another ``fit_seed`` (of the network and its learning; the cells are the same) it is ``policy-SEED.npz``.
    Cells whose arrivals span more than ``longest_s`` are tuned, but neither learned from nor held out.

    Returns:
        Goodput relative to the constant that was tuned on the very same requests, over the cells held out.
    """
    out.mkdir(parents=True, exist_ok=True)
    set_up_torch()
    store = Store(out)
    store.begin()
    rows = _tuned_cells(source, store, cells_count, workers)
    rows = [row for row in rows if span_s(source, row) <= longest_s]
    held_out = max(int(HOLDOUT_FRAC * len(rows)), 1)
    tested, learned = rows[:held_out], rows[held_out:]
    data = Data()
    for row, several in zip(learned, _side_by_side(seen_under_settings, source, learned, workers), strict=True):
        for seen in several:
            data.add(seen, row["targets"])
    path = out / f"policy-{fit_seed}.npz" if fit_seed else out / "policy.npz"
    about: dict[str, Any] = {"interval_s": source.interval_s, "predictor": source.predictor}
    about |= {"seed": fit_seed, "command": command}
    figures: dict[str, float] = {}
    for number in range(1, rounds + 1):
        layers = fit(*data.arrays(), hidden, fit_seed, source.levels)
        training = asdict(source) | {"cells_count": cells_count, "rounds": number}
        Network(layers, interface("tanh", masked=True, levels=source.levels) | about | {"training": training}).save(
            path
        )
        judged = _side_by_side(seen_by_network, source, tested, workers, str(path))
        ratio = np.array([_ratio(row, seen) for row, seen in zip(tested, judged, strict=True)])
        figures = {"round": number, "observations": len(data), "held_out": len(tested), "mean": float(ratio.mean())}
        figures |= {f"p{q}": float(np.percentile(ratio, q)) for q in (5, 25, 50)}
        err.print(f"over the tuned constant of held-out cells: {figures}", highlight=False)
        if number < rounds:
            _learn_from_own(source, data, learned, str(path), workers)
    return figures


class Data:
    """What to learn from: observations, masks, and the targets of each episode they are of."""

    def __init__(self) -> None:
        self._seen: list[Seen] = []
        self._targets: list[list[float]] = []

    def add(self, seen: Seen, targets: list[float]) -> None:
        self._seen.append(seen)
        self._targets.append(targets)

    def __len__(self) -> int:
        return sum(len(seen.obs) for seen in self._seen)

    def arrays(self) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.float32]]:
        """(n, features), (n, levels), (n, levels)."""
        counts = [len(seen.obs) for seen in self._seen]
        wanted = np.repeat(np.array(self._targets, np.float32), counts, axis=0)
        return (
            np.concatenate([seen.obs for seen in self._seen]),
            np.concatenate([seen.masks for seen in self._seen]),
            wanted,
        )


def _ratio(row: Row, seen: Seen) -> float:
    return seen.goodput_frac / max(row["goodput_frac"], 1e-9)


def _learn_from_own(source: Source, data: Data, rows: list[Row], path: str, workers: Workers) -> None:
    """What the network itself gets to see. Where it falls short, also which of its own choices to change.

    Knobs work together: the best constant's levels, one by one, need not be good beside what the network does.
    """
    own = list(_side_by_side(seen_by_network, source, rows, workers, path))
    short = [(row, seen) for row, seen in zip(rows, own, strict=True) if _ratio(row, seen) < 1 - TAU]
    for row, seen in zip(rows, own, strict=True):
        data.add(seen, row["targets"])
    changes = all_of(_correction, [(source, row, seen.action) for row, seen in short], workers)
    for (_, seen), targets in zip(short, changes, strict=True):
        data.add(seen, targets)


def _side_by_side(
    function: Callable[..., list[Any]], source: Source, rows: list[Row], workers: Workers, *more: Any
) -> list[Any]:
    """What ``function(source, some rows, *more)`` gives for each row: rows of like length in one engine."""
    order = sorted(range(len(rows)), key=lambda k: span_s(source, rows[k]), reverse=True)
    parts = [order[k : k + SIDE_BY_SIDE] for k in range(0, len(order), SIDE_BY_SIDE)]
    found: list[Any] = [None] * len(rows)
    results = all_of(_call, [(function, source, [rows[k] for k in part], *more) for part in parts], workers)
    for part, several in zip(parts, results, strict=True):
        for k, each in zip(part, several, strict=True):
            found[k] = each
    return found


def _correction(work: tuple[Source, Row, tuple[int, ...]]) -> list[float]:
    return corrections(*work)


def _call(work: tuple[Any, ...]) -> list[Any]:
    function, *arguments = work
    found: list[Any] = function(*arguments)
    return found


def _tuned_cells(source: Source, store: Store, count: int, workers: Workers) -> list[Row]:
    """The best constant of each cell; those in the store, from the same requests, are not tuned again."""
    named = inputs_sha256(source.systems, source.models, source.traces)
    depends = {"source": source, "inputs": named, "l3env": sources_sha256(Path(__file__))}
    jobs = [Job(f"tuned-{i}", {}, depends | {"i": i}, partial(_tuned, source, i)) for i in range(count)]
    with progress_bar("tuning") as progress:
        ended = run_jobs(jobs, store, workers=workers, progress=progress)
    return [dict(done.figures) for done in ended.of_all()]


def _tuned(source: Source, i: int) -> Result:
    return tuned(source, i), {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", nargs="+", type=int, default=[128, 128])
    parser.add_argument("--workers", type=int, default=-1)
    parser.add_argument("--seed", type=int, default=0, help="of the cells")
    parser.add_argument("--action-knobs", nargs="+", default=Source.action_knobs)
    parser.add_argument("--predictor", default=None, help="a policy whose length predictor the network uses")
    parser.add_argument("--longest-s", type=float, default=math.inf, help="longest span of arrivals to learn from")
    parser.add_argument("--fit-seed", type=int, default=0, help="of the network and its learning")
    for name, default in (("systems", SYSTEMS), ("models", MODELS), ("traces", TRACES)):
        parser.add_argument(f"--{name}", nargs="+", default=default)
    parser.add_argument("--window", default=Source.window)
    parser.add_argument("--utilization", nargs=2, type=float, default=Source.utilization, metavar=("LOW", "HIGH"))
    parser.add_argument("--episode-requests", type=int, default=Source.episode_requests)
    given = parser.parse_args()
    source = Source(
        tuple(given.systems),
        tuple(given.models),
        tuple(given.traces),
        window=given.window,
        utilization=tuple(given.utilization),
        episode_requests=given.episode_requests,
        action_knobs=tuple(given.action_knobs),
        predictor=given.predictor,
        seed=given.seed,
    )
    command = shlex.join(["python", "-m", "l3env.experiments.learning.imitate", *sys.argv[1:]])
    figures = imitate(
        source,
        given.out,
        given.cells,
        rounds=given.rounds,
        hidden=given.hidden,
        workers=Workers(count=given.workers),
        fit_seed=given.fit_seed,
        longest_s=given.longest_s,
        command=command,
    )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
