"""Runs the router study and keeps its figures: ``python -m experiments.deepseek.study`` (ten minutes of a core)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.deepseek.router import over_gamma, serve
from l3env import load
from l3env.specs import SystemSpec

PATH = Path(__file__).parents[1] / "data" / "deepseek_router.json"
SYSTEMS = ("h800-ep32-prefill", "h800-ep144-decode", "h800-ep320-decode")


def figures(layers: int = 8, tokens: int = 1024, interval_tokens: int = 16_384) -> dict[str, Any]:
    """Imbalance between ranks of each deployment, and of experts over gamma."""
    moe = load("model/deepseek-v3").moe
    out: dict[str, Any] = {"layers": layers, "interval_tokens": interval_tokens, "ranks": {}}
    for name in SYSTEMS:
        system: SystemSpec = load(f"system/{name}")
        assert system.experts is not None
        served = serve(
            moe,
            system.experts.ranks_count,
            system.experts.slots_count,
            layers=layers,
            steps=90,
            tokens=tokens,
            interval_tokens=interval_tokens,
            shared_is_routed=system.experts.shared_is_routed,
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
    part = PATH.with_suffix(".part")
    part.write_text(json.dumps(figures(), indent=2) + "\n", "utf-8")
    part.replace(PATH)
