"""Measured GPU times against predicted ones: ``l3env validate gpu --gpu h200 [--profile CSV] [--json]``.

A profile is a CSV (also .gz) with the columns ``op,model,tp,tokens,batch,kv_len,ms``, a row a measurement on one
tensor-parallel shard of one layer in bf16; further columns are ignored:

* ``fc_layer``: the sum of the layer's linear operations for ``tokens`` tokens.
* ``decode_attn``: decode attention of ``batch`` requests of ``kv_len`` tokens each.
* ``prefill_attn``: attention of ``tokens`` new tokens, ``kv_len`` in all, of one request.

Predictions come from the functions and coefficients that the engine's tables are made of.
"""

from __future__ import annotations

import csv
import functools
import gzip
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from l3env.errors import ProfileError, SpecError
from l3env.experiments.gpu.attention_rows import NO_WINDOW, Arrays, coefficients, decode_rows_s, prefill_rows_s
from l3env.machine import specs
from l3env.machine.costs import gpu as costs
from l3env.machine.specs import GpuSpec, ModelSpec

COLUMNS = ("op", "model", "tp", "tokens", "batch", "kv_len", "ms")
NEEDS = {"fc_layer": ("tokens",), "decode_attn": ("batch", "kv_len"), "prefill_attn": ("tokens", "kv_len")}
OPS = tuple(NEEDS)
DATA_DIR = Path(__file__).parents[1] / "data"


@dataclass(frozen=True)
class Point:
    """One measurement."""

    op: str
    model: str
    tp: int
    tokens: int
    batch: int
    kv_len: int
    ms: float


def read_profile(path: Path) -> list[Point]:
    """Reads and checks a profile.

    Raises:
        ProfileError: naming file, row and field.
    """
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path}: cannot be read: {error}") from None
    rows = csv.DictReader(io.StringIO(text))
    missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
    if missing:
        raise ProfileError(f"{path}: row 1: missing column {', '.join(missing)}; expected {','.join(COLUMNS)}")
    points = [_point(row, f"{path}: row {rows.line_num}") for row in rows]
    if not points:
        raise ProfileError(f"{path}: no rows; expected measurements with the columns {','.join(COLUMNS)}")
    return points


def _point(row: Mapping[str, str | None], where: str) -> Point:
    op = (row["op"] or "").strip()
    if op not in OPS:
        raise ProfileError(f"{where}: op = {op!r}: expected one of {', '.join(OPS)}")
    name = (row["model"] or "").strip()
    try:
        model = load_model(name)
    except SpecError as error:
        raise ProfileError(f"{where}: model = {name!r}: {error}") from None
    tp = _whole(row, "tp", where)
    if model.heads_count % tp:
        raise ProfileError(f"{where}: tp = {tp}: expected a divisor of the {model.heads_count} heads of {name}")
    counts = {key: _whole(row, key, where) if key in NEEDS[op] else 1 for key in ("tokens", "batch", "kv_len")}
    if op == "prefill_attn" and counts["kv_len"] < counts["tokens"]:
        raise ProfileError(f"{where}: kv_len = {counts['kv_len']}: expected at least tokens = {counts['tokens']}")
    return Point(op, name, tp, ms=_milliseconds(row, where), **counts)


def _whole(row: Mapping[str, str | None], key: str, where: str) -> int:
    text = (row[key] or "").strip()
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value >= 1 and value == math.floor(value)) or math.isinf(value):
        raise ProfileError(f"{where}: {key} = {text!r}: expected a whole number >= 1")
    return int(value)


def _milliseconds(row: Mapping[str, str | None], where: str) -> float:
    text = (row["ms"] or "").strip()
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ProfileError(f"{where}: ms = {text!r}: expected a number of milliseconds > 0")
    return value


@functools.cache
def load_model(name: str) -> ModelSpec:
    """A preset's name, or ``model:file.toml``."""
    model: ModelSpec = specs.load(name if name.startswith("model:") else f"model/{name}")
    return model


# -- predictions -----------------------------------------------------------------------------------------------------


def attention_arrays(device: GpuSpec, model: ModelSpec, tp: int) -> Arrays:
    """The engine's attention coefficients for one layer."""
    return coefficients(device, [replace(model, layers_count=1)], tp)


def plain(kernel: Any) -> Any:
    """A compiled kernel that calls no other as the Python function it was written as."""
    return getattr(kernel, "py_func", kernel)


def prefill_attention_s(arrays: Any, batch: int, chunk: int, history: int) -> float:
    """Prefill attention of ``batch`` requests in one call: ``chunk`` new tokens of each on ``history`` earlier ones."""
    return float(_prefill_s(arrays, np.array([batch]), np.array([chunk]), np.array([history]))[0])


def _prefill_s(arrays: Any, batch: np.ndarray, chunks: np.ndarray, histories: np.ndarray) -> np.ndarray:
    out = np.empty(chunks.size)
    tables, windows = np.zeros(chunks.size, np.int64), np.full(chunks.size, NO_WINDOW, np.int64)
    prefill_rows_s(Arrays(arrays.coef), tables, batch, chunks, histories, windows, out)
    return out


def _decode_s(arrays: Any, kv_tokens: np.ndarray, requests: np.ndarray) -> np.ndarray:
    out = np.empty(requests.size)
    decode_rows_s(Arrays(arrays.coef), np.zeros(requests.size, np.int64), kv_tokens, requests, out)
    return out


def predict_ms(device: GpuSpec, points: Iterable[Point], models: Mapping[str, ModelSpec] | None = None) -> np.ndarray:
    """Predicted milliseconds of each point; ``models`` adds names that are no presets."""
    listed = list(points)
    out = np.empty(len(listed))
    groups: dict[tuple[str, str, int], list[int]] = {}
    for i, point in enumerate(listed):
        groups.setdefault((point.op, point.model, point.tp), []).append(i)
    for (op, name, tp), places in groups.items():
        model = models[name] if models and name in models else load_model(name)
        chosen = [listed[i] for i in places]
        tokens, batch, kv_len = (np.array([getattr(p, key) for p in chosen]) for key in ("tokens", "batch", "kv_len"))
        if op == "fc_layer":
            times = costs.linear_layer_s(model, device, tp, tokens)
        elif op == "decode_attn":
            times = _decode_s(attention_arrays(device, model, tp), batch * kv_len.astype(float), batch.astype(float))
        else:
            times = _prefill_s(attention_arrays(device, model, tp), np.ones_like(tokens), tokens, kv_len - tokens)
        out[places] = times * 1e3
    return out


def kv_bytes(point: Point, model: ModelSpec) -> float:
    """K and V that a decode attention call reads."""
    heads = max(model.kv_heads_count / point.tp, 1)
    return 2 * point.batch * point.kv_len * heads * model.head_size * model.bytes_per_kv_element


# -- errors ----------------------------------------------------------------------------------------------------------


def statistics(predicted_ms: np.ndarray, measured_ms: np.ndarray) -> dict[str, float | int]:
    """Of |predicted / measured - 1|."""
    error = np.abs(predicted_ms / measured_ms - 1)
    return {
        "n": int(error.size),
        "median": round(float(np.median(error)), 5),
        "p90": round(float(np.quantile(error, 0.9)), 5),
        "worst": round(float(error.max()), 5),
    }


def validate(device: GpuSpec, points: list[Point]) -> dict[str, dict[str, float | int]]:
    """Error statistics by operation."""
    predicted, measured = predict_ms(device, points), np.array([point.ms for point in points])
    ops = np.array([point.op for point in points])
    return {op: statistics(predicted[ops == op], measured[ops == op]) for op in OPS if (ops == op).any()}


def default_profile(gpu_name: str) -> Path:
    """The measurements in the repository for a GPU preset."""
    path = DATA_DIR / f"{gpu_name.removesuffix('-ideal')}.csv.gz"
    if not path.is_file():
        there = ", ".join(sorted(p.name.removesuffix(".csv.gz") for p in DATA_DIR.glob("*.csv.gz")))
        raise ProfileError(
            f"no measurements of {gpu_name!r} in the repository (there are: {there}); give --profile CSV"
        )
    return path
