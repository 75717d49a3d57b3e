"""How long requests wait for their first token, and which of them longer than the guard allows.

The guard: max(``GUARD_S``, ``GUARD_TTFT_SLOS`` x a request's TTFT SLO). Who waits longer, and was not refused on
arrival, costs as much as one that meets its SLO earns, so that nobody wins by letting those wait that are late anyway.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.choices import Status
from l3env.engine.state import GUARD_S, GUARD_TTFT_SLOS


def waits_s(req: NDArray[np.void], clock_s: Any) -> NDArray[np.float64]:
    """Seconds from arrival to the first token, for who has none until it left or until ``clock_s``; NaN for who was
    refused on arrival or has not arrived.

    Args:
        req: (...) rows of REQUEST_DTYPE.
        clock_s: where their environments stand; broadcast.
    """
    end_s = np.where(req["status"] == Status.LEFT, req["last_token_s"], clock_s)
    until_s = np.where(np.isnan(req["first_token_s"]), end_s, req["first_token_s"])
    counts = (req["status"] != Status.FUTURE) & (req["status"] != Status.REJECTED)
    return np.where(counts, until_s - req["arrival_s"], np.nan)


def beyond_guard(wait_s: Any, ttft_slo_s: Any) -> NDArray[np.bool_]:
    """Who waited longer than the guard allows; nobody where a wait is NaN."""
    return np.asarray(wait_s > np.maximum(GUARD_S, GUARD_TTFT_SLOS * np.asarray(ttft_slo_s)))
