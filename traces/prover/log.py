"""Logs of proof search: one JSON object a generation, as a real run or ``traces.prover`` writes them.

Fields: ``theorem`` (what is proved, any text or number), ``job`` (which of its concurrent jobs), ``submitted_s`` and
``generated_s`` (when the request was sent and its answer complete), ``prompt_tokens``, ``output_tokens``; optional are
``verified_s``, ``success``, ``depth``, ``process`` and ``prefix_ids`` (ids of the prompt's whole 16-token blocks).

A generation waits for the one before it of the same job of the same theorem: it is sent as long after that has been
generated as it was in the log (verification, and waiting for a verifier), so a replay reacts to the scheduler, while
what is asked does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.errors import TraceError
from l3env.files import write_text
from l3env.requests.workload import NO_PARENT, Workload
from l3env.traces.reading import MAX_TOKENS, FileFormat, fail, first_line, read_bytes

BLOCK_TOKENS = 16
NEEDED = ("theorem", "job", "submitted_s", "generated_s", "prompt_tokens", "output_tokens")
OPTIONAL = ("verified_s", "success", "depth", "process", "prefix_ids")


def matches(path: Path) -> bool:
    """True where the first line begins as a JSON object with a theorem."""
    start = first_line(path)
    return start.startswith("{") and '"theorem"' in start and '"job"' in start


def write(rows: Iterable[Mapping[str, Any]], path: Path) -> Path:
    """Writes a log, whole or not at all: rows in order of submission."""
    ordered = sorted(rows, key=lambda row: float(row["submitted_s"]))
    write_text(path, "".join(json.dumps(dict(row)) + "\n" for row in ordered))
    return path


def load(path: Path) -> Workload:
    """One request a line (plain or gzip). Raises TraceError naming file, line and field."""
    lines = read_bytes(path).rstrip().split(b"\n")
    if lines == [b""]:
        raise TraceError(f"{path}: empty; expected one JSON object a line")
    rows = [_parse(path, number, line) for number, line in enumerate(lines, start=1)]
    order = sorted(range(len(rows)), key=lambda i: rows[i]["submitted_s"])
    rows = [rows[i] for i in order]
    last: dict[tuple[Any, Any], int] = {}
    parent = np.full(len(rows), NO_PARENT, dtype=np.int64)
    think_s = np.zeros(len(rows))
    sessions: dict[Any, int] = {}
    for i, row in enumerate(rows):
        key = (row["theorem"], row["job"])
        if key in last:
            before = rows[last[key]]
            pause_s = row["submitted_s"] - before["generated_s"]
            if pause_s < 0:
                expected = f"no earlier than the generation before it of the same job ended ({before['generated_s']:g})"
                fail(path, order[i] + 1, "submitted_s", row["submitted_s"], expected)
            parent[i], think_s[i] = last[key], pause_s
        last[key] = i
        sessions.setdefault(row["theorem"], len(sessions))
    ids = [row.get("prefix_ids", []) for row in rows]
    has_ids = any(ids)
    return Workload.build(
        path.name.partition(".")[0],
        _earliest_s(rows, parent),
        [row["prompt_tokens"] for row in rows],
        [row["output_tokens"] for row in rows],
        parent_idx=parent,
        think_s=think_s,
        session_idx=[sessions[row["theorem"]] for row in rows],
        prefix_ids=[block for row in ids for block in row] if has_ids else None,
        prefix_offsets=np.cumsum([0, *(len(row) for row in ids)]) if has_ids else None,
        prefix_block_tokens=BLOCK_TOKENS if has_ids else 0,
        source={"file": str(path), "format": FORMAT.name, "rows": len(rows), "skipped": {}, "prefix_scope": "trace"},
    )


def _earliest_s(rows: list[dict[str, Any]], parent: NDArray[np.int64]) -> NDArray[np.float64]:
    """Roots arrive as in the log; what depends on others arrives by its pause, so its bound is the roots' so far."""
    times_s = [row["submitted_s"] - rows[0]["submitted_s"] for row in rows]
    return np.maximum.accumulate(np.where(parent == NO_PARENT, times_s, 0.0))


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise TraceError(f"{path}: row {number}: not JSON ({error}); expected an object a line") from error
    keys = set(row) if isinstance(row, dict) else set()
    if not keys.issuperset(NEEDED) or not keys.issubset((*NEEDED, *OPTIONAL)):
        got = sorted(row) if isinstance(row, dict) else row
        known = f"{', '.join(NEEDED)}, and of {', '.join(OPTIONAL)} what there is"
        raise TraceError(f"{path}: row {number}: got fields {got!r}; expected {known}")
    for name in ("theorem", "job"):
        if type(row[name]) not in (int, str):
            fail(path, number, name, row[name], "a text or a whole number")
    for name, least in (("submitted_s", 0), ("generated_s", "submitted_s")):
        bound = row[least] if isinstance(least, str) else least
        if type(row[name]) not in (int, float) or not bound <= row[name] < float("inf"):
            fail(path, number, name, row[name], f"seconds >= {least}")
    for name in ("prompt_tokens", "output_tokens"):
        if type(row[name]) is not int or not 1 <= row[name] <= MAX_TOKENS:
            fail(path, number, name, row[name], f"a whole number from 1 to {MAX_TOKENS}")
    ids = row.get("prefix_ids", [])
    if not isinstance(ids, list) or not all(type(block) is int and 0 <= block < 2**63 for block in ids):
        fail(path, number, "prefix_ids", ids, "a list of whole numbers >= 0")
    if len(ids) > row["prompt_tokens"] // BLOCK_TOKENS:
        fail(path, number, "prefix_ids", f"{len(ids)} ids", f"at most one for each {BLOCK_TOKENS} prompt tokens")
    return row


FORMAT = FileFormat("prover-log", "Proof-search log, one JSON object a generation", matches, load, {})
