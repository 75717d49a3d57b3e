"""Routed experts of many shapes at once, routed as the measuring code did."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from l3env.machine import specs
from l3env.machine.costs.experts import grouped_s
from l3env.machine.costs.gpu import TILE_STEP
from l3env.machine.specs import GpuSpec, ModelSpec

Array = NDArray[np.float64]
SHAPE = ["num_tokens", "topk", "num_experts", "moe_ep_size", "distribution"]
DRAWS = 8
UNGATED = {(1856, 6), (2688, 22), (5120, 22)}  # Nemotron's (inner size, chosen) have two matrices an expert


class Routed(NamedTuple):
    """What one rank gets, on average over draws."""

    hit: float  # experts with tokens
    pairs: float  # (token, expert) pairs
    stepped: float  # the same with each expert's rounded up to whole tiles


@functools.cache
def routed(tokens: int, chosen: int, experts: int, ranks: int, distribution: str) -> Routed:
    """The fullest rank of a routing: equal numbers, or drawn from a power law (as aiconfigurator does)."""
    if distribution == "balanced":
        mine, pairs = experts / ranks, tokens * chosen / ranks
        hit = min(mine, max(pairs, 1.0))
        return Routed(hit, pairs, hit * TILE_STEP * np.ceil(pairs / hit / TILE_STEP))
    alpha = float(distribution.rsplit("_", 1)[1])
    random = np.random.default_rng(tokens + 7 * experts + ranks)
    low, high = (1.0, 0.8 * tokens) if tokens * chosen > experts else (0.01, 2.0)
    uniform, power = random.random((DRAWS, experts)), 1 - alpha
    drawn = ((high**power - low**power) * uniform + low**power) ** (1 / power)
    counts = np.minimum(np.round(drawn / drawn.sum(1, keepdims=True) * tokens * chosen), tokens)
    by_rank = counts.reshape(DRAWS, ranks, experts // ranks)
    fullest = by_rank[np.arange(DRAWS), by_rank.sum(2).argmax(1)]
    hit = max(float((fullest > 0).sum(1).mean()), 1.0)
    return Routed(hit, float(fullest.sum(1).mean()), float((np.ceil(fullest / TILE_STEP) * TILE_STEP).sum(1).mean()))


def expert_model(dtype: str, hidden: int, *, gated: bool) -> ModelSpec:
    """A model with experts of this precision."""
    base: ModelSpec = specs.load("model/deepseek-v3")
    weight_bytes = 2 if dtype == "bfloat16" else 1
    sizes = {"hidden_size": hidden, "bytes_per_parameter": weight_bytes}
    return replace(base, gated_ffn=gated, block_scales=dtype == "fp8_block", **sizes)  # type: ignore[arg-type]


def moe_s(device: GpuSpec, rows: pd.DataFrame) -> Array:
    """The table ``moe``: routing and both expert products on one rank."""
    found = [routed(*key) for key in rows[SHAPE].itertuples(index=False, name=None)]
    hit, pairs, stepped = (np.array(column, dtype=float) for column in zip(*found, strict=True))
    out = np.empty(len(rows))
    tokens = rows["num_tokens"].to_numpy(float)
    keys = rows.groupby(["moe_dtype", "hidden_size", "inter_size", "topk", "moe_tp_size"], sort=False)
    groups: list[Any] = list(keys.indices.items())
    for (dtype, hidden, inner, chosen, split), places in groups:
        model = expert_model(str(dtype), int(hidden), gated=(inner, chosen) not in UNGATED)
        mine = hit[places], stepped[places] / hit[places], pairs[places]
        out[places] = grouped_s(model, device, *mine, inner / split, chosen * tokens[places])
    return out
