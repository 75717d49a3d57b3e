"""TensorRT-LLM's GUARANTEED_NO_EVICT, its default: first come, first served; a request starts once its prompt and its
longest output fit beside those of all who run, to their ends. Whoever has started is never paused.

Source: the documentation of TensorRT-LLM (``CapacitySchedulerPolicy``). Exact only with ``max_output_tokens`` that no
request exceeds (see ``declared``). A prompt may be cut into chunks here, as with TensorRT-LLM's chunked context; the
limits of tokens and requests an iteration are ours to set, by defaults that were not verified.
"""

from __future__ import annotations

from typing import Any

from l3env.knobs import Knobs
from l3env.policies.declared import Declared

MAX_NUM_TOKENS, MAX_BATCH_SIZE = 8192, 2048

IN_FLIGHT = Knobs(
    prefill_budget_tokens=MAX_NUM_TOKENS,
    budget_counts_decodes=True,
    running_max_count=MAX_BATCH_SIZE,
    headroom_frac=0.0,
)
"""In-flight batching."""


class TrtllmNoEvict(Declared):
    """TensorRT-LLM's default: nobody starts who might have to be paused."""

    source = "TensorRT-LLM, GUARANTEED_NO_EVICT"

    def __init__(self, max_output_tokens: int | None = None, **knobs: Any) -> None:
        super().__init__("trtllm-no-evict", IN_FLIGHT, max_output_tokens, **knobs)
