"""Shortest prompt first, as papers compare with it: no request steps back because its deadline is lost.

Long prompts starve under overload. ``sjf-prompt`` is the stronger form: there the hopeless come last.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.policies.by_key import ByKey


class SjfPlain(ByKey):
    """Sarathi-Serve's batching, shortest prompt first."""

    source = "textbook"

    def __init__(self, **knobs: Any) -> None:
        super().__init__("sjf-plain", **knobs)

    def key(self, rows: NDArray[np.void]) -> NDArray[Any]:
        return rows["prompt_tokens"]
