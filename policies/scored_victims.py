"""What variants of vLLM V1 share that preempt somebody else than the newest when memory runs over."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.choices import Victim
from l3env.knobs import Knobs
from l3env.policies.vllm import Vllm
from l3env.policy.plan import Scored
from l3env.policy.protocol import Role
from l3env.policy.view import View


class ScoredVictims(Vllm):
    """vLLM V1; the running request that is worth least goes first."""

    role = Role.PUBLISHED
    source = "vllm-project/vllm issue 54644"
    decision_interval_s = 0.0

    def __init__(self, name: str, **knobs: Any) -> None:
        super().__init__(victim=Victim.LOWEST_SCORE, **knobs)
        self.name = name

    def worth(self, rows: NDArray[np.void], block_tokens: int) -> NDArray[Any]:
        """From 0 to 1 of each running request."""
        raise NotImplementedError

    def decide(self, view: View) -> Knobs | Scored:  # type: ignore[override]
        if not may_run_over(view, self.knobs):
            return self.knobs
        rows = view.running
        return Scored(self.knobs, rows["idx"], self.worth(rows, view.pools.block_tokens))


def may_run_over(view: View, knobs: Knobs) -> bool:
    """Whether some pool might lack blocks in the next iteration: each request that runs may take a block, or a chunk,
    and so may each that starts."""
    pools, budget = view.pools, knobs.prefill_budget_tokens
    free = (pools.capacity_blocks - pools.used_blocks)[pools.capacity_blocks > 0]
    most = 2 * view.running_count + min(view.waiting_count, budget) + budget // pools.block_tokens
    return bool(free.min() < most)
