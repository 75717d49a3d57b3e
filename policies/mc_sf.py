"""Memory-constrained shortest first (MC-SF; arXiv 2502.07115): waiting requests join in ascending order of predicted
output, while at every predicted end of those in the batch the memory of all that are still there is within what there
is. Whoever runs goes on.

The ends need looking at only, and their largest sum is ``by_count.peak_tokens``. The paper's rounds give each running
request one token and take a prompt whole at once; here prompts are chunked under a budget, predictions are the mean
output of earlier requests with similar prompts (the paper: an upper bound, or the truth), and who outgrows them may be
preempted. Memory comes in blocks, so that each request may waste most of one. On machines with several pools the peak
is that of all together.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.choices import Order
from l3env.knobs import Knobs
from l3env.machine.tables import Tables
from l3env.policies.by_count import PEEK_COUNT, built_tokens, fitting_count, kv_tokens
from l3env.policies.by_key import ByKey, scores_of
from l3env.policies.srtf_predicted import fit_on
from l3env.policy import LengthPredictor
from l3env.policy.plan import Scored
from l3env.policy.view import View
from l3env.requests.workload import Workload


class McSf(ByKey):
    """Shortest predicted output first, as many as fit at every predicted end."""

    source = "MC-SF, arXiv 2502.07115"
    signals = "predicted output"
    decision_interval_s = 0.0

    def __init__(self, **knobs: Any) -> None:
        super().__init__("mc-sf", **{"headroom_frac": 0.0, **knobs})

    def prepare(self, system: Tables, training: Workload | None) -> None:
        super().prepare(system, training)
        self._predict = fit_on(training, self.name)
        self._memory_tokens = kv_tokens(system)

    def predictor(self) -> LengthPredictor | None:
        return self._predict

    def key(self, rows: NDArray[np.void]) -> NDArray[Any]:
        return rows["predicted_tokens"]

    def decide(self, view: View) -> Knobs | Scored:
        rows = self.newcomers(view)
        if not view.waiting_count:
            return self.knobs
        knobs = replace(self.knobs, admit_max_count=self._count(view, rows))
        return Scored(knobs, rows["idx"], scores_of(self.key(rows)))

    def _count(self, view: View, new: NDArray[np.void]) -> int:
        """How many of the queue may join. Newcomers have no score yet, so the queue is put in order here."""
        queue = np.concatenate([view.waiting(PEEK_COUNT, Order.BY_SCORE), new])
        queue = queue[np.unique(queue["idx"], return_index=True)[1]]
        queue = queue[np.argsort(self.key(queue), kind="stable")][:PEEK_COUNT]
        rows = np.concatenate([view.running, queue])
        left = np.maximum(rows["predicted_tokens"] - rows["emitted_tokens"], 1)
        return fitting_count(
            built_tokens(rows, view.pools.block_tokens), left, view.running_count, self._memory_tokens + 1
        )
