"""vLLM V1 with a cost-aware victim (vllm-project/vllm issue 54644): of those who run, whoever frees most blocks for the
tokens that must be computed again, and is farthest from its end, is preempted: the largest

    blocks / max(1, computed tokens) x (1 - emitted / declared longest output).

All else is vLLM's (``vllm``). One longest output is declared for all requests (``declared``). Blocks are those of the
whole prompt from its start on, unless the serving engine takes them chunk by chunk.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.machine.tables import Tables
from l3env.policies.declared import declared_tokens
from l3env.policies.scored_victims import ScoredVictims
from l3env.requests.workload import Workload


class VllmCostAware(ScoredVictims):
    """vLLM V1; who frees most for the least lost work is preempted first."""

    signals = "declared output limit"

    def __init__(self, max_output_tokens: int | None = None, **knobs: Any) -> None:
        super().__init__("vllm-cost-aware", **knobs)
        self._given_tokens = max_output_tokens

    def prepare(self, system: Tables, training: Workload | None) -> None:
        super().prepare(system, training)
        self._limit_tokens = declared_tokens(self._given_tokens, training, self.name)
        self._by_chunk = system.system.serving.blocks_by_chunk

    def worth(self, rows: NDArray[np.void], block_tokens: int) -> NDArray[Any]:
        held = rows["kv_tokens"] + (0 if self._by_chunk else rows["prefill_left_tokens"])
        blocks = -(-held // block_tokens)
        left_frac = np.maximum(1.0 - rows["emitted_tokens"] / self._limit_tokens, 0.0)
        return 1.0 / (1.0 + blocks / np.maximum(rows["kv_tokens"], 1) * left_frac)
