"""The L3 scheduler (arXiv 2504.17584, section 6): predict both devices' times and align them.

Each sub-batch takes prefills while the GPU would finish before the PIM side; once memory is full the last prefill is
chunked so that T_GPU comes as close as possible to T_PIM. Its predictions are the performance model's own. Without PIM
there is nothing to align, and it schedules as Sarathi-Serve does.
"""

from __future__ import annotations

from l3env.policy import BasePolicy, Knobs, View
from l3env.state import Budget
from policies.sarathi import TOKEN_BUDGET


class L3(BasePolicy):
    """Alignment-predicting."""

    name = "l3"
    decision_interval_s = float("inf")

    def decide(self, view: View) -> Knobs:
        if view.system.has_pim:
            return Knobs(prefill_budget_tokens=Budget.ALIGN_WHEN_FULL)
        return Knobs(prefill_budget_tokens=TOKEN_BUDGET, budget_counts_decodes=True)
