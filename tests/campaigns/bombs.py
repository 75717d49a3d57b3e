"""Small files that would be large in memory: each is read by a process of its own, which says how much it held.

Archives of zeros, of rows and of archives, a line without end, aliases that multiply. ``python -m
tests.campaigns.bombs FILE MOST_BYTES`` is that process.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq

from l3env.errors import L3EnvError
from l3env.runs.grid import Grid
from l3env.traces import catalog, reading
from tests.campaigns.memory import most_held_bytes

PIECE = 2**20
ROWS = b"0.5,100,10\n" * (PIECE // 11)
HEADER = b"arrival_s,prompt_tokens,output_tokens\n"
REAL_BYTES = reading.MOST_BYTES
FREE_BYTES = 400 * 2**20  # what a process holds that has read nothing
TIMES = 3  # of the limit, that reading may hold at most


def _zstd(path: Path) -> pa.CompressedOutputStream:
    return pa.CompressedOutputStream(str(path), "zstd")


PACKERS: dict[str, Callable[[Path], object]] = {
    "gz": partial(gzip.open, mode="wb", compresslevel=1),
    "bz2": partial(bz2.open, mode="wb", compresslevel=1),
    "xz": partial(lzma.open, mode="wb", preset=0),
    "zst": _zstd,
}


def packed(path: Path, kind: str, size: int, piece: bytes) -> Path:
    """A file that unpacks to so many bytes."""
    with PACKERS[kind](path) as file:  # type: ignore[attr-defined]
        file.write(HEADER)
        for _ in range(size // len(piece) + 1):
            file.write(piece)
    return path


def bombs(folder: Path, size: int, names: tuple[str, ...] = ()) -> Iterator[Path]:
    """One after the other, each of at least so many bytes once it is read; those of some names, or all."""
    for path in _all_bombs(folder, size):
        if not names or path.name in names:
            yield path


def _all_bombs(folder: Path, size: int) -> Iterator[Path]:
    for kind in PACKERS:
        yield packed(folder / f"zeros.csv.{kind}", kind, size, bytes(PIECE))
        yield packed(folder / f"rows.csv.{kind}", kind, size, ROWS)
    inner = packed(folder / "inner.gz", "gz", size // 8, ROWS).read_bytes()
    with tarfile.open(folder / "archives.tar", "w") as archive:
        for number in range(10):
            info = tarfile.TarInfo(f"demo/chunk-{number}-trace.csv")
            info.size = len(inner)
            archive.addfile(info, io.BytesIO(inner))
    yield folder / "archives.tar"
    line = folder / "line.jsonl"
    with line.open("wb") as file:
        file.write(b'{"a": "')
        file.truncate(max(size, 10 * 2**30 if size > REAL_BYTES else 0))  # sparse
    yield line
    table = pa.table({"arrival_s": np.zeros(min(size, 2**29) // 8)})
    pq.write_table(table, folder / "column.parquet", compression="zstd")
    feather.write_feather(table, folder / "column.arrow", compression="zstd")
    del table
    yield folder / "column.parquet"
    yield folder / "column.arrow"
    yield _written(folder / "laughs.yaml", _aliases("[{}]"))
    yield _written(folder / "merges.yaml", _aliases("{{<<: [{}]}}"))
    yield _written(folder / "deep.yaml", "policies: " + "[" * 200_000)


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def _aliases(form: str) -> str:
    lines = ["policies: &a0 {x: fcfs}"]
    lines += [f"a{i + 1}: &a{i + 1} " + form.format(", ".join([f"*a{i}"] * 10)) for i in range(12)]
    return "\n".join([*lines, "systems: *a12", ""])


def try_one(path: Path, most_bytes: int) -> dict[str, object]:
    """Reads a bomb in a process of its own: how that ended, its error, the most bytes it held."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.campaigns.bombs", str(path), str(most_bytes)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        return {"outcome": f"ended with {done.returncode}: {done.stderr[-300:]}", "bytes": 0}
    return dict(json.loads(done.stdout))


def campaign(folder: Path, size: int, most_bytes: int, *, say=print) -> int:
    """All of them; returns how many were not refused, or held more than ``TIMES`` the limit."""
    faults = 0
    for path in bombs(folder, size):
        file_bytes = path.stat().st_size
        found = try_one(path, most_bytes)
        held = int(str(found["bytes"]))
        bad = found["outcome"] != "refused" or held > TIMES * most_bytes + FREE_BYTES
        faults += bad
        say(
            f"{path.name}: {file_bytes:,} bytes on disk, {found['outcome']}, {held / 2**20:,.0f} MiB held"
            + (" TOO MUCH" if bad else "")
        )
        path.unlink()
    return faults


def main(path: str, most_bytes: str) -> None:
    """The process that reads one."""
    reading.MOST_BYTES = int(most_bytes)
    reading.MOST_LINE_BYTES = min(reading.MOST_LINE_BYTES, int(most_bytes) // 4)
    warnings.simplefilter("ignore")
    try:
        if path.endswith(".yaml"):
            Grid.from_yaml(Path(path))
        else:
            catalog.resolve(path + ("?format=servegen" if path.endswith(".tar") else ""))
        outcome, error = "read", ""
    except L3EnvError as problem:
        outcome, error = "refused", str(problem)
    print(json.dumps({"outcome": outcome, "error": error, "bytes": most_held_bytes()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
