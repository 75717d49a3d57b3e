"""vLLM V1 with the victim "least computed first" (vllm-project/vllm issue 54644): of those who run, whoever has the
fewest tokens computed is preempted, so that the least work is thrown away.

All else is vLLM's (``vllm``). The issue preempts for want of a block for one request; here a pool preempts until all
its requests can grow. On machines with PIM each pool has its own victims.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.policies.scored_victims import ScoredVictims


class VllmLcf(ScoredVictims):
    """vLLM V1; who has computed least is preempted first."""

    def __init__(self, **knobs: Any) -> None:
        super().__init__("vllm-lcf", **knobs)

    def worth(self, rows: NDArray[np.void], block_tokens: int) -> NDArray[Any]:
        return 1.0 - 1.0 / (1.0 + rows["kv_tokens"])
