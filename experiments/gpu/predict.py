"""Predicted times of an operation's rows, as the engine's tables have them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from l3env.experiments.gpu import attention_rows, expert_rows
from l3env.experiments.gpu.operators import LINKS, PRESETS, Array, Operation, files, read
from l3env.experiments.gpu.validation import statistics
from l3env.machine import specs
from l3env.machine.costs import gpu as costs
from l3env.machine.specs import GpuSpec, LinkSpec, ModelSpec


def gemm_model(dtype: str) -> ModelSpec:
    """A model whose products are of this precision."""
    base: ModelSpec = specs.load("model/llama-3-8b")
    return replace(base, bytes_per_parameter=2 if dtype == "bfloat16" else 1, block_scales=dtype == "fp8_block")


def gemm_s(device: GpuSpec, operation: Operation) -> Array:
    """y[m, n] = x[m, k] W."""
    tokens, inner, outputs = (operation.column(name) for name in ("m", "k", "n"))
    return costs.linear_s(gemm_model(operation.name.removeprefix("gemm_")), device, tokens, inner, outputs)


def all_reduce_s(link: LinkSpec, operation: Operation) -> Array:
    """An all-reduce over the GPU link."""
    ranks, sizes = operation.column("num_gpus").astype(int), operation.column("bytes")
    out = np.empty(sizes.size)
    for count in np.unique(ranks):
        out[ranks == count] = costs.all_reduce_s(link, int(count), sizes[ranks == count])
    return out


def predict_s(device: GpuSpec | LinkSpec, operation: Operation) -> Array:
    """Seconds of each row on a GPU, or over its link, in a measurement of its own: short, at the highest clock."""
    name = operation.name
    if isinstance(device, LinkSpec):
        return all_reduce_s(device, operation)
    device = replace(device, sustained_slowdown_frac=0.0)
    if name.startswith("gemm"):
        return gemm_s(device, operation)
    if name.startswith("generation_attention"):
        return attention_rows.generation_s(device, operation.rows)
    if name.startswith("context_attention"):
        return attention_rows.context_s(device, operation.rows)
    if name.startswith("mla"):
        return attention_rows.latent_s(device, operation.rows)
    if name.startswith("moe"):
        return expert_rows.moe_s(device, operation.rows)
    raise ValueError(f"no model of {name}")


def preset(gpu: str, operation: Operation) -> GpuSpec | LinkSpec:
    """What predicts an operation: the GPU's preset, or that of its link."""
    link = {"all_reduce": LINKS[gpu], "nccl_all_reduce": f"{LINKS[gpu]}-nccl"}.get(operation.name)
    found: GpuSpec | LinkSpec = specs.load(f"link/{link}" if link else f"gpu/{PRESETS[gpu]}")
    return found


def validate_folder(folder: Path, progress: Callable[[str], None]) -> dict[str, dict[str, dict[str, float | int]]]:
    """By GPU and operation: n, median, p90, worst of |predicted / measured - 1|, and the rows left out.

    Older versions of a backend, of which a newer one is there, stand apart.

    Raises:
        ProfileError: no tables.
    """
    tables = files(folder)
    latest: dict[tuple[str, str], tuple[int, ...]] = {}
    for each in tables:
        key = each.gpu, each.table
        latest[key] = max(latest.get(key, ()), each.age)
    out: dict[str, dict[str, dict[str, float | int]]] = {}
    for table in tables:
        progress(table.path.name)
        older = f" ({table.version})" if table.age < latest[table.gpu, table.table] else ""
        for operation in read(table):
            errors = statistics(predict_s(preset(table.gpu, operation), operation), operation.seconds)
            left_out = {"suspect": operation.suspect_count, "unmodelled": operation.unmodelled_count}
            out.setdefault(PRESETS[table.gpu], {})[operation.name + older] = errors | left_out
    return out
