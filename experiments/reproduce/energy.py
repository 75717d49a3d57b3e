"""Energy per output token of L3 against GPU only."""

from __future__ import annotations

from l3env.experiments.reproduce.common import MODELS, TRACES, Row, measured, row

WHY = {"qwen-72b": "with GQA one rank reads a request's layer: long requests hold up the run while idle power adds up"}


def rows() -> list[Row]:
    changes: list[tuple[float, str]] = []
    for model in MODELS:
        for trace in TRACES:
            ours, theirs = (measured(name, model, trace) for name in ("l3", "gpu"))
            if ours is not None and theirs is not None:
                changes.append((ours["energy_j_per_token"] / theirs["energy_j_per_token"] - 1, f"{model}, {trace}"))
    mean = sum(change for change, _ in changes) / len(changes)
    low, where = min(changes)
    note = (
        f"mean of {len(changes)} cells; best {low:+.0%} at {where}, worst {max(changes)[0]:+.0%} at {max(changes)[1]}"
    )
    note += "; idle power of GPUs and DIMMs included"
    out = [row("energy", "L3 over GPU only, all cells", "energy per token, change", -0.40, mean, note)]
    for model in MODELS:
        mine = [change for change, case in changes if case.startswith(model)]
        case = f"L3 over GPU only, {model}"
        out.append(row("energy", case, "energy per token, change", -0.40, sum(mine) / len(mine), WHY.get(model, "")))
    return out
