"""CSV, JSON lines, JSON lists, Parquet and Arrow files as tables, and what a file looks like before it is read."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.feather as feather
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from l3env.errors import TraceError
from l3env.traces import reading
from l3env.traces.named_columns import Table
from l3env.traces.reading import UNREADABLE, decoded, first_bytes, read_bytes

SEPARATORS = (",", ";", "\t")
PARQUET, ARROW_FILE, FEATHER_1, ARROW_STREAM = b"PAR1", b"ARROW1", b"FEA1", b"\xff\xff\xff\xff"
BINARY = (PARQUET, ARROW_FILE, FEATHER_1, ARROW_STREAM)
OWN_KEY, OWN_HEADER = b"l3env.requests.workload", b"# {"  # of files that l3env has written: metadata, first line
BLOCK_BYTES = 2**26  # of a CSV that is parsed at once; no row may be longer
MOST_COLUMNS = 10_000  # of a CSV
FLOAT_DIGITS = 17  # a number with no more digits is a float64; longer ones are kept exactly
KEY = re.compile(rb'"([^"\\]{1,80})"\s*:')


# ------------------------------------------------------------------------------------------------------ what it is


@dataclass(frozen=True)
class Look:
    """A file at first sight.

    Attributes:
        kind: "csv", "json", "binary" (Parquet, Arrow) or "".
        names: of its columns, or of the fields of its first object.
        is_own: whether l3env has written it.
    """

    kind: str = ""
    names: frozenset[str] = frozenset()
    is_own: bool = False


def look(path: Path) -> Look:
    """The kind and column names of a file; empty for a folder, an archive and what is no table."""
    try:
        stat = path.stat()
    except OSError:
        return Look()
    if not path.is_file():
        return Look()
    return _look(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=64)
def _look(path: Path, mtime_ns: int, size: int) -> Look:
    head = first_bytes(path)
    try:
        if head.startswith(BINARY):
            schema = _schema(path, head)
            return Look("binary", frozenset(schema.names), OWN_KEY in (schema.metadata or {}))
        head = decoded(head).lstrip()
        if head.startswith((b"{", b"[")):
            return Look("json", _first_keys(head))
        is_own = head.startswith(OWN_HEADER)
        while head.startswith(b"#"):
            head = head.partition(b"\n")[2]
        names = _header(head.split(b"\n", 1)[0].decode())[0] if head else []
    except (TraceError, *UNREADABLE):
        return Look()
    return Look("csv" if len(names) > 1 or is_own else "", frozenset(names), is_own)


def has_names(path: Path, *names: str) -> bool:
    """Whether a table file has all of these columns or fields."""
    return look(path).names >= set(names)


def _first_keys(head: bytes) -> frozenset[str]:
    """The keys of the first object; where it goes beyond the head, all that stand before a colon there."""
    start = head.find(b"{")
    try:
        found = json.JSONDecoder().raw_decode(head[start:].decode(errors="ignore"))[0]
    except (ValueError, RecursionError):
        return frozenset(key.decode(errors="ignore") for key in KEY.findall(head))
    return frozenset(found) if isinstance(found, dict) else frozenset()


# ------------------------------------------------------------------------------------------------------ reading it


def read_table(path: Path) -> Table:
    """The table in a file of any of these kinds, packed or not. Raises TraceError where there is none."""
    return parse_table(read_bytes(path), str(path))


def parse_table(data: bytes, file: str) -> Table:
    """As ``read_table``, from bytes; ``file`` is what errors call them."""
    if data.startswith(BINARY):
        return _parse_binary(data, file)
    if decoded(data[:64]).lstrip().startswith((b"{", b"[")):
        return of_rows(*parse_json(data, file), file)
    return parse_csv(data, file)


def of_rows(rows: Sequence[dict[str, Any]], lines: Sequence[Any], file: str) -> Table:
    """A table of JSON objects; ``lines`` is what errors call each of them."""
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(row))
    return Table(file, {name: [row.get(name) for row in rows] for name in names}, lambda row: lines[row])


def parse_json(data: bytes, file: str) -> tuple[list[dict[str, Any]], list[int]]:
    """The objects of JSON lines, of a JSON list or of one document, and the line (or place, from 1) of each."""
    rows, lines = [], []
    for row, line in iterate_json(data, file):
        rows.append(row)
        lines.append(line)
    return rows, lines


def iterate_json(data: bytes, file: str) -> Iterator[tuple[dict[str, Any], int]]:
    """As ``parse_json``, one after the other; lines are read when they are asked for. Raises TraceError for none."""
    number = 0
    for row, number in _values(decoded(data), file):
        if not isinstance(row, dict):
            raise TraceError(f"{file}: row {number}: got fields {str(row)[:60]}; expected an object")
        yield row, number
    if not number:
        raise TraceError(f"{file}: empty; expected at least one JSON object")


def _values(data: bytes, file: str) -> Iterator[tuple[Any, int]]:
    if data.lstrip().startswith(b"["):
        found = load_json(data, file)
        yield from ((row, place) for place, row in enumerate(found, start=1))
        return
    is_first = True
    for number, line in enumerate(io.BytesIO(data), start=1):
        if not line.strip():
            continue
        try:
            row = load_json(line, f"{file}: row {number}")
        except TraceError:
            if not is_first:
                raise
            yield _whole(data, file, number), number
            return
        is_first = False
        yield row, number


def _whole(data: bytes, file: str, number: int) -> Any:
    """One document over several lines; where it is none, the error of its first line."""
    try:
        return load_json(data, file)
    except TraceError:
        if b"\n" not in data.strip():
            raise
        return load_json(data.split(b"\n")[number - 1], f"{file}: row {number}")


def load_json(data: bytes, file: str) -> Any:
    """One JSON value; floats of more digits than float64 has stay Decimals. Raises TraceError."""
    try:
        return json.loads(data, parse_float=_parse_float)
    except RecursionError:
        raise TraceError(f"{file}: not JSON (nested too deep); expected an object") from None
    except ValueError as error:
        raise TraceError(f"{file}: not JSON ({error}); expected an object") from error


def _parse_float(text: str) -> float | Decimal:
    try:
        return float(text) if len(text) <= FLOAT_DIGITS else Decimal(text)
    except ArithmeticError:  # an exponent of more digits than Decimal takes
        return float(text)


# ------------------------------------------------------------------------------------------------------------- CSV


def parse_csv(data: bytes, file: str, names: Sequence[str] = (), lines_before: int = 0) -> Table:
    """A CSV with ``,``, ``;`` or tabs; with a header, unless ``names`` are those of its columns.

    ``lines_before`` are lines that were cut from its start: errors count them. Raises TraceError for rows of another
    length and for what is no text.
    """
    data = decoded(data)
    if b'"' not in data:
        data = re.sub(rb"(?m)^[ \t]+\r?$", b"", data)  # lines of blanks, which are none
    header_lines = 0
    separator = ","
    repeated: frozenset[str] = frozenset()
    body = data
    if not names:
        blank = len(data) - len(data.lstrip(b"\r\n"))
        head, _, body = data[blank:].partition(b"\n")
        header_lines = data[:blank].count(b"\n") + 1
        try:
            names, separator = _header(head.decode())
        except ValueError as error:
            raise TraceError(f"{file}: row {header_lines}: not a readable header ({error})") from error
        repeated = frozenset(name for name, count in Counter(names).items() if count > 1)
    if len(names) > MOST_COLUMNS:
        raise TraceError(f"{file}: row {header_lines}: {len(names):,} columns; expected at most {MOST_COLUMNS:,}")
    if not body.strip():
        what = "no rows below the header" if any(names) and header_lines else "empty"
        raise TraceError(f"{file}: {what}; expected at least one request")
    before = lines_before + header_lines
    table = _parse_rows(body, file, list(names), separator, before)
    columns = {name: table.column(place) for place, name in reversed(list(enumerate(names)))}
    ordered = {name: columns[name] for name in dict.fromkeys(names)}
    return Table(file, ordered, lambda row: _line_of(body, separator, before, row), repeated)


def _header(head: str) -> tuple[list[str], str]:
    """Names of the columns of a header line, and what separates them."""
    separator = max(SEPARATORS, key=lambda each: head.count(each))
    try:
        names = next(csv.reader([head.strip("\r\n")], delimiter=separator), [])
    except csv.Error as error:
        raise ValueError(str(error)) from error
    return [name.strip() for name in names], separator


def _parse_rows(body: bytes, file: str, names: list[str], separator: str, before: int) -> pa.Table:
    places = [str(place) for place in range(len(names))]
    try:
        return pa_csv.read_csv(
            io.BytesIO(body),
            read_options=pa_csv.ReadOptions(
                use_threads=False, column_names=places, block_size=min(max(len(body) + 1, 2**16), BLOCK_BYTES)
            ),
            parse_options=pa_csv.ParseOptions(delimiter=separator, newlines_in_values=b'"' in body),
            convert_options=pa_csv.ConvertOptions(
                column_types=dict.fromkeys(places, pa.string()), strings_can_be_null=False
            ),
        )
    except (pa.ArrowException, ValueError) as error:
        for line, row in _records(body, separator, before):
            if len(row) != len(names):
                raise TraceError(
                    f"{file}: row {line}: got {len(row)} fields; expected {len(names)} ({', '.join(names)})"
                ) from error
        raise TraceError(f"{file}: not a readable CSV: {error}") from error


def _records(body: bytes, separator: str, before: int) -> Iterator[tuple[int, list[str]]]:
    """The line where each row begins, and its fields; to say what is wrong."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(body.decode(errors="replace"), newline=""), delimiter=separator)
    begin = 1
    try:
        for row in reader:
            if row:
                yield before + begin, row
            begin = reader.line_num + 1
    except csv.Error:
        return


def _line_of(body: bytes, separator: str, before: int, number: int) -> int:
    """The line where a row (from 0) begins."""
    lines = (line for line, _ in _records(body, separator, before))
    return next(itertools.islice(lines, number, None), before + number + 1)


# -------------------------------------------------------------------------------------------------- Parquet, Arrow


def _schema(path: Path, head: bytes) -> pa.Schema:
    data = pa.BufferReader(read_bytes(path))
    if head.startswith(PARQUET):
        return pq.read_schema(data)
    if head.startswith(ARROW_STREAM):
        return ipc.open_stream(data).schema
    return ipc.open_file(data).schema if head.startswith(ARROW_FILE) else feather.read_table(data).schema


def read_arrow(data: bytes, file: str) -> pa.Table:
    """The Arrow table of a Parquet, Feather or Arrow file. Raises TraceError where it cannot be read."""
    kind = "Parquet" if data.startswith(PARQUET) else "Arrow"
    buffer = pa.BufferReader(data)
    try:
        if data.startswith(PARQUET):
            about = pq.read_metadata(buffer)
            size = sum(about.row_group(each).total_byte_size for each in range(about.num_row_groups))
            size = max(size, 8 * about.num_rows * about.num_columns)  # repeated values take nothing in the file
            if size > reading.MOST_BYTES:
                raise reading.too_large(file)
            table = pq.read_table(pa.BufferReader(data))
        elif data.startswith(ARROW_STREAM):
            table = ipc.open_stream(buffer).read_all()
        else:
            table = feather.read_table(buffer)
        table.validate(full=True)  # offsets of a damaged file may point anywhere
        return table
    except TraceError:
        raise
    except (*UNREADABLE, KeyError, TypeError, MemoryError) as error:
        raise TraceError(f"{file}: not a readable {kind} file: {error}") from error


def _parse_binary(data: bytes, file: str) -> Table:
    table = read_arrow(data, file)
    repeated = frozenset(name for name, count in Counter(table.column_names).items() if count > 1)
    columns: dict[str, Any] = {}
    for name, values in zip(table.column_names, table.columns, strict=True):
        if not name.startswith("__index_level_"):  # pandas: the row's number, or a name of it
            columns.setdefault(name, _plain(values, file, name))
    if not table.num_rows:
        raise TraceError(f"{file}: no rows; expected at least one request")
    return Table(file, columns, lambda row: row + 1, repeated)


def _plain(values: pa.ChunkedArray, file: str, name: str) -> pa.ChunkedArray:
    """A column without the encodings that only concern how it is stored."""
    kind = values.type
    try:
        if isinstance(kind, pa.BaseExtensionType):
            values = pa.chunked_array([chunk.storage for chunk in values.chunks], kind.storage_type)
            kind = values.type
        if pa.types.is_dictionary(kind):
            values = pc.cast(values, kind.value_type)
            kind = values.type
        if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or pa.types.is_null(kind):
            return pc.cast(values, pa.string())
        return pc.cast(values, pa.float32()) if pa.types.is_float16(kind) else values
    except pa.ArrowException as error:
        raise TraceError(f"{file}: field {name}: {kind} cannot be read: {error}") from error
