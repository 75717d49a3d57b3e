"""The L3 scheduler with the performance model's own predictions, decoded in the engine: fast, never wrong about time.

As ``l3``, but nothing is learned: each iteration is planned inside the compiled engine from the same tables that price
it, and sub-batches interleave where that is shorter than one batch. It is what ``utilization`` refers to on systems
with PIM. Without PIM it schedules as Sarathi-Serve does.
"""

from __future__ import annotations

from l3env.choices import Budget, SubBatching
from l3env.knobs import Knobs
from l3env.policies.sarathi import TOKEN_BUDGET
from l3env.policy.protocol import BasePolicy
from l3env.policy.view import View


class L3Model(BasePolicy):
    """L3's alignment with perfect predictions of time, compiled."""

    source = "arXiv 2504.17584"
    name = "l3-model"
    decision_interval_s = float("inf")
    reference_with_pim = True

    def decide(self, view: View) -> Knobs:
        if view.system.has_pim:
            return Knobs(prefill_budget_tokens=Budget.ALIGN_WHEN_FULL, sub_batching=SubBatching.ADAPTIVE)
        return Knobs(prefill_budget_tokens=TOKEN_BUDGET, budget_counts_decodes=True)
