"""vLLM with learned ranks (LTR; arXiv 2408.15792; hao-ai-lab/vllm-ltr): in every iteration those who wait and those who
run are sorted by one score given on arrival, the shortest first, and the batch is filled from the front.

Starvation guard: one that was not served for ``starved_count`` iterations goes to the front, for as many iterations
served as ``period_count``.

The authors' score is a rank learned from prompts by a small model; here it is the mean output of earlier requests with
similar prompts (``fit_bins``). Differs: who falls out is swapped to the host there; here it pauses and keeps its
memory, or, where that is wanted by one before it, is computed again. The budget of tokens and the batch are vLLM's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from l3env.machine.tables import Tables
from l3env.policies.composing import Composing, served_by
from l3env.policies.srtf_predicted import fit_on
from l3env.policies.vllm import MAX_BATCHED_TOKENS, MAX_NUM_SEQS
from l3env.policy import LengthPredictor
from l3env.policy.plan import Plan
from l3env.policy.view import View
from l3env.requests.workload import Workload

STARVED_COUNT, PERIOD_COUNT = 200, 10


class VllmLtr(Composing):
    """The shortest predicted output first, whoever runs; the starved get turns."""

    source = "LTR, arXiv 2408.15792"
    signals = "predicted output"
    name = "vllm-ltr"

    def __init__(
        self,
        starved_count: int = STARVED_COUNT,
        period_count: int = PERIOD_COUNT,
        budget_tokens: int = MAX_BATCHED_TOKENS,
        batch_count: int = MAX_NUM_SEQS,
    ) -> None:
        super().__init__(budget_tokens, batch_count)
        self._starved_count, self._period_count = starved_count, period_count

    def prepare(self, system: Tables, training: Workload | None) -> None:
        self._predict = fit_on(training, self.name)
        self._idle_count: dict[int, int] = {}
        self._turns_count: dict[int, int] = {}

    def predictor(self) -> LengthPredictor | None:
        return self._predict

    def decide(self, view: View) -> Plan:
        rows = view.present
        order = np.lexsort((rows["arrival_s"], rows["predicted_tokens"], self._is_behind(rows)))
        plan = self.compose(view, rows[order], evicts=True)
        self._count(rows, view, plan)
        return plan

    def _is_behind(self, rows: NDArray[np.void]) -> NDArray[np.bool_]:
        return np.array([self._turns_count.get(idx, 0) == 0 for idx in rows["idx"].tolist()], bool)

    def _count(self, rows: NDArray[np.void], view: View, plan: Plan) -> None:
        """Iterations without service, and turns left of those that had too many."""
        served = set(served_by(view, plan))
        idle, turns = self._idle_count, self._turns_count
        self._idle_count, self._turns_count = {}, {}
        for idx in rows["idx"].tolist():
            waited = 0 if idx in served else idle.get(idx, 0) + 1
            left = max(turns.get(idx, 0) - (idx in served), 0)
            if waited >= self._starved_count:
                waited, left = 0, self._period_count
            self._idle_count[idx] = waited
            if left:
                self._turns_count[idx] = left
