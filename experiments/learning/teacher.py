"""What imitation learns from: drawn cells, their best constants, what a change of a knob costs, what is seen there."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.engine.engine import Engine
from l3env.engine.kernels.run import Stop, Until
from l3env.envs.episodes import Episode, Episodes
from l3env.envs.observe.observer import Observer
from l3env.experiments.learning.grid import MODELS, SYSTEMS, TRACES
from l3env.experiments.train.windows import in_window
from l3env.policies.network import load_network
from l3env.policy.levels import LEVELS, Levels, action_of, knobs_of, lasting, levels_of
from l3env.search.tune import Case, probe, tune

TAU = 0.01  # a setting that loses 1 % of goodput gets 1/e of the best one's weight
OTHERS_COUNT = 2  # settings other than the best that are rolled out, of those that reach GOOD_ENOUGH of it
GOOD_ENOUGH = 0.7
KEPT_OBSERVATIONS = 64  # of a rollout
RANDOM_COUNT, ROUNDS_COUNT = 48, 3  # of each search

# (n, features), (n, levels) and which episodes these are -> (n, knobs)
Act = Callable[[NDArray[np.float32], NDArray[np.bool_], NDArray[np.int64]], NDArray[np.int64]]
Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Where cells are drawn from; cell i is drawn with seed (seed, i).

    Attributes:
        loads: a cell's setting is the best on average at these multiples of its load, the first of them 1. More than
            one decides between settings that are equally good until the load rises.
    """

    systems: tuple[str, ...] = SYSTEMS
    models: tuple[str, ...] = MODELS
    traces: tuple[str, ...] = TRACES
    window: str = "0%:60%"
    utilization: tuple[float, float] = (0.5, 1.3)
    loads: tuple[float, ...] = (1.0, 1.15)
    episode_requests: int = 500
    interval_s: float = 1.0
    action_knobs: tuple[str, ...] = tuple(LEVELS)
    predictor: str | None = None
    seed: int = 0

    @property
    def levels(self) -> Levels:
        """The knobs that the network sets, and their levels."""
        return levels_of(self.action_knobs)


@functools.lru_cache(maxsize=1)
def _episodes(source: Source) -> Episodes:
    return Episodes.build(
        list(source.systems),
        list(source.models),
        [in_window(trace, source.window) for trace in source.traces],
        utilization=source.utilization,
        episode_requests=source.episode_requests,
        interval_s=source.interval_s,
        predictor=source.predictor,
    )


def episode(source: Source, i: int) -> Episode:
    """Cell ``i``."""
    return _episodes(source).draw(np.random.default_rng([source.seed, i]))


def span_s(source: Source, row: Row) -> float:
    """How long a cell takes at least: cells of like length are best served side by side."""
    return episode(source, row["i"]).workload.span_s


def _cells(source: Source, i: int) -> list[Case]:
    """Cell ``i`` at each of the loads at which its setting should do well."""
    cell = episode(source, i)
    pair = _episodes(source).pairs[cell.pair_idx]
    predicted = _episodes(source).predicted(cell)
    return [Case(pair, cell.workload.at_load(load), cell.slo, True, predicted) for load in source.loads]


def tuned(source: Source, i: int) -> Row:
    """The best constant of cell ``i``: its action and goodput, targets by knob, and other actions to see states of."""
    found = tune(
        _cells(source, i),
        grid=lasting(source.levels),
        random_count=RANDOM_COUNT,
        rounds_count=ROUNDS_COUNT,
        seed=i,
    )
    best = found.guarded_frac.mean()
    fair = found.tried[found.tried["guarded_frac"] >= best - (1 - GOOD_ENOUGH) * abs(best)]
    others = fair.sample(min(OTHERS_COUNT, len(fair)), random_state=i)
    return {
        "i": i,
        "goodput_frac": float(found.goodput_frac[0]),
        "action": action_of(found.knobs, source.levels).tolist(),
        "others": [_action(row, source.levels) for row in others[list(source.levels)].to_dict("records")],
        "targets": targets(found.around, found.grid, source.levels).tolist(),
    }


def _action(row: Mapping[Hashable, float], levels: Levels) -> list[int]:
    """A table's row of numbers as the places of the levels they are."""
    return [list(values).index(row[name]) for name, values in levels.items()]


def targets(
    around: dict[str, NDArray[np.float64]], grid: Levels, levels_by_knob: Levels = LEVELS, tau: float = TAU
) -> NDArray[np.float64]:
    """(levels,) a distribution over each knob's levels; the values in ``around`` are of the levels in ``grid``."""
    heads = []
    for name, levels in levels_by_knob.items():
        head = np.zeros(len(levels))
        values = around[name]
        head[[levels.index(level) for level in grid[name]]] = np.exp((values - values.max()) / tau)
        heads.append(head / head.sum())
    return np.concatenate(heads)


@dataclass(frozen=True)
class Seen:
    """What an agent sees in an episode (some of it, evenly spread), and how it did.

    Attributes:
        obs, masks: (n, features) and (n, levels), n about KEPT_OBSERVATIONS.
        goodput_frac: share of requests that met their SLO.
        action: what it did most often.
    """

    obs: NDArray[np.float32]
    masks: NDArray[np.bool_]
    goodput_frac: float
    action: tuple[int, ...]


def rollouts(source: Source, cells: Sequence[Episode], act: Act) -> list[Seen]:
    """Serves episodes side by side, a decision every ``interval_s``."""
    episodes = _episodes(source)
    engine = Engine(episodes.pairs, len(cells), max(len(cell.workload) for cell in cells))
    observer = Observer(engine, has_predictor=source.predictor is not None, levels=source.levels)
    for e, cell in enumerate(cells):
        episodes.open(engine, e, cell)
    kept: list[list[tuple[Any, Any]]] = [[] for _ in cells]
    done_most: list[Counter[tuple[int, ...]]] = [Counter() for _ in cells]
    obs, masks = observer.look(), observer.masks()
    env, number, stride = engine.state.env, 0, 1
    while (alive := np.flatnonzero(env["stop"] != Stop.DONE)).size:
        actions = np.zeros((len(cells), len(source.levels)), np.int64)
        actions[alive] = act(obs[alive], masks[alive], alive)
        for e in alive.tolist():
            done_most[e][tuple(actions[e].tolist())] += 1
            if number % stride == 0:
                kept[e].append((obs[e], masks[e]))
        if number == 2 * KEPT_OBSERVATIONS * stride:
            kept, stride = [rows[::2] for rows in kept], 2 * stride
        number += 1
        obs, masks = observer.step(actions, Until.TIME, env["clock_s"] + source.interval_s)
    return [_seen(*each) for each in zip(cells, kept, done_most, env["slo_met_count"].tolist(), strict=True)]


def _seen(cell: Episode, kept: list[tuple[Any, Any]], done: Counter[tuple[int, ...]], met_count: int) -> Seen:
    chosen = np.unique(np.linspace(0, len(kept) - 1, KEPT_OBSERVATIONS).astype(int))
    obs, masks = (np.array([kept[k][i] for k in chosen]) for i in (0, 1))
    return Seen(obs, masks, met_count / len(cell.workload), done.most_common(1)[0][0])


def seen_under_settings(source: Source, rows: Sequence[Row]) -> list[list[Seen]]:
    """Of each cell: what is seen under its best and other settings."""
    fixed = [(row, action) for row in rows for action in (row["action"], *row["others"])]
    actions = np.array([action for _, action in fixed])
    cells = {row["i"]: episode(source, row["i"]) for row in rows}
    found = iter(rollouts(source, [cells[row["i"]] for row, _ in fixed], lambda obs, masks, which: actions[which]))
    return [[next(found) for _ in range(1 + len(row["others"]))] for row in rows]


def seen_by_network(source: Source, rows: Sequence[Row], path: str) -> list[Seen]:
    """What the network sees on cells, and its goodput there."""
    network = load_network(Path(path))
    return rollouts(source, [episode(source, row["i"]) for row in rows], lambda obs, masks, _: network.act(obs, masks))


def corrections(source: Source, row: Row, action: Sequence[int]) -> list[float]:
    """Targets of each knob where the others are those of ``action``: what a network that does this should change."""
    levels = source.levels
    found = probe(_cells(source, row["i"]), knobs_of(np.array(action), levels), grid=lasting(levels))
    return targets(found.around, found.grid, levels).tolist()
