"""Orca (Yu et al., OSDI 2022): iterations of whole prompts and decode steps together, first come, first served, at most
``max_batch_count`` requests at once; a request starts where slots for its longest output are left.

Orca reserves max_tokens slots in all, prompt included, and loses some to buddy allocation; here the prompt and the
longest output are reserved, in blocks. Exact only with ``max_output_tokens`` that no request exceeds (``declared``).
The default batch is that of Sarathi-Serve's comparison with Orca; Orca's authors tune it.
"""

from __future__ import annotations

from typing import Any

from l3env.choices import Budget
from l3env.knobs import Knobs
from l3env.policies.declared import Declared

MAX_BATCH_COUNT = 16


class Orca(Declared):
    """Iteration-level batches of whole prompts and decodes, memory reserved to the end."""

    source = "Orca, OSDI 2022"

    def __init__(
        self, max_output_tokens: int | None = None, max_batch_count: int = MAX_BATCH_COUNT, **knobs: Any
    ) -> None:
        base = Knobs(prefill_budget_tokens=Budget.UNLIMITED, running_max_count=max_batch_count)
        super().__init__("orca", base, max_output_tokens, **knobs)
