"""Raw measurements, as ``experiments/gpu/measure.py`` writes them, turned into what is fitted and validated.

One CSV row is one operation on one kernel (``backend``). Of the kernels that torch offers for one attention call the
fastest counts; compositions of several calls stay in the data but out of the fit.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from l3env.errors import ProfileError
from l3env.experiments.gpu.coefficients import Linear, Small
from l3env.experiments.gpu.validation import (
    NEEDS,
    Point,
    load_model,
    statistics,
)
from l3env.machine import specs
from l3env.machine.batch import Chunk, Decodes
from l3env.machine.specs import GpuSpec
from l3env.machine.tables import compile_tables

SINGLE_CALLS = ("flash", "cudnn", "default")
LINEAR_OPS = ("linear_qkv", "linear_o", "linear_up", "linear_down")
SMALL_OPS = {"small_add_norm": 2, "small_rope": 1, "small_gate": 1, "small_gelu": 1}  # how often a layer runs each
KEYS = ["model", "tp", "tokens", "batch", "kv_len"]


def read_raw(path: Path) -> pd.DataFrame:
    """The table of one or several runs; counts are whole numbers, 1 where an operation has none."""
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise ProfileError(f"{path}: cannot be read: {error}") from None
    missing = {"op", *KEYS, "k", "n", "backend", "ms"} - set(table.columns)
    if missing:
        raise ProfileError(f"{path}: row 1: missing column {', '.join(sorted(missing))}")
    counts = ["tp", "tokens", "batch", "kv_len", "k", "n"]
    table[counts] = table[counts].fillna(1).astype(int)
    return table.astype({"model": str, "backend": str})


def linear(table: pd.DataFrame) -> Linear:
    rows = table[table["op"].isin(LINEAR_OPS) & (table["backend"] == "bf16")]
    tokens, k, n, ms = (rows[name].to_numpy(float) for name in ("tokens", "k", "n", "ms"))
    return Linear(tokens, k, n, ms / 1e3)


def small(table: pd.DataFrame) -> list[Small]:
    rows = table[table["op"].isin(SMALL_OPS)]
    seconds = (rows["ms"] * rows["op"].map(SMALL_OPS) / 1e3).rename("seconds")
    layers = (
        rows.assign(seconds=seconds).groupby(["model", "tp", "tokens"])["seconds"].agg(["sum", "size"]).reset_index()
    )
    whole = layers[layers["size"] == 3]  # norm, RoPE and activation
    return [
        Small(load_model(str(name)), int(str(tp)), part["tokens"].to_numpy(float), part["sum"].to_numpy(float))
        for (name, tp), part in whole.groupby(["model", "tp"])
    ]


def points(table: pd.DataFrame) -> list[Point]:
    """Measurements in the form of a profile."""
    rows = table[table["op"].isin(LINEAR_OPS) & (table["backend"] == "bf16")]
    layers = rows.groupby(KEYS)["ms"].agg(["sum", "size"]).reset_index()
    layers = layers[layers["size"] == len(LINEAR_OPS)]
    out = [Point("fc_layer", r.model, r.tp, r.tokens, 1, 1, r.sum) for r in _rows(layers)]
    rows = table[table["op"].isin(NEEDS) & table["backend"].isin(SINGLE_CALLS)]
    fastest = rows.groupby(["op", *KEYS])["ms"].min().reset_index()
    return out + [Point(r.op, r.model, r.tp, r.tokens, r.batch, r.kv_len, r.ms) for r in _rows(fastest)]


def stacks(table: pd.DataFrame) -> pd.DataFrame:
    """Whole stacks of layers, the fastest single-call kernel each."""
    rows = table[(table["op"] == "stack") & table["backend"].isin(SINGLE_CALLS)]
    return rows.groupby([*KEYS, "n"])["ms"].min().reset_index()


def predict_stacks_ms(device: GpuSpec, rows: pd.DataFrame) -> np.ndarray:
    """Iteration times of the same stacks, from the engine's tables for one GPU."""
    out = []
    for r in _rows(rows):
        model = replace(load_model(r.model), layers_count=r.n)
        tables = compile_tables(specs.load("system/gpu-dgx-h200", gpu=device, gpus_count=1), model, tp=1)
        if r.tokens > 1:
            priced = tables.iteration(chunks=[Chunk(r.tokens, r.kv_len - r.tokens)] * r.batch)
        else:
            priced = tables.iteration([Decodes(r.batch, r.kv_len - 1)])  # its own token is one of them
        time_s = priced.phases[0].attention_s + priced.phases[0].fc_s  # a stack has no head
        out.append(time_s * 1e3)
    return np.array(out)


def validate_stacks(device: GpuSpec, table: pd.DataFrame) -> dict[str, dict[str, float | int]]:
    """Errors of whole iterations, where there are any measured."""
    rows = stacks(table)
    return {"stack": statistics(predict_stacks_ms(device, rows), rows["ms"].to_numpy(float))} if len(rows) else {}


def _rows(table: pd.DataFrame) -> list:  # type: ignore[type-arg]
    return list(table.itertuples(index=False, name="Row"))
