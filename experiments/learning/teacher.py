"""What imitation learns from: drawn cells, their best constants, what a change of a knob costs, what is seen there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.learning.grid import MODELS, SYSTEMS, TRACES
from experiments.train.windows import in_window
from l3env.engine import Engine
from l3env.episodes import Episode, Episodes
from l3env.observe import LEVELS, ViewObserver, action_of, knobs_of
from l3env.policy import BasePolicy, Knobs, View
from l3env.runner import drive
from l3env.tune import ACTIONS, Cell, Grid, tune
from policies.network import load_network

TAU = 0.01  # a setting that loses 1 % of goodput gets 1/e of the best one's weight
OTHERS_COUNT = 2  # settings other than the best that are rolled out, of those that reach GOOD_ENOUGH of it
GOOD_ENOUGH = 0.7
KEPT_OBSERVATIONS = 64  # of a rollout
RANDOM_COUNT, ROUNDS_COUNT = 48, 3  # of each search

Act = Callable[[NDArray[np.float32], NDArray[np.bool_]], NDArray[np.int64]]


@dataclass(frozen=True)
class Source:
    """Where cells are drawn from; cell i is drawn with seed (seed, i)."""

    systems: tuple[str, ...] = SYSTEMS
    models: tuple[str, ...] = MODELS
    traces: tuple[str, ...] = TRACES
    window: str = "0%:60%"
    utilization: tuple[float, float] = (0.5, 1.3)
    episode_requests: int = 500
    interval_s: float = 1.0
    seed: int = 0


@functools.lru_cache(maxsize=1)
def _episodes(source: Source) -> Episodes:
    return Episodes.build(
        list(source.systems),
        list(source.models),
        [in_window(trace, source.window) for trace in source.traces],
        utilization=source.utilization,
        episode_requests=source.episode_requests,
        interval_s=source.interval_s,
    )


def episode(source: Source, i: int) -> Episode:
    """Cell ``i``."""
    return _episodes(source).draw(np.random.default_rng([source.seed, i]))


def tuned(source: Source, i: int) -> dict[str, Any]:
    """The best constant of cell ``i``: its action and goodput, targets by knob, and other actions to see states of."""
    cell = episode(source, i)
    pair = _episodes(source).pairs[cell.pair_idx]
    found = tune(
        [Cell(pair, cell.workload, cell.slo, one_replica=True)],
        grid=ACTIONS,
        random_count=RANDOM_COUNT,
        rounds_count=ROUNDS_COUNT,
        seed=i,
    )
    fair = found.tried[found.tried["goodput_frac"] >= GOOD_ENOUGH * found.goodput_frac[0]]
    others = fair.sample(min(OTHERS_COUNT, len(fair)), random_state=i)
    return {
        "i": i,
        "goodput_frac": float(found.goodput_frac[0]),
        "action": action_of(found.knobs).tolist(),
        "others": [action_of(Knobs(**_typed(row))).tolist() for row in others[list(ACTIONS)].to_dict("records")],
        "targets": targets(found.around, found.grid).tolist(),
    }


def _typed(row: dict[str, Any]) -> dict[str, Any]:
    """Numbers of a table's row as the levels they are."""
    return {name: next(level for level in ACTIONS[name] if level == value) for name, value in row.items()}


def targets(around: dict[str, NDArray[np.float64]], grid: Grid, tau: float = TAU) -> NDArray[np.float64]:
    """(levels,) a distribution over each knob's levels; the values in ``around`` are of the levels in ``grid``."""
    heads = []
    for name, levels in LEVELS.items():
        head = np.zeros(len(levels))
        values = around[name]
        head[[levels.index(level) for level in grid[name]]] = np.exp((values - values.max()) / tau)
        heads.append(head / head.sum())
    return np.concatenate(heads)


class Recorder(BasePolicy):
    """Does what it is told and keeps what an agent would have seen."""

    name = "recorder"

    def __init__(self, act: Act, every_s: float) -> None:
        self.decision_interval_s = every_s
        self._act = act
        self._observer = ViewObserver()
        self.seen: list[tuple[NDArray[np.float32], NDArray[np.bool_]]] = []

    def decide(self, view: View) -> Knobs:
        features, mask = self._observer.look(view)
        self.seen.append((features, mask))
        return knobs_of(self._act(features, mask))


def rollout(source: Source, cell: Episode, act: Act) -> tuple[NDArray[np.float32], NDArray[np.bool_], float]:
    """Some (observations, masks) of an episode, and its goodput."""
    pair = _episodes(source).pairs[cell.pair_idx]
    engine = Engine(pair, 1, len(cell.workload))
    engine.reset(0, cell.workload, slo=cell.slo)
    recorder = Recorder(act, source.interval_s)
    drive(engine, 0, recorder)
    chosen = np.unique(np.linspace(0, len(recorder.seen) - 1, KEPT_OBSERVATIONS).astype(int))
    obs = np.array([recorder.seen[k][0] for k in chosen])
    masks = np.array([recorder.seen[k][1] for k in chosen])
    return obs, masks, float(engine.state.env["slo_met_count"][0]) / len(cell.workload)


def seen_under_settings(source: Source, row: dict[str, Any]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """What is seen under the best and other settings of a cell."""
    cell = episode(source, row["i"])
    parts = []
    for action in (row["action"], *row["others"]):
        fixed = np.array(action)
        parts.append(rollout(source, cell, lambda features, mask, fixed=fixed: fixed)[:2])  # type: ignore[misc]
    return np.concatenate([obs for obs, _ in parts]), np.concatenate([masks for _, masks in parts])


def seen_by_network(
    source: Source, row: dict[str, Any], path: str
) -> tuple[NDArray[np.float32], NDArray[np.bool_], float]:
    """What the network sees on a cell, and its goodput there."""
    return rollout(source, episode(source, row["i"]), load_network(Path(path)).act)
