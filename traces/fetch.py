"""Downloads a real trace into the user's cache, checked against the manifest."""

from __future__ import annotations

import hashlib
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

from l3env.errors import TraceError
from l3env.traces import catalog
from l3env.traces.canonical import written
from l3env.traces.catalog import Entry

CHUNK_BYTES = 1 << 16
TIMEOUT_S = 30.0

Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all where the server says


def fetch(name: str, progress: Progress | None = None, *, manifest: Path = catalog.MANIFEST) -> Path:
    """Downloads the trace ``name`` to the cache and returns its file; a copy that is there already is checked and kept.

    The file appears whole and checked or not at all. ``progress(done_bytes, total_bytes)`` is called as it comes.
    Raises TraceError for an unknown name, a trace published as many files, no network, or a wrong checksum.
    """
    entries = catalog.read_manifest(manifest)
    if name not in entries:
        raise TraceError(f"trace {name!r} is not in the manifest; expected one of {', '.join(entries)}")
    entry = entries[name]
    if entry.multi:
        raise TraceError(
            f"trace {name!r} is published as many files at {entry.url}; download that folder and pass its path "
            f"as the trace (format {entry.format})"
        )
    target = catalog.cache_dir() / entry.files[0]
    if target.exists():
        with target.open("rb") as file:
            check = _Check(entry)
            while chunk := file.read(CHUNK_BYTES):
                check.add(chunk)
        if check.problem() is None:
            return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TraceError(f"{target.parent}: cannot be made: {error}") from error
    with written(target) as file:
        _download(entry, file, progress)
    return target


class _Check:
    """Checks bytes as they come: the sha256 of all, or that of the first rows where only theirs is known."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.size_bytes = 0
        self.whole = hashlib.sha256()
        self.prefix = hashlib.sha256()

    def add(self, chunk: bytes) -> None:
        missing = max(0, self.entry.url_prefix_bytes - self.size_bytes)
        self.prefix.update(chunk[:missing])
        self.whole.update(chunk)
        self.size_bytes += len(chunk)

    def problem(self) -> str | None:
        """What is wrong, or None."""
        entry = self.entry
        if entry.url_sha256:
            got, expected, what = self.whole.hexdigest(), entry.url_sha256, "sha256"
        elif entry.url_prefix_sha256:
            what = f"sha256 of the first {entry.url_prefix_bytes} bytes"
            got, expected = self.prefix.hexdigest(), entry.url_prefix_sha256
        else:
            return "no checksum in the manifest to check it against"
        return None if got == expected else f"{what} is {got} ({self.size_bytes} bytes); expected {expected}"


def _download(entry: Entry, file: BinaryIO, progress: Progress | None) -> None:
    check = _Check(entry)
    try:
        with urllib.request.urlopen(entry.url, timeout=TIMEOUT_S) as answer:
            length = answer.headers.get("Content-Length")
            total_bytes = int(length) if length and length.isdecimal() else None
            while chunk := answer.read(CHUNK_BYTES):
                check.add(chunk)
                file.write(chunk)
                if progress is not None:
                    progress(check.size_bytes, total_bytes)
    except urllib.error.HTTPError as error:
        raise TraceError(f"trace {entry.name}: {entry.url} answers {error.code} {error.reason}") from error
    except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise TraceError(
            f"trace {entry.name}: {entry.url} cannot be reached ({reason}); without network, put the file in a folder "
            f"named by L3ENV_TRACE_DIR as {entry.files[0]}, or use profile:{entry.name} where there is one"
        ) from error
    if problem := check.problem():
        raise TraceError(f"trace {entry.name}: {entry.url}: {problem}; nothing was kept")
