"""The learning grid: one policy, tuned for no cell, against heuristics and tuned constants on unseen windows.

    python -m l3env.experiments.learning.grid --learned policies/data/learned-ppo.npz --out runs/grid

Systems x models x traces x utilizations x seeds; the first 60 % of each trace's span is for training, the rest for
this. Finished runs are kept in ``OUT``, so an interrupted grid goes on; the table goes to ``OUT/grid.json`` and
``OUT/grid.md``.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l3env.cli.shared import err, progress_bar, say_taken
from l3env.experiments.learning.evaluate import baselines_of, evaluate, networks_of
from l3env.experiments.learning.scenarios import Scenario, add_objective
from l3env.files import write_text
from l3env.runs.store import Store
from l3env.runs.workers import Workers
from l3env.search.objective import Objective

SYSTEMS = ("l3-dgx-a100", "hbm-pim-dgx-a100", "gpu-dgx-a100")
MODELS = ("gpt-175b", "qwen-72b")
TRACES = (
    "azure-conv-2023",
    "mooncake-conversation",
    "openr1?n=1500&arrivals=poisson&rate=1",
    "splice:azure-conv-2023,azure-code-2023,openr1?every=120",
)
UTILIZATIONS = (0.7, 0.9, 1.1)
SEEDS_COUNT = 5
OPPONENTS = ("best_heuristic", "l3", "best_constant", "best_constant_global", "best_constant_in_order")


def grid_scenarios(
    systems: Sequence[str] = SYSTEMS,
    models: Sequence[str] = MODELS,
    traces: Sequence[str] = TRACES,
    utilizations: Sequence[float] = UTILIZATIONS,
) -> list[Scenario]:
    """All combinations."""
    combinations = itertools.product(systems, models, traces, utilizations)
    return [Scenario(*each) for each in combinations]


def table(figures: dict[str, Any]) -> str:
    """The whole result as Markdown: interquartile means first, then every cell, losses included."""
    counts = f"{figures['cells_count']} cells, {figures['seeds_count']} seeds"
    lines = [
        f"{counts}. {figures['objective'].capitalize()} goodput of `{figures['policy']}` over that of:",
        "",
        "| opponent | IQM | 95 % interval | worst cell |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name in OPPONENTS:
        if f"iqm_vs_{name}" in figures:
            middle, low, high = (figures[f"iqm_vs_{name}{end}"] for end in ("", "_low", "_high"))
            worst = figures[f"worst_cell_vs_{name}"]
            lines.append(f"| {name.replace('_', ' ')} | {middle:.3f} | {low:.3f} to {high:.3f} | {worst:.3f} |")
    shown = [name for name in OPPONENTS if f"vs_{name}" in figures["cells"][0]]
    head = ["system", "model", "trace", "utilization", "goodput", *(f"vs {name.replace('_', ' ')}" for name in shown)]
    lines += [
        "",
        f"| {' | '.join([*head, 'best heuristic is'])} |",
        f"|{' --- |' * 4}{' ---: |' * (len(shown) + 1)} --- |",
    ]
    for cell in figures["cells"]:
        ours = cell["goodput_frac"][figures["policy"]]
        ratios = " | ".join(f"{cell[f'vs_{name}']:.3f}" for name in shown)
        place = " | ".join(str(cell[name]) for name in ("system", "model", "trace", "utilization"))
        lines.append(f"| {place} | {ours:.3f} | {ratios} | {cell['best_heuristic'] or '-'} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--learned",
        default="learned-ppo",
        help="a run folder, .npz files with commas between (one a training seed), or a policy's name",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/grid"))
    parser.add_argument("--baselines", default="best", help="best, or policies with commas between")
    parser.add_argument("--seeds", type=int, default=SEEDS_COUNT)
    parser.add_argument("--workers", type=int, default=-1, help="processes; -1: one a core")
    for name, default in (("systems", SYSTEMS), ("models", MODELS), ("traces", TRACES)):
        parser.add_argument(f"--{name}", nargs="+", default=default)
    parser.add_argument("--utilizations", nargs="+", type=float, default=UTILIZATIONS)
    add_objective(parser)
    given = parser.parse_args()
    store = Store(given.out)
    store.begin()
    with progress_bar("judging") as progress:
        figures, found = evaluate(
            grid_scenarios(given.systems, given.models, given.traces, given.utilizations),
            networks_of(given.learned),
            baselines_of(given.baselines),
            seeds_count=given.seeds,
            objective=Objective(given.objective),
            store=store,
            workers=Workers(count=given.workers),
            progress=progress,
        )
    say_taken(found.taken_count, len(found.rows), given.out)
    write_text(given.out / "grid.json", json.dumps(figures, indent=2) + "\n")
    write_text(given.out / "grid.md", table(figures))
    err.print(table(figures), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
