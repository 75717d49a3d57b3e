"""Predicted times of an operation's rows, as the engine's tables have them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from l3env.experiments.gpu import attention_rows, expert_rows
from l3env.experiments.gpu.operators import Array, Operation
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


def predict_s(device: GpuSpec | LinkSpec, operation: Operation, *, lasting: bool = False) -> Array:
    """Seconds of each row on a GPU, or over its link, in a measurement of its own: short, at the highest clock, or a
    lasting load."""
    name = operation.name
    if isinstance(device, LinkSpec):
        return all_reduce_s(device, operation)
    device = device if lasting else replace(device, sustained_slowdown_frac=0.0, prefill_slowdown_frac=0.0)
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
