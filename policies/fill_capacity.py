"""Fill the memory first: the baseline of the L3 paper's scheduler study (arXiv 2504.17584).

Whatever fits is admitted at once and prefilled whole in the same iteration, with no regard to what the iteration then
lasts.
"""

from __future__ import annotations

from typing import Any

from l3env.knobs import Knobs
from l3env.policy.protocol import FixedKnobs


class FillCapacity(FixedKnobs):
    """Admits greedily until memory is full."""

    source = "arXiv 2504.17584"

    def __init__(self, **knobs: Any) -> None:
        super().__init__("fill-capacity", Knobs(headroom_frac=0.0), **knobs)
