"""Workloads that change: pieces of several traces in turn, and load that ramps or swings.

``splice:A,B,C?every=300`` serves 300 s of A, 300 s of B, 300 s of C, then A goes on where it stopped, until one of them
has no whole piece left. Each trace's clock is scaled so that all bring as many tokens a second (prompt and output) as A
does at its own rate; ``rates=2,1,0.5`` sets requests/s for each instead. Parts without a clock get Poisson arrivals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from l3env.errors import TraceError
from l3env.requests.workload import Workload
from l3env.traces.arrivals import with_arrivals
from l3env.traces.resample import resample
from l3env.traces.window import Window

PREFIX = "splice:"
DEFAULT_EVERY_S = 300.0
DEFAULT_PERIOD_S = 600.0


def splice(
    names: Sequence[str],
    resolve: Callable[[str, int], Workload],
    *,
    seed: int = 0,
    every: float = DEFAULT_EVERY_S,
    rates: tuple[float, ...] | None = None,
    window: Window | None = None,
) -> Workload:
    """Pieces of ``every`` seconds of each trace in turn.

    A window is cut from each part, and seeds other than 0 resample each part within it, so that what is held out stays
    unseen. Raises TraceError for fewer than two parts, parts with sessions, parts shorter than a piece, and a number of
    rates other than that of the parts.
    """
    shown = PREFIX + ",".join(names)
    if len(names) < 2:
        raise TraceError(f"{shown}: expected at least two traces, with commas between")
    if rates is not None and len(rates) != len(names):
        raise TraceError(f"{shown}: rates= has {len(rates)} numbers; expected {len(names)}, one for each trace")
    parts = [_part(name, resolve, seed, window) for name in names]
    wanted = [tokens_per_s(parts[0])] * len(parts)
    speeds = [tokens / tokens_per_s(part) for tokens, part in zip(wanted, parts, strict=True)]
    if rates is not None:
        speeds = [rate / part.rate_per_s for rate, part in zip(rates, parts, strict=True)]
    parts = [part.at_load(speed) for part, speed in zip(parts, speeds, strict=True)]
    rounds = min(int(part.span_s // every) for part in parts)
    if rounds == 0:
        short = min(range(len(parts)), key=lambda i: parts[i].span_s)
        raise TraceError(f"{shown}: {names[short]} lasts {parts[short].span_s:g} s at its speed; expected every= below")
    return _join(shown, parts, every, rounds, seed)


def _part(name: str, resolve: Callable[[str, int], Workload], seed: int, window: Window | None) -> Workload:
    workload = resolve(name, 0)
    drawn = workload.source.get("drawn_with_seed") is not None
    if drawn and seed:
        workload = resolve(name, seed)
    if (workload.parent_idx >= 0).any():
        raise TraceError(f"{name}: its requests follow others in sessions, which pieces would cut; expected none")
    if workload.span_s <= 0:
        workload = with_arrivals(workload, "poisson", 1.0, None, seed)
    if window is not None:
        workload = window.of(workload)
    workload = resample(workload, seed) if seed and not drawn else workload
    return replace(workload, arrival_s=workload.arrival_s - workload.arrival_s[0])


def tokens_per_s(workload: Workload) -> float:
    """Prompt and output tokens that arrive in a second, on average."""
    return float(np.mean(workload.prompt_tokens + workload.output_tokens)) * workload.rate_per_s


def _join(name: str, parts: list[Workload], every_s: float, rounds: int, seed: int) -> Workload:
    arrival, prompt, output, turns = [], [], [], []
    for turn in range(rounds * len(parts)):
        part, begin_s = parts[turn % len(parts)], turn // len(parts) * every_s
        here = slice(*np.searchsorted(part.arrival_s, [begin_s, begin_s + every_s]))
        arrival.append(part.arrival_s[here] - begin_s + turn * every_s)
        prompt.append(part.prompt_tokens[here])
        output.append(part.output_tokens[here])
        turns.append(len(arrival[-1]))
    about = {
        "format": "splice",
        "parts": [dict(part.source) for part in parts],
        "every_s": every_s,
        "requests_by_piece": turns,
        "note": "prefix ids and sessions of the parts are left out",
        "drawn_with_seed": seed,
    }
    columns = (np.concatenate(each) for each in (arrival, prompt, output))
    return Workload.build(name, *columns, source=about)


@dataclass(frozen=True)
class Swing:
    """Two levels of load, as multiples of a trace's own rate."""

    low: float
    high: float


def parse_swing(text: str) -> Swing:
    """``FIRST:SECOND``, multiples of the rate. Raises ValueError."""
    try:
        first, second = (float(part) for part in text.split(":"))
    except ValueError:
        first = second = math.nan
    if not all(math.isfinite(level) and level > 0 for level in (first, second)):
        raise ValueError("FIRST:SECOND, two multiples of the rate > 0")
    return Swing(first, second)


def parse_rates(text: str) -> tuple[float, ...]:
    """Numbers > 0 with commas between. Raises ValueError."""
    rates = tuple(float(part) if part else math.nan for part in text.split(","))
    if not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise ValueError("requests/s > 0 with commas between")
    return rates


def ramp(workload: Workload, levels: Swing) -> Workload:
    """The rate goes in a straight line from ``low`` to ``high`` times the trace's own.

    By time u the ramped clock has let in what the own clock had by t(u) = low u + (high - low) u^2 / (2 U), with U the
    new span.
    """
    start_s, own_s = _own_clock(workload)
    low, high = levels.low, levels.high
    new_span_s = 2 * float(own_s[-1]) / (low + high)
    bend = (high - low) / new_span_s
    times_s = 2 * own_s / (low + np.sqrt(low**2 + 2 * bend * own_s))  # the root of t(u) = t that is exact at bend 0
    return _at_times(workload, start_s + times_s, f"ramp from {low:g} to {high:g} times the rate")


def swing(workload: Workload, levels: Swing, period_s: float = DEFAULT_PERIOD_S) -> Workload:
    """The rate is ``low`` times the trace's own for half a period, then ``high`` times, and so on."""
    start_s, own_s = _own_clock(workload)
    halves = 2 * (int(own_s[-1] / (period_s / 2 * (levels.low + levels.high))) + 1)
    new_s = np.arange(halves + 1) * period_s / 2
    passed_s = np.concatenate([[0.0], np.cumsum(np.tile([levels.low, levels.high], halves // 2) * period_s / 2)])
    times_s = np.interp(own_s, passed_s, new_s)
    shown = f"swings between {levels.low:g} and {levels.high:g} times the rate every {period_s:g} s"
    return _at_times(workload, start_s + times_s, shown)


def _own_clock(workload: Workload) -> tuple[float, NDArray[np.float64]]:
    if workload.span_s <= 0:
        raise TraceError(f"{workload.name}: all requests are present at once, so the load cannot change; use arrivals=")
    start_s = float(workload.arrival_s[0])
    return start_s, workload.arrival_s - start_s


def _at_times(workload: Workload, times_s: NDArray[np.float64], shown: str) -> Workload:
    return replace(workload, arrival_s=times_s, source={**workload.source, "load_over_time": shown})
