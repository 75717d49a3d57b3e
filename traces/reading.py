"""What the loaders share: opening files, packed or not, and errors that name file, row and field."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import pyarrow as pa

from l3env.errors import TraceError
from l3env.requests.workload import Workload

MAX_TOKENS = 2**31 - 1
MOST_BYTES = 2**32  # of a file or archive, unpacked
MOST_LINE_BYTES = 2**29
CHUNK_BYTES = 2**24
SEEN_BYTES = 2**16  # of a file, to tell its format
PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
TAR_NAMES = (".tar", ".tgz", ".tbz2", ".txz", ".tzst", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
UNREADABLE = (
    *(OSError, EOFError, ValueError, OverflowError, zlib.error, lzma.LZMAError),
    *(tarfile.TarError, pa.ArrowException),
)


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
    shown = str(got) if isinstance(got, Decimal) else repr(got)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    raise TraceError(f"{file}: row {row}, field {column}: got {shown}; expected {expected}")


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes as a stream, unpacked where its first bytes say gzip, bz2, xz, zstd or lz4.

    Raises TraceError where it cannot be opened or, while it is read, unpacked.
    """
    try:
        with path.open("rb") as raw:
            packing = next((name for magic, name in PACKED.items() if _peek(raw).startswith(magic)), None)
            if packing is None:
                yield raw
            else:
                with _unpacked(raw, packing) as stream:
                    yield stream
    except FileNotFoundError:
        raise TraceError(f"{path}: no such file") from None
    except TraceError:
        raise
    except UNREADABLE as error:
        raise TraceError(f"{path}: cannot be read: {error}") from error


def _peek(raw: Any) -> bytes:
    return bytes(raw.peek(8)[:8])


def _unpacked(raw: BinaryIO, packing: str) -> BinaryIO:
    if packing == "gzip":
        return cast(BinaryIO, gzip.open(raw))
    if packing == "bz2":
        return cast(BinaryIO, bz2.open(raw))
    if packing == "xz":
        return cast(BinaryIO, lzma.open(raw))
    return cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), packing))


def read_bytes(path: Path) -> bytes:
    """The file's bytes, unpacked. Raises TraceError where it cannot be read or is larger than ``MOST_BYTES``."""
    with opened(path) as stream:
        return _read_all(str(path), stream, is_text=True)


def _read_all(file: str, stream: Any, is_text: bool, most: int | None = None) -> bytes:
    """All bytes of a stream. Raises TraceError for more than ``most`` of them, and for text with an endless line."""
    most = MOST_BYTES if most is None else most
    data = bytearray()
    line_start = 0
    while chunk := stream.read(CHUNK_BYTES):
        if not data:
            is_text = is_text and not chunk.startswith((b"PAR1", b"ARROW1"))
        end = chunk.rfind(b"\n")
        line_start = len(data) + end + 1 if end >= 0 else line_start
        data += chunk
        if len(data) > most:
            raise too_large(file)
        if is_text and len(data) - line_start > MOST_LINE_BYTES:
            raise TraceError(f"{file}: a line of more than {MOST_LINE_BYTES:,} bytes; expected shorter ones")
    return bytes(data)


def too_large(file: str) -> TraceError:
    """The error for more bytes than a trace may have."""
    return TraceError(f"{file}: more than {MOST_BYTES:,} bytes, unpacked; expected at most that many")


def first_bytes(path: Path, count: int = SEEN_BYTES) -> bytes:
    """The first bytes (unpacked) for recognising a format; empty for a folder or what cannot be read."""
    try:
        with opened(path) as stream:
            data = bytearray()
            while len(data) < count and (chunk := stream.read(count - len(data))):
                data += chunk
            return bytes(data)
    except TraceError:
        return b""


def decoded(data: bytes) -> bytes:
    """Text as UTF-8 without a byte-order mark, from UTF-8 or UTF-16 with one."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data[: len(data) // 2 * 2].decode("utf-16", errors="replace").encode()
    return data.removeprefix(b"\xef\xbb\xbf")


def first_line(path: Path) -> str:
    """The first line that is not blank, without its end; empty where there is no text."""
    head = decoded(first_bytes(path)).lstrip().split(b"\n", 1)[0]
    try:
        return head.decode().rstrip("\r")
    except UnicodeDecodeError:
        return ""


def is_tar(path: Path) -> bool:
    """True for a tar archive, compressed or not."""
    return path.is_file() and path.name.endswith(TAR_NAMES)


def member_names(path: Path, limit: int | None = None) -> list[str]:
    """Names of the files in a folder or a tar archive (the first ``limit`` of them); else the file's own name."""
    return [name for name, _ in _members(path, limit, read=False)]


def read_members(path: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every file under a folder or in a tar archive whose name has ``pattern``, sorted by name."""
    wanted = re.compile(pattern)
    yield from sorted(_members(path, None, read=True, wanted=wanted))


def _members(
    path: Path, limit: int | None, read: bool, wanted: re.Pattern[str] | None = None
) -> Iterator[tuple[str, bytes]]:
    """Walks a folder, an archive or one file; yields at most ``limit`` names, with their bytes where asked."""
    if path.is_dir():
        walk = _in_folder(path, read, wanted)
    elif is_tar(path):
        walk = _in_archive(path, read, wanted)
    else:
        walk = iter([(path.name, read_bytes(path) if read else b"")])
    for number, member in enumerate(walk, start=1):
        yield member
        if number == limit:
            return


def _in_folder(path: Path, read: bool, wanted: re.Pattern[str] | None) -> Iterator[tuple[str, bytes]]:
    left = MOST_BYTES
    for file in sorted(path.rglob("*")):
        if file.is_file() and (wanted is None or wanted.search(file.name)):
            data = read_bytes(file) if read else b""
            left -= len(data)
            if left < 0:
                raise too_large(str(path))
            yield str(file.relative_to(path)), data


def _in_archive(path: Path, read: bool, wanted: re.Pattern[str] | None) -> Iterator[tuple[str, bytes]]:
    left = MOST_BYTES
    with opened(path) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            if member.isfile() and (wanted is None or wanted.search(member.name.rsplit("/", 1)[-1])):
                handle = archive.extractfile(member) if read else None
                data = _read_all(str(path), handle, is_text=False, most=left) if handle else b""
                unpacked = unpack(f"{path}!{member.name}", data, left)
                left -= max(len(data), len(unpacked))
                yield member.name, unpacked


def unpack(file: str, data: bytes, most: int | None = None) -> bytes:
    """Bytes of a member of an archive, unpacked where they are packed themselves. Raises TraceError, also for more than
    ``most`` of them (by default ``MOST_BYTES``)."""
    packing = next((name for magic, name in PACKED.items() if data.startswith(magic)), None)
    if packing is None:
        return data
    try:
        with _unpacked(io.BytesIO(data), packing) as stream:
            return _read_all(file, stream, is_text=True, most=most)
    except TraceError:
        raise
    except UNREADABLE as error:
        raise TraceError(f"{file}: cannot be read: {error}") from error
