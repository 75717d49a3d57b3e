"""What the adapter remembers of a request beside what vLLM holds, and the queue key that follows from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from l3env.choices import Order

NAME = "l3env_entry"  # of the attribute of vLLM's requests
HOPELESS_SCALE, SMALLEST_KEY = 2.0**600, 1e-100  # as in ``kernels.queue``
HEEDS_HOPELESS = frozenset(Order) - {Order.FCFS, Order.NEWEST_FIRST, Order.BY_SCORE}


@dataclass(slots=True, eq=False)
class Entry:
    """A request's own data; times are seconds since the scheduler began.

    Attributes:
        seq: order of arrival.
        slot: its index in the View, NOWHERE before it was ever shown.
    """

    seq: int
    arrival_s: float
    prompt_tokens: int
    slot: int = -1
    ttft_alone_s: float = 0.0
    ttft_slo_s: float = math.inf
    tbt_slo_s: float = math.inf
    predicted_tokens: int = 0
    score: float = 0.0
    hopeless: bool = False
    first_token_s: float = math.nan
    admitted_seq: int = 0

    def hopeless_from_s(self) -> float:
        """The time after which, waiting, its TTFT deadline cannot be met; never where it was, always if missed."""
        if math.isnan(self.first_token_s):
            return self.arrival_s + self.ttft_slo_s - self.ttft_alone_s
        return -math.inf if self.first_token_s > self.arrival_s + self.ttft_slo_s else math.inf


def entry_of(request: Any) -> Entry:
    """Of one of vLLM's requests."""
    found: Entry = getattr(request, NAME)
    return found


def key_of(request: Any, order: Order) -> float:
    """Sort key, small first, as the engine's ``waiting_key``; hopelessness included."""
    entry = entry_of(request)
    key = _plain_key(request, entry, order)
    return max(key, SMALLEST_KEY) * HOPELESS_SCALE if entry.hopeless and order in HEEDS_HOPELESS else key


def _plain_key(request: Any, entry: Entry, order: Order) -> float:
    if order == Order.SHORTEST_PROMPT_HOPELESS_LAST:
        return float(entry.prompt_tokens)
    if order == Order.EARLIEST_DEADLINE_HOPELESS_LAST:
        return entry.arrival_s + entry.ttft_slo_s
    if order == Order.NEWEST_FIRST:
        return -entry.arrival_s
    if order == Order.SHORTEST_PREDICTED_HOPELESS_LAST:
        left = max(entry.predicted_tokens - request.num_output_tokens, 1)
        return float(request.num_tokens + left)
    if order == Order.BY_SCORE:
        return -entry.score
    return entry.arrival_s
