"""Fits a GPU's parameters to measured times: least squares on log error, robust against outliers (soft L1).

The linear operations, the small ones, prefill and decode attention are fitted one after the other: each has parameters
of its own. Used by ``l3env calibrate`` and by ``experiments/gpu/fit.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from l3env.experiments.gpu import refit
from l3env.experiments.gpu.validation import Point, kv_bytes, load_model, predict_ms
from l3env.machine.costs import gpu as costs
from l3env.machine.specs import GpuSpec, ModelSpec

Array = NDArray[np.float64]
SOFT_ERROR = 0.1  # errors beyond this pull less
DECODE_FIT_BYTES = 4 * 2**20  # smaller calls are launches: their times hold no bandwidth
PREFILL_ROWS_MOST = 1500

# parameter: (start, low, high)
LINEAR = refit.LINEAR.bounds
ELEMENTWISE = {"elementwise_launch_s": (1e-5, 0.0, 1e-3), "elementwise_utilisation_frac": (0.5, 0.02, 1.0)}
PREFILL = refit.PREFILL.bounds
DECODE = {name: bounds for name, bounds in refit.DECODE.bounds.items() if not name.startswith(("cache", "attention"))}


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
        residual,
        np.clip(start, low, high),
        bounds=(low, high),
        x_scale=start,
        loss="soft_l1",
        f_scale=SOFT_ERROR,
        max_nfev=200,
    ).x
    rounded: dict[str, Any] = {name: float(f"{value:.4g}") for name, value in zip(names, found, strict=True)}
    return replace(device, **rounded)


def fit_linear(device: GpuSpec, model: ModelSpec, data: Linear) -> GpuSpec:
    """``model`` says how many bytes a parameter has."""
    measured = np.log(data.seconds)

    def log_error(trial: GpuSpec) -> Array:
        times: Any = costs.linear_s(model, trial, data.tokens, data.k, data.n)
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


def carry(device: GpuSpec, other: GpuSpec, names: Iterable[str]) -> GpuSpec:
    """Parameters of another GPU."""
    values: dict[str, Any] = {name: getattr(other, name) for name in names}
    return replace(device, **values)
