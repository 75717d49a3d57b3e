"""The canonical file of a whole Workload: Parquet, or CSV with a JSON comment in its first line. Round trips are exact.

Columns: ``arrival_s, prompt_tokens, output_tokens, parent_idx, think_s, session_idx, prefix_ids`` (a list; in CSV
joined by ``;``). Name, source and tokens per prefix block are JSON: in Parquet's schema metadata under
``l3env.workload``, in CSV after ``# ``. A user's CSV may leave out the JSON line and every column but the first three.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from l3env.errors import TraceError
from l3env.files import whole
from l3env.requests.workload import NO_PARENT, Workload
from l3env.traces.reading import FileFormat, Table, first_bytes, first_line, parse_table, read_bytes

VERSION = 1
METADATA_KEY = b"l3env.requests.workload"
COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens")
OPTIONAL_COLUMNS = ("parent_idx", "think_s", "session_idx", "prefix_ids")
SCHEMA = pa.schema(
    {
        "arrival_s": pa.float64(),
        "prompt_tokens": pa.int64(),
        "output_tokens": pa.int64(),
        "parent_idx": pa.int64(),
        "think_s": pa.float64(),
        "session_idx": pa.int64(),
        "prefix_ids": pa.large_list(pa.int64()),
    }
)
HEADER_KEYS = {"version", "name", "prefix_block_tokens", "source"}
MAX_INDEX = 2**53


def matches(path: Path) -> bool:
    """True for a Parquet file, and for a CSV that begins with our JSON line or has ``arrival_s`` as a column."""
    if first_bytes(path, 4) == b"PAR1":
        return True
    start = first_line(path)
    return start.startswith("# {") or "arrival_s" in start.split(",")


def save(workload: Workload, path: str | Path) -> Path:
    """Writes ``path`` (``.parquet`` or ``.csv``) whole or not at all; returns it.

    Raises TraceError for another suffix, a folder that is not there or a source that is not JSON.
    """
    path = Path(path)
    writer = {".parquet": _write_parquet, ".csv": _write_csv}.get(path.suffix)
    if writer is None:
        raise TraceError(f"{path}: suffix {path.suffix!r}; expected .parquet or .csv")
    try:
        header = json.dumps(_header(workload))
    except (TypeError, ValueError) as error:
        raise TraceError(f"{path}: workload {workload.name} has a source that is not JSON: {error}") from error
    with written(path) as file:
        writer(workload, header, file)
    return path


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file that is on the disk whole or not at all. Raises TraceError where it cannot be written."""
    try:
        with whole(path, sync=True) as file:
            yield file
    except OSError as error:
        raise TraceError(f"{path}: cannot be written: {error}") from error


def load(path: Path) -> Workload:
    """The workload saved in ``path``. Raises TraceError naming file, row and field."""
    return _load_parquet(path) if first_bytes(path, 4) == b"PAR1" else _load_csv(path)


def _header(workload: Workload) -> dict[str, Any]:
    return {
        "version": VERSION,
        "name": workload.name,
        "prefix_block_tokens": workload.prefix_block_tokens,
        "source": dict(workload.source),
    }


def _write_parquet(workload: Workload, header: str, file: BinaryIO) -> None:
    lists = pa.LargeListArray.from_arrays(pa.array(workload.prefix_offsets), pa.array(workload.prefix_ids))
    columns = [pa.array(getattr(workload, name)) for name in SCHEMA.names[:-1]]
    schema = SCHEMA.with_metadata({METADATA_KEY: header.encode()})
    pq.write_table(pa.table([*columns, lists], schema=schema), file, compression="zstd")


def _write_csv(workload: Workload, header: str, file: BinaryIO) -> None:
    frame = pd.DataFrame({name: getattr(workload, name) for name in SCHEMA.names[:-1]})
    offsets, ids = workload.prefix_offsets, workload.prefix_ids.tolist()
    frame["prefix_ids"] = [";".join(map(str, ids[start:end])) for start, end in pairwise(offsets.tolist())]
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    text.write(f"# {header}\n")
    frame.to_csv(text, index=False, lineterminator="\n")
    text.flush()
    text.detach()


def _load_parquet(path: Path) -> Workload:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise TraceError(f"{path}: not a readable Parquet file: {error}") from error
    metadata = (table.schema.metadata or {}).get(METADATA_KEY)
    if metadata is None or not table.schema.equals(SCHEMA):
        raise TraceError(
            f"{path}: columns {', '.join(table.column_names)}; expected a file written by l3env "
            f"with columns {', '.join(SCHEMA.names)} and metadata {METADATA_KEY.decode()}"
        )
    if any(table.column(name).null_count for name in SCHEMA.names):
        raise TraceError(f"{path}: a column has missing values; expected none")
    lists = table.column("prefix_ids").combine_chunks()
    lengths = np.array(pc.list_value_length(lists).to_numpy(zero_copy_only=False), dtype=np.int64)
    columns = {name: np.array(table.column(name).to_numpy()) for name in SCHEMA.names[:-1]}
    return _build(str(path), metadata.decode(), columns, np.array(lists.flatten().to_numpy()), lengths)


def _load_csv(path: Path) -> Workload:
    data = read_bytes(path)
    header, lines = None, 0
    if data.startswith(b"#"):
        first, _, data = data.partition(b"\n")
        header, lines = first[1:].decode(errors="replace").strip(), 1
    table = parse_table(data, str(path), COLUMNS, OPTIONAL_COLUMNS)
    table = Table(table.file, table.columns, table.first_row + lines)
    columns: dict[str, NDArray[Any]] = {"arrival_s": table.floats("arrival_s")}
    table.require_sorted("arrival_s", columns["arrival_s"])
    columns |= {name: table.tokens(name) for name in ("prompt_tokens", "output_tokens")}
    if "think_s" in table.columns:
        columns["think_s"] = table.floats("think_s")
    for name in ("parent_idx", "session_idx"):
        if name in table.columns:
            columns[name] = table.integers(name, NO_PARENT, MAX_INDEX)
    if "parent_idx" in columns:
        table.require(columns["parent_idx"] < np.arange(len(table)), "parent_idx", "-1 or the index of an earlier row")
    ids, lengths = _prefix_ids(table)
    return _build(str(path), header, columns, ids, lengths, path.stem)


def _prefix_ids(table: Table) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All ids in one array, and how many each row has."""
    if "prefix_ids" not in table.columns:
        return np.zeros(0, dtype=np.int64), np.zeros(len(table), dtype=np.int64)
    text = table.columns["prefix_ids"]
    good = pc.match_substring_regex(text, r"^(-?\d{1,19}(;-?\d{1,19})*)?$")
    table.require(np.array(good.to_numpy(), dtype=bool), "prefix_ids", "whole numbers joined by ';'")
    rows = [row.split(";") if row else [] for row in text.to_pylist()]
    try:
        ids = np.array([int(block) for row in rows for block in row], dtype=np.int64)
    except OverflowError:
        row = next(i for i, row in enumerate(rows) if any(abs(int(block)) >= 2**63 for block in row))
        table.fail(row, "prefix_ids", "whole numbers of 64 bits")
    return ids, np.array([len(row) for row in rows], dtype=np.int64)


def _build(
    file: str,
    header: str | None,
    columns: dict[str, Any],
    ids: NDArray[np.int64],
    lengths: NDArray[np.int64],
    stem: str = "",
) -> Workload:
    about: dict[str, Any] = {"name": stem, "source": {"file": file}}
    if header is not None:
        about = _read_header(file, header)
    try:
        return Workload.build(
            about["name"],
            columns.pop("arrival_s"),
            columns.pop("prompt_tokens"),
            columns.pop("output_tokens"),
            **columns,
            prefix_ids=ids,
            prefix_offsets=np.concatenate([[0], np.cumsum(lengths)]),
            prefix_block_tokens=about.get("prefix_block_tokens", 0),
            source=about["source"],
        )
    except TraceError:
        raise
    except ValueError as error:
        raise TraceError(f"{file}: {error}") from error


def _read_header(file: str, header: str) -> dict[str, Any]:
    try:
        about = json.loads(header)
    except ValueError as error:
        raise TraceError(f"{file}: the workload's JSON header cannot be read: {error}") from error
    if not isinstance(about, dict) or about.keys() != HEADER_KEYS or about["version"] != VERSION:
        raise TraceError(
            f"{file}: JSON header {header[:80]!r}; "
            f"expected version {VERSION} with keys {', '.join(sorted(HEADER_KEYS))}"
        )
    return about


FORMAT = FileFormat("canonical", "l3env's own Parquet or CSV of a whole workload", matches, load)
