"""Fits a GPU's parameters to measured times: least squares on log error, robust against outliers (soft L1).

The linear operations, the small ones, prefill and decode attention are fitted one after the other: each has parameters
of its own. Used by ``l3env calibrate`` and by ``experiments/gpu/fit.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from l3env.experiments.gpu.validation import Point, kv_bytes, load_model, predict_ms
from l3env.machine.costs import gpu as costs
from l3env.machine.specs import GpuSpec, ModelSpec

Array = NDArray[np.float64]
SOFT_ERROR = 0.1  # errors beyond this pull less
DECODE_FIT_BYTES = 4 * 2**20  # smaller calls are launches: their times hold no bandwidth
PREFILL_ROWS_MOST = 1500

# parameter: (start, low, high)
LINEAR = {
    "compute_utilisation_frac": (0.8, 0.2, 1.0),
    "memory_utilisation_frac": (0.85, 0.2, 1.0),
    "linear_launch_s": (3e-6, 0.0, 3e-5),
    "roofline_exponent": (3.0, 1.0, 20.0),
    "tile_wave_frac": (0.3, 0.0, 1.0),
    "tile_ramp_frac": (0.1, 0.0, 2.0),
}
ELEMENTWISE = {"elementwise_launch_s": (1e-5, 0.0, 1e-3), "elementwise_utilisation_frac": (0.5, 0.02, 1.0)}
PREFILL = {
    "prefill_launch_s": (7e-6, 0.0, 1e-4),
    "prefill_utilisation_frac": (0.6, 0.05, 1.0),
    "prefill_query_s": (1e-8, 0.0, 1e-6),
    "prefill_history_launch_s": (3e-6, 0.0, 1e-4),
    "prefill_tile_tokens": (64.0, 1.0, 256.0),
    "prefill_chunk_ratio": (1.2, 1.0, 4.0),
    "prefill_history_ratio": (1.2, 0.2, 4.0),
}
DECODE = {
    "decode_launch_s": (7e-6, 0.0, 1e-4),
    "decode_utilisation_frac": (0.8, 0.1, 1.0),
    "decode_tail_frac": (0.3, 0.0, 1.0),
}


@dataclass(frozen=True)
class Linear:
    """Measured linear operations: (tokens, k) x (k, n)."""

    tokens: Array
    k: Array
    n: Array
    seconds: Array


@dataclass(frozen=True)
class Small:
    """Measured small operations of a layer, summed."""

    model: ModelSpec
    tp: int
    tokens: Array
    seconds: Array


Predict = Callable[[GpuSpec], Array]


def _least_squares(device: GpuSpec, bounds: Mapping[str, tuple[float, float, float]], log_error: Predict) -> GpuSpec:
    names = list(bounds)
    start, low, high = (np.array([bounds[name][i] for name in names]) for i in range(3))

    def residual(x: Array) -> Array:
        return log_error(replace(device, **dict(zip(names, x.tolist(), strict=True))))

    found = least_squares(
        residual, start, bounds=(low, high), x_scale=start, loss="soft_l1", f_scale=SOFT_ERROR, max_nfev=200
    ).x
    rounded: dict[str, Any] = {name: float(f"{value:.4g}") for name, value in zip(names, found, strict=True)}
    return replace(device, **rounded)


def fit_linear(device: GpuSpec, model: ModelSpec, data: Linear) -> GpuSpec:
    """``model`` says how many bytes a parameter has."""
    measured = np.log(data.seconds)

    def log_error(trial: GpuSpec) -> Array:
        times: Any = costs.linear_s(model, trial, data.tokens, data.k, data.n)  # type: ignore[arg-type]
        return np.log(times) - measured

    return _least_squares(device, LINEAR, log_error)


def fit_elementwise(device: GpuSpec, data: list[Small]) -> GpuSpec:
    measured = np.log(np.concatenate([part.seconds for part in data]))

    def log_error(trial: GpuSpec) -> Array:
        times = [costs.elementwise_layer_s(part.model, trial, part.tp, part.tokens) for part in data]
        return np.log(np.concatenate(times)) - measured

    return _least_squares(device, ELEMENTWISE, log_error)


def fit_prefill(device: GpuSpec, points: list[Point], models: Mapping[str, ModelSpec] | None = None) -> GpuSpec:
    step = max(1, -(-len(points) // PREFILL_ROWS_MOST))
    return _fit_points(device, PREFILL, points[::step], models)


def fit_decode(device: GpuSpec, points: list[Point], models: Mapping[str, ModelSpec] | None = None) -> GpuSpec:
    known = models or {}
    large = [p for p in points if kv_bytes(p, known.get(p.model) or load_model(p.model)) >= DECODE_FIT_BYTES]
    step = max(1, -(-len(large) // PREFILL_ROWS_MOST))
    return _fit_points(device, DECODE, large[::step], models)


def _fit_points(
    device: GpuSpec,
    bounds: Mapping[str, tuple[float, float, float]],
    points: list[Point],
    models: Mapping[str, ModelSpec] | None,
) -> GpuSpec:
    measured = np.log([point.ms for point in points])
    return _least_squares(device, bounds, lambda trial: np.log(predict_ms(trial, points, models)) - measured)
