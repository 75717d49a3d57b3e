"""A scheduler that decides request by request: who is admitted, whose prompt is next, how long an iteration may be.

One set of weights for all systems, models, traces and loads, found by an evolution strategy
(``l3env.experiments.learning.evolve``, the command is in the file). ``l3env.engine.kernels.scorer`` says what they
mean. Two sub-batches are interleaved where that is shorter; everything else follows from the scores.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from l3env.choices import Order, SubBatching, Victim
from l3env.engine.state import Score
from l3env.errors import PolicyError
from l3env.knobs import Knobs
from l3env.policy.protocol import BasePolicy, Role
from l3env.policy.view import View

FILE = Path(__file__).parent / "data" / "request-score.json"

KNOBS = Knobs(
    order=Order.BY_SCORE,
    victim=Victim.LOWEST_SCORE,
    prefill_in_order=True,
    sub_batching=SubBatching.ADAPTIVE,
)
"""What the scorer does not set; and its starting point in what it does."""


class RequestScore(BasePolicy):
    """Schedules by the scores of a file that ``l3env.experiments.learning.evolve`` wrote."""

    role = Role.LEARNED
    decision_interval_s = math.inf

    def __init__(self, path: Path = FILE, name: str = "request-score") -> None:
        self.name = name
        self.weights = read_weights(path)

    def scorer(self) -> NDArray[np.float64]:
        return self.weights

    def decide(self, view: View) -> Knobs:
        return KNOBS


def weights_of(values: Mapping[str, float]) -> NDArray[np.float64]:
    """(len(Score),) weights from their names; those left out are 0. Raises PolicyError for a name there is not."""
    known = [each.name for each in Score if each not in (Score.ON, Score.FLOOR)]
    if unknown := sorted(set(values) - set(known)):
        raise PolicyError(f"scorer: unknown weights {', '.join(unknown)}; expected some of {', '.join(known)}")
    weights = np.zeros(len(Score))
    weights[Score.ON] = 1.0
    for name, value in values.items():
        weights[Score[name]] = value
    return weights


def read_weights(path: Path) -> NDArray[np.float64]:
    """The weights in a file. Raises PolicyError for what is wrong with it."""
    try:
        values = {
            str(name): float(value) for name, value in json.loads(path.read_text(encoding="utf-8"))["weights"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PolicyError(f"{path}: expected JSON with an object 'weights' of numbers: {error!r}") from None
    if not all(map(math.isfinite, values.values())):
        raise PolicyError(f"{path}: a weight is no finite number")
    return weights_of(values)
