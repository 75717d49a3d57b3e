"""Chunked prefill, decode first: Sarathi-Serve (OSDI 2024), and vLLM since.

Every iteration holds all decoding requests; what they leave of the token budget goes to prefill chunks, in order of
arrival.
"""

from __future__ import annotations

from typing import Any

from l3env.knobs import Knobs
from l3env.policy.protocol import FixedKnobs

TOKEN_BUDGET = 512


class Sarathi(FixedKnobs):
    """Stall-free batching under a token budget an iteration."""

    source = "Sarathi-Serve, arXiv 2403.02310"
    reference_with_pim = False

    def __init__(self, **knobs: Any) -> None:
        super().__init__("sarathi", Knobs(prefill_budget_tokens=TOKEN_BUDGET, budget_counts_decodes=True), **knobs)
