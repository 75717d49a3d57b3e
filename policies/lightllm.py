"""LightLLM's default admission (ModelTC/lightllm, chunked-prefill queue): first come, first served; a request starts
while the peak of memory to come, of all who run and itself, is below what there is (``by_count.peak_tokens``).

What a request has left follows from the longest output it declares: all of it, where memory is used by more than
``router_token_ratio`` (0 by default: always), else 1.1 times what it has emitted, at least 1024. New requests are
looked at every 6 iterations.

Differs: one longest output is declared for all (``declared``); the budget of prompt tokens beside the decodes was not
verified; memory comes in blocks, so that each request may waste most of one; on machines with several pools the peak is
that of all together.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.knobs import Knobs
from l3env.policies.by_count import PEEK_COUNT, ByCount, built_tokens, fitting_count
from l3env.policy.view import View

GROWTH, LEAST_TOKENS = 1.1, 1024  # of an output, expected while memory is ample
EVERY_COUNT = 6
CHUNKED = Knobs(prefill_budget_tokens=8192, budget_counts_decodes=True, headroom_frac=0.0)


class LightLlm(ByCount):
    """LightLLM's default: whoever keeps the peak of memory to come below what there is."""

    source = "ModelTC/lightllm"
    signals = "declared output limit"

    def __init__(
        self,
        max_output_tokens: int | None = None,
        router_token_ratio: float = 0.0,
        every_count: int = EVERY_COUNT,
        **knobs: Any,
    ) -> None:
        super().__init__("lightllm", CHUNKED, max_output_tokens, every_count, **knobs)
        self._router_token_ratio = router_token_ratio

    def count(self, view: View) -> int:
        rows = np.concatenate([view.running, view.waiting(PEEK_COUNT)])
        held = built_tokens(rows, view.pools.block_tokens)
        full = held[: view.running_count].sum() >= self._router_token_ratio * self._memory_tokens
        return fitting_count(held, self._left_tokens(rows, full), view.running_count, self._memory_tokens)

    def _left_tokens(self, rows: NDArray[np.void], full: bool) -> NDArray[Any]:
        emitted = rows["emitted_tokens"]
        ends = self._limit_tokens if full else np.maximum(GROWTH * emitted, LEAST_TOKENS)
        return np.maximum(np.minimum(ends, self._limit_tokens) - emitted, 1)
