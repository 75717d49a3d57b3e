"""Embedded profiles: fitted statistics of real traces, from which a look-alike is drawn. No rows of a trace.

A profile has quantiles of the prompt, quantiles of the output for each fifth of the prompts (the dependence of output
on prompt), the rate over time, and the coefficient of variation of the gaps once the rate is taken out (burstiness).
``python -m l3env.traces.fit_profiles`` makes them from the real files.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from l3env.errors import TraceError
from l3env.requests.workload import Workload
from l3env.traces.arrivals import gamma_gaps
from l3env.traces.window import Window

PROFILE_DIR = Path(__file__).parent / "profiles"
MAX_BINS = 5
ROWS_PER_BIN = 150
ROWS_PER_QUANTILE = 10  # coarser than the rows, so that a profile of a small trace is not the trace
TAIL = (0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999)  # a few requests there carry much of the load
NOTE = "embedded profile: drawn from fitted statistics of the trace, not the real trace"


@dataclass(frozen=True)
class Profile:
    """Fitted statistics of one trace.

    Attributes:
        name, trace, licence, url: whose statistics they are.
        requests: of the trace. span_s: from its first to its last arrival; 0 for lengths only.
        default_window_s: what is generated where no window and no n is asked for.
        rates: (S,) share of the requests in each of S equal stretches of the span, times S (mean 1).
        gap_cv: CV of the gaps between arrivals in operational time (the rate taken out).
        prompt_tokens: (P,) quantiles at ``grid(requests)``.
        output_tokens: (B, Q) the same of the output at ``grid(requests // B)``, for each B-th of the prompts (a fifth,
            fewer for a small trace) from the shortest up.
        spearman: rank correlation of output and prompt, for the reader.
        statistics: ``traces.stats.describe`` of the trace, for the reader.
    """

    name: str
    licence: str
    url: str
    requests: int
    span_s: float
    default_window_s: tuple[float, float] | None
    rates: tuple[float, ...]
    gap_cv: float
    prompt_tokens: tuple[float, ...]
    output_tokens: tuple[tuple[float, ...], ...]
    spearman: float
    statistics: dict[str, Any]

    @property
    def default_requests(self) -> int:
        """About how many requests ``generate`` gives where nothing is asked for."""
        if self.default_window_s is None:
            return self.requests
        places = np.interp(self.default_window_s, np.linspace(0, self.span_s, len(self.rates) + 1), self.cumulative)
        return round(float(places[1] - places[0]))

    @property
    def cumulative(self) -> NDArray[np.float64]:
        """(S + 1,) expected requests before each stretch's start and at the end."""
        return np.concatenate([[0.0], np.cumsum(self.rates)]) * self.requests / max(len(self.rates), 1)


def grid(rows: int) -> NDArray[np.float64]:
    """Probabilities at which ``rows`` values are summed up: steps of 1 %, or of ten rows; finer in the upper tail."""
    steps = max(1, min(100, rows // ROWS_PER_QUANTILE))
    tail = [chance for chance in TAIL if rows * (1 - chance) >= 1]
    return np.unique([*(np.arange(steps + 1) / steps), *tail])


@cache
def names() -> tuple[str, ...]:
    """The traces that have a profile."""
    return tuple(sorted(path.stem for path in PROFILE_DIR.glob("*.json")))


@cache
def read(name: str) -> Profile:
    """The profile of the trace ``name``. Raises TraceError where there is none or it is damaged."""
    path = PROFILE_DIR / f"{name}.json"
    if name not in names():
        raise TraceError(f"profile {name!r}; expected one of {', '.join(names())}")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        table["output_tokens"] = tuple(map(tuple, table["output_tokens"]))
        if table["default_window_s"] is not None:
            table["default_window_s"] = tuple(table["default_window_s"])
        columns: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in table.items()
        }
        profile = Profile(**columns)
        bins = len(profile.output_tokens)
        sizes = [grid(profile.requests).size, *[grid(profile.requests // bins).size] * bins]
        if [len(row) for row in (profile.prompt_tokens, *profile.output_tokens)] != sizes:
            raise TypeError("its quantiles are not at this version's probabilities")
        return profile
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TraceError(f"{path}: {error}; expected a file made by `python -m l3env.traces.fit_profiles`") from error


def save(profile: Profile, folder: Path = PROFILE_DIR) -> Path:
    """Writes the profile as JSON; returns the file."""
    path = folder / f"{profile.name}.json"
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in asdict(profile).items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return path


def fit(
    workload: Workload,
    name: str,
    *,
    segments: int = 30,
    licence: str = "",
    url: str = "",
    default_window_s: tuple[float, float] | None = None,
    statistics: dict[str, Any] | None = None,
) -> Profile:
    """The statistics of ``workload``; ``segments`` equal stretches of time carry the rate."""
    prompt, output = workload.prompt_tokens, workload.output_tokens
    has_clock = workload.span_s > 0
    rates, gap_cv = _fit_arrivals(workload, segments) if has_clock else (np.zeros(0), 0.0)
    count = len(workload)
    bins = max(1, min(MAX_BINS, count // ROWS_PER_BIN))
    chances = grid(count // bins)
    ties = np.random.default_rng(0).permutation(count)  # equal prompts fall into either bin, in no order
    bin_idx = np.empty(count, dtype=np.int64)
    bin_idx[np.lexsort((ties, prompt))] = np.arange(count) * bins // count
    return Profile(
        name=name,
        licence=licence,
        url=url,
        requests=count,
        span_s=round(workload.span_s, 3),
        default_window_s=default_window_s,
        rates=_rounded(rates, 5),
        gap_cv=round(gap_cv, 4),
        prompt_tokens=_rounded(np.quantile(prompt, grid(count)), 1),
        output_tokens=tuple(_rounded(np.quantile(output[bin_idx == i], chances), 1) for i in range(bins)),
        spearman=round(float(pd.Series(prompt).rank().corr(pd.Series(output).rank())), 4),
        statistics=statistics or {},
    )


def _rounded(values: NDArray[np.float64], digits: int) -> tuple[float, ...]:
    return tuple(float(value) for value in np.round(values, digits))


def _fit_arrivals(workload: Workload, segments: int) -> tuple[NDArray[np.float64], float]:
    """Normalised rate of each segment, and the CV of the gaps measured in expected requests instead of seconds."""
    times_s = workload.arrival_s - workload.arrival_s[0]
    counts = np.histogram(times_s, bins=segments, range=(0.0, workload.span_s))[0]
    edges_s = np.linspace(0.0, workload.span_s, segments + 1)
    gaps = np.diff(np.interp(times_s, edges_s, np.concatenate([[0.0], np.cumsum(counts)])))
    return counts * segments / len(workload), float(gaps.std() / gaps.mean())


def generate(name: str, *, n: int | None = None, window: Window | None = None, seed: int = 0) -> Workload:
    """A workload with the profile's statistics; another seed draws another one. Raises TraceError.

    Without ``n`` and ``window`` as many requests as the trace has, over its span (ServeGen: its first hour). ``window``
    cuts a stretch of that; ``n`` keeps the first n, and the rate curve repeats where the trace is shorter than either.
    Prefix ids and sessions are not part of a profile.
    """
    profile = read(name)
    if n is not None and n < 1:
        raise TraceError(f"profile:{name}: n={n}; expected a whole number >= 1")
    if window is None and n is None and profile.default_window_s is not None:
        window = Window(*profile.default_window_s)
    times_rng, lengths_rng = (np.random.default_rng([seed, part, 0x9F]) for part in (0, 1))
    source = {
        "format": "profile",
        "note": NOTE,
        "profile_of": name,
        "licence": profile.licence,
        "url": profile.url,
        "drawn_with_seed": seed,
    }
    if profile.span_s <= 0:
        if window is not None:
            raise TraceError(f"profile:{name}: lengths only, no clock, so window= has no meaning; use n=")
        arrival_s = np.zeros(n or profile.requests)
        source["arrivals"] = "none in the trace (lengths only): all present at 0"
    else:
        arrival_s = _within(profile, _arrivals(profile, _cycles(profile, n, window), times_rng), n, window)
    prompt, output = _lengths(profile, arrival_s.size, lengths_rng)
    return Workload.build(f"profile:{name}", arrival_s, prompt, output, source=source)


def _cycles(profile: Profile, n: int | None, window: Window | None) -> int:
    """How often the trace's span is repeated to hold the window and n requests."""
    end_s = window.bounds(0.0, profile.span_s)[1] if window else 0.0
    needed = max(end_s / profile.span_s if math.isfinite(end_s) else 1.0, (n or 1) / profile.requests, 1.0)
    return math.ceil(needed - 1e-9) + (1 if window and n and needed > 1 else 0)


def _arrivals(profile: Profile, cycles: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Gamma gaps in operational time, scaled to the number of requests, then bent by the rate curve."""
    count = cycles * profile.requests
    gaps = gamma_gaps(rng, count - 1, profile.gap_cv)
    places = np.concatenate([[0.0], np.cumsum(gaps)]) / gaps.sum() * count
    floor = 1e-6 * profile.requests  # an idle stretch keeps the curve ascending
    steps = np.maximum(np.diff(profile.cumulative), floor)
    curve = np.concatenate([[0.0], np.cumsum(np.tile(steps, cycles))])
    edges_s = np.linspace(0.0, cycles * profile.span_s, curve.size)
    times_s: NDArray[np.float64] = np.interp(places * (curve[-1] / count), curve, edges_s)
    return times_s


def _within(
    profile: Profile, times_s: NDArray[np.float64], n: int | None, window: Window | None
) -> NDArray[np.float64]:
    if window is not None:
        start_s, end_s = window.bounds(0.0, profile.span_s)
        times_s = times_s[(times_s >= start_s) & (times_s < end_s)] - start_s
        if not times_s.size:
            raise TraceError(
                f"profile:{profile.name}: no request arrives in [{start_s:g}, {end_s:g}) s of {profile.span_s:g} s"
            )
    return times_s if n is None else times_s[:n]


def _lengths(profile: Profile, count: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(count,) prompts by inverse quantile, and outputs from the quantiles of their prompt's fifth.

    Draws are stratified (one in each of ``count`` equal slices, in random order), so that lengths have the profile's
    distribution as nearly as ``count`` allows and seeds differ in pairing, order and times.
    """
    rank = _strata(count, rng)
    prompt = np.interp(rank, grid(profile.requests), profile.prompt_tokens)
    output = np.empty(count)
    bins = len(profile.output_tokens)
    chances = grid(profile.requests // bins)
    for i, quantiles in enumerate(profile.output_tokens):
        mask = (rank * bins).astype(np.int64) == i
        output[mask] = np.interp(_strata(int(mask.sum()), rng), chances, quantiles)
    whole_prompt, whole_output = (np.maximum(np.rint(tokens), 1).astype(np.int64) for tokens in (prompt, output))
    return whole_prompt, whole_output


def _strata(count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """(count,) numbers in [0, 1), one in each slice of width 1 / count, in random order."""
    draws: NDArray[np.float64] = (rng.permutation(count) + rng.random(count)) / max(count, 1)
    return np.minimum(draws, np.nextafter(1.0, 0.0))
