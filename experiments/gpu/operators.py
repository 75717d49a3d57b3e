"""Measured operator times in the tables of NVIDIA's aiconfigurator, against predicted ones.

A folder holds files ``<gpu>_sxm_<backend>-<version>_<table>.csv[.gz]``, any of the tables gemm, context_attention,
generation_attention, mla_context_module, mla_generation_module, moe, custom_allreduce and nccl; ``latency_ms`` is one
call on one GPU. Rows that the table marks ``suspect`` are left out and counted, and so are those that l3env has no
model of. Predictions come from the functions and coefficients that the engine's tables are made of; attention from the
engine's own kernels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from l3env.errors import ProfileError

Array = NDArray[np.float64]
NAME = re.compile(r"(?P<gpu>\w+?)_sxm_(?P<version>[\w.]+-[\d.]+)_(?P<table>[a-z_]+)\.csv(\.gz)?")
PRESETS = {"a100": "a100-80", "h100": "h100", "h200": "h200", "b200": "b200"}
LINKS = {"a100": "nvlink3", "h100": "nvlink4", "h200": "nvlink4", "b200": "nvlink5"}
GRAPH_BACKEND = "vllm_graph"
BLOCK_FLOOR_MS = {"h100": 0.25, "h200": 0.25, "b200": 0.5, "a100": 0.0}  # eager: host overhead below, see the docs
MOST_HEAD_SIZE = 256  # heads of 512 go through another kernel
OTHER_KERNELS = (
    "vllm_triton_attn",  # these two stand in where the usual one has no such head;
    "vllm_flash_attn_fa4",
    "vllm_modeloptfp8moe_flashinfer_cutlass_flashinferexperts",  # this reads experts at a fifth of the bandwidth
)
BF16, FP8, BLOCK = "bfloat16", "fp8", "fp8_block"


@dataclass(frozen=True)
class Operation:
    """Measurements of one operation on one GPU.

    Attributes:
        gpu: "a100", "h100", "h200" or "b200".
        version: the backend's, as in the file's name.
        name: what was measured.
        rows: its columns as in the file, clean.
        suspect_count, unmodelled_count: rows that were left out.
    """

    gpu: str
    version: str
    name: str
    rows: pd.DataFrame
    suspect_count: int = 0
    unmodelled_count: int = 0

    @property
    def seconds(self) -> Array:
        """Measured."""
        return self.column("latency_ms") / 1e3

    def column(self, name: str) -> Array:
        return self.rows[name].to_numpy(float)

    def only(self, mask: NDArray[np.bool_]) -> Operation:
        """Some of the rows."""
        return replace(self, rows=self.rows[mask])


class Found(NamedTuple):
    """A table's file."""

    path: Path
    gpu: str
    version: str
    table: str

    @property
    def age(self) -> tuple[int, ...]:
        """Larger for newer versions."""
        return tuple(int(part) for part in re.findall(r"\d+", self.version))


def files(folder: Path) -> list[Found]:
    """The tables of a folder.

    Raises:
        ProfileError: there is none.
    """
    found = []
    for path in sorted(folder.glob("*.csv*")):
        match = NAME.fullmatch(path.name)
        if match and match["gpu"] in PRESETS and match["table"] in SPLITTERS:
            found.append(Found(path, match["gpu"], match["version"], match["table"]))
    if not found:
        raise ProfileError(f"{folder}: no tables; expected <gpu>_sxm_<backend>-<version>_<table>.csv.gz")
    return found


def read(found: Found) -> list[Operation]:
    """The operations of a table."""
    try:
        rows = pd.read_csv(found.path, low_memory=False)
    except (OSError, ValueError) as error:
        raise ProfileError(f"{found.path}: cannot be read: {error}") from None
    if "latency_ms" not in rows:
        raise ProfileError(f"{found.path}: row 1: missing column latency_ms")
    try:
        parts = list(SPLITTERS[found.table](rows))
    except KeyError as error:
        raise ProfileError(f"{found.path}: row 1: missing column {error.args[0]}") from None
    out = []
    for name, part, modelled in parts:
        flags = part["suspect"] if "suspect" in part else pd.Series(index=part.index, dtype=object)
        suspect = flags.notna() & (flags.astype(str).str.strip() != "")
        if name == f"gemm_{BLOCK}":
            modelled = modelled & (part["latency_ms"] >= BLOCK_FLOOR_MS[found.gpu])
        counts = int(suspect.sum()), int((~modelled & ~suspect).sum())
        kept = part[modelled & ~suspect].reset_index(drop=True)
        if len(kept):
            out.append(Operation(found.gpu, found.version, name, kept, *counts))
    return out


Part = tuple[str, pd.DataFrame, "pd.Series[bool]"]


def _gemm(rows: pd.DataFrame) -> Iterator[Part]:
    for dtype in (BF16, FP8, BLOCK):
        part = rows[rows["gemm_dtype"] == dtype]
        yield f"gemm_{dtype}", part, part["m"] > 0


def _attention(name: str) -> Any:
    def split(rows: pd.DataFrame) -> Iterator[Part]:
        for dtype in (BF16, FP8):
            for windowed in (False, True):
                part = rows[(rows["kv_cache_dtype"] == dtype) & ((rows["window_size"] > 0) == windowed)]
                others = part["kernel_source"].isin(OTHER_KERNELS)
                yield _labelled(name, dtype, windowed), part, (part["head_dim"] <= MOST_HEAD_SIZE) & ~others

    return split


def _labelled(name: str, dtype: str, windowed: bool) -> str:
    return name + ("_fp8_kv" if dtype == FP8 else "") + ("_window" if windowed else "")


def _mla(name: str) -> Any:
    def split(rows: pd.DataFrame) -> Iterator[Part]:
        for gemm in (BF16, BLOCK):
            part = rows[rows["gemm_type"] == gemm]
            yield f"{name}_{gemm}", part, part["batch_size"] > 0

    return split


def _moe(rows: pd.DataFrame) -> Iterator[Part]:
    for dtype in (BF16, FP8, BLOCK):
        part = rows[rows["moe_dtype"] == dtype]
        yield f"moe_{dtype}", part, ~part["kernel_source"].isin(OTHER_KERNELS)


def _custom_all_reduce(rows: pd.DataFrame) -> Iterator[Part]:
    part = rows[rows["backend"] == GRAPH_BACKEND]
    yield "all_reduce", part.assign(bytes=part["message_size"] * 2), part["num_gpus"] > 1


def _nccl(rows: pd.DataFrame) -> Iterator[Part]:
    sized = rows.assign(bytes=rows["message_size"] * np.where(rows["nccl_dtype"] == "int8", 1, 2))
    part = sized[sized["op_name"] == "all_reduce"]
    yield "nccl_all_reduce", part, part["num_gpus"] > 1


SPLITTERS: dict[str, Any] = {
    "gemm": _gemm,
    "context_attention": _attention("context_attention"),
    "generation_attention": _attention("generation_attention"),
    "mla_context_module": _mla("mla_context"),
    "mla_generation_module": _mla("mla_generation"),
    "moe": _moe,
    "custom_allreduce": _custom_all_reduce,
    "nccl": _nccl,
}
