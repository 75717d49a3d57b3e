"""Joules of measured operations: from their watts, and from the energies that the engine's tables are made of.

The tables' watts are means of NVML's readings every 0.1 s during a run, and a reading is itself the mean of the last
second (NVML reference, nvmlDeviceGetPowerUsage, Ampere except GA100 and newer). A run that begins on a GPU at rest
therefore shows too little: ``shown_w``. How long a run is, is aiconfigurator's rule (collector/helper.py,
benchmark_with_power): a second, 0.3 s for calls below 0.1 ms, 6 to 3,000 calls, after three warm-ups twice. Products
and experts are small to set up, their runs follow one another, and what is shown has settled; attention sets up its KV
first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from l3env.experiments.gpu import attention_rows, expert_rows
from l3env.experiments.gpu.operators import Array, Operation, files, read
from l3env.experiments.gpu.predict import gemm_model, predict_s
from l3env.experiments.gpu.refit import SOFT_ERROR, fitted_part, held_out
from l3env.experiments.gpu.validation import statistics
from l3env.jit import kernel
from l3env.machine.arrays import COEF_DTYPE
from l3env.machine.costs import energy
from l3env.machine.costs.gpu import attention_shapes, ffn_shapes
from l3env.machine.price import gpu_busy_j
from l3env.machine.specs import GpuSpec

SETTLED_S = 1e-4  # watts of shorter calls are too low: NVML's mean takes in the time between runs
SECOND_S = 1.0  # NVML's mean
WARM_UPS = 6
LEAST_CALLS, MOST_CALLS = 6, 3000
BRIEF_S, BRIEF_RUN_S = 1e-4, 0.3
EAGER_S = {"mla": 3e-4, "context": 0.0, "generation": 0.0}  # a call outside its graph takes no less: estimates
BOUNDS = {  # (start, low, high)
    "busy_power_w": (300.0, 0.0, 1000.0),
    "mac_j": (1e-12, 0.0, 1e-10),
    "fp8_mac_j": (1e-12, 0.0, 1e-10),
    "hbm_j_per_byte": (6e-11, 0.0, 1e-9),
}
NO_JOULES = 1e-30  # 0 would mean "as 16 bit"
BEFORE_W = dict.fromkeys(EAGER_S, (300.0, 0.0, 1000.0))  # what was drawn before a run


@kernel
def busy_rows_j(coef: Any, work_j: Array, busy_s: Array, out: Array) -> None:
    """The engine's formula for each row, into ``out``."""
    for i in range(out.size):
        out[i] = gpu_busy_j(coef[0], work_j[i], busy_s[i])


def work_j(device: GpuSpec, operation: Operation) -> Array:
    """Joules of computing and moving of each row's call."""
    name, rows = operation.name, operation.rows
    if name.startswith("gemm"):
        model = gemm_model(name.removeprefix("gemm_"))
        return energy.linear_j(model, device, *(operation.column(each) for each in ("m", "k", "n")))
    if name.startswith("moe"):
        return _experts_j(device, rows)
    if name.startswith("mla"):
        return _latent_j(device, rows)
    return _attention_j(device, rows)


def _experts_j(device: GpuSpec, rows: pd.DataFrame) -> Array:
    found = [expert_rows.routed(*key) for key in rows[expert_rows.SHAPE].itertuples(index=False, name=None)]
    hit, pairs = np.array([each.hit for each in found]), np.array([each.pairs for each in found])
    out = np.empty(len(rows))
    keys = rows.groupby(["moe_dtype", "hidden_size", "inter_size", "topk", "moe_tp_size"], sort=False)
    groups: list[Any] = list(keys.indices.items())
    for (dtype, hidden, inner, chosen, split), places in groups:
        model = expert_rows.expert_model(str(dtype), int(hidden), gated=(inner, chosen) not in expert_rows.UNGATED)
        each = energy.shapes_j(model, device, ffn_shapes(model, inner / split))
        out[places] = hit[places] * each[0] + pairs[places] * each[1]
    return out


def _latent_j(device: GpuSpec, rows: pd.DataFrame) -> Array:
    out = np.empty(len(rows))
    groups: list[Any] = list(rows.groupby(["num_heads", "kv_cache_dtype", "gemm_type"]).indices.items())
    for key, places in groups:
        model = attention_rows.latent_model(*key)
        requests, chunks, steps = (rows[name].to_numpy(float)[places] for name in ("batch_size", "isl", "step"))
        products = energy.shapes_j(model, device, attention_shapes(model, 1))
        prefill = requests * chunks * (chunks + 1) / 2 * energy.attention_pair_j(model, device.mac_j)
        prefill += requests * chunks * model.kv_bytes_per_token * energy.gpu_byte_j(device)
        decode = requests * np.maximum(steps, 1) * energy.hbm_token_j(model, device)
        out[places] = products[0] + requests * chunks * products[1] + np.where(chunks > 1, prefill, decode)
    return out


def _attention_j(device: GpuSpec, rows: pd.DataFrame) -> Array:
    """Prompts, or a token on ``step`` earlier ones, of which a window may be seen."""
    shapes, requests = attention_rows.dense_shapes(rows), rows["batch_size"].to_numpy(float)
    chunks, steps, windows = (rows[name].to_numpy(float) for name in ("isl", "step", "window_size"))
    first = np.where(windows > 0, np.minimum(chunks, windows), chunks)
    pairs = first * (first + 1) / 2 + (chunks - first) * first
    seen = np.where(windows > 0, np.minimum(steps + 1, windows), steps + 1)
    pair_j = np.array([energy.attention_pair_j(model, device.mac_j) for model in shapes.models])[shapes.places]
    token_j = np.array([energy.hbm_token_j(model, device) for model in shapes.models])[shapes.places]
    moved_j = np.array([model.kv_bytes_per_token for model in shapes.models])[shapes.places] * energy.gpu_byte_j(device)
    return requests * np.where(chunks > 1, pairs * pair_j + chunks * moved_j, seen * token_j)


def drawn_w(device: GpuSpec, joules: Array, seconds: Array) -> Array:
    """Watts that a GPU draws in calls of so much work and so many seconds, one after the other."""
    coef, out = np.zeros(1, COEF_DTYPE), np.empty(seconds.size)
    coef["gpu_busy_w"], coef["gpu_most_w"] = energy.gpu_busy_w(device, 1)
    busy_rows_j(coef, joules, seconds, out)
    return device.idle_power_w + out / seconds


def settled_frac(kind: str, seconds: Array) -> Array:
    """Share of a run's own watts in what is shown of it, the rest being those before it; 1 where runs follow closely.

    A reading t after the start holds min(1, w + t) of the run, w of warm-ups: its mean over the run.
    """
    if kind not in EAGER_S:
        return np.ones_like(seconds)
    eager = np.maximum(seconds, EAGER_S[kind])
    wanted = np.where(eager < BRIEF_S, BRIEF_RUN_S, SECOND_S)
    run = np.clip(np.floor(wanted / eager) + 1, LEAST_CALLS, MOST_CALLS) * seconds
    warm = np.minimum(WARM_UPS * seconds, SECOND_S)
    rising = np.minimum(run, SECOND_S - warm)
    return (rising * (warm + rising / 2) / SECOND_S + run - rising) / run


def shown_w(name: str, watts: Array, seconds: Array, before_w: Mapping[str, float]) -> Array:
    """The watts that the table's harness would show of calls of an operation that draw so many."""
    kind = name.split("_")[0]
    share = settled_frac(kind, seconds)
    return share * watts + (1 - share) * before_w.get(kind, 0.0)


def metered(operation: Operation) -> Operation:
    """The rows whose watts have been measured, of calls that are long enough; none where there are none."""
    if "power_w" not in operation.rows:
        return operation.only(np.zeros(len(operation.rows), bool))
    return operation.only((operation.column("power_w") > 0) & (operation.seconds >= SETTLED_S))


def read_metered(folder: Path, gpu: str) -> list[Operation]:
    """Operations of a GPU with watts, of the newest tables that have them."""
    newest: dict[str, Operation] = {}
    for found in sorted((each for each in files(folder) if each.gpu == gpu), key=lambda each: each.age):
        for operation in read(found):
            if "reduce" not in operation.name and len(metered(operation).rows):
                newest[operation.name] = metered(operation)
    return list(newest.values())


def unit_work(device: GpuSpec, operation: Operation) -> Array:
    """(N, 3) work of each row for one joule per multiply-accumulate in 16 bit, in 8 bit, and per byte."""
    columns = []
    for own in np.eye(3) + NO_JOULES:
        unit = replace(device, mac_j=own[0], fp8_mac_j=own[1], hbm_j_per_byte=own[2], cache_j_per_byte=0.0)
        columns.append(work_j(unit, operation))
    return np.stack(columns, axis=1)


def fit_energy(device: GpuSpec, operations: list[Operation]) -> tuple[GpuSpec, dict[str, float]]:
    """The device with its energies fitted to watts at the measured times, and what was drawn before runs.

    Every operation weighs the same; a third of the shapes is held out as of times.
    """
    parts = [each for each in (fitted_part(each, None) for each in operations) if len(each.rows)]
    works = [unit_work(device, each) for each in parts]
    start, low, high = (np.array([each[i] for each in (BOUNDS | BEFORE_W).values()]) for i in range(3))
    low[0], high[0] = device.idle_power_w, device.power_w
    weights = np.concatenate([np.full(len(each.rows), len(each.rows) ** -0.5) for each in parts])
    measured = np.log(np.concatenate([each.column("power_w") for each in parts]))

    def residual(x: Array) -> Array:
        busy_w, per_unit, before_w = (
            x[0] * start[0],
            x[1:4] * start[1:4],
            dict(zip(BEFORE_W, x[4:] * start[4:], strict=True)),
        )
        trial = replace(device, busy_power_w=float(busy_w))
        shown = [
            shown_w(each.name, drawn_w(trial, work @ per_unit, each.seconds), each.seconds, before_w)
            for each, work in zip(parts, works, strict=True)
        ]
        return (np.log(np.concatenate(shown)) - measured) * weights / weights.mean()

    bounds = low / start, high / start
    found = least_squares(residual, np.ones(start.size), bounds=bounds, loss="soft_l1", f_scale=SOFT_ERROR).x * start
    found[3] = max(found[3] - device.cache_j_per_byte, 0.0)
    values: dict[str, Any] = {name: float(f"{each:.4g}") for name, each in zip(BOUNDS, found, strict=False)}
    return replace(device, **values), dict(zip(BEFORE_W, found[4:].round(1).tolist(), strict=True))


def errors(device: GpuSpec, operation: Operation, before_w: Mapping[str, float]) -> dict[str, Any]:
    """|predicted / measured - 1| of joules a call: at the measured time, at the predicted one (a run of a second is a
    lasting load), and at the measured one without the harness's lag."""
    measured_s, joules = operation.seconds, work_j(device, operation)
    measured_j, own_s = operation.column("power_w") * measured_s, predict_s(device, operation, lasting=True)
    drawn = drawn_w(device, joules, measured_s)
    own = shown_w(operation.name, drawn_w(device, joules, own_s), own_s, before_w)
    return {
        "energy": statistics(shown_w(operation.name, drawn, measured_s, before_w) * measured_s, measured_j),
        "energy_at_predicted_time": statistics(own * own_s, measured_j),
        "energy_without_lag": statistics(drawn * measured_s, measured_j),
    }


def residuals(device: GpuSpec, operations: list[Operation], before_w: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Errors of each operation, of the shapes that were fitted and of those held out."""
    out: dict[str, dict[str, Any]] = {}
    for each in operations:
        held = held_out(each)
        parts = {"fitted": ~held, "held_out": held}
        out[each.name] = {
            "version": each.version,
            **{key: errors(device, each.only(mask), before_w) for key, mask in parts.items() if mask.any()},
        }
    return out
