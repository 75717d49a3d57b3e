"""Fits the GPU presets and the NVLink all-reduce: ``python -m l3env.experiments.gpu.fit``.

Reads ``experiments/data/h200.csv.gz`` (measured by this project) and, for A100 and H100, the operator profiles of
microsoft/vidur (MIT, commit 7d47513) in ``L3ENV_PROFILE_DIR`` or ``../shared/profiles``, which stay outside the
repository. Writes ``l3env/presets/gpu/{a100-80,h100,h200}.toml`` and ``experiments/data/gpu_fit.json`` with residuals.

Whole models are held out of every fit; the residuals on them are what the model may claim. vidur has one attention
profile, so there batch sizes and chunk lengths are held out instead.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from l3env.experiments.gpu import coefficients as gpu_fit
from l3env.experiments.gpu import raw
from l3env.experiments.gpu.coefficients import Linear, Small
from l3env.experiments.gpu.preset import write_preset
from l3env.experiments.gpu.validation import DATA_DIR, Point, kv_bytes, load_model, predict_ms, statistics
from l3env.machine import specs
from l3env.machine.costs import gpu as costs
from l3env.machine.specs import PRESET_DIR, GpuSpec, ModelSpec

LARGE_KV_BYTES = 8 * 2**20
H200_FIT_MODELS = ("llama-3-8b", "llama-3-70b", "opt-66b")
VIDUR = "operator times of microsoft/vidur (MIT, commit 7d47513, data/profiling)"
MEASURED = "torch 2.11, CUDA 13.0, mean of two to three runs, experiments/data/h200.csv.gz"
VIDUR_LINEAR = {"attn_pre_proj": "qkv", "attn_post_proj": "o", "mlp_up_proj": "up", "mlp_down_proj": "down"}
VIDUR_SMALL = {"input_layernorm": 1, "post_attention_layernorm": 1, "add": 2, "attn_rope": 1, "mlp_act": 1}
REPORT = "experiments/data/gpu_fit.json"
SM_COUNT = {"a100-80": 108, "h100": 132, "h200": 132}


def profile_dir() -> Path:
    return Path(os.environ.get("L3ENV_PROFILE_DIR") or Path(__file__).resolve().parents[3] / "shared" / "profiles")


def vidur_models() -> dict[str, ModelSpec]:
    """The shapes that vidur measured; its Qwen-72B is the first one, with 64 KV heads."""
    base = specs.load("model/llama-3-70b")
    return {
        "llama-2-70b": base,
        "qwen-1-72b": replace(base, kv_heads_count=64, ffn_size=24_576),
        "llama-2-7b": specs.load("model/llama-2-7b"),
    }


class VidurLayers:
    """Linear and small operations of one model on one GPU, all tensor-parallel degrees."""

    def __init__(self, gpu_dir: str, file: str, name: str) -> None:
        table = pd.read_csv(profile_dir() / gpu_dir / f"{file}_layer_ops.csv.gz")
        self.name, self.model = name, vidur_models()[name]
        self.table = (
            table.groupby(["num_tensor_parallel_workers", "num_tokens"]).median(numeric_only=True).reset_index()
        )

    def _ms(self, rows: pd.DataFrame, op: str) -> np.ndarray:
        return rows[f"time_stats.{op}.median"].to_numpy(float)

    def linear(self) -> list[Linear]:
        out = []
        for tp, rows in self.table.groupby("num_tensor_parallel_workers"):
            tokens = rows["num_tokens"].to_numpy(float)
            for op, (k, n) in zip(VIDUR_LINEAR, costs.linear_shapes(self.model, int(str(tp))), strict=True):
                same = np.ones_like(tokens)
                out.append(Linear(tokens, k * same, n * same, self._ms(rows, op) / 1e3))
        return out

    def small(self) -> list[Small]:
        out = []
        for tp, rows in self.table.groupby("num_tensor_parallel_workers"):
            total = sum(times * self._ms(rows, op) for op, times in VIDUR_SMALL.items())
            out.append(Small(self.model, int(str(tp)), rows["num_tokens"].to_numpy(float), np.asarray(total) / 1e3))
        return out

    def points(self) -> list[Point]:
        out = []
        for tp, rows in self.table.groupby("num_tensor_parallel_workers"):
            total = sum(self._ms(rows, op) for op in VIDUR_LINEAR)
            for tokens, ms in zip(rows["num_tokens"], np.asarray(total), strict=True):
                out.append(Point("fc_layer", self.name, int(str(tp)), int(tokens), 1, 1, float(ms)))
        return out


def vidur_attention() -> list[Point]:
    """A100, Llama-2-70B at tp 2, FlashAttention: decode and prefill."""
    table = pd.read_csv(profile_dir() / "a100" / "attention_llama-2-70b_tp2.csv.gz")
    keys = ["is_prefill", "batch_size", "prefill_chunk_size", "kv_cache_size"]
    times = ["time_stats.attn_decode.median", "time_stats.attn_prefill.median"]
    rows = table.groupby(keys)[times].median().reset_index()
    out = []
    for is_prefill, batch, chunk, kv, decode_ms, prefill_ms in rows.itertuples(index=False, name=None):
        if is_prefill and prefill_ms > 0:
            out.append(Point("prefill_attn", "llama-2-70b", 2, int(chunk), 1, int(chunk + kv), float(prefill_ms)))
        elif not is_prefill and decode_ms > 0 and kv > 0:
            out.append(Point("decode_attn", "llama-2-70b", 2, 1, int(batch), int(kv), float(decode_ms)))
    return out


def joined(parts: list[Linear]) -> Linear:
    return Linear(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("tokens", "k", "n", "seconds")))


def errors(device: GpuSpec, points: list[Point], models: dict[str, ModelSpec] | None = None) -> dict[str, Any]:
    """Error statistics by operation; decode attention apart from 8 MiB of KV on."""
    out: dict[str, Any] = {}
    known = models or {}
    for op in ("fc_layer", "decode_attn", "prefill_attn"):
        chosen = [p for p in points if p.op == op]
        groups = {op: chosen}
        if op == "decode_attn":
            large = [kv_bytes(p, known.get(p.model) or load_model(p.model)) >= LARGE_KV_BYTES for p in chosen]
            groups = {
                "decode_attn from 8 MiB": [p for p, is_large in zip(chosen, large, strict=True) if is_large],
                "decode_attn below 8 MiB": [p for p, is_large in zip(chosen, large, strict=True) if not is_large],
            }
        for name, some in groups.items():
            if some:
                out[name] = statistics(predict_ms(device, some, models), np.array([p.ms for p in some]))
    return out


def small_errors(device: GpuSpec, parts: list[Small]) -> dict[str, Any]:
    predicted = [costs.elementwise_layer_s(p.model, device, p.tp, p.tokens) for p in parts]
    return statistics(np.concatenate(predicted), np.concatenate([p.seconds for p in parts]))


def start(name: str) -> GpuSpec:
    device: GpuSpec = specs.load(f"gpu/{name}-ideal")
    return replace(device, name=name, sm_count=SM_COUNT[name])


def fit_h200() -> tuple[GpuSpec, dict[str, Any]]:
    table = raw.read_raw(DATA_DIR / "h200.csv.gz")
    fitted = table["model"].isin(H200_FIT_MODELS)
    device = gpu_fit.fit_linear(start("h200"), load_model("llama-3-8b"), raw.linear(table[fitted]))
    device = gpu_fit.fit_elementwise(device, raw.small(table[fitted]))
    points = raw.points(table)
    inside = [p for p in points if p.model in H200_FIT_MODELS]
    outside = [p for p in points if p.model not in H200_FIT_MODELS]
    device = gpu_fit.fit_prefill(device, [p for p in inside if p.op == "prefill_attn"])
    device = gpu_fit.fit_decode(device, [p for p in inside if p.op == "decode_attn"])
    stacks = raw.stacks(table)
    report = {
        "data": f"this project's measurements on NVIDIA H200s ({MEASURED})",
        "fitted_on": list(H200_FIT_MODELS),
        "held_out": sorted({p.model for p in outside}),
        "residuals_fit": errors(device, inside),
        "residuals_held_out": errors(device, outside),
        "residuals_small_operations": small_errors(device, raw.small(table)),
        "residuals_stack": statistics(raw.predict_stacks_ms(device, stacks), stacks["ms"].to_numpy(float)),
    }
    return device, report


def fit_vidur(
    name: str, gpu_dir: str, fit_on: list[str], held: str, like: GpuSpec | None
) -> tuple[GpuSpec, dict[str, Any]]:
    """``like`` lends its attention parameters where none were measured."""
    files = {"llama-2-70b": "llama-2-70b", "llama-2-7b": "llama-2-7b", "qwen-1-72b": "qwen-72b"}
    layers = {key: VidurLayers(gpu_dir, files[key], key) for key in [*fit_on, held]}
    models = vidur_models()
    inside = [layers[key] for key in fit_on]
    device = gpu_fit.fit_linear(
        start(name), models["llama-2-70b"], joined([part for layer in inside for part in layer.linear()])
    )
    device = gpu_fit.fit_elementwise(device, [part for layer in inside for part in layer.small()])
    fitted = [p for layer in inside for p in layer.points()]
    outside = layers[held].points()
    report: dict[str, Any] = {"data": VIDUR, "fitted_on": fit_on, "held_out": [held]}
    if like is None:
        attention = vidur_attention()
        keep = [p for p in attention if (p.tokens // 32 if p.tokens > 1 else p.batch) % 2 == 0]
        device = gpu_fit.fit_prefill(device, [p for p in keep if p.op == "prefill_attn"], models)
        device = gpu_fit.fit_decode(device, [p for p in keep if p.op == "decode_attn"], models)
        chosen = set(keep)
        fitted += keep
        outside += [p for p in attention if p not in chosen]
        report["held_out"].append("attention: odd batch sizes, chunks of an odd multiple of 32 tokens")
    else:
        lent = [f for f in vars(like) if f.startswith(("prefill_", "decode_"))]
        device = replace(device, **{f: getattr(like, f) for f in lent})
    report |= {
        "residuals_fit": errors(device, fitted, models),
        "residuals_held_out": errors(device, outside, models),
        "residuals_small_operations": small_errors(device, layers[held].small()),
    }
    return device, report


def fit_all_reduce(file: str, link_name: str) -> dict[str, Any]:
    """Latency and share of the bandwidth of NCCL's all-reduce within one node.

    Fitted to the fastest of each size's repeats: the fastest of small messages scatter between 10 and 60 us with the
    processes' launches, which a graph or a custom all-reduce does without.
    """
    link = specs.load(f"link/{link_name}")
    table = pd.read_csv(profile_dir() / "network" / f"{file}_all_reduce.csv.gz")
    table = table[(table["devices_per_node"] == table["num_workers"]) & (table["num_workers"] <= 8)]
    fastest = table.groupby(["num_workers", "size"])["time_stats.all_reduce.min"].median().reset_index()
    seconds = fastest["time_stats.all_reduce.min"].to_numpy(float) / 1e3
    octave = np.floor(np.log2(fastest["size"])).astype(int)  # sizes lie evenly: every octave weighs the same
    weight = 1 / np.sqrt(octave.groupby([octave, fastest["num_workers"]]).transform("size").to_numpy(float))

    def predicted(x: np.ndarray) -> np.ndarray:
        trial = replace(link, latency_s=x[0], utilisation_frac=x[1])
        rows = zip(fastest["num_workers"], fastest["size"], strict=True)
        return np.array([float(costs.all_reduce_s(trial, int(str(tp)), float(size))) for tp, size in rows])

    found = least_squares(
        lambda x: np.log(predicted(x) / seconds) * weight,
        [2e-5, 0.7],
        bounds=([0, 0.1], [1e-3, 1]),
        x_scale=[1e-5, 0.1],
        loss="soft_l1",
        f_scale=gpu_fit.SOFT_ERROR,
    ).x
    times = predicted(found)
    by_tp = {
        f"tp {tp}": statistics(times[rows], seconds[rows])
        for tp in (2, 4, 8)
        if (rows := (fastest["num_workers"] == tp).to_numpy()).any()
    }
    return {
        "data": VIDUR,
        "latency_s": float(f"{found[0]:.3g}"),
        "utilisation_frac": float(f"{found[1]:.3g}"),
        "residuals": by_tp,
    }


def update_link(name: str, fit: dict[str, Any]) -> None:
    """Writes the link's preset: the ideal one with what was fitted."""
    lines = (PRESET_DIR / "link" / f"{name}-ideal.toml").read_text(encoding="utf-8").split("\n")
    text = f'"fitted by experiments/gpu/fit.py to all-reduces within a node: {VIDUR}; residuals in {REPORT}"'
    in_sources = False
    for i, line in enumerate(lines):
        key = line.partition(" = ")[0]
        in_sources |= line == "[sources]"
        if key in ("latency_s", "utilisation_frac"):
            lines[i] = f"{key} = {text if in_sources else fit[key]}"
        elif key == "name":
            lines[i] = f'name = "{name}"'
    lines[0] = lines[0].replace(", the AttAcc-style assumptions", "")
    (PRESET_DIR / "link" / f"{name}.toml").write_text("\n".join(lines), encoding="utf-8")


def sources_of(device: GpuSpec, ideal: GpuSpec, text: str, lent: str = "") -> dict[str, str]:
    sources = dict(ideal.sources)
    for field in (*gpu_fit.LINEAR, *gpu_fit.ELEMENTWISE, *gpu_fit.PREFILL, *gpu_fit.DECODE):
        attention = field.startswith(("prefill_", "decode_"))
        sources[field] = lent if lent and attention else text
    sources["sm_count"] = "vendor data sheet: streaming multiprocessors"
    return sources


def main() -> None:
    report: dict[str, Any] = {"errors": "|predicted / measured - 1|", "gpus": {}, "links": {}}
    h200, report["gpus"]["h200"] = fit_h200()
    a100, report["gpus"]["a100-80"] = fit_vidur("a100-80", "a100", ["llama-2-70b", "llama-2-7b"], "qwen-1-72b", None)
    h100, report["gpus"]["h100"] = fit_vidur("h100", "h100", ["llama-2-70b"], "qwen-1-72b", h200)
    by_fit = "fitted by experiments/gpu/fit.py to {}; residuals in " + REPORT
    lent = "carried over from gpu/h200 (no H100 attention profile; the same multiprocessors), there "
    lent += by_fit.format(MEASURED)
    for device, text, attention in (
        (h200, by_fit.format(f"this project's measurements on an H200: {MEASURED}"), ""),
        (a100, by_fit.format(VIDUR), ""),
        (h100, by_fit.format(VIDUR), lent),
    ):
        ideal = specs.load(f"gpu/{device.name}-ideal")
        title = (PRESET_DIR / "gpu" / f"{device.name}-ideal.toml").read_text(encoding="utf-8").split("\n")[0]
        title = title.removeprefix("# ").replace("plain data-sheet roofline", "fitted to measured operator times")
        sources = sources_of(device, ideal, text, attention)
        write_preset(PRESET_DIR / "gpu" / f"{device.name}.toml", title, device, sources)
        fields = (*gpu_fit.LINEAR, *gpu_fit.ELEMENTWISE, *gpu_fit.PREFILL, *gpu_fit.DECODE)
        report["gpus"][device.name]["parameters"] = {f: getattr(device, f) for f in fields}
    report["links"]["nvlink3"] = fit_all_reduce("a100_dgx", "nvlink3")
    report["links"]["nvlink4"] = fit_all_reduce("h100_dgx", "nvlink4")
    for name, fit in report["links"].items():
        update_link(name, fit)
    (DATA_DIR / "gpu_fit.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
