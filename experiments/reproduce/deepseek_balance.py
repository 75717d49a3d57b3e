"""Runs the router study and keeps its figures: ``python -m l3env.experiments.reproduce.deepseek_balance``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from l3env import load
from l3env.experiments.reproduce.deepseek_router import over_gamma, serve
from l3env.files import write_text

PATH = Path(__file__).parents[1] / "data" / "deepseek_router.json"
SYSTEMS = ("h800-ep32-prefill", "h800-ep144-decode", "h800-ep320-decode")
LMSYS = "9 nodes, EP 72"  # as the decode unit of 18 nodes, with twice the slots a GPU


def figures(layers: int = 8, tokens: int = 1024, interval_tokens: int = 16_384) -> dict[str, Any]:
    """Imbalance between ranks of each deployment, and of experts over gamma."""
    moe = load("model/deepseek-v3").moe
    out: dict[str, Any] = {"layers": layers, "interval_tokens": interval_tokens, "ranks": {}}
    units = {name: load(f"system/{name}").experts for name in SYSTEMS}
    for name, unit in {**units, LMSYS: replace(units[SYSTEMS[1]], ranks_count=72)}.items():
        served = serve(
            moe,
            unit.ranks_count,
            unit.slots_count,
            layers=layers,
            steps=90,
            tokens=tokens,
            interval_tokens=interval_tokens,
            shared_is_routed=unit.shared_is_routed,
        )
        out["ranks"][name] = {
            "fixed_mean": float(served.fixed.mean()),
            "fixed_low": float(served.fixed.min()),
            "fixed_high": float(served.fixed.max()),
            "rebalanced_mean": float(served.rebalanced.mean()),
        }
    out["gamma"] = {f"{gamma:g}": pair for gamma, pair in over_gamma(moe).items()}
    return out


def stored() -> dict[str, Any]:
    """The figures kept with the package."""
    return dict(json.loads(PATH.read_text("utf-8")))


if __name__ == "__main__":
    write_text(PATH, json.dumps(figures(), indent=2) + "\n")
