"""Measures the GPU at hand and writes a preset for it: ``l3env calibrate --model M --tp N --out my-gpu.toml``.

Needs a CUDA build of torch and an idle GPU. A run takes one to three minutes and resumes: beside ``my-gpu.toml`` stand
``my-gpu.csv`` (every measurement, at once), ``my-gpu.json`` (what it was measured on) and ``my-gpu.profile.csv`` (the
form that ``l3env validate gpu`` reads).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from l3env.errors import L3EnvError
from l3env.experiments.gpu import coefficients as gpu_fit
from l3env.experiments.gpu import measure as gpu_measure
from l3env.experiments.gpu import raw
from l3env.experiments.gpu.measure import GpuError, Rows, Shard
from l3env.experiments.gpu.preset import write_preset
from l3env.experiments.gpu.validation import COLUMNS, Point, load_model, validate
from l3env.machine import specs
from l3env.machine.specs import GpuSpec, ModelSpec

TOKENS = [1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 300, 384, 512, 640, 768, 1000, 1024, 1536, 2048, 3000, 4096]
TOKENS += [6144, 8192]
SMALL_TOKENS = [1, 8, 64, 256, 512, 1024, 2048, 4096, 8192]
DECODE = [
    (1, batch, length)
    for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256)
    for length in (128, 256, 512, 1024, 2048, 3000, 4096, 8192, 16_384, 32_768)
    if batch * length <= 2**20
]
PREFILL = [
    (new, 1, new + history)
    for new in (16, 64, 128, 256, 512, 1000, 2048, 4096, 8192)
    for history in (0, 512, 2048, 8192, 24_576)
]
POOL_BYTES = 16 * 2**30
BASES = {"A100": "a100-80", "H100": "h100", "H200": "h200", "H800": "h800", "B200": "b200"}

Progress = Callable[[int, str], None]


class CalibrationError(L3EnvError):
    """The GPU cannot be calibrated; one line says why."""


def shard_of(model: ModelSpec, name: str, tp: int) -> Shard:
    """One GPU's part of a layer.

    Raises:
        CalibrationError: ``tp`` does not divide the heads or the FFN.
    """
    if tp < 1 or model.heads_count % tp or model.ffn_size % tp:
        raise CalibrationError(
            f"tp = {tp}: expected a divisor of {model.heads_count} heads and FFN size {model.ffn_size}"
        )
    return Shard(
        name,
        tp,
        model.hidden_size,
        model.heads_count // tp,
        max(model.kv_heads_count // tp, 1),
        model.head_size,
        model.ffn_size // tp,
        model.gated_ffn,
    )


def make_plan(shard: Shard, pool_bytes: int) -> dict[str, Any]:
    """All that a calibration measures."""
    fields = gpu_measure.shard_fields(shard)
    fp8 = torch.cuda.get_device_capability() >= (8, 9)
    return {
        "pool_bytes": pool_bytes,
        "parts": [
            {"kind": "launch"},
            {"kind": "copies"},
            {"kind": "linear", "shard": fields, "tokens": TOKENS, "fp8": fp8},
            {"kind": "small", "shard": fields, "tokens": SMALL_TOKENS},
            {"kind": "attention", "shard": fields, "points": DECODE + PREFILL, "backends": ["flash", "cudnn"]},
        ],
    }


def base_spec(gpu_name: str, base: str | None) -> tuple[str, GpuSpec]:
    """Data-sheet values to start from: ``base``, or the preset of the GPU's name."""
    if base is None:
        match = [preset for part, preset in BASES.items() if part in gpu_name]
        if not match:
            raise CalibrationError(f"no data sheet for {gpu_name!r}: give --base gpu/NAME or --base gpu:file.toml")
        base = f"gpu/{match[0]}"
    spec: GpuSpec = specs.load(base)
    return base, spec


def calibrate(model_name: str, tp: int | None, out: Path, base: str | None, progress: Progress) -> dict[str, Any]:
    """Measures, fits, writes; returns the fit's own errors by operation.

    Raises:
        CalibrationError: no CUDA torch, no GPU, a busy one, or a CSV of another GPU to resume from.
    """
    model = load_model(model_name)
    shard = shard_of(model, model_name, model.tensor_parallel_count if tp is None else tp)
    try:
        gpu_measure.require_idle_gpu()
    except GpuError as error:
        raise CalibrationError(str(error)) from None
    about = gpu_measure.describe_gpu()
    base_name, start = base_spec(about["gpu"], base)
    _same_gpu(out.with_suffix(".json"), about)
    rows = Rows(out.with_suffix(".csv"))
    free_bytes = torch.cuda.mem_get_info()[0]
    for count, what in enumerate(gpu_measure.steps(make_plan(shard, min(POOL_BYTES, int(0.4 * free_bytes))), rows)):
        progress(count, what)
    table = raw.read_raw(rows.path)
    device = fit(start, model, table, about, out.stem)
    points = raw.points(table)
    write_profile(out.with_name(f"{out.stem}.profile.csv"), points)
    write_preset(out, title(about, table), device, sources(start, base_name, about, rows.path.name))
    return validate(device, points)


def _same_gpu(path: Path, about: dict[str, Any]) -> None:
    """Keeps what a CSV was measured on beside it."""
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before != about:
            raise CalibrationError(
                f"{path}: measured on other hardware or software; give another --out to start afresh"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def fit(start: GpuSpec, model: ModelSpec, table: pd.DataFrame, about: dict[str, Any], name: str) -> GpuSpec:
    """A spec with the parameters fitted to the measurements."""
    device = replace(start, name=name, sm_count=about["sm_count"], hbm_bytes=float(about["memory_bytes"]))
    device = gpu_fit.fit_linear(device, model, raw.linear(table))
    device = gpu_fit.fit_elementwise(device, raw.small(table))
    points = raw.points(table)
    device = gpu_fit.fit_prefill(device, [p for p in points if p.op == "prefill_attn"])
    return gpu_fit.fit_decode(device, [p for p in points if p.op == "decode_attn"])


def sources(start: GpuSpec, base_name: str, about: dict[str, Any], csv_name: str) -> dict[str, str]:
    """Where each value of the preset comes from."""
    carried = {key: f"{base_name}: {text}" for key, text in start.sources.items()}
    fitted = f"l3env calibrate: fitted to {csv_name}, {about['gpu']}, torch {about['torch']}, CUDA {about['cuda']}"
    for field in (*gpu_fit.LINEAR, *gpu_fit.ELEMENTWISE, *gpu_fit.PREFILL, *gpu_fit.DECODE):
        carried[field] = fitted
    asked = f"l3env calibrate: as the driver of {about['gpu']} says"
    return carried | {"sm_count": asked, "hbm_bytes": asked}


def title(about: dict[str, Any], table: pd.DataFrame) -> str:
    """What the preset says in its first lines: the GPU, and what was measured beside the fit."""
    lines = [f"{about['gpu']}, measured by l3env calibrate"]
    for op, what in (
        ("copy_d2d", "within the GPU, read and write"),
        ("copy_h2d", "host to GPU"),
        ("copy_d2h", "to host"),
    ):
        copies = table[table["op"] == op]
        if len(copies):
            rate = (copies["n"] / copies["ms"] * 1e3).max() * (2 if op == "copy_d2d" else 1)
            lines.append(f"# copies {what}: up to {rate / 1e9:,.0f} GB/s")
    launch = table[table["op"] == "launch_gap"]["ms"]
    if len(launch):
        lines.append(f"# one empty kernel of a graph: {launch.iloc[0] * 1e3:.2f} us")
    keys = ["op", "model", "tp", "tokens"]
    pairs = table[table["backend"] == "bf16"].merge(table[table["backend"] == "fp8"], on=keys)
    large = pairs[pairs["tokens"] >= 2048]
    if len(large):
        faster = (large["ms_x"] / large["ms_y"]).median()
        lines.append(f"# linear operations in FP8 (E4M3), 2,048 tokens on: {faster:.2f} times as fast")
    return "\n".join(lines)


def write_profile(path: Path, points: list[Point]) -> None:
    """The measurements as a profile."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([p.op, p.model, p.tp, p.tokens, p.batch, p.kv_len, f"{p.ms:.6g}"] for p in points)
