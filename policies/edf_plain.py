"""Earliest TTFT deadline first, as papers compare with it: no request steps back because its deadline is lost.

Under overload it serves those first that are already late. ``edf`` is the stronger form: there the hopeless come last.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.policies.by_key import ByKey


class EdfPlain(ByKey):
    """Sarathi-Serve's batching, earliest deadline first."""

    source = "textbook"
    signals = "TTFT deadlines"

    def __init__(self, **knobs: Any) -> None:
        super().__init__("edf-plain", **knobs)

    def key(self, rows: NDArray[np.void]) -> NDArray[Any]:
        return rows["ttft_deadline_s"]
