"""Fits a GPU's parameters to tables of operators: least squares on log error, robust against outliers (soft L1).

Products, prefill attention, decode attention and so on are fitted one after the other: each has parameters of its own.
A third of the shapes, drawn by a hash of their sizes, is held out of every fit and judged apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from l3env.experiments.gpu.operators import PRESETS, Array, Operation
from l3env.experiments.gpu.predict import predict_s
from l3env.machine.specs import GpuSpec, LinkSpec

SOFT_ERROR = 0.1  # errors beyond this pull less
ROWS_MOST = 6000  # of an operation in a fit: evenly spaced ones
HELD_OUT_OF = 3  # one in so many shapes
SHAPES = {  # what a shape is: the columns that are held out together; single rows elsewhere
    "gemm": ["n", "k"],
    "context_attention": ["num_heads", "num_key_value_heads", "head_dim", "window_size"],
    "generation_attention": ["num_heads", "num_key_value_heads", "head_dim", "window_size"],
    "moe": ["hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size"],
    "mla": ["num_heads", "batch_size", "isl", "step"],
    "all_reduce": ["num_gpus", "message_size"],
    "nccl": ["op_name", "num_gpus", "message_size"],
}
Device = TypeVar("Device", GpuSpec, LinkSpec)
Bounds = Mapping[str, tuple[float, float, float]]  # parameter: (start, low, high)


@dataclass(frozen=True)
class Group:
    """Parameters that are fitted together.

    Attributes:
        operations: names of the operations that they are fitted to.
        bounds: the parameters.
        choices: where to start from, and values of others; the best is kept.
        where: which rows.
        gpus: whose kernels have them.
    """

    operations: tuple[str, ...]
    bounds: Bounds
    choices: tuple[dict[str, Any], ...] = ({},)
    where: Callable[[Operation], NDArray[np.bool_]] | None = None
    gpus: tuple[str, ...] = tuple(PRESETS)


LINEAR = Group(
    ("gemm_bfloat16",),
    {
        "compute_utilisation_frac": (0.8, 0.2, 1.0),
        "memory_utilisation_frac": (0.87, 0.2, 1.0),
        "sm_bytes_per_s": (1.5e11, 1e10, 2e12),
        "tile_start_s": (3e-7, 0.0, 2e-5),
        "tile_wave_frac": (0.1, 0.0, 1.0),
        "split_s": (3e-6, 0.0, 2e-5),
        "split_bytes_per_s": (4e12, 1e11, 2e14),
        "roofline_exponent": (2.5, 1.0, 20.0),
        "linear_launch_s": (2.4e-6, 0.0, 3e-5),
    },
    ({}, {"sm_bytes_per_s": 5e10, "tile_start_s": 3.5e-6, "roofline_exponent": 1.5, "tile_wave_frac": 0.7}),
)
LINEAR_FP8 = Group(
    ("gemm_fp8",),
    {
        "fp8_utilisation_frac": (0.65, 0.2, 1.0),
        "fp8_sm_bytes_per_s": (2e11, 1e10, 2e12),
        "quantise_launch_s": (2.4e-6, 0.0, 2e-5),
        "quantise_element_s": (4e-10, 0.0, 1e-8),
        "quantise_crowd_frac": (1.0, 0.0, 2.0),
        "quantise_row_s": (7e-9, 0.0, 1e-7),
        "quantise_bytes_per_s": (2.5e12, 1e11, 1e14),
    },
)
PREFILL = Group(
    ("context_attention",),
    {
        "prefill_launch_s": (1e-5, 0.0, 1e-4),
        "prefill_utilisation_frac": (0.65, 0.05, 1.0),
        "prefill_softmax_size": (40.0, 0.0, 600.0),
        "prefill_tile_s": (3e-6, 0.0, 5e-5),
        "prefill_tail_frac": (0.7, 0.0, 5.0),
        "prefill_exponent": (1.5, 1.0, 20.0),
        "prefill_kv_moves": (3.0, 0.0, 60.0),
        "prefill_query_moves": (1.0, 0.0, 20.0),
    },
    tuple({"prefill_tile_rows": rows} for rows in (64, 128, 256)),
    where=lambda op: op.column("isl") > 1,
)
DECODE = Group(
    ("generation_attention",),
    {
        "attention_head_launch_frac": (0.1, -0.5, 1.0),
        "decode_launch_s": (1e-5, 0.0, 1e-4),
        "decode_split_s": (1.5e-6, 0.0, 2e-5),
        "decode_utilisation_frac": (0.88, 0.1, 1.0),
        "decode_query_moves": (2.0, 0.0, 10.0),
        "decode_tile_s": (3.5e-6, 0.0, 1e-4),
        "decode_exponent": (1.5, 1.0, 20.0),
        "cache_bytes_per_s": (5e12, 5e11, 5e13),
    },
    gpus=("h100", "h200", "b200"),
)
UNSPLIT = {"decode_head_bytes_per_s": (2.4e10, 1e9, 1e12), "decode_regroup_s": (6e-6, 0.0, 3e-5)}
DECODE_UNSPLIT = Group(DECODE.operations, {**DECODE.bounds, **UNSPLIT}, gpus=("a100",))
PREFILL_FP8 = Group(
    ("context_attention_fp8_kv",),
    {
        "fp8_kv_launch_s": (2e-6, 0.0, 1e-4),
        "fp8_kv_prefill_utilisation_frac": (0.65, 0.05, 2.0),
        "fp8_kv_prefill_tile_s": (1e-6, 0.0, 5e-5),
    },
    where=lambda op: op.column("isl") > 1,
)
DECODE_FP8 = Group(
    ("generation_attention_fp8_kv",),
    {
        "fp8_kv_decode_utilisation_frac": (0.7, 0.1, 1.0),
        "fp8_kv_cache_bytes_per_s": (2e12, 2e11, 5e13),
    },
)
LATENT = Group(
    ("mla_generation_bfloat16", "mla_context_bfloat16", "mla_generation_fp8_block", "mla_context_fp8_block"),
    {
        "latent_launch_s": (3e-5, 0.0, 3e-4),
        "latent_token_s": (1e-9, 0.0, 1e-7),
        "latent_head_s": (1e-10, 0.0, 1e-8),
        "block_launch_s": (3e-6, 0.0, 5e-5),
        "prefill_latent_utilisation_frac": (0.6, 0.05, 0.85),
        "latent_decode_utilisation_frac": (0.85, 0.1, 1.0),
        "decode_compute_utilisation_frac": (0.7, 0.05, 1.0),
        "fp8_output_bytes_per_s": (2e12, 1e11, 1e14),
    },
)
EXPERTS = Group(
    ("moe_bfloat16",),
    {
        "expert_launch_s": (2.5e-5, 0.0, 3e-4),
        "expert_utilisation_frac": (0.6, 0.05, 1.0),
        "expert_memory_utilisation_frac": (0.8, 0.05, 1.0),
        "expert_row_moves": (1.0, 0.0, 50.0),
        "expert_token_moves": (1.0, 0.0, 50.0),
    },
)
EXPERTS_FP8 = Group(
    ("moe_fp8_block",),
    {
        "fp8_expert_launch_s": (2.5e-5, 0.0, 3e-4),
        "fp8_expert_row_moves": (1.0, 0.0, 50.0),
        "fp8_expert_token_moves": (1.0, 0.0, 50.0),
        "fp8_expert_utilisation_frac": (0.5, 0.05, 1.0),
        "fp8_expert_memory_utilisation_frac": (0.8, 0.05, 1.0),
    },
)
ALL_REDUCE = {
    "latency_s": (6e-6, 0.0, 5e-5),
    "hop_s": (1e-7, 0.0, 5e-6),
    "one_shot_utilisation_frac": (0.5, 0.02, 1.0),
    "two_shot_s": (5e-6, 0.0, 1e-4),
    "utilisation_frac": (0.7, 0.2, 1.0),
    "switch_utilisation_frac": (0.8, 0.2, 2.0),
}
CUSTOM = Group(("all_reduce",), ALL_REDUCE)
NCCL = Group(("nccl_all_reduce",), ALL_REDUCE)


def shape_columns(name: str) -> list[str]:
    """What is held out together of an operation."""
    return next(columns for prefix, columns in SHAPES.items() if name.startswith(prefix))


def held_out(operation: Operation) -> NDArray[np.bool_]:
    """Rows of the shapes that are held out, the same on every GPU."""
    columns = [column for column in shape_columns(operation.name) if column in operation.rows]
    keys = operation.rows[columns].astype(str).agg(" ".join, axis=1)
    drawn = {key: int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % HELD_OUT_OF == 0 for key in keys.unique()}
    return keys.map(drawn).to_numpy(bool)


def fitted_part(operation: Operation, where: Callable[[Operation], NDArray[np.bool_]] | None) -> Operation:
    """The rows that a fit sees."""
    chosen = ~held_out(operation)
    if where is not None:
        chosen &= where(operation)
    places = np.flatnonzero(chosen)
    keep = np.zeros_like(chosen)
    keep[places[:: max(1, -(-places.size // ROWS_MOST))]] = True
    return operation.only(keep)


def _log_s(device: GpuSpec | LinkSpec, operations: list[Operation]) -> Array:
    return np.log(np.concatenate([predict_s(device, each) for each in operations]))


def fit_group(device: Device, group: Group, operations: list[Operation]) -> Device:
    """The device with the group's parameters fitted; as it was where nothing was measured of them."""
    parts = [fitted_part(each, group.where) for each in operations if each.name in group.operations]
    parts = [each for each in parts if len(each.rows)]
    if not parts:
        return device
    measured = np.log(np.concatenate([each.seconds for each in parts]))
    names = list(group.bounds)
    start, low, high = (np.array([group.bounds[name][i] for name in names]) for i in range(3))
    best, least = device, np.inf
    for choice in group.choices:
        others: dict[str, Any] = {name: value for name, value in choice.items() if name not in names}
        base: Any = replace(device, **others)
        begin = np.array([choice.get(name, value) for name, value in zip(names, start, strict=True)])
        found = least_squares(
            lambda x, base=base: _log_s(replace(base, **dict(zip(names, x.tolist(), strict=True))), parts) - measured,
            begin,
            bounds=(low, high),
            x_scale=start,
            loss="soft_l1",
            f_scale=SOFT_ERROR,
            max_nfev=60,
        )
        if found.cost < least:
            rounded: dict[str, Any] = {name: float(f"{value:.4g}") for name, value in zip(names, found.x, strict=True)}
            best, least = replace(base, **rounded), found.cost
    return best
