"""The canonical file of a whole Workload: Parquet, or CSV with a JSON comment in its first line. Round trips are exact.

Columns: ``arrival_s, prompt_tokens, output_tokens, parent_idx, think_s, session_idx, prefix_ids`` (a list; in CSV
joined by ``;``). Name, source and tokens per prefix block are JSON: in Parquet's schema metadata under
``l3env.workload``, in CSV after ``# ``. Kept extra columns follow.

Any other table - CSV, JSON lines, a JSON list, Parquet, Arrow - is read by the rules of all formats (``traces.rows``):
three columns are enough, under usual names or under those that options give (``?arrival=COLUMN``).
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
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
from l3env.traces.containers import OWN_KEY, PARQUET, look, parse_csv, parse_table, read_arrow
from l3env.traces.named_columns import Table, shown
from l3env.traces.reading import FileFormat, decoded, read_bytes
from l3env.traces.rows import (
    Links,
    Prefix,
    build,
    check_links,
    kept_columns,
    parse_names,
    parse_unit,
    rows_of_parents,
)
from l3env.traces.spec import parse_count
from l3env.traces.times import UNIT_DIGITS

VERSION = 1
TYPE = re.compile(r"[<>|=]?[biufU]\d{1,6}")  # of an extra column
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
MORE_KEYS = {"extra", "recorded_floor"}
DEFAULT_BLOCK_TOKENS = 16
MAX_INDEX = 2**53
OF_RUNS = {"run_id", "sent_s", "client_arrival_s"}  # columns of measured runs, which have a loader of their own

# What a role's column may be called (lower case, "_" for other signs); the canonical name first.
NAMES = {
    "arrival": (
        *("arrival_s", "arrival", "arrival_time", "arrival_time_s", "arrived_at", "arrived_at_s", "arrival_timestamp"),
        *("timestamp", "timestamp_s", "time", "time_s", "arrival_ms", "arrival_time_ms", "timestamp_ms", "time_ms"),
        *("arrival_us", "arrival_time_us", "timestamp_us", "arrival_ns", "arrival_time_ns", "timestamp_ns"),
    ),
    "prompt": (
        *("prompt_tokens", "input_tokens", "context_tokens", "prefill_tokens", "request_tokens", "num_prefill_tokens"),
        *("num_prompt_tokens", "num_input_tokens", "prompt_length", "prompt_len", "input_length", "input_len"),
        *("input_toks", "prompt_token_count", "contexttokens"),
    ),
    "output": (
        *("output_tokens", "generated_tokens", "decode_tokens", "response_tokens", "completion_tokens"),
        *("num_decode_tokens", "num_output_tokens", "num_generated_tokens", "output_length", "output_len"),
        *("output_toks", "output_token_count", "generatedtokens"),
    ),
    "parent": ("parent_idx", "parent", "parent_id", "parent_request_id", "parent_chat_id"),
    "id": ("request_id", "id", "chat_id"),
    "think": ("think_s", "think_time", "think_time_s", "think_ms", "think_time_ms", "think_us", "think_ns"),
    "session": ("session_idx", "session_id", "session", "conversation_id"),
    "prefix": ("prefix_ids", "hash_ids", "block_ids", "prefix_hash_ids", "block_hashes"),
}
NEEDED = ("arrival", "prompt", "output")


def matches(path: Path) -> bool:
    """True for a file that l3env has written, and for a table with ``arrival_s`` as a column or field."""
    found = look(path)
    return found.is_own or ("arrival_s" in found.names and not found.names & OF_RUNS)


def save(workload: Workload, path: str | Path) -> Path:
    """Writes ``path`` (``.parquet`` or ``.csv``) whole or not at all; returns it.

    Raises TraceError for another suffix, a folder that is not there, a source that is not JSON or a name of an extra
    column that begins or ends with a blank or has more than one line.
    """
    path = Path(path)
    writer = {".parquet": _write_parquet, ".csv": _write_csv}.get(path.suffix)
    if writer is None:
        raise TraceError(f"{path}: suffix {path.suffix!r}; expected .parquet or .csv")
    for name in workload.extra:
        if name in SCHEMA.names or not name or name.strip() != name or "\n" in name or "\r" in name:
            raise TraceError(f"{path}: extra column {name!r}; expected a name of one line, not one of the canonical")
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


def load(
    path: Path,
    *,
    unit: str | None = None,
    prefix_block_tokens: int | None = None,
    keep: Sequence[str] = (),
    **roles: str,
) -> Workload:
    """A workload as it was saved, or any table with a row per request.

    Args:
        roles: names of the columns for ``arrival`` (numbers, or dates), ``prompt``, ``output`` (tokens), and where
            there are such ``parent`` (row from 0, or with ``id`` the id of another request), ``think``, ``session``
            and ``prefix`` (ids of the prompt's blocks). Usual names are found without.
        unit: of arrival and think times: s, ms, us, ns. Default: what the column's name ends with, else s.
        prefix_block_tokens: tokens per id; default 16.
        keep: columns for ``Workload.extra``.

    Raises:
        TraceError naming file, row and field.
    """
    data = read_bytes(path)
    is_asked = bool(roles) or unit is not None or prefix_block_tokens is not None
    if data.startswith(PARQUET):
        own = None if is_asked else _own_parquet(read_arrow(data, str(path)), str(path))
        table = parse_table(data, str(path)) if own is None else None
    else:
        own, table = None, None
        data, header, lines = _cut_header(data)
        table = parse_csv(data, str(path), lines_before=lines) if lines else parse_table(data, str(path))
        if header is not None and not is_asked:
            own = _own_csv(table, header)
    if own is not None:
        return own
    assert table is not None
    return _of_table(path, table, roles, unit, prefix_block_tokens, keep)


def _cut_header(data: bytes) -> tuple[bytes, str | None, int]:
    """What follows the first line where that is a comment, its text where it is a JSON object, and the lines cut."""
    data = decoded(data)
    header, lines = None, 0
    while data.startswith(b"#") and header is None:
        first, _, data = data.partition(b"\n")
        text = first[1:].decode(errors="replace").strip()
        header, lines = text if text.startswith("{") else None, lines + 1
    return data, header, lines


# ------------------------------------------------------------------------------------------------------- any table


def _of_table(
    path: Path,
    table: Table,
    given: Mapping[str, str],
    unit: str | None,
    prefix_block_tokens: int | None,
    keep: Sequence[str],
) -> Workload:
    column = find_columns(table, given)
    arrivals = table.times(column["arrival"], unit or _unit(column["arrival"]))
    prompt, output = table.tokens(column["prompt"]), table.tokens(column["output"])
    source: dict[str, Any] = {}
    prefix = None
    if "prefix" in column:
        ids, lengths = table.id_lists(column["prefix"])
        tokens = prefix_block_tokens or DEFAULT_BLOCK_TOKENS
        if ids.size:
            expected = f"at most one id for each {tokens} prompt tokens (?prefix_block_tokens= sets how many)"
            table.require(lengths <= -(-prompt // tokens), column["prefix"], expected)
            said = "given" if prefix_block_tokens else "the default; ?prefix_block_tokens= sets another"
            source["prefix_blocks"] = f"{tokens} tokens an id ({said})"
        prefix = Prefix(ids, lengths, tokens)
    return build(
        path,
        FORMAT.name,
        arrivals,
        prompt,
        output,
        name=path.stem,
        links=_links(table, column, unit),
        session=table.ids(column["session"]) if "session" in column else None,
        prefix=prefix,
        extra=kept_columns(table, keep),
        source={**source, **table.about_unused()},
    )


def find_columns(table: Table, given: Mapping[str, str]) -> dict[str, str]:
    """Role -> column: what is given, else the one column with a usual name. Raises TraceError where that is not one."""
    found = {}
    plain = {name: re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") for name in table.columns}
    for role, usual in NAMES.items():
        if role in given:
            if not table.has(given[role]):
                raise TraceError(
                    f"{table.file}: {role}={given[role]}: no such column; the file has {shown(table.columns)}"
                )
            found[role] = given[role]
            continue
        names = [name for name, text in plain.items() if text in usual and name not in given.values()]
        if usual[0] in names or len(names) == 1:
            found[role] = usual[0] if usual[0] in names else names[0]
        elif names and role in NEEDED:
            raise TraceError(
                f"{table.file}: columns {', '.join(names)} may all be the {role}; expected ?{role}= with one of them"
            )
        elif role in NEEDED:
            raise TraceError(
                f"{table.file}: missing column {usual[0]!r}; the file has {shown(table.columns)}; "
                f"expected it, or ?{role}=COLUMN with one of these (also {', '.join(NAMES)} where there are such)"
            )
    return found


def _unit(column: str) -> str:
    """What a column's name ends with, else s."""
    end = column.lower().rpartition("_")[2]
    return end if end in UNIT_DIGITS else "s"


def _links(table: Table, column: Mapping[str, str], unit: str | None) -> Links | None:
    think_s = np.zeros(len(table))
    if "think" in column:
        says = column["think"].lower().rpartition("_")[2] in UNIT_DIGITS
        think_s = table.seconds(column["think"], _unit(column["think"]) if says else unit or "s")
    if "parent" not in column:
        return None
    name = column["parent"]
    if "id" in column and name != NAMES["parent"][0]:
        return Links(rows_of_parents(table, column["id"], name), think_s)
    parent = table.integers(name, NO_PARENT, len(table) - 1, default=NO_PARENT)
    check_links(parent, lambda row: table.fail(row, name, "-1 or the index of a row that does not wait for this one"))
    return Links(parent, think_s)


# ------------------------------------------------------------------------------------------------- files of our own


def _header(workload: Workload) -> dict[str, Any]:
    header = {
        "version": VERSION,
        "name": workload.name,
        "prefix_block_tokens": workload.prefix_block_tokens,
        "source": dict(workload.source),
    }
    if workload.recorded_floor:
        header["recorded_floor"] = True
    extra = {name: values.dtype.str for name, values in workload.extra.items()}
    return {**header, "extra": extra} if extra else header


def _write_parquet(workload: Workload, header: str, file: BinaryIO) -> None:
    lists = pa.LargeListArray.from_arrays(pa.array(workload.prefix_offsets), pa.array(workload.prefix_ids))
    columns = [pa.array(getattr(workload, name)) for name in SCHEMA.names[:-1]]
    more = {name: pa.array(values) for name, values in workload.extra.items()}
    schema = pa.schema([*SCHEMA, *(pa.field(name, values.type) for name, values in more.items())])
    schema = schema.with_metadata({OWN_KEY: header.encode()})
    pq.write_table(pa.table([*columns, lists, *more.values()], schema=schema), file, compression="zstd")


def _write_csv(workload: Workload, header: str, file: BinaryIO) -> None:
    frame = pd.DataFrame({name: getattr(workload, name) for name in SCHEMA.names[:-1]})
    offsets, ids = workload.prefix_offsets, workload.prefix_ids.tolist()
    frame["prefix_ids"] = [";".join(map(str, ids[start:end])) for start, end in pairwise(offsets.tolist())]
    for name, values in workload.extra.items():
        frame[name] = values
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    text.write(f"# {header}\n")
    quoting: Any = csv.QUOTE_NONNUMERIC if workload.extra else csv.QUOTE_MINIMAL
    frame.to_csv(text, index=False, lineterminator="\n", na_rep="nan", quoting=quoting)
    text.flush()
    text.detach()


def _own_parquet(table: pa.Table, file: str) -> Workload | None:
    """The workload as it was saved; None for a table that l3env has not written, or not with these columns."""
    metadata = (table.schema.metadata or {}).get(OWN_KEY)
    if metadata is None or table.schema.names[: len(SCHEMA)] != SCHEMA.names:
        return None
    if not pa.schema(list(table.schema)[: len(SCHEMA)]).equals(SCHEMA):
        return None
    about = _read_header(file, metadata.decode(errors="replace"))
    if any(table.column(name).null_count for name in table.column_names):
        raise TraceError(f"{file}: a column has missing values; expected none")
    lists = table.column("prefix_ids").combine_chunks()
    lengths = np.array(pc.list_value_length(lists).to_numpy(zero_copy_only=False), dtype=np.int64)
    columns = {name: np.array(table.column(name).to_numpy()) for name in SCHEMA.names[:-1]}
    extra = _extra(file, about, {name: table.column(name).to_pylist() for name in table.column_names[len(SCHEMA) :]})
    return _build(file, about, columns, np.array(lists.flatten().to_numpy()), lengths, extra)


def _own_csv(table: Table, header: str) -> Workload:
    about = _read_header(table.file, header)
    table.need(*SCHEMA.names[:3])
    columns: dict[str, NDArray[Any]] = {"arrival_s": table.numbers("arrival_s")}
    ascending = np.concatenate([[True], np.diff(columns["arrival_s"]) >= 0])
    table.require(ascending, "arrival_s", "a time not before the row above")
    columns |= {name: table.tokens(name) for name in ("prompt_tokens", "output_tokens")}
    for name in ("prompt_tokens", "output_tokens"):
        table.require(columns[name] > 0, name, "a whole number >= 1")
    if table.has("think_s"):
        columns["think_s"] = table.numbers("think_s")
    for name in ("parent_idx", "session_idx"):
        if table.has(name):
            columns[name] = table.integers(name, NO_PARENT, MAX_INDEX)
    if "parent_idx" in columns:
        table.require(columns["parent_idx"] < np.arange(len(table)), "parent_idx", "-1 or the index of an earlier row")
    ids, lengths = _own_ids(table)
    texts = {name: table.columns[name].to_pylist() for name in about.get("extra", {}) if table.has(name)}
    return _build(table.file, about, columns, ids, lengths, _extra(table.file, about, texts))


def _own_ids(table: Table) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All ids as they are, and how many each row has."""
    if not table.has("prefix_ids"):
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


def _extra(file: str, about: Mapping[str, Any], columns: Mapping[str, Sequence[Any]]) -> dict[str, NDArray[Any]]:
    """The extra columns that the header names, each of the type it had."""
    extra = {}
    for name, kind in about.get("extra", {}).items():
        if not isinstance(kind, str) or not TYPE.fullmatch(kind):
            raise TraceError(f"{file}: extra column {name!r}: type {kind!r}; expected one of numpy's, like '<i8'")
        try:
            values: Any = list(columns[name])
            if np.dtype(kind).kind == "b":
                values = [value in (True, "True") for value in values]
            extra[name] = np.array(values).astype(kind)
        except (KeyError, TypeError, ValueError, OverflowError, MemoryError) as error:
            raise TraceError(f"{file}: extra column {name!r} is not of type {kind!r}: {error!r}") from error
    return extra


def _build(
    file: str,
    about: Mapping[str, Any],
    columns: dict[str, Any],
    ids: NDArray[np.int64],
    lengths: NDArray[np.int64],
    extra: Mapping[str, NDArray[Any]],
) -> Workload:
    try:
        return Workload.build(
            about["name"],
            columns.pop("arrival_s"),
            columns.pop("prompt_tokens"),
            columns.pop("output_tokens"),
            **columns,
            prefix_ids=ids,
            prefix_offsets=np.concatenate([[0], np.cumsum(lengths)]),
            recorded_floor=about.get("recorded_floor", False),
            prefix_block_tokens=about["prefix_block_tokens"],
            source=about["source"],
            extra=extra,
        )
    except TraceError:
        raise
    except (ValueError, TypeError, OverflowError) as error:
        raise TraceError(f"{file}: {error}") from error


def _read_header(file: str, header: str) -> dict[str, Any]:
    try:
        about = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{file}: the workload's JSON header cannot be read: {error}") from error
    if not isinstance(about, dict) or about.keys() - MORE_KEYS != HEADER_KEYS or about["version"] != VERSION:
        raise TraceError(
            f"{file}: JSON header {header[:80]!r}; "
            f"expected version {VERSION} with keys {', '.join(sorted(HEADER_KEYS))}"
        )
    for key, kind in (
        ("name", str),
        ("prefix_block_tokens", int),
        ("source", dict),
        ("extra", dict),
        ("recorded_floor", bool),
    ):
        if not isinstance(about.get(key, kind()), kind):
            raise TraceError(f"{file}: JSON header, key {key!r}: got {about[key]!r}; expected {kind.__name__}")
    return about


FORMAT = FileFormat(
    "canonical",
    "l3env's own Parquet or CSV of a whole workload, and any table with arrival_s, prompt_tokens, output_tokens",
    matches,
    load,
    {
        **dict.fromkeys(NAMES, str),
        "unit": parse_unit,
        "prefix_block_tokens": parse_count,
        "keep": parse_names,
    },
)
