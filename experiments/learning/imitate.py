"""A policy that starts near the tuned constant everywhere: imitation of constants tuned on many drawn cells.

    python -m experiments.learning.imitate --out runs/imitation --cells 2000
    l3env train --algo maskable-ppo --init runs/imitation/policy.npz ...

Each cell is an episode as training draws it (system, model, trace, load, window). A search finds its best fixed knobs
and what each change of one knob costs. The network learns, from what it sees along the way, each knob's levels with
targets proportional to exp(-loss / TAU): where a knob does not matter, the targets say so. First it sees rollouts of
the best and of other settings, then its own (DAgger, Ross et al. 2011, arXiv 1011.0686).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch as th
from numpy.typing import NDArray
from rich.console import Console

from experiments.learning.grid import MODELS, SYSTEMS, TRACES
from experiments.learning.teacher import Source, seen_by_network, seen_under_settings, tuned
from experiments.train.algorithms import set_up_torch
from experiments.train.export import interface
from l3env.errors import L3EnvError
from l3env.observe import LEVELS
from policies.network import Network

HOLDOUT_FRAC = 0.1  # of cells: never learned from
EPOCHS, LEAST_STEPS, BATCH, RATE = 20, 400, 2048, 2e-3

err = Console(stderr=True)


# --- learning


def fit(
    obs: NDArray[np.float32], masks: NDArray[np.bool_], wanted: NDArray[np.float32], hidden: Sequence[int], seed: int
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
    heads = [len(levels) for levels in LEVELS.values()]
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
    rounds: int = 2,
    hidden: Sequence[int] = (128, 128),
    workers: int = -1,
    command: str = "",
) -> dict[str, float]:
    """Writes ``policy.npz`` into ``out``; tuned cells are kept in ``tuned.jsonl`` and not tuned again.

    Returns:
        Goodput relative to the constant that was tuned on the very same requests, over the cells held out.
    """
    out.mkdir(parents=True, exist_ok=True)
    set_up_torch()
    os.environ["L3ENV_THREADS"] = "1"  # a process a core
    rows = _tuned_cells(source, out / "tuned.jsonl", cells_count, workers)
    held_out = max(int(HOLDOUT_FRAC * len(rows)), 1)
    learned, tested = rows[held_out:], rows[:held_out]
    sets = [
        (row, *found)
        for row, found in zip(learned, _each(seen_under_settings, source, learned, (), workers), strict=True)
    ]
    figures: dict[str, float] = {}
    path = out / "policy.npz"
    for number in range(1, rounds + 1):
        obs, masks = (np.concatenate([each[k] for each in sets]) for k in (1, 2))
        wanted = np.concatenate([np.repeat([row["targets"]], len(seen), axis=0) for row, seen, _ in sets]).astype(
            np.float32
        )
        layers = fit(obs, masks, wanted, hidden, source.seed)
        about: dict[str, Any] = {
            "interval_s": source.interval_s,
            "predictor": None,
            "seed": source.seed,
            "command": command,
        }
        about |= {"training": asdict(source) | {"cells_count": cells_count, "rounds": number}}
        Network(layers, interface("tanh", masked=True) | about).save(path)
        results = list(_each(seen_by_network, source, tested, (str(path),), workers))
        ratio = np.array(
            [goodput / max(row["goodput_frac"], 1e-9) for row, (_, _, goodput) in zip(tested, results, strict=True)]
        )
        figures = {"round": number, "observations": len(obs), "held_out": len(tested), "mean": float(ratio.mean())}
        figures |= {f"p{q}": float(np.percentile(ratio, q)) for q in (5, 25, 50)}
        err.print(f"over the tuned constant of held-out cells: {figures}", highlight=False)
        if number < rounds:
            own = _each(seen_by_network, source, learned, (str(path),), workers)
            sets += [(row, found[0], found[1]) for row, found in zip(learned, own, strict=True)]
    return figures


def _tuned_cells(source: Source, path: Path, count: int, workers: int) -> list[dict[str, Any]]:
    head = json.dumps(asdict(source))
    done: dict[int, dict[str, Any]] = {}
    if path.exists():
        first, *lines = path.read_text(encoding="utf-8").split("\n")
        if first != head:
            raise L3EnvError(f"{path}: cells of another source; remove it or choose another --out")
        done = {row["i"]: row for row in map(json.loads, lines[:-1])}
        path.write_text("".join(f"{line}\n" for line in (head, *map(json.dumps, done.values()))), encoding="utf-8")
    else:
        path.write_text(head + "\n", encoding="utf-8")
    left = [i for i in range(count) if i not in done]
    with path.open("a", encoding="utf-8") as file:
        for row in joblib.Parallel(workers, return_as="generator_unordered")(
            joblib.delayed(tuned)(source, i) for i in left
        ):
            done[row["i"]] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
            if len(done) % max(count // 20, 1) == 0:
                err.print(f"tuned {len(done)} of {count} cells", highlight=False)
    return [done[i] for i in range(count)]


def _each(
    function: Callable[..., Any], source: Source, rows: list[dict[str, Any]], more: tuple[Any, ...], workers: int
) -> Iterable[Any]:
    return joblib.Parallel(workers, return_as="generator")(joblib.delayed(function)(source, row, *more) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--hidden", nargs="+", type=int, default=[128, 128])
    parser.add_argument("--workers", type=int, default=-1)
    parser.add_argument("--seed", type=int, default=0)
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
        seed=given.seed,
    )
    command = shlex.join(["python", "-m", "experiments.learning.imitate", *sys.argv[1:]])
    figures = imitate(
        source, given.out, given.cells, rounds=given.rounds, hidden=given.hidden, workers=given.workers, command=command
    )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
