"""Puts part of the KV in HBM where the PIM side is the slower device, and takes it back where the GPU is.

Every second it looks at how long both devices worked since the last look and moves the HBM share of new KV one step
towards the idle one (arXiv 2504.17584 leaves HBM beside the weights unused; attention there costs GPU time).
"""

from __future__ import annotations

from l3env.choices import Budget
from l3env.knobs import Knobs
from l3env.machine.tables import Tables
from l3env.policies.sarathi import TOKEN_BUDGET
from l3env.policy.protocol import BasePolicy
from l3env.policy.view import View
from l3env.requests.workload import Workload

STEP_FRAC = 0.05
DEAD_BAND = 0.05  # relative difference of busy times below which nothing changes


class HybridGreedy(BasePolicy):
    """HBM share by measured balance."""

    name = "hybrid-greedy"
    decision_interval_s = 1.0

    def prepare(self, system: Tables, training: Workload | None) -> None:
        self._share_frac = 0.0
        self._gpu_busy_s = 0.0
        self._pim_busy_s = 0.0

    def decide(self, view: View) -> Knobs:
        if not view.system.has_pim:
            return Knobs(prefill_budget_tokens=TOKEN_BUDGET, budget_counts_decodes=True)
        gpu_s, pim_s = view.totals["gpu_busy_s"], view.totals["pim_busy_s"]
        new_gpu_s, new_pim_s = gpu_s - self._gpu_busy_s, pim_s - self._pim_busy_s
        self._gpu_busy_s, self._pim_busy_s = gpu_s, pim_s
        if view.system.has_hbm_kv and new_gpu_s + new_pim_s > 0:
            lead = (new_pim_s - new_gpu_s) / (new_pim_s + new_gpu_s)
            most = view.system.hbm_tokens / (view.system.hbm_tokens + view.system.pim_tokens)
            if abs(lead) > DEAD_BAND:
                step = STEP_FRAC if lead > 0 else -STEP_FRAC
                self._share_frac = min(max(self._share_frac + step, 0.0), max(most, STEP_FRAC))
        return Knobs(prefill_budget_tokens=Budget.ALIGN_WHEN_FULL, hbm_share_frac=self._share_frac)
