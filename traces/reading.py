"""What the loaders share: opening files, strict CSV tables, and errors that name file, row and field."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
from numpy.typing import NDArray

from l3env.errors import TraceError
from l3env.requests.workload import Workload

MAX_TOKENS = 2**31 - 1
GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class FileFormat:
    """A trace format made of two functions; see ``l3env.trace_registry.TraceFormat`` for what each field means."""

    name: str
    description: str
    matches: Callable[[Path], bool]
    load: Callable[..., Workload]
    options: Mapping[str, Callable[[str], Any]] = field(default_factory=dict)


def fail(file: object, row: object, column: str, got: object, expected: str) -> NoReturn:
    """Raises the one error of a bad row. ``row`` counts the file's lines from 1, the header included."""
    raise TraceError(f"{file}: row {row}, field {column}: got {got!r}; expected {expected}")


def read_bytes(path: Path) -> bytes:
    """The file's bytes, gunzipped where it is gzip. Raises TraceError where it cannot be read."""
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if data.startswith(GZIP_MAGIC) else data
    except FileNotFoundError:
        raise TraceError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(f"{path}: cannot be read: {error}") from error


def first_bytes(path: Path, count: int = 4096) -> bytes:
    """The first bytes (after gunzip) for recognising a format; empty for a folder or what cannot be read."""
    try:
        with path.open("rb") as raw:
            head = raw.read(count)
        if head.startswith(GZIP_MAGIC):
            with gzip.open(path, "rb") as packed:
                return packed.read(count)
        return head
    except (OSError, EOFError, zlib.error):
        return b""


def first_line(path: Path) -> str:
    """The first line, without its end and without a byte-order mark; empty where there is no text."""
    head = first_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n", 1)[0]
    try:
        return head.decode().rstrip("\r")
    except UnicodeDecodeError:
        return ""


def has_any_column(path: Path, columns: Sequence[str]) -> bool:
    """True where the first line is a CSV header with at least one of ``columns``."""
    names = {name.strip().strip('"') for name in first_line(path).split(",")}
    return bool(names & set(columns))


def is_tar(path: Path) -> bool:
    """True for a tar archive, compressed or not."""
    return path.is_file() and path.name.endswith((".tar", ".tar.gz", ".tgz"))


def member_names(path: Path, limit: int | None = None) -> list[str]:
    """Names of the files in a folder or a tar archive (the first ``limit`` of them); else the file's own name."""
    try:
        return [name for name, _ in _members(path, limit, read=False)]
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise TraceError(f"{path}: cannot be read: {error}") from error


def read_members(path: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every file under a folder or in a tar archive whose name has ``pattern``, sorted by name."""
    wanted = re.compile(pattern)
    try:
        found = [(name, data) for name, data in _members(path, None, read=True, wanted=wanted)]
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise TraceError(f"{path}: cannot be read: {error}") from error
    yield from sorted(found)


def _members(
    path: Path, limit: int | None, read: bool, wanted: re.Pattern[str] | None = None
) -> Iterator[tuple[str, bytes]]:
    """Walks a folder, an archive or one file; yields at most ``limit`` names, with their bytes where asked."""
    count = 0
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.is_file() and (wanted is None or wanted.search(file.name)):
                yield str(file.relative_to(path)), read_bytes(file) if read else b""
                count += 1
                if count == limit:
                    return
    elif is_tar(path):
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                if member.isfile() and (wanted is None or wanted.search(member.name.rsplit("/", 1)[-1])):
                    handle = archive.extractfile(member) if read else None
                    yield member.name, handle.read() if handle else b""
                    count += 1
                    if count == limit:
                        return
    else:
        yield path.name, read_bytes(path) if read else b""


@dataclass(frozen=True)
class Table:
    """Text columns of one CSV; row ``i`` of a column is line ``first_row + i`` of the file."""

    file: str
    columns: Mapping[str, pa.ChunkedArray]
    first_row: int

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def floats(self, column: str, low: float = 0.0) -> NDArray[np.float64]:
        """(N,) finite numbers >= ``low``."""
        expected = "a number" if low == -np.inf else f"a number >= {low:g}"
        values = np.array(self._cast(column, pa.float64(), expected).to_numpy(), dtype=np.float64)
        self.require(np.isfinite(values) & (values >= low), column, expected)
        return values

    def integers(self, column: str, low: int, high: int) -> NDArray[np.int64]:
        """(N,) whole numbers from ``low`` to ``high``."""
        expected = f"a whole number from {low} to {high}"
        values = np.array(self._cast(column, pa.float64(), expected).to_numpy(), dtype=np.float64)
        with np.errstate(invalid="ignore"):
            self.require((values >= low) & (values <= high) & (values == np.floor(values)), column, expected)
        return np.array(values, dtype=np.int64)

    def tokens(self, column: str, low: int = 1) -> NDArray[np.int64]:
        """(N,) token counts, at least ``low``."""
        return self.integers(column, low, MAX_TOKENS)

    def times_ns(self, column: str) -> NDArray[np.int64]:
        """(N,) UTC wall-clock times in ns, up to nine fraction digits, with an optional UTC suffix."""
        expected = "a time like 2023-11-16 18:15:46.6805900"
        text = pc.replace_substring_regex(self.columns[column], r"(\+00:00|Z)$", "")
        stamps = self._cast(column, pa.timestamp("ns"), expected, text)
        return np.array(stamps.cast(pa.int64()).to_numpy(), dtype=np.int64)

    def require_sorted(self, column: str, values: NDArray[Any]) -> None:
        """Raises for the first value that is before the one above it."""
        mask = np.concatenate([[True], values[1:] >= values[:-1]])
        self.require(mask, column, "a time not before the row above")

    def require(self, good_mask: NDArray[np.bool_], column: str, expected: str) -> None:
        """Raises for the first row whose mask is False."""
        if not good_mask.all():
            row = int(np.argmin(good_mask))
            self.fail(row, column, expected)

    def fail(self, row: int, column: str, expected: str) -> NoReturn:
        """Raises for row ``row`` (counted from 0 within the data)."""
        fail(self.file, self.first_row + row, column, self.columns[column][row].as_py(), expected)

    def _cast(
        self, column: str, kind: pa.DataType, expected: str, text: pa.ChunkedArray | None = None
    ) -> pa.ChunkedArray:
        """The column as ``kind``; on failure halves the rows until it has the first bad one."""
        values = self.columns[column] if text is None else text
        try:
            return pc.cast(values, kind)
        except pa.ArrowInvalid:
            low, high = 0, len(values)
        while high - low > 1:
            middle = (low + high) // 2
            try:
                pc.cast(values.slice(low, middle - low), kind)
                low = middle
            except pa.ArrowInvalid:
                high = middle
        self.fail(low, column, expected)


def read_table(path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> Table:
    """Reads a CSV with a header. Raises TraceError for missing or unknown columns and rows of another length."""
    return parse_table(read_bytes(path), str(path), required, optional)


def parse_table(data: bytes, file: str, required: Sequence[str], optional: Sequence[str] = ()) -> Table:
    """As ``read_table``, from bytes; ``file`` is what errors call them."""
    data = data.removeprefix(b"\xef\xbb\xbf").rstrip()
    header = data.split(b"\n", 1)[0].decode(errors="replace").strip()
    names = [name.strip().strip('"') for name in header.split(",")] if header else []
    missing = [name for name in required if name not in names]
    unknown = [name for name in names if name not in (*required, *optional)]
    repeated = sorted({name for name in names if names.count(name) > 1})
    for what, columns in (("missing", missing), ("unknown", unknown), ("repeated", repeated)):
        if columns:
            extra = f" (and optionally {', '.join(optional)})" if optional else ""
            raise TraceError(
                f"{file}: row 1: {what} column {', '.join(map(repr, columns))}; expected {', '.join(required)}{extra}"
            )
    if b"\n" not in data:
        raise TraceError(f"{file}: no rows below the header; expected at least one request")
    return _parse(data, file, names, skip_rows=1)


def parse_rows(data: bytes, file: str, columns: Sequence[str]) -> Table:
    """As ``parse_table`` for a file without header, whose columns are ``columns`` in this order."""
    if not data.strip():
        raise TraceError(f"{file}: empty; expected rows of {', '.join(columns)}")
    return _parse(data.rstrip(), file, columns, skip_rows=0)


def _parse(data: bytes, file: str, names: Sequence[str], skip_rows: int) -> Table:
    bad: list[tuple[int | None, int]] = []

    def on_bad_row(row: pa_csv.InvalidRow) -> str:
        bad.append((row.number, row.actual_columns))
        return "error"

    try:
        table = pa_csv.read_csv(
            io.BytesIO(data),
            read_options=pa_csv.ReadOptions(use_threads=False, column_names=list(names), skip_rows=skip_rows),
            parse_options=pa_csv.ParseOptions(ignore_empty_lines=False, invalid_row_handler=on_bad_row),
            convert_options=pa_csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid as error:
        if bad:
            row, columns = bad[0]
            raise TraceError(
                f"{file}: row {row}: got {columns} fields; expected {len(names)} ({', '.join(names)})"
            ) from error
        raise TraceError(f"{file}: not a readable CSV: {error}") from error
    stripped = {name: pc.utf8_trim_whitespace(table.column(name)) for name in names}
    return Table(file, stripped, first_row=1 + skip_rows)
