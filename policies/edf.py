"""Earliest TTFT deadline first; requests that can no longer meet theirs give way to all others."""

from __future__ import annotations

from typing import Any

from l3env.choices import Order
from l3env.knobs import Knobs
from l3env.policies.sarathi import TOKEN_BUDGET
from l3env.policy.protocol import FixedKnobs


class Edf(FixedKnobs):
    """Sarathi-Serve's batching, earliest deadline first, the hopeless last."""

    def __init__(self, **knobs: Any) -> None:
        super().__init__(
            "edf",
            Knobs(
                prefill_budget_tokens=TOKEN_BUDGET,
                budget_counts_decodes=True,
                order=Order.EARLIEST_DEADLINE_HOPELESS_LAST,
            ),
            **knobs,
        )
