"""Mooncake: one JSON object a line, with the ids of the prompt's 512-token blocks.

Source: github.com/kvcache-ai/Mooncake (FAST25-release); Qin et al., FAST 2025. Licence Apache-2.0.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.errors import TraceError
from l3env.requests.workload import Workload
from l3env.traces.reading import MAX_TOKENS, FileFormat, fail, first_line, read_bytes

FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")
BLOCK_TOKENS = 512
SPREAD_SEED = 20250225  # fixed: the spread is part of the trace's reading, not of a resample
COARSE_SHARE = 0.5  # a clock is coarse when fewer than this share of rows have a time of their own
COARSE_STEP_S = 0.5


def matches(path: Path) -> bool:
    """True where the first line begins as a JSON object with one of the format's fields besides ``timestamp``."""
    start = first_line(path)
    return start.startswith("{") and any(f'"{name}"' in start for name in FIELDS[1:3])


def load(path: Path, *, spread: bool = True) -> Workload:
    """One request a line (plain or gzip); arrival in s; prefix ids kept, 512 tokens an id, comparable over the trace.

    The conversation trace's clock moves in steps of about 3 s. ``spread`` places the requests of one step at sorted
    uniform times within it (fixed seed; at most one median step ahead), only where the clock is that coarse;
    ``source["spread"]`` says what was done. Raises TraceError naming file, line and field.
    """
    rows = _read(path)
    times_s = np.array([row["timestamp"] for row in rows], dtype=np.float64) / 1e3
    ids = [row["hash_ids"] for row in rows]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])])
    times_s, said = _spread(times_s) if spread else (times_s, "off")
    return Workload.build(
        path.name.partition(".")[0],
        times_s,
        [row["input_length"] for row in rows],
        [row["output_length"] for row in rows],
        prefix_ids=np.array([block for row in ids for block in row], dtype=np.int64),
        prefix_offsets=offsets,
        prefix_block_tokens=BLOCK_TOKENS,
        source={
            "file": str(path),
            "format": FORMAT.name,
            "rows": len(rows),
            "skipped": {},
            "prefix_scope": "trace",
            "spread": said,
        },
    )


def _read(path: Path) -> list[dict[str, Any]]:
    lines = read_bytes(path).rstrip().split(b"\n")
    if lines == [b""]:
        raise TraceError(f"{path}: empty; expected one JSON object a line")
    rows: list[dict[str, Any]] = []
    before = 0.0
    for number, line in enumerate(lines, start=1):
        row = _parse(path, number, line)
        if row["timestamp"] < before:
            fail(path, number, "timestamp", row["timestamp"], f"a time not before the row above ({before:g} ms)")
        before = row["timestamp"]
        rows.append(row)
    return rows


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise TraceError(f"{path}: row {number}: not JSON ({error}); expected an object a line") from error
    if not isinstance(row, dict) or row.keys() != set(FIELDS):
        got = sorted(row) if isinstance(row, dict) else row
        raise TraceError(f"{path}: row {number}: got fields {got!r}; expected {', '.join(FIELDS)}")
    time_ms = row["timestamp"]
    if type(time_ms) not in (int, float) or not 0 <= time_ms < float("inf"):
        fail(path, number, "timestamp", time_ms, "milliseconds >= 0")
    for name in ("input_length", "output_length"):
        if type(row[name]) is not int or not 1 <= row[name] <= MAX_TOKENS:
            fail(path, number, name, row[name], f"a whole number from 1 to {MAX_TOKENS}")
    ids, blocks = row["hash_ids"], -(-row["input_length"] // BLOCK_TOKENS)
    if not isinstance(ids, list) or not all(type(block) is int and 0 <= block < 2**62 for block in ids):
        fail(path, number, "hash_ids", ids, "a list of whole numbers >= 0")
    if len(ids) != blocks:
        fail(path, number, "hash_ids", f"{len(ids)} ids", f"{blocks}, one per {BLOCK_TOKENS} tokens of input_length")
    return row


def _spread(times_s: NDArray[np.float64]) -> tuple[NDArray[np.float64], str]:
    """Times spread within the clock's steps where it is coarse, and what was done in words."""
    steps_s, step_idx = np.unique(times_s, return_inverse=True)
    if steps_s.size < 2 or steps_s.size >= COARSE_SHARE * times_s.size:
        return times_s, "not needed: the clock is fine"
    median_s = float(np.median(np.diff(steps_s)))
    if median_s < COARSE_STEP_S:
        return times_s, "not needed: the clock is fine"
    width_s = np.minimum(np.append(np.diff(steps_s), median_s), median_s)[step_idx]
    offset_s = np.random.default_rng(SPREAD_SEED).random(times_s.size) * width_s
    said = f"uniform within the clock's steps of about {median_s:g} s, fixed seed {SPREAD_SEED}"
    return np.sort(times_s + offset_s), said


def _yes_or_no(text: str) -> bool:
    if text.lower() in ("true", "yes", "1", "on"):
        return True
    if text.lower() in ("false", "no", "0", "off"):
        return False
    raise ValueError("yes or no")


FORMAT = FileFormat(
    "mooncake-jsonl", "Mooncake JSON lines with prefix block ids", matches, load, {"spread": _yes_or_no}
)
