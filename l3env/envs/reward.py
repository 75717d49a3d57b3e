"""Rewards: plain functions of two snapshots of the engine's totals (ENV_DTYPE rows, any number of environments).

All are sums over time, so a step that covers many iterations earns what its iterations earn together, and the sum over
an episode does not depend on where its steps end.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from l3env.errors import L3EnvError

Totals = NDArray[np.void]  # (E,) ENV_DTYPE
Reward = Callable[[Totals, Totals], NDArray[np.float64]]


def goodput(before: Totals, after: Totals) -> NDArray[np.float64]:
    """Requests that met their SLO, as a share of the episode's: sums to ``slo_attainment_frac`` of the report."""
    return (after["slo_met_count"] - before["slo_met_count"]) / after["requests_count"]


def guarded_goodput(before: Totals, after: Totals) -> NDArray[np.float64]:
    """The same less those whose first token came later than the guard allows, when it comes: where every request is
    served, it sums to ``guarded_attainment_frac``."""
    late = after["beyond_guard_count"] - before["beyond_guard_count"]
    return goodput(before, after) - late / after["requests_count"]


def throughput(before: Totals, after: Totals) -> NDArray[np.float64]:
    """Output tokens emitted, in thousands."""
    return (after["output_tokens"] - before["output_tokens"]) / 1e3


def latency(before: Totals, after: Totals) -> NDArray[np.float64]:
    """Minus the time that requests spend in the system, per request: sums to minus the mean time in system (s)."""
    return -(after["present_s"] - before["present_s"]) / after["requests_count"]


def slo_violations(before: Totals, after: Totals) -> NDArray[np.float64]:
    """Minus the share of the episode's requests that finished without meeting their SLO, were rejected, or left."""
    ended = sum(after[name] - before[name] for name in ("finished_count", "rejected_count", "left_count"))
    return -(ended - (after["slo_met_count"] - before["slo_met_count"])) / after["requests_count"]


def energy(before: Totals, after: Totals) -> NDArray[np.float64]:
    """Minus the dynamic energy, in kilojoules."""
    return -(after["energy_j"] - before["energy_j"]) / 1e3


REWARDS: dict[str, Reward] = {
    "goodput": goodput,
    "guarded-goodput": guarded_goodput,
    "throughput": throughput,
    "latency": latency,
    "slo-violations": slo_violations,
    "energy": energy,
}


def get_reward(name: str | Reward) -> Reward:
    """A reward by name, or a function of one's own. Raises L3EnvError for an unknown name."""
    if callable(name):
        return name
    if name not in REWARDS:
        raise L3EnvError(f"unknown reward {name!r}; expected one of {', '.join(REWARDS)}, or a function")
    return REWARDS[name]
