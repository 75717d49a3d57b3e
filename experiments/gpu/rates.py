"""Published rates of whole models against the formula of an iteration: ``l3env validate rates FILE``.

The table has a row a run at a constant concurrency (``rates_silicon`` of the profiles: aiconfigurator's samples of
other people's runs, Apache-2.0, commit 095f58a), with columns ``system, backend, model, precision, gemm_quant_mode,
mode, isl, osl, concurrency, tp_size, pp_size, attention_dp_size, moe_tp_size, moe_ep_size, ttft_ms, tpot_ms``, and of
deployments with prefill apart (``mode`` disagg) ``decode_num_workers, decode_tp_size, decode_pp_size,
decode_attention_dp_size``. Rows of one configuration count once, with their median.

Of a run only concurrency and lengths are known, so the time per output token is the mean of a steady state: a decode
step of all requests at their mean length, and the other requests' prompts, of which one comes with every
osl / (concurrency - 1) tokens of a request, as chunks beside such a step.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from l3env.errors import ProfileError, SpecError
from l3env.experiments.gpu.validation import statistics
from l3env.machine import specs
from l3env.machine.batch import Chunk, Decodes
from l3env.machine.tables import Tables, compile_tables

SYSTEMS = {"h100_sxm": "gpu-dgx-h100", "h200_sxm": "gpu-dgx-h200", "b200_sxm": "gpu-dgx-b200"}
MODELS = {"Llama-3.1-8B": "llama-3-8b", "Llama-3.1-70B": "llama-3-70b", "DeepSeek": "deepseek-v3"}
GROUP = ["system", "backend", "mode", "model", "gemm_quant_mode", "isl", "osl", "concurrency"]
SIZES = ["tp_size", "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size"]
DECODE_SIZES = ["decode_num_workers", "decode_tp_size", "decode_pp_size", "decode_attention_dp_size"]
NEEDED = [*GROUP, *SIZES, *DECODE_SIZES, "precision", "ttft_ms", "tpot_ms"]
ENGINE = "engine/vllm-0.22"
CHUNK_TOKENS = 8192  # what the engines' servers take of prompts in a step
DRAWN_FRAC = 0.9  # isl and osl are nominal: such runs draw 80 to 100 % of them
OVERLOAD_MS = 60_000
GPUS_A_HOST = 8


def read_rates(path: Path) -> pd.DataFrame:
    """The table's rows, those of one configuration joined.

    Raises:
        ProfileError: it cannot be read, or columns are missing.
    """
    try:
        rows = pd.read_csv(path, low_memory=False)
    except (OSError, ValueError) as error:
        raise ProfileError(f"{path}: cannot be read: {error}") from None
    missing = [name for name in NEEDED if name not in rows]
    if missing:
        raise ProfileError(f"{path}: row 1: missing column {', '.join(missing)}")
    rows = rows[rows["tpot_ms"] > 0]
    keys = [*GROUP, *SIZES, *DECODE_SIZES, "precision"]
    return rows.groupby(keys, dropna=False, sort=False)[["ttft_ms", "tpot_ms"]].median().reset_index()


def preset_of(name: str) -> str | None:
    """A model's preset by its published name."""
    return next((preset for part, preset in MODELS.items() if part in name), None)


def reason(row: Any) -> str | None:
    """Why a row is left out; None where it is compared."""
    if row.system not in SYSTEMS or preset_of(row.model) is None:
        return "no preset"
    if row.precision == "fp4":
        return "FP4 weights: not modelled"
    if row.ttft_ms > OVERLOAD_MS:
        return "overload"
    if row.mode == "disagg":
        stated = row.decode_num_workers > 0 and row.decode_tp_size > 0
        sizes = row.decode_tp_size, row.decode_attention_dp_size, row.decode_pp_size
    else:
        stated, sizes = row.tp_size > 0, (row.tp_size, row.attention_dp_size, row.pp_size)
    if not stated:
        return "parallelism not stated"
    tp, dp, pp = (1.0 if np.isnan(size) else size for size in sizes)
    if dp > 1 or pp > 1:
        return "attention data-parallel or pipelined: no system of that kind"
    return "more GPUs than a host" if tp > GPUS_A_HOST else None


@functools.cache
def machine(system: str, model: str, quantised: str, tp: int) -> Tables:
    """One replica; 8-bit weights come with 8-bit KV, as those runs were set up: an assumption, the table has no KV."""
    engine = replace(specs.load(ENGINE), memory=None)  # most rows are of other engines, which keep other shares
    spec = replace(specs.load(f"system/{SYSTEMS[system]}"), engine=engine)
    served = specs.load(f"model/{model}")
    narrow = quantised.startswith("fp8")
    width, blocks = (1, quantised == "fp8_block" or served.mla is not None) if narrow else (2, False)
    served = replace(served, bytes_per_parameter=width, bytes_per_kv_element=width, block_scales=blocks)
    return compile_tables(spec, replace(served, max_model_len=None), tp=tp)


def tpot_s(tables: Tables, requests: int, prompt: int, output: int, *, prefills: bool) -> float:
    """Mean time per output token in a steady state of so many requests; ``prefills``: their prompts run here."""
    fitting = max(int(tables.hbm_tokens // (prompt + output)), 1)
    count, length = min(requests, fitting), prompt + output / 2
    step_s = tables.iteration_s([Decodes(count, length)])
    if not prefills or count == 1:
        return step_s
    extra_s = 0.0
    for history in range(0, prompt, CHUNK_TOKENS):
        chunk = Chunk(min(CHUNK_TOKENS, prompt - history), history)
        extra_s += tables.iteration_s([Decodes(count - 1, length)], [chunk]) - step_s
    return step_s + (count - 1) / output * extra_s


def predicted_ms(row: Any) -> float:
    """Of one row that ``reason`` lets through."""
    apart = row.mode == "disagg"
    tp = int(row.decode_tp_size if apart else row.tp_size)
    tables = machine(row.system, str(preset_of(row.model)), str(row.gemm_quant_mode), tp)
    requests = max(round(row.concurrency / (row.decode_num_workers if apart else 1)), 1)
    prompt, output = round(row.isl * DRAWN_FRAC), round(row.osl * DRAWN_FRAC)
    return 1e3 * tpot_s(tables, requests, prompt, output, prefills=not apart)


def validate_rates(path: Path) -> dict[str, Any]:
    """By GPU and model: n, median, p90, worst of |predicted / measured - 1| of TPOT, and the median of
    predicted / measured by backend and mode; the rows left out by reason."""
    kept: list[dict[str, Any]] = []
    left_out: dict[str, int] = {}
    for row in rows_of(read_rates(path)):
        why = reason(row)
        if why is None:
            try:
                kept.append(compared(row))
            except SpecError:
                why = "does not fit"
        if why is not None:
            left_out[why] = left_out.get(why, 0) + 1
    out: dict[str, Any] = {"tpot": {}, "left_out": left_out}
    for key in sorted({(row["gpu"], row["model"]) for row in kept}):
        part = pd.DataFrame([row for row in kept if (row["gpu"], row["model"]) == key])
        ratios = part["predicted_ms"] / part["measured_ms"]
        figures: dict[str, Any] = dict(statistics(part["predicted_ms"].to_numpy(), part["measured_ms"].to_numpy()))
        figures["ratio"] = {
            how: {"n": int((part["how"] == how).sum()), "median": round(float(ratios[part["how"] == how].median()), 4)}
            for how in sorted(part["how"].unique())
        }
        out["tpot"].setdefault(key[0], {})[key[1]] = figures
    return out


def rows_of(table: pd.DataFrame) -> list[Any]:
    """Rows with their columns as attributes."""
    return list(table.itertuples())


def compared(row: Any) -> dict[str, Any]:
    """A row and what is predicted of it."""
    return {
        "gpu": row.system.removesuffix("_sxm"),
        "model": preset_of(row.model),
        "how": f"{row.backend} {row.mode}",
        "predicted_ms": predicted_ms(row),
        "measured_ms": row.tpot_ms,
    }
