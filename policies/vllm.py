"""vLLM's own scheduling (V1): prompts under way and decodes in order of admission, chunks up to a token budget an
iteration, a cap on running requests, the newest preempted first.

With a serving engine that takes blocks chunk by chunk (``engine = "vllm-0.22"``) its steps are those of the real
scheduler, one by one (``make test-vllm``).
"""

from __future__ import annotations

from typing import Any

from l3env.knobs import Knobs
from l3env.machine.tables import Tables
from l3env.policy.protocol import FixedKnobs
from l3env.requests.workload import Workload

MAX_BATCHED_TOKENS, MAX_NUM_SEQS = (
    2048,
    256,
)  # vLLM's defaults of its server on smaller GPUs; an engine preset has its own


class Vllm(FixedKnobs):
    """vLLM V1's default; limits that are not given are the serving engine's."""

    source = "vLLM V1, scheduler.py"

    def __init__(self, **knobs: Any) -> None:
        self._given = knobs
        super().__init__("vllm", self._knobs(MAX_BATCHED_TOKENS, MAX_NUM_SEQS))

    def _knobs(self, tokens: int, seqs: int) -> Knobs:
        limits = {"prefill_budget_tokens": tokens, "running_max_count": seqs}
        return Knobs(**{"budget_counts_decodes": True, "headroom_frac": 0.0, **limits, **self._given})

    def prepare(self, system: Tables, training: Workload | None) -> None:
        engine = system.system.serving
        self.knobs = self._knobs(
            engine.max_num_batched_tokens or MAX_BATCHED_TOKENS, engine.max_num_seqs or MAX_NUM_SEQS
        )
