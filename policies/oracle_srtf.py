"""Shortest remaining work first, by true output length: what ``srtf-predicted`` could do if it knew.

Not a real scheduler: an upper reference. The name says so, and only such names are given the truth.
"""

from __future__ import annotations

from typing import Any

from l3env.policies.srtf_predicted import SHORTEST_REMAINING
from l3env.policy.protocol import FixedKnobs, Role


class OracleSrtf(FixedKnobs):
    """``srtf-predicted`` with a perfect predictor."""

    role = Role.ORACLE
    wants_truth = True

    def __init__(self, **knobs: Any) -> None:
        super().__init__("oracle-srtf", SHORTEST_REMAINING, **knobs)
