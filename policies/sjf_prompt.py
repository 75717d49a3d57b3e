"""Shortest prompt first; requests that can no longer meet their TTFT deadline give way to all others."""

from __future__ import annotations

from typing import Any

from l3env.choices import Order
from l3env.knobs import Knobs
from l3env.policies.sarathi import TOKEN_BUDGET
from l3env.policy.protocol import FixedKnobs


class SjfPrompt(FixedKnobs):
    """Sarathi-Serve's batching, shortest prompt first, the hopeless last."""

    def __init__(self, **knobs: Any) -> None:
        super().__init__(
            "sjf-prompt",
            Knobs(
                prefill_budget_tokens=TOKEN_BUDGET,
                budget_counts_decodes=True,
                order=Order.SHORTEST_PROMPT_HOPELESS_LAST,
            ),
            **knobs,
        )
