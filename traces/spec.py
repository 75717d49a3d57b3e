"""The keys that all traces take, ``NAME_OR_PATH[?key=value&key=value]``, and what they do to a workload."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from l3env.errors import TraceError
from l3env.reference import parse
from l3env.requests.workload import Workload
from l3env.traces.arrivals import KINDS, with_arrivals
from l3env.traces.resample import resample
from l3env.traces.splice import DEFAULT_PERIOD_S, parse_swing, ramp, swing
from l3env.traces.window import parse_window


def parse_count(text: str) -> int:
    """A whole number >= 1. Raises ValueError."""
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("a whole number >= 1")
    return int(text)


def parse_seed(text: str) -> int:
    """A whole number >= 0. Raises ValueError."""
    if not text.isdecimal():
        raise ValueError("a whole number >= 0")
    return int(text)


def parse_positive(text: str) -> float:
    """A finite number > 0. Raises ValueError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ValueError("a finite number > 0")
    return value


def parse_arrivals(text: str) -> str:
    """The name of an arrival process. Raises ValueError."""
    if text not in KINDS:
        raise ValueError(f"one of {', '.join(KINDS)}")
    return text


def parse_switch(text: str) -> bool:
    """``true`` or ``false``. Raises ValueError."""
    if text.lower() not in ("true", "false"):
        raise ValueError("true or false")
    return text.lower() == "true"


GENERAL: Mapping[str, Callable[[str], Any]] = {
    "window": parse_window,
    "n": parse_count,
    "prompt_scale": parse_positive,
    "output_scale": parse_positive,
    "load": parse_positive,
    "rate": parse_positive,
    "arrivals": parse_arrivals,
    "cv": parse_positive,
    "seed": parse_seed,
    "ramp": parse_swing,
    "swing": parse_swing,
    "period": parse_positive,
    "recorded_floor": parse_switch,
}


def parse_options(spec: str, extra: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    """The spec's options by key, as typed values; ``extra`` are the keys of this trace besides the general ones.

    Raises TraceError that names the key, the value and what was expected.
    """
    values = parse(spec, "trace", TraceError).values({**GENERAL, **extra})
    if "load" in values and "rate" in values:
        raise TraceError(f"trace {spec!r}: load and rate both set the speed of arrivals; expected one of them")
    if "cv" in values and values.get("arrivals") != "gamma":
        raise TraceError(f"trace {spec!r}: cv needs arrivals=gamma")
    if "ramp" in values and "swing" in values:
        raise TraceError(f"trace {spec!r}: ramp and swing both change the load over time; expected one of them")
    if "period" in values and "swing" not in values:
        raise TraceError(f"trace {spec!r}: period needs swing=FIRST:SECOND")
    return values


def apply(workload: Workload, values: Mapping[str, Any], seed: int) -> Workload:
    """Window, another sample where ``seed`` >= 1 and the rows are fixed, first ``n``, lengths, arrivals, rate or load,
    ramp.

    A sample is drawn within the window, so a window that is held out stays unseen. Rows drawn with this seed already
    (``source["drawn_with_seed"]``) are not sampled again.
    """
    kind, rate = values.get("arrivals"), values.get("rate")
    drawn = workload.source.get("drawn_with_seed") is not None
    window = values.get("window")
    floor = values.get("recorded_floor", workload.recorded_floor)
    if window is not None and kind in ("poisson", "gamma") and workload.span_s <= 0:
        if seed and not drawn:
            workload, drawn = resample(workload, seed), True
        workload = with_arrivals(workload, kind, rate, values.get("cv"), seed)
        kind, rate = None, None  # the window is one of this new clock
    if window is not None:
        workload = window.of(workload)
    if seed and not drawn:
        workload = resample(workload, seed)
    if "n" in values:
        workload = workload.head(values["n"])
    if "prompt_scale" in values or "output_scale" in values:
        workload = scale_lengths(workload, values.get("prompt_scale", 1.0), values.get("output_scale", 1.0))
    if kind is not None:
        workload = with_arrivals(workload, kind, rate, values.get("cv"), seed)
    elif rate is not None:
        workload = at_rate(workload, rate)
    if "load" in values:
        workload = workload.at_load(values["load"])
    if "ramp" in values:
        workload = ramp(workload, values["ramp"])
    elif "swing" in values:
        workload = swing(workload, values["swing"], values.get("period", DEFAULT_PERIOD_S))
    return replace(workload, recorded_floor=floor)


def at_rate(workload: Workload, rate_per_s: float) -> Workload:
    """The same requests, the clock scaled to ``rate_per_s`` requests/s. Raises TraceError where there is no clock."""
    if not math.isfinite(workload.rate_per_s) or workload.rate_per_s <= 0:
        raise TraceError(
            f"{workload.name}: rate={rate_per_s:g} needs a clock, but all requests are present at once; "
            "expected arrivals=poisson or arrivals=gamma with it"
        )
    scaled = workload.at_load(rate_per_s / workload.rate_per_s)
    return replace(scaled, source={**workload.source, "rate_set_to_per_s": rate_per_s})


def scale_lengths(workload: Workload, prompt_scale: float, output_scale: float) -> Workload:
    """The same requests with longer or shorter prompts and outputs, rounded, at least 1 token.

    Blocks that prefix ids name grow with the prompts. Raises TraceError where that gives no whole number of tokens.
    """
    block_tokens = workload.prefix_block_tokens * prompt_scale
    if block_tokens != int(block_tokens):
        raise TraceError(
            f"{workload.name}: prompt_scale={prompt_scale:g} makes blocks of {block_tokens:g} tokens of its blocks of "
            f"{workload.prefix_block_tokens}; expected a whole number"
        )
    prompt, output = (
        np.maximum(np.rint(tokens * scale).astype(np.int64), 1)
        for tokens, scale in ((workload.prompt_tokens, prompt_scale), (workload.output_tokens, output_scale))
    )
    return replace(
        workload,
        prompt_tokens=prompt,
        output_tokens=output,
        prefix_block_tokens=int(block_tokens),
        source={**workload.source, "lengths_scaled_by": [prompt_scale, output_scale]},
    )
