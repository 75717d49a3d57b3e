"""The planner (``policies/rmaxts.py``) against the best constant setting and the heuristics, cell by cell.

    # 512 simulations, the learning grid
    python -m l3env.experiments.learning.planner --grid --out runs/planner
    # budgets and ablations, eight cells
    python -m l3env.experiments.learning.planner --study --out runs/planner-study
    # where its settings were chosen
    python -m l3env.experiments.learning.planner --grid --training 0%:36% --window 36%:60%

Cells and requests are those of ``experiments/learning/grid.py``. Finished runs are kept in ``OUT``, so an interrupted
study goes on; the table goes to ``OUT/planner.md``. Goodput is the share of requests that meet their SLO, less those
that wait beyond the guard (``--objective plain``: without these).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from l3env.cli.shared import err, progress_bar, say_taken
from l3env.experiments.learning.grid import MODELS, SYSTEMS, TRACES, UTILIZATIONS, grid_scenarios
from l3env.experiments.learning.iqm import CELL, interquartile_mean
from l3env.experiments.learning.scenarios import (
    EVALUATION_WINDOW,
    TRAINING_WINDOW,
    Scenario,
    add_objective,
    judge,
    tuned_for,
)
from l3env.files import write_text
from l3env.policy.protocol import Role
from l3env.policy.registry import policies_of
from l3env.runs.store import Store
from l3env.runs.workers import Workers
from l3env.search.objective import FIGURES, Objective

HEURISTICS = tuple(name for name in policies_of(Role.HEURISTIC) if name != "l3")  # l3-model stands for it
CONSTANTS = ("best-constant", "best-constant-in-order")  # the second is where the planner starts from
HEURISTIC = "best heuristic"
PLANNER = "rmaxts"
LEAST = 1e-3  # that goodput counts in a ratio: guarded it may be negative
BUDGETS = (32, 128, 512, 2048)
STUDIED: Mapping[str, str] = {
    PLANNER: "rmaxts?simulations=512",
    **{f"rmaxts-{budget}": f"rmaxts?simulations={budget}" for budget in BUDGETS if budget != 512},
    "rmaxts, no intrinsic reward": "rmaxts?intrinsic=false",
    "rmaxts, UCB1": "rmaxts?gamma=1.0",
    "rmaxts, no virtual loss": "rmaxts?virtual_loss=false",
    "rmaxts, nothing beyond the interval": "rmaxts?beyond=false",
}
STUDIED_SCENARIOS = (
    (0, 0, 0),
    (0, 1, 1),
    (1, 0, 1),
    (1, 1, 0),
    (1, 1, 3),
    (2, 0, 0),
    (2, 0, 1),
    (2, 1, 1),
)  # as indices


def studied_scenarios(utilization: float = 0.9) -> list[Scenario]:
    """Eight: every system and model, three of the traces (openr1 runs longest)."""
    places = [(SYSTEMS[s], MODELS[m], TRACES[t]) for s, m, t in STUDIED_SCENARIOS]
    return [Scenario(*place, utilization) for place in places]


def goodputs(rows: Sequence[Mapping[str, Any]], objective: Objective = Objective.GUARDED) -> pd.DataFrame:
    """(C, P) goodput by cell and policy, with the best heuristic's as ``best heuristic`` and its name."""
    goodput = pd.DataFrame(rows).pivot(index=CELL, columns="policy", values=FIGURES[objective])
    known = [name for name in HEURISTICS if name in goodput]
    goodput[HEURISTIC] = goodput[known].max(axis=1)
    goodput["best heuristic is"] = goodput[known].idxmax(axis=1)
    return goodput


def table(rows: Sequence[Mapping[str, Any]], objective: Objective = Objective.GUARDED) -> str:
    """As Markdown: for each form of the planner its goodput over the opponents', its cost, and then every cell."""
    goodput = goodputs(rows, objective)
    frame = pd.DataFrame(rows)
    planners = [name for name in dict.fromkeys(frame["policy"]) if name.startswith(PLANNER)]
    opponents = [name for name in (*CONSTANTS, HEURISTIC) if name in goodput]
    means = ", ".join(f"{name} {goodput[name].mean():.3f}" for name in opponents)
    heads = ["", "goodput", *(f"over {name}: mean, IQM, least, cells below 0.98" for name in opponents)]
    heads += ["ms a decision", "simulations", "decisions", "other than the constant"]
    lines = [f"{len(goodput)} cells. Goodput: {means}.", "", *_head(heads, 1)]
    for name in planners:
        ours, own = goodput[name], frame[frame["policy"] == name]
        shown = [name, f"{ours.mean():.3f}"]
        for opponent in opponents:
            over = ours.clip(lower=LEAST) / goodput[opponent].clip(lower=LEAST)
            figures = [over.mean(), interquartile_mean(over), over.min()]
            shown.append(f"{', '.join(f'{each:.3f}' for each in figures)}, {int((over < 0.98).sum())}")
        shown += [f"{own[each].mean():.0f}" for each in ("decision_ms", "simulations_mean_count", "decisions_count")]
        lines.append(_line([*shown, f"{own['deviations_frac'].mean():.0%}"]))
    if PLANNER in planners:
        heads = [*CELL, "goodput", *opponents, *(f"over {name}" for name in opponents), "best heuristic is"]
        lines += ["", *_head(heads, len(CELL))]
        for cell, row in goodput.iterrows():
            theirs = [row[name] for name in opponents]
            numbers = [row[PLANNER], *theirs, *(row[PLANNER] / each for each in theirs)]
            place = [str(each) for each in (cell if isinstance(cell, tuple) else (cell,))]
            lines.append(_line([*place, *(f"{each:.3f}" for each in numbers), row["best heuristic is"]]))
    return "\n".join(lines) + "\n"


def _line(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"


def _head(heads: Sequence[str], texts: int) -> list[str]:
    """The first lines of a table whose first columns are text."""
    return [_line(heads), f"|{' --- |' * texts}{' ---: |' * (len(heads) - texts)}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--grid", action="store_true", help="the planner at 512 simulations on the learning grid")
    what.add_argument("--study", action="store_true", help="budgets and ablations on eight cells")
    parser.add_argument("--out", type=Path, default=Path("runs/planner"))
    parser.add_argument("--workers", type=int, default=-1, help="processes; -1: one a core")
    parser.add_argument("--training", default=TRAINING_WINDOW, help="part of a trace's span to learn from")
    parser.add_argument("--window", default=EVALUATION_WINDOW, help="part to serve")
    parser.add_argument("--planners", nargs="+", help="forms of the planner, as rmaxts?simulations=128&gamma=1.0")
    for name, default in (("systems", SYSTEMS), ("models", MODELS), ("traces", TRACES)):
        parser.add_argument(f"--{name}", nargs="+", default=default)
    parser.add_argument("--utilizations", nargs="+", type=float, default=UTILIZATIONS)
    add_objective(parser)
    given = parser.parse_args()
    objective = Objective(given.objective)
    scenarios = (
        studied_scenarios()
        if given.study
        else grid_scenarios(given.systems, given.models, given.traces, given.utilizations)
    )
    scenarios = [replace(each, training_window=given.training, window=given.window) for each in scenarios]
    planners = {ref: ref for ref in given.planners} if given.planners else STUDIED
    if given.grid and not given.planners:
        planners = {PLANNER: STUDIED[PLANNER]}
    policies = {**planners, **{name: name for name in (*CONSTANTS, *HEURISTICS)}}
    store = Store(given.out)
    store.begin()
    with progress_bar("planning") as progress:
        found = judge(
            scenarios,
            {name: (tuned_for(ref, objective),) for name, ref in policies.items()},
            store=store,
            workers=Workers(count=given.workers),
            progress=progress,
        )
    say_taken(found.taken_count, len(found.rows), given.out)
    write_text(given.out / "planner.md", table(found.rows, objective))
    err.print(table(found.rows, objective), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
