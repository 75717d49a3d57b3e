"""Shortest remaining work first, by predicted output length.

The predictor is fitted on a training window of earlier requests: the mean output of requests with similar prompts
(bins of equal counts, as many as leave 50 requests in each). Admission reserves room for the predicted growth of all
residents. Waiting requests are ordered; running ones are not interrupted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.choices import Order, Victim
from l3env.errors import PolicyError
from l3env.knobs import Knobs
from l3env.machine.tables import Tables
from l3env.policies.sarathi import TOKEN_BUDGET
from l3env.policy import LengthPredictor
from l3env.policy.protocol import FixedKnobs
from l3env.requests.workload import Workload

MIN_REQUESTS_PER_BIN = 50
MOST_BINS = 20

SHORTEST_REMAINING = Knobs(
    prefill_budget_tokens=TOKEN_BUDGET,
    budget_counts_decodes=True,
    order=Order.SHORTEST_PREDICTED_HOPELESS_LAST,
    reserve_predicted=True,
    victim=Victim.MOST_PREDICTED_LEFT,
)


def fit_bins(prompt_tokens: NDArray[np.int64], output_tokens: NDArray[np.int64]) -> LengthPredictor:
    """Mean output per bin of prompt length; bins hold equally many requests."""
    bins = int(np.clip(prompt_tokens.size // MIN_REQUESTS_PER_BIN, 1, MOST_BINS))
    edges = np.unique(np.quantile(prompt_tokens, np.linspace(0, 1, bins + 1)[1:-1]))
    place = np.searchsorted(edges, prompt_tokens, side="right")
    counts = np.bincount(place, minlength=edges.size + 1)
    sums = np.bincount(place, weights=output_tokens, minlength=edges.size + 1)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), output_tokens.mean())

    def predict(prompts: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.asarray(means[np.searchsorted(edges, prompts, side="right")])

    return predict


def needed(training: Workload | None, name: str) -> Workload:
    """The earlier requests that a policy's predictor is fitted on. Raises PolicyError where there are none."""
    if training is None or not len(training):
        raise PolicyError(f"{name} needs a training window of earlier requests to fit its predictor on")
    return training


def fit_on(training: Workload | None, name: str) -> LengthPredictor:
    """The predictor fitted on earlier requests. Raises PolicyError where there are none."""
    earlier = needed(training, name)
    return fit_bins(earlier.prompt_tokens, earlier.output_tokens)


class SrtfPredicted(FixedKnobs):
    """Shortest predicted remaining work first."""

    def __init__(self, **knobs: Any) -> None:
        super().__init__("srtf-predicted", SHORTEST_REMAINING, **knobs)
        self._predict: LengthPredictor | None = None

    def prepare(self, system: Tables, training: Workload | None) -> None:
        self._predict = fit_on(training, self.name)

    def predictor(self) -> LengthPredictor | None:
        return self._predict
