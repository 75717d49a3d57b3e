"""Whole files or nothing, however a process ends, with several processes writing side by side."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pandas as pd

PART = re.compile(r"\.(?P<host>.*)-(?P<pid>\d+)-\d+\.part")
FOREIGN_S = 86_400.0  # parts that another host began are left alone for so long

_numbers = itertools.count()


@contextmanager
def whole(path: Path, *, sync: bool = False) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of ``path`` once all has gone well; otherwise nothing is left of it.

    Args:
        sync: wait until it is on the disk, so that a power cut cannot take it either.
    """
    part = path.with_name(f".{platform.node()[:40]}-{os.getpid()}-{next(_numbers)}.part")
    try:
        with part.open("wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or nothing."""
    with whole(path) as file:
        file.write(text.encode())


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """Writes a whole Parquet file or nothing."""
    with whole(path) as file:
        frame.to_parquet(file)


def remove_parts(folder: Path) -> None:
    """Removes what killed processes have left half-written in a folder and below; not what others are writing."""
    for part in folder.rglob("*.part"):
        with contextlib.suppress(FileNotFoundError):
            if not _being_written(part):
                part.unlink()


def _being_written(part: Path) -> bool:
    found = PART.fullmatch(part.name)
    if found is None:
        return False
    if found["host"] != platform.node()[:40]:
        return time.time() - part.stat().st_mtime < FOREIGN_S
    try:
        os.kill(int(found["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is somebody else's
    return True
