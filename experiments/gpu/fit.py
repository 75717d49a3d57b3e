"""Fits the GPU and NVLink presets to tables of operators: ``l3env calibrate gpu FOLDER``.

The tables are those of NVIDIA's aiconfigurator (Apache-2.0), which stay outside the repository (``operators`` says what
they look like). Of what they do not hold, the small operations between products, ``experiments/data/h200.csv.gz``
(measured by this project) and the layers of microsoft/vidur (MIT, commit 7d47513) on an A100 are used: other harnesses.
Writes presets, and with residuals ``gpu_fit.json``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from l3env.errors import ProfileError
from l3env.experiments.gpu import coefficients, energy_rows, operators, raw, refit
from l3env.experiments.gpu.operator_errors import REPORT
from l3env.experiments.gpu.operators import LINKS, PRESETS, Operation
from l3env.experiments.gpu.predict import predict_s
from l3env.experiments.gpu.preset import write_preset
from l3env.experiments.gpu.validation import DATA_DIR, load_model, statistics
from l3env.machine import specs
from l3env.machine.specs import PRESET_DIR, GpuSpec, LinkSpec

SOURCE = "operator times of vLLM kernels, NVIDIA aiconfigurator (Apache-2.0, commit 095f58a)"
FITTED = "fitted by l3env calibrate gpu to {}: {}; residuals in docs/gpu-validation.md"
SM_COUNT = {"a100": 108, "h100": 132, "h200": 132, "b200": 148}
CACHE_BYTES = {"a100": 40e6, "h100": 50e6, "h200": 50e6, "b200": 63e6}  # a B200's 126 MB lie in two halves
KERNELS: dict[str, dict[str, Any]] = {  # how each GPU's attention kernels work, from their sources
    "a100": {"prefill_packs_heads": False, "prefill_splits_keys": False},
    "h100": {"prefill_packs_heads": True, "prefill_splits_keys": True},
    "h200": {"prefill_packs_heads": True, "prefill_splits_keys": True},
    "b200": {"prefill_packs_heads": False, "prefill_splits_keys": False},
}
KERNEL_SOURCES = {
    "a100": "FlashAttention-2 as vLLM 0.14 calls it (flash_attn_varlen_func): keys are split for decode steps of "
    "grouped heads only",
    "h100": "FlashAttention-3 as vLLM calls it: query heads of a KV head packed into a tile, keys split where "
    "tiles are few",
    "b200": "TRT-LLM's kernels of FlashInfer as vLLM calls them; whether long histories are split was not "
    "measured: not, as assumed",
}
SUSTAINED = {  # not in the tables, whose calls are short
    "a100": (
        0.2,
        "fitted to layers of Llama-2-70B that microsoft/vidur measured (MIT, commit 7d47513, data/profiling)",
    ),
    "h100": (
        0.18,
        "fitted to steps of vLLM 0.22.0 with Llama-3-8B on an H100 that follow one another with 2,000 prompt tokens",
    ),
    "h200": (0.16, "fitted to linear operations of experiments/data/h200.csv.gz, bursts of milliseconds"),
    "b200": (0.16, "carried over from gpu/h200: assumed"),
}
SUSTAINED_PREFILL = {"h100": 0.18}  # of attention, by the same steps; elsewhere nobody has measured it
DATA_SHEET = "vendor data sheet: streaming multiprocessors"
CACHE = "vendor data sheet: L2 cache"
TITLES = {
    "a100": "NVIDIA A100-SXM4-80GB",
    "h100": "NVIDIA H100-SXM5-80GB",
    "h200": "NVIDIA H200-SXM5-141GB",
    "b200": "NVIDIA B200 (SXM)",
}
GROUPS = {
    "gemm": (refit.LINEAR,),
    "gemm, FP8": (refit.LINEAR_FP8,),
    "generation_attention": (refit.DECODE, refit.DECODE_UNSPLIT),
    "context_attention": (refit.PREFILL,),
    "attention, FP8 KV": (refit.PREFILL_FP8, refit.DECODE_FP8),
    "mla": (refit.LATENT,),
    "moe": (refit.EXPERTS, refit.EXPERTS_FP8),
}
WATTS = (
    "fitted by l3env calibrate gpu to watts of vLLM kernels above 0.1 ms, NVIDIA aiconfigurator (Apache-2.0, commit "
    "095f58a): median errors {} by operation, docs/gpu-validation.md"
)
Progress = Callable[[str], None]


def start(gpu: str) -> GpuSpec:
    """The data sheet's values and what is known of the kernels."""
    device: GpuSpec = specs.load(f"gpu/{PRESETS[gpu]}-ideal")
    known = {"sm_count": SM_COUNT[gpu], "cache_bytes": CACHE_BYTES[gpu]} | KERNELS[gpu]
    return replace(device, name=PRESETS[gpu], **known)


def elementwise(gpu: str, device: GpuSpec) -> tuple[GpuSpec, str]:
    """Small operations: an A100's from vidur where it is at hand, the others' from this project's H200."""
    if gpu == "a100":
        folder = Path(os.environ.get("L3ENV_PROFILE_DIR") or Path(__file__).resolve().parents[3] / "shared/profiles")
        path = folder / "a100" / "llama-2-70b_layer_ops.csv.gz"
        if path.is_file():
            return coefficients.fit_elementwise(device, vidur_small(path)), VIDUR
        old: GpuSpec = specs.load("gpu/a100-80")
        return coefficients.carry(device, old, coefficients.ELEMENTWISE), VIDUR
    h200 = coefficients.fit_elementwise(start("h200"), raw.small(raw.read_raw(DATA_DIR / "h200.csv.gz")))
    carried = coefficients.carry(device, h200, coefficients.ELEMENTWISE)
    return carried, MEASURED if gpu == "h200" else f"carried over from gpu/h200: {MEASURED}"


VIDUR = "fitted to operator times of microsoft/vidur (MIT, commit 7d47513, data/profiling), Llama-2-70B"
MEASURED = "fitted to an H200's, torch 2.11, CUDA 13.0, experiments/data/h200.csv.gz"
VIDUR_SMALL = {"input_layernorm": 1, "post_attention_layernorm": 1, "add": 2, "attn_rope": 1, "mlp_act": 1}


def vidur_small(path: Path) -> list[coefficients.Small]:
    """Small operations of Llama-2-70B's layers."""
    table = pd.read_csv(path)
    groups = table.groupby(["num_tensor_parallel_workers", "num_tokens"]).median(numeric_only=True).reset_index()
    model, out = load_model("llama-3-70b"), []
    for tp, rows in groups.groupby("num_tensor_parallel_workers"):
        ms = sum(times * rows[f"time_stats.{op}.median"].to_numpy(float) for op, times in VIDUR_SMALL.items())
        out.append(coefficients.Small(model, int(str(tp)), rows["num_tokens"].to_numpy(float), np.asarray(ms) / 1e3))
    return out


def fit_gpu(gpu: str, operations: list[Operation], progress: Progress) -> tuple[GpuSpec, dict[str, str]]:
    """A GPU's spec and the sources of what was fitted."""
    device = start(gpu)
    device, small_source = elementwise(gpu, device)
    cited = dict.fromkeys(coefficients.ELEMENTWISE, small_source) | {"sm_count": DATA_SHEET, "cache_bytes": CACHE}
    cited |= dict.fromkeys(KERNELS[gpu], KERNEL_SOURCES.get(gpu, KERNEL_SOURCES["h100"]))
    slowdown, cited["sustained_slowdown_frac"] = SUSTAINED[gpu]
    device = replace(device, sustained_slowdown_frac=slowdown)
    if gpu in SUSTAINED_PREFILL:
        device = replace(device, prefill_slowdown_frac=SUSTAINED_PREFILL[gpu])
        cited["prefill_slowdown_frac"] = cited["sustained_slowdown_frac"]
    cited["prefill_tile_rows"] = f"the best of 64, 128 and 256 for context_attention: {SOURCE}"
    for what, groups in GROUPS.items():
        for group in groups:
            if gpu not in group.gpus:
                continue
            progress(f"{gpu}: {what}")
            before, device = device, refit.fit_group(device, group, operations)
            if device is not before:
                cited |= dict.fromkeys(group.bounds, FITTED.format(what, SOURCE))
    return device, cited


def residuals(device: GpuSpec | LinkSpec, operations: list[Operation]) -> dict[str, dict[str, Any]]:
    """Errors of each operation, of the shapes that were fitted and of those held out."""
    out = {}
    for each in operations:
        predicted, measured, held = predict_s(device, each), each.seconds, refit.held_out(each)
        parts = {"fitted": ~held, "held_out": held}
        out[each.name] = {
            "version": each.version,
            "suspect": each.suspect_count,
            "unmodelled": each.unmodelled_count,
            **{key: statistics(predicted[mask], measured[mask]) for key, mask in parts.items() if mask.any()},
        }
    return out


def fit_watts(gpu: str, device: GpuSpec, folder: Path) -> tuple[GpuSpec, dict[str, Any]]:
    """The device with energies fitted to what watts a folder has, and the report; as it was where there are none."""
    measured = energy_rows.read_metered(folder, gpu)
    if not measured:
        return device, {}
    device, before_w = energy_rows.fit_energy(device, measured)
    parameters = {name: getattr(device, name) for name in energy_rows.BOUNDS}
    rows = energy_rows.residuals(device, measured, before_w)
    return device, {"parameters": parameters, "before_w": before_w, "residuals": rows}


def energy_sources(watts: dict[str, Any]) -> dict[str, str]:
    """Sources of fitted energies, with the range of their median errors."""
    medians = [row["fitted"]["energy"]["median"] for row in watts["residuals"].values() if "fitted" in row]
    text = WATTS.format(f"{min(medians):.1%} to {max(medians):.0%}")
    both = {"hbm_j_per_byte": f"{text}; HBM and caches together, less cache_j_per_byte"}
    return dict.fromkeys(energy_rows.BOUNDS, text) | both


def fit_links(gpu: str, operations: list[Operation]) -> dict[str, LinkSpec]:
    """The link with the engine's all-reduce and with NCCL's, by preset name."""
    name, out = LINKS[gpu], {}
    for suffix, group in (("", refit.CUSTOM), ("-nccl", refit.NCCL)):
        base: LinkSpec = replace(specs.load(f"link/{name}-ideal"), name=name + suffix)
        link = refit.fit_group(base, group, operations)
        if link is not base:
            out[link.name] = link
    return out


def read_folder(folder: Path) -> dict[str, list[Operation]]:
    """Operations by GPU, those of the newest version of each table; older ones are validated, not fitted."""
    latest: dict[tuple[str, str], operators.Found] = {}
    for found in operators.files(folder):
        key = found.gpu, found.table
        if key not in latest or found.age > latest[key].age:
            latest[key] = found
    out: dict[str, list[Operation]] = {}
    for found in latest.values():
        out.setdefault(found.gpu, []).extend(operators.read(found))
    return out


def fitted_text(group: refit.Group) -> str:
    return FITTED.format(" and ".join(group.operations), SOURCE)


def write(out: Path, gpu: str, device: GpuSpec, cited: dict[str, str], links: dict[str, LinkSpec]) -> None:
    """The presets."""
    (out / "gpu").mkdir(parents=True, exist_ok=True)
    (out / "link").mkdir(parents=True, exist_ok=True)
    ideal: GpuSpec = specs.load(f"gpu/{PRESETS[gpu]}-ideal")
    title = f"{TITLES[gpu]}, fitted to measured operator times"
    write_preset(out / "gpu" / f"{device.name}.toml", title, device, dict(ideal.sources) | cited)
    for name, link in links.items():
        base: LinkSpec = specs.load(f"link/{LINKS[gpu]}-ideal")
        group = refit.NCCL if name.endswith("-nccl") else refit.CUSTOM
        what = "NCCL's all-reduce" if name.endswith("-nccl") else "a serving engine's own all-reduce"
        sources = dict(base.sources) | dict.fromkeys(group.bounds, f"{gpu.upper()}: {fitted_text(group)}")
        write_preset(out / "link" / f"{name}.toml", f"NVLink of the {gpu.upper()}: {what}", link, sources)


CARRIED = {"h800": ("h100", "the same die"), "gb200": ("b200", "the same die")}
OWN_KERNELS = {  # what DeepSeek's kernels on H800s do in their own way
    "h800": (
        "expert_",
        "fp8_expert_",
        "fp8_utilisation",
        "fp8_sm_",
        "fp8_kv_",
        "latent_",
        "quantise_",
        "block_",
        "prefill_latent_",
    ),
    "gb200": ("none",),
}


def carry_preset(out: Path, name: str) -> None:
    """A GPU that was not measured with the parameters of a relative; its data sheet and fields of its own stay."""
    like, why = CARRIED[name]
    own: GpuSpec = specs.load(f"gpu/{name}")
    path = out / "gpu" / f"{like}.toml"
    other: GpuSpec = specs.load(f"gpu:{path}")
    sheet = specs.load(f"gpu/{like}-ideal").sources
    kept = {key for key, text in own.sources.items() if not text.startswith("carried over from gpu/")}
    names = [key for key in other.sources if key not in sheet and key not in kept]
    names = [key for key in names if not key.startswith(OWN_KERNELS[name])]
    names += ["compute_utilisation_frac", "memory_utilisation_frac"]
    names += ["mac_j", "hbm_j_per_byte"] if other.busy_power_w else []
    sources = {key: text for key, text in own.sources.items() if key in kept}
    sources |= dict.fromkeys(names, f"carried over from gpu/{like}: {why}")
    title = (PRESET_DIR / "gpu" / f"{name}.toml").read_text("utf-8").splitlines()[0].removeprefix("# ")
    write_preset(out / "gpu" / f"{name}.toml", title, coefficients.carry(own, other, names), sources)


def refit_folder(folder: Path, out: Path, progress: Progress) -> dict[str, Any]:
    """Fits all that a folder has tables of, writes presets to ``out`` and returns the report.

    Raises:
        ProfileError: no tables.
    """
    report: dict[str, Any] = {"errors": "|predicted / measured - 1|", "data": SOURCE, "gpus": {}, "links": {}}
    done: set[str] = set()
    for gpu, operations in sorted(read_folder(folder).items()):
        device, cited = fit_gpu(gpu, operations, progress)
        progress(f"{gpu}: watts")
        device, watts = fit_watts(gpu, device, folder)
        cited |= energy_sources(watts) if watts else {}
        links = {name: link for name, link in fit_links(gpu, operations).items() if name not in done}
        done |= set(links)
        write(out, gpu, device, cited, links)
        own = [each for each in operations if "reduce" not in each.name]
        values = {
            f.name: getattr(device, f.name)
            for f in fields(device)
            if f.name in cited.keys() - energy_rows.BOUNDS.keys()
        }
        report["gpus"][device.name] = {"parameters": values, "residuals": residuals(device, own)}
        if watts:
            report["gpus"][device.name]["energy"] = watts
        for name, link in links.items():
            group = refit.NCCL if name.endswith("-nccl") else refit.CUSTOM
            mine = [each for each in operations if each.name in group.operations]
            values = {key: getattr(link, key) for key in group.bounds}
            report["links"][name] = {"parameters": values, "residuals": residuals(link, mine)}
    if not report["gpus"]:
        raise ProfileError(f"{folder}: nothing to fit")
    for name, (like, _) in CARRIED.items():
        if like in report["gpus"]:
            carry_preset(out, name)
    (out / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report
