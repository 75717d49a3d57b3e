"""The disaggregated roofline (arXiv 2504.17584): ``l3env roofline``.

Throughput at batch B is the smaller of the FC line (tokens/s of the GPUs, rising with B until they are compute-bound)
and the attention line (bandwidth over KV bytes read per token, flat in B), with B capped by capacity.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from l3env import Workload, load
from l3env.errors import SpecError
from l3env.files import whole
from l3env.machine import specs
from l3env.machine.costs import experts
from l3env.machine.specs import ModelSpec, SystemSpec
from l3env.machine.tables import compile_tables
from l3env.units import GB, TERA

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Roofline:
    """Lines of one model on one kind of GPU node, at one context length.

    Attributes:
        context_tokens: KV tokens a decode step reads per request, on average over all output tokens.
    """

    model: ModelSpec
    system: SystemSpec
    tp: int
    context_tokens: float

    def fc_tokens_per_s(self, batch: Array) -> Array:
        """FC line of the whole node for a batch shared by its replicas; fractions of a token by linear time."""
        replicas = self.system.gpus_count // self.tp
        each = np.asarray(batch, dtype=float) / replicas
        time_s = np.maximum(*experts.fc_and_all_to_all_s(self.system, self.model, self.tp, np.maximum(each, 1.0)))
        return replicas * each / time_s

    def attention_tokens_per_s(self, bytes_per_s: ArrayLike) -> Array:
        """Attention line."""
        return np.asarray(bytes_per_s) / (self.model.kv_bytes_per_token * self.context_tokens)

    def batch(self, capacity_bytes: ArrayLike) -> Array:
        """Capacity line: the largest batch."""
        return np.asarray(capacity_bytes) / (self.model.kv_bytes_per_token * self.context_tokens)

    def tokens_per_s(self, capacity_bytes: ArrayLike, bytes_per_s: ArrayLike) -> Array:
        """min(FC line at the capacity's batch, attention line)."""
        return np.minimum(self.fc_tokens_per_s(self.batch(capacity_bytes)), self.attention_tokens_per_s(bytes_per_s))


def mean_context_tokens(workload: Workload) -> float:
    """KV tokens read per output token: sum of out x (prompt + out / 2) over sum of out."""
    out = workload.output_tokens.astype(float)
    return float((out * (workload.prompt_tokens + out / 2)).sum() / out.sum())


def points(model: str) -> list[tuple[str, float, float]]:
    """(system, bytes for KV, bytes/s of decode attention) of the A100 systems that hold the model."""
    found = []
    for name in specs.names("system"):
        if not name.endswith("dgx-a100"):
            continue
        system = load(f"system/{name}")
        try:
            tables = compile_tables(system, load(f"model/{model}"))
        except SpecError:
            continue
        per_token = tables.model.kv_bytes_per_token * tables.replicas_count
        if system.pim is not None:
            rate = system.pim.internal_bytes_per_s * system.pim.internal_utilisation_frac
            found.append((name, tables.pim_tokens * per_token, rate))
        else:
            rate = system.gpus_count * system.gpu.hbm_bytes_per_s * system.gpu.memory_utilisation_frac
            found.append((name, tables.hbm_tokens * per_token, rate))
    return found


def draw(roofline: Roofline, marks: list[tuple[str, float, float]], system: str, path: Path) -> Path:
    """Contours of throughput over capacity and bandwidth with the systems marked; the three lines for one system."""
    picture = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = picture.subplots(1, 2)
    capacities, rates = np.geomspace(20 * GB, 8000 * GB, 200), np.geomspace(0.2 * TERA, 400 * TERA, 200)
    grid = roofline.tokens_per_s(capacities[None, :], rates[:, None])
    levels = np.geomspace(grid.min(), grid.max(), 14)
    shown = left.contourf(capacities / GB, rates / TERA, grid, levels=levels, cmap="viridis", norm="log")
    picture.colorbar(shown, ax=left, label="output tokens/s", format="{x:,.0f}")
    for name, capacity, rate in marks:
        left.plot(capacity / GB, rate / TERA, "o", color="white", markeredgecolor="black")
        place = (6, 5) if name.startswith(("l3", "hbm-pim-ext", "gpu")) else (6, -11)
        label = name.removesuffix("-dgx-a100")
        left.annotate(label, (capacity / GB, rate / TERA), xytext=place, textcoords="offset points", color="white")
    left.set(xscale="log", yscale="log", xlabel="capacity for KV (GB)", ylabel="bandwidth of decode attention (TB/s)")
    title = f"{roofline.model.name}, {roofline.context_tokens:,.0f} tokens of context"
    left.set_title(f"throughput, {title}")
    capacity, rate = next((c, r) for name, c, r in marks if name == system)
    batches = np.geomspace(1, 4 * max(float(roofline.batch(np.array(capacity))), 64), 300)
    right.plot(batches, roofline.fc_tokens_per_s(batches), label="FC line (GPUs)", color="#0072B2")
    attention = float(roofline.attention_tokens_per_s(np.array(rate)))
    right.axhline(attention, label="attention line (bandwidth)", color="#D55E00", linestyle="--")
    largest = float(roofline.batch(np.array(capacity)))
    right.axvline(largest, label=f"capacity line (batch {largest:,.0f})", color="#009E73", linestyle=":")
    reached = float(roofline.tokens_per_s(np.array(capacity), np.array(rate)))
    right.plot(largest, reached, "o", color="black", label=f"{system}: {reached:,.0f} tokens/s")
    right.set(xscale="log", yscale="log", xlabel="batch (requests)", ylabel="output tokens/s", title=system)
    right.legend()
    right.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as file:
        picture.savefig(file, format="png", dpi=150)
    return path
