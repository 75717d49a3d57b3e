"""Speculative shortest job first (SSJF; Qiu et al., arXiv 2404.08509): shortest predicted output first, not preemptive,
nothing else changed.

The authors' proxy is a fine-tuned BERT that reads the prompt; here, as prompts have no words, it is the mean output of
earlier requests with similar prompts (``fit_bins``). They have no guard against starvation. ``aging_tokens_per_s`` is
one: so many predicted tokens are taken off for every second of waiting. Since all who wait age alike, the order is that
of predicted + aging x arrival, which stays the same while they wait. 0, the default, is as published.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.machine.tables import Tables
from l3env.policies.by_key import ByKey
from l3env.policies.srtf_predicted import fit_on
from l3env.policy import LengthPredictor
from l3env.requests.workload import Workload


class Ssjf(ByKey):
    """Shortest predicted output first, with aging where asked for."""

    source = "SSJF, arXiv 2404.08509"
    signals = "predicted output"

    def __init__(self, aging_tokens_per_s: float = 0.0, **knobs: Any) -> None:
        super().__init__("ssjf", **knobs)
        self._aging_tokens_per_s = aging_tokens_per_s

    def prepare(self, system: Tables, training: Workload | None) -> None:
        super().prepare(system, training)
        self._predict = fit_on(training, self.name)

    def predictor(self) -> LengthPredictor | None:
        return self._predict

    def key(self, rows: NDArray[np.void]) -> NDArray[Any]:
        return rows["predicted_tokens"] + self._aging_tokens_per_s * rows["arrival_s"]
