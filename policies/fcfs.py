"""First come, first served, prefill first: vLLM's scheduler before chunked prefill (SOSP 2023).

Waiting prompts are prefilled whole, in order of arrival, up to a token budget an iteration, and stall all decoding
while they do. Blocks for the prompt are taken at admission, 1 % of memory is kept free; when memory runs over, the
newest request is preempted and recomputed. On systems with PIM the KV lives there and sub-batches interleave.
"""

from __future__ import annotations

from typing import Any

from l3env.knobs import Knobs
from l3env.policy.protocol import FixedKnobs

MAX_BATCHED_TOKENS = 8192


class Fcfs(FixedKnobs):
    """vLLM-like: prefill first."""

    source = "vLLM V0, arXiv 2309.06180"

    def __init__(self, **knobs: Any) -> None:
        super().__init__("fcfs", Knobs(prefill_budget_tokens=MAX_BATCHED_TOKENS, prefill_first=True), **knobs)
