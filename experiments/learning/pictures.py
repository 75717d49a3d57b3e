"""Pictures of learning: goodput over environment steps, and which setting a policy chooses in which state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from l3env.choices import Budget, Order, SubBatching
from l3env.engine.engine import Engine, Slo
from l3env.envs.observe.features import FEATURES
from l3env.envs.observe.observer import ViewObserver
from l3env.experiments.learning.scenarios import Scenario, requests
from l3env.knobs import Knobs
from l3env.machine.pair import compile_pair
from l3env.policies.learned_ppo import Learned
from l3env.policy.levels import LEVELS, action_of
from l3env.policy.protocol import BasePolicy
from l3env.policy.view import View
from l3env.runs.driver import drive, replica_shares

STATES = ("waiting_work", "next_growth", "prefill_load_short", "slo_met_share")  # features that states are shown by
BINS = 8


def learning_curve(runs: Sequence[Path], path: Path) -> None:
    """Validation goodput of some runs over environment steps, with standard errors over episodes."""
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for run in runs:
        rows = pd.read_csv(run / "evaluations.csv")
        (line,) = axes.plot(rows["steps"], rows["goodput_frac"], marker=".", label=run.name)
        low, high = rows["goodput_frac"] - rows["standard_error"], rows["goodput_frac"] + rows["standard_error"]
        axes.fill_between(rows["steps"], low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="environment steps", ylabel="goodput on the validation window (share of requests)")
    axes.legend(frameon=False)
    _save(figure, path)


def compared_curves(cells: Mapping[str, Mapping[str, Sequence[Path]]], path: Path) -> None:
    """Validation goodput over environment steps, a panel a cell: each run of an algorithm thin, their mean thick.

    Args:
        cells: runs' folders by algorithm, by the panel's title. The mean is taken at the steps of the first run.
    """
    figure, row = plt.subplots(
        1, len(cells), figsize=(5 * len(cells), 3.5), layout="constrained", squeeze=False, sharey=True
    )
    for axes, (title, algorithms) in zip(row[0], cells.items(), strict=True):
        for i, (algo, runs) in enumerate(algorithms.items()):
            tables = [pd.read_csv(run / "evaluations.csv") for run in runs]
            steps = tables[0]["steps"]
            curves = np.array([np.interp(steps, table["steps"], table["goodput_frac"]) for table in tables])
            for table in tables:
                axes.plot(table["steps"], table["goodput_frac"], color=f"C{i}", alpha=0.4, linewidth=0.8)
            axes.plot(steps, curves.mean(axis=0), color=f"C{i}", linewidth=2, label=algo)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("environment steps")
        axes.legend(frameon=False)
    row[0, 0].set_ylabel("goodput on the validation window\n(share of requests)")
    _save(figure, path)


class Watched(BasePolicy):
    """A policy whose observations and actions are kept."""

    def __init__(self, policy: Learned) -> None:
        self.name, self.decision_interval_s = policy.name, policy.decision_interval_s
        self._policy, self._observer = policy, ViewObserver()
        self.seen: list[NDArray[np.float32]] = []
        self.done: list[NDArray[np.int64]] = []

    def decide(self, view: View) -> Knobs:
        self.seen.append(self._observer.look(view)[0])
        knobs = self._policy.decide(view)
        self.done.append(action_of(knobs))
        return knobs


def policy_picture(scenario: Scenario, network: str, path: Path) -> None:
    """For each knob, how often each level is chosen in each eighth of the states seen, by several features."""
    obs, actions = _watch(scenario, network)
    names = [name for name, _ in FEATURES]
    figure, grid = plt.subplots(
        len(LEVELS), len(STATES), figsize=(3 * len(STATES), 1.5 * len(LEVELS)), layout="constrained", squeeze=False
    )
    for k, (knob, levels) in enumerate(LEVELS.items()):
        for j, feature in enumerate(STATES):
            column = obs[:, names.index(feature)]
            edges = np.unique(np.quantile(column, np.linspace(0, 1, BINS + 1)))
            bins = np.clip(np.searchsorted(edges, column, side="right") - 1, 0, max(len(edges) - 2, 0))
            counts = np.zeros((len(levels), max(len(edges) - 1, 1)))
            np.add.at(counts, (actions[:, k], bins), 1)
            axes = grid[k, j]
            axes.imshow(
                counts / np.maximum(counts.sum(axis=0), 1), aspect="auto", origin="lower", cmap="Blues", vmin=0, vmax=1
            )
            axes.set_yticks(range(len(levels)), [_label(knob, level) for level in levels] if j == 0 else [], fontsize=6)
            axes.set_xticks([0, counts.shape[1] - 1], [f"{edges[0]:.2f}", f"{edges[-1]:.2f}"], fontsize=6)
            if j == 0:
                axes.set_ylabel(knob, fontsize=7)
            if k == len(LEVELS) - 1:
                axes.set_xlabel(feature, fontsize=7)
    figure.suptitle(
        f"{scenario.system}, {scenario.model}, {scenario.trace}, utilization {scenario.utilization:g}", fontsize=9
    )
    _save(figure, path)


def _watch(scenario: Scenario, network: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(observations, actions) of a policy on the first replica of a scenario."""
    tables, workload = compile_pair(scenario.system, scenario.model), requests(scenario, scenario.window)
    part = workload.select(replica_shares(workload, tables.replicas_count)[0])
    policy = Learned(Path(network))
    policy.prepare(tables, requests(scenario, scenario.training_window))
    engine = Engine(tables, 1, len(part))
    engine.reset(0, part, slo=Slo())
    watched = Watched(policy)
    drive(engine, 0, watched)
    return np.array(watched.seen), np.array(watched.done)


def _label(knob: str, level: float) -> str:
    kinds = {"order": Order, "sub_batching": SubBatching}
    if knob in kinds:
        return kinds[knob](int(level)).name.lower()
    if knob == "prefill_budget_tokens" and level in list(Budget):
        return Budget(int(level)).name.lower()
    return "unlimited" if level >= 1 << 30 else f"{level:g}" if not isinstance(level, bool) else str(level)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
