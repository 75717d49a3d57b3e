"""A stretch of a trace, in seconds or in shares of its span."""

from __future__ import annotations

import math
from dataclasses import dataclass

from l3env.errors import TraceError
from l3env.requests.workload import Workload


@dataclass(frozen=True)
class Window:
    """From ``start`` to ``end`` (not included), in s, or in fractions of the span where ``*_is_frac``."""

    start: float = 0.0
    end: float = math.inf
    start_is_frac: bool = False
    end_is_frac: bool = False

    def bounds(self, first_s: float, span_s: float) -> tuple[float, float]:
        """(start, end) in s for a trace whose first arrival is at ``first_s``; 100 % includes the last arrival."""
        start_s = first_s + self.start * span_s if self.start_is_frac else self.start
        end_s = first_s + self.end * span_s if self.end_is_frac else self.end
        return start_s, math.inf if self.end_is_frac and self.end >= 1 else end_s

    def of(self, workload: Workload) -> Workload:
        """The requests of ``workload`` in the window, its start at time 0. Raises TraceError where there is none."""
        if workload.span_s <= 0 and (self.start_is_frac or self.end_is_frac):
            raise TraceError(f"{workload.name}: no clock (all present at once), so window= has no meaning; use n=")
        return workload.window(*self.bounds(float(workload.arrival_s[0]), workload.span_s))


def parse_window(text: str) -> Window:
    """``START:END`` in s or per cent (``0:3600``, ``60%:100%``); either side may be empty. Raises ValueError."""
    left, colon, right = text.partition(":")
    if not colon:
        raise ValueError("START:END in s, or in per cent of the span")
    start, start_is_frac = _side(left, 0.0)
    end, end_is_frac = _side(right, math.inf)
    if start_is_frac == end_is_frac and not start < end:
        raise ValueError("START:END with START before END")
    return Window(start, end, start_is_frac, end_is_frac)


def _side(text: str, default: float) -> tuple[float, bool]:
    if not text:
        return default, False
    is_frac = text.endswith("%")
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0) or (is_frac and value > 100):
        raise ValueError("START:END in s >= 0, or in per cent of the span up to 100%")
    return (value / 100, True) if is_frac else (value, False)
