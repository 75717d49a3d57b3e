"""The L3 scheduler (its own predictors) against filling the memory first: time between tokens and throughput."""

from __future__ import annotations

from l3env import load_trace, make_policy
from l3env.experiments.reproduce.common import Row, machine, row, throughput
from l3env.runs.driver import run_policy

CASES = (
    ("gpt-175b", "openr1?n=150"),
    ("gpt-175b", "dolphin-short?n=1000"),
    ("gpt-175b", "azure-conv-2023?n=1000&arrivals=closed"),
    ("opt-66b", "azure-conv-2023?n=1000&arrivals=closed"),
    ("qwen-72b", "dolphin-short?n=1000"),
)
PREDICTORS = ("prefill_attention", "fc", "pim")
PAPER_MEDIAN_ERROR = 0.005


def rows() -> list[Row]:
    changes, errors = [], dict.fromkeys(PREDICTORS, float("nan"))
    for model, name in CASES:
        tables, workload = machine("l3", model), load_trace(name)
        fill, ours = (run_policy(tables, workload, make_policy(each)).metrics for each in ("fill-capacity", "l3"))
        change = ours["tbt_p50_s"] / fill["tbt_p50_s"] - 1
        ratio = throughput(ours) / throughput(fill)
        changes.append((change, ratio, f"{model}, {workload.name}"))
        if "azure" in name and model == "gpt-175b":
            errors = {each: ours[f"l3_{each}_error_p50"] for each in PREDICTORS}
    change, ratio, where = min(changes)
    every = "; ".join(f"{case}: {c:+.0%} TBT, x{t:.2f} throughput" for c, t, case in changes)
    out = [
        row("fig14", f"L3 scheduler over fill-capacity ({where})", "median TBT, change", -0.7093, change, every),
        row("fig14", f"L3 scheduler over fill-capacity ({where})", "throughput ratio (flat or up)", 1.0, ratio),
    ]
    return out + [
        row(
            "fig14",
            f"predictor {name}",
            "median relative error, iterations not learned from",
            PAPER_MEDIAN_ERROR,
            error,
        )
        for name, error in errors.items()
    ]
