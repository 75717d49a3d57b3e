"""The planner (``policies/rmaxts.py``) against the best constant setting and the heuristics, cell by cell.

    python -m experiments.planner                 # every budget and ablation
    python -m experiments.planner --quick         # 512 simulations, fewer requests

Training requests come first in a trace, those served after them; the load is that at which the reference policy serves
the trace at the utilization of the cell. Goodput is the share of requests that meet their SLO.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from l3env import load_trace
from l3env.policy import Policy, make_policy
from l3env.runner import compile_pair, load_at_capacity, run_policy
from l3env.tables import Tables
from l3env.workload import Workload
from policies.rmaxts import RMaxTS

PAIRS = (
    ("l3-dgx-a100", "gpt-175b"),
    ("l3-dgx-a100", "qwen-72b"),
    ("gpu-dgx-a100", "qwen-72b"),
    ("hbm-pim-dgx-a100", "qwen-72b"),
)
TRACES = ("azure-conv-2023", "azure-code-2023")
UTILIZATIONS = (0.7, 1.0, 1.3)
HEURISTICS = ("edf", "sjf-prompt", "sarathi", "l3-model", "fill-capacity", "fcfs")
BUDGETS = (32, 128, 512, 2048)
REQUESTS = 400  # a replica: as many to learn from, as many to serve


@dataclass(frozen=True)
class PlannedCell:
    """A machine, the requests to learn from and those to serve."""

    name: str
    tables: Tables
    training: Workload
    workload: Workload


def cells(requests_count: int = REQUESTS) -> Iterator[PlannedCell]:
    """Every cell of the study."""
    for system, model in PAIRS:
        tables = compile_pair(system, model)
        for trace in TRACES:
            count = requests_count * tables.replicas_count
            whole = load_trace(trace).head(2 * count)
            full = load_at_capacity(tables, whole)
            for utilization in UTILIZATIONS:
                loaded = whole.at_load(utilization * full)
                rest = loaded.select(np.arange(count, 2 * count))
                workload = rest.window(float(rest.arrival_s[0]), float("inf"))
                name = f"{model} on {system}, {trace}, {utilization:g}"
                yield PlannedCell(name, tables, loaded.head(count), workload)


def planners(*, quick: bool = False) -> dict[str, Policy]:
    """The planner at its budgets, and its ablations at 512 simulations."""
    found: dict[str, Policy] = {f"rmaxts-{budget}": RMaxTS(budget) for budget in ((512,) if quick else BUDGETS)}
    if not quick:
        found["no intrinsic reward"] = RMaxTS(512, intrinsic=False)
        found["ucb1"] = RMaxTS(512, gamma=1.0)
    return found


def study(*, quick: bool = False) -> pd.DataFrame:
    """One row per cell and policy: goodput, and the planner's own figures."""
    rows = []
    for cell in cells(REQUESTS // 2 if quick else REQUESTS):
        made = {name: make_policy(name) for name in ("best-constant", *HEURISTICS)} | planners(quick=quick)
        for name, policy in made.items():
            start = time.perf_counter()
            metrics = run_policy(cell.tables, cell.workload, policy, training=cell.training, record=False).metrics
            figures = {key: metrics[key] for key in ("decision_ms", "deviations_frac") if key in metrics}
            row: dict[str, Any] = {"cell": cell.name, "policy": name, "goodput_frac": metrics["slo_attainment_frac"]}
            rows.append(row | figures | {"wall_s": time.perf_counter() - start})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return pd.DataFrame(rows)


def against_constant(results: pd.DataFrame) -> pd.DataFrame:
    """Per policy: mean and least goodput over that of the best constant setting; cells where it has some."""
    goodput = results.pivot(index="cell", columns="policy", values="goodput_frac")
    goodput["best heuristic"] = goodput[list(HEURISTICS)].max(axis=1)
    ratio = goodput[goodput["best-constant"] > 0].div(goodput["best-constant"], axis=0).dropna()
    return pd.DataFrame({"mean": ratio.mean(), "least": ratio.min(), "goodput": goodput.mean()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    results = study(quick=parser.parse_args().quick)
    print(against_constant(results).round(4).to_string())
    print(results.groupby("policy")["decision_ms"].mean().dropna().round(1).to_string())


if __name__ == "__main__":
    main()
