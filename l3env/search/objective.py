"""What tuning, search, evolution, training and evaluation make large: goodput, guarded against starvation or plain."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.errors import L3EnvError


class Objective(StrEnum):
    """What a request counts."""

    GUARDED = "guarded"  # 1 where it met its SLO, -1 where it waited beyond the guard (``engine.guard``), else 0
    PLAIN = "plain"  # 1 where it met its SLO, else 0


FIGURES = {Objective.GUARDED: "guarded_attainment_frac", Objective.PLAIN: "slo_attainment_frac"}
"""The figure of a run that an objective is, per request."""


def objective_of(name: str) -> Objective:
    """Raises L3EnvError for an unknown name."""
    if name not in list(Objective):
        raise L3EnvError(f"objective = {name!r}; expected one of {', '.join(Objective)}")
    return Objective(name)


def earned(outcomes: NDArray[np.int8], objective: Objective) -> NDArray[np.int8]:
    """What requests count, of their outcomes: 1 met, -1 beyond the guard, 0 neither."""
    return outcomes if objective == Objective.GUARDED else np.maximum(outcomes, 0)


def relative(values: NDArray[np.float64], axis: int) -> NDArray[Any]:
    """Values over the largest size among them along an axis, so that each cell counts alike: the share of the best
    where none is negative, -1 to 1 where some are."""
    return values / np.maximum(np.abs(values).max(axis=axis, keepdims=True), 1e-12)
