"""Arrival processes for requests that have lengths but no clock, or whose clock is to be replaced."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from l3env.errors import TraceError
from l3env.requests.workload import Workload

KINDS = ("closed", "poisson", "gamma")
DEFAULT_GAMMA_CV = 2.0


def gamma_gaps(rng: np.random.Generator, count: int, cv: float) -> NDArray[np.float64]:
    """(count,) gamma gaps of mean 1 and coefficient of variation ``cv`` (shape 1/cv^2, scale cv^2; cv 1 is Poisson)."""
    return rng.gamma(1.0 / cv**2, cv**2, count)


def draw_times(
    kind: str, count: int, rate_per_s: float, cv: float | None, rng: np.random.Generator
) -> NDArray[np.float64]:
    """(count,) ascending times in s, the first at 0: independent gaps of mean 1 / rate, exponential or gamma."""
    if not (np.isfinite(rate_per_s) and rate_per_s > 0):
        raise TraceError(f"rate {rate_per_s}; expected a finite number of requests/s > 0")
    if kind == "gamma":
        spread = DEFAULT_GAMMA_CV if cv is None else cv
    elif kind == "poisson":
        if cv is not None:
            raise TraceError(f"cv={cv:g} has no meaning with arrivals=poisson (its CV is 1); use arrivals=gamma")
        spread = 1.0
    else:
        raise TraceError(f"arrivals {kind!r}; expected one of {', '.join(KINDS)}")
    if not (np.isfinite(spread) and spread > 0):
        raise TraceError(f"cv {spread}; expected a finite number > 0")
    gaps = gamma_gaps(rng, count - 1, spread) / rate_per_s
    return np.concatenate([[0.0], np.cumsum(gaps)])


def with_arrivals(
    workload: Workload, kind: str, rate_per_s: float | None = None, cv: float | None = None, seed: int = 0
) -> Workload:
    """The same requests in the same order under another arrival process.

    ``closed``: all present at 0 (children still follow their parents). ``poisson`` and ``gamma`` (coefficient of
    variation ``cv``, 2 by default): at ``rate_per_s``, or at the workload's own rate where it has one. Raises
    TraceError where a rate is missing or requests depend on others.
    """
    if kind == "closed":
        if rate_per_s is not None or cv is not None:
            raise TraceError(f"{workload.name}: arrivals=closed takes neither rate nor cv: all are present at 0")
        return replace(workload.closed_loop(), source={**workload.source, "arrivals": "closed loop: all present at 0"})
    if kind not in KINDS:
        raise TraceError(f"{workload.name}: arrivals {kind!r}; expected one of {', '.join(KINDS)}")
    if (workload.parent_idx >= 0).any():
        raise TraceError(
            f"{workload.name}: arrivals={kind} cannot place requests that follow others in a session; "
            "expected arrivals=closed, or session_rate= for the session starts"
        )
    rate = workload.rate_per_s if rate_per_s is None else rate_per_s
    if not np.isfinite(rate):
        raise TraceError(f"{workload.name}: no arrival times, so arrivals={kind} needs rate=REQUESTS_PER_S")
    rng = np.random.default_rng([seed, 0xA1])
    times_s = draw_times(kind, len(workload), rate, cv, rng)
    shown = f"{kind}, {rate:g} requests/s" + (f", CV {cv or DEFAULT_GAMMA_CV:g}" if kind == "gamma" else "")
    return replace(workload, arrival_s=times_s, source={**workload.source, "arrivals": f"drawn: {shown}, seed {seed}"})
