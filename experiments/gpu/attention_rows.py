"""Attention of many shapes at once, from the engine's coefficients and kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from l3env.jit import kernel
from l3env.machine import specs
from l3env.machine.arrays import COEF_DTYPE
from l3env.machine.costs import attention
from l3env.machine.price import hbm_attention_s, prefill_batch_s, prefill_tail_s, prefill_work_s
from l3env.machine.specs import GpuSpec, ModelSpec
from l3env.machine.tables import fill_attention
from l3env.units import FP8_BYTES

Array = NDArray[np.float64]
Counts = NDArray[np.int64]
NO_WINDOW = 2**40
GEOMETRY = ["num_heads", "num_key_value_heads", "head_dim", "kv_cache_dtype"]


class Arrays(NamedTuple):
    """As much of the engine's tables as attention needs."""

    coef: Any


@kernel
def decode_rows_s(t: Any, tables: Counts, kv_tokens: Array, requests: Array, out: Array) -> None:
    """Decode attention of each row, into ``out``."""
    for i in range(tables.size):
        out[i] = hbm_attention_s(t, tables[i], kv_tokens[i], requests[i])


@kernel
def prefill_rows_s(
    t: Any, tables: Counts, requests: Counts, chunks: Counts, histories: Counts, windows: Counts, out: Array
) -> None:
    """Prefill attention of each row, into ``out``: ``requests`` equal chunks on a history each in one call.

    Where a token sees a window, the first ones are a triangle; the others have as many keys, and a tile's.
    """
    for i in range(tables.size):
        coef, first = t.coef[tables[i]], min(chunks[i], windows[i])
        work_s, rest = prefill_work_s(t, tables[i], first, histories[i]), float(chunks[i] - first)
        if rest > 0:
            work_s += coef["prefill_pair_s"] * rest * (first + coef["prefill_tile_tokens"])
            work_s += rest * (coef["prefill_new_s"] + coef["prefill_tile_s"] / coef["prefill_tile_tokens"])
        out[i] = prefill_batch_s(t, tables[i], requests[i] * work_s, prefill_tail_s(t, tables[i], first), requests[i])


def dense_model(heads: int, kv_heads: int, head_size: int, kv_bytes: float) -> ModelSpec:
    """One layer of a model with these heads, those of one GPU."""
    base: ModelSpec = specs.load("model/llama-3-8b")
    shape = {"heads_count": heads, "kv_heads_count": kv_heads, "head_size": head_size}
    return replace(base, layers_count=1, bytes_per_kv_element=kv_bytes, **shape)  # type: ignore[arg-type]


def latent_model(heads: int, kv_dtype: str, gemm_type: str) -> ModelSpec:
    """One layer of DeepSeek-V3's attention with so many heads."""
    base: ModelSpec = specs.load("model/deepseek-v3")
    weight_bytes, kv_bytes = (2 if gemm_type == "bfloat16" else 1), (1 if kv_dtype == "fp8" else 2)
    return replace(
        base,
        layers_count=1,
        heads_count=heads,
        kv_heads_count=heads,
        bytes_per_parameter=weight_bytes,
        block_scales=weight_bytes == 1,
        bytes_per_kv_element=kv_bytes,
        moe=None,
        draft_modules_count=0,
    )


def latent_s(device: GpuSpec, rows: pd.DataFrame) -> Array:
    """The tables ``mla_*_module``: projections, attention and the small kernels between."""
    groups = rows.groupby(["num_heads", "kv_cache_dtype", "gemm_type"], sort=True)
    keys: list[Any] = list(groups.groups)
    models, places = [latent_model(*key) for key in keys], np.asarray(groups.ngroup(), np.int64)
    requests, chunks, steps = (rows[name].to_numpy(np.int64) for name in ("batch_size", "isl", "step"))
    tokens, shapes = (requests * chunks).astype(float), Shapes(models, places)
    around = np.empty(tokens.size)
    for i, model in enumerate(models):
        mine = places == i
        around[mine] = attention.latent_block_s(model, device, 1, tokens[mine])
    decode = decode_s(device, shapes, requests * np.maximum(steps, 1.0), requests.astype(float))
    prefill = prefill_s(device, shapes, requests, chunks, np.zeros_like(chunks), np.zeros_like(chunks))
    return around + np.where(chunks > 1, prefill, decode)


class Shapes(NamedTuple):
    """Rows by the model that they are of."""

    models: list[ModelSpec]
    places: NDArray[np.int64]  # (N,) of each row's


def dense_shapes(rows: pd.DataFrame) -> Shapes:
    groups = rows.groupby(GEOMETRY, sort=True)
    keys: list[Any] = list(groups.groups)
    models = [dense_model(key[0], key[1], key[2], 1.0 if key[3] == "fp8" else 2.0) for key in keys]
    return Shapes(models, np.asarray(groups.ngroup(), np.int64))


def coefficients(device: GpuSpec, models: list[ModelSpec], tp: int = 1) -> Arrays:
    """The engine's, of one GPU."""
    coef = np.zeros(len(models), COEF_DTYPE)
    for i, model in enumerate(models):
        fill_attention(coef[i : i + 1], device, model, tp)
    return Arrays(coef)


def decode_s(device: GpuSpec, shapes: Shapes, kv_tokens: Array, requests: Array) -> Array:
    """Decode attention as measured: in calls that repeat on the same KV, what fits the L2 cache is read from there."""
    cold = coefficients(device, shapes.models).coef
    out = np.empty(requests.size)
    if device.cache_bytes_per_s == 0:
        decode_rows_s(Arrays(cold), shapes.places, kv_tokens, requests, out)
        return out
    hot = cold.copy()
    token_bytes = np.array([model.kv_bytes_per_token for model in shapes.models])
    narrow = device.fp8_kv_cache_bytes_per_s or device.cache_bytes_per_s
    rates = [narrow if model.bytes_per_kv_element <= FP8_BYTES else device.cache_bytes_per_s for model in shapes.models]
    hot["hbm_token_s"] = token_bytes / np.array(rates)
    both = Arrays(np.concatenate([cold, hot]))
    fits = token_bytes[shapes.places] * kv_tokens <= device.cache_bytes
    places = shapes.places + np.where(fits, len(shapes.models), 0)
    decode_rows_s(both, places, kv_tokens, requests, out)
    return out


def prefill_s(
    device: GpuSpec, shapes: Shapes, requests: Counts, chunks: Counts, histories: Counts, windows: Counts
) -> Array:
    """Prefill attention; a window of 0 is none."""
    out = np.empty(requests.size)
    seen = np.where(windows > 0, windows, np.int64(NO_WINDOW))
    t = coefficients(device, shapes.models)
    prefill_rows_s(t, shapes.places, requests, chunks, histories, seen, out)
    return out


def generation_s(device: GpuSpec, rows: pd.DataFrame) -> Array:
    """The table ``generation_attention``: a new token on ``step`` earlier ones, of which a window may be seen."""
    lengths, windows = rows["step"].to_numpy(float) + 1, rows["window_size"].to_numpy(float)
    requests = rows["batch_size"].to_numpy(float)
    seen = np.where(windows > 0, np.minimum(lengths, windows), lengths)
    return decode_s(device, dense_shapes(rows), requests * seen, requests)


def context_s(device: GpuSpec, rows: pd.DataFrame) -> Array:
    """The table ``context_attention``: whole prompts; those of one token are decode steps and go by its kernel."""
    shapes, requests = dense_shapes(rows), rows["batch_size"].to_numpy(np.int64)
    chunks, windows = rows["isl"].to_numpy(np.int64), rows["window_size"].to_numpy(np.int64)
    many_s = prefill_s(device, shapes, requests, chunks, np.zeros_like(chunks), windows)
    return np.where(chunks > 1, many_s, decode_s(device, shapes, requests * 1.0, requests * 1.0))
