"""LLMServingSim workloads: JSON lines, each a request or a session of requests with tools between them.

Fields: ``input_toks``, ``output_toks``, ``arrival_time_ns``, perhaps ``input_tok_ids``; a session has ``session_id``,
``arrival_time_ns`` and ``sub_requests``, each with ``tool_duration_ns`` from its answer to the next one. Source:
github.com/casys-kaist/LLMServingSim (MIT).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from l3env.requests.workload import NO_PARENT, Workload
from l3env.traces.containers import look, of_rows, parse_json, read_table
from l3env.traces.named_columns import Table
from l3env.traces.reading import FileFormat, fail, read_bytes
from l3env.traces.rows import Links, Prefix, build, kept_columns, parse_names
from l3env.traces.spec import parse_count

BLOCK_TOKENS = 16
KNOWN = ("input_tok_ids", "output_tok_ids", "session_id", "tool_duration_ns")


def matches(path: Path) -> bool:
    """True for requests with ``input_toks``, and for sessions with ``sub_requests``."""
    return bool(look(path).names & {"input_toks", "sub_requests"})


def load(path: Path, *, prefix_block_tokens: int = BLOCK_TOKENS, keep: Sequence[str] = ()) -> Workload:
    """One request a line or sub-request; arrival in s.

    A sub-request waits for the one before it and then for its tools (``think_s``); recorded is only when the session
    begins, so ``arrival_s`` of all its requests is that. Prefix ids come from the token ids, where there are such:
    equal for equal whole blocks of ``prefix_block_tokens`` after equal beginnings. Raises TraceError naming file, line
    and field.
    """
    if look(path).kind == "json":
        table, parent = _rows(path)
    else:
        table = read_table(path)
        parent = [NO_PARENT] * len(table)
    table.need("arrival_time_ns", "input_toks", "output_toks")
    links = None
    if table.has("tool_duration_ns"):
        parents = np.array(parent, dtype=np.int64)
        after_s = table.seconds("tool_duration_ns", "ns")
        links = Links(parents, np.where(parents >= 0, after_s[np.maximum(parents, 0)], 0.0))
    times = table.times("arrival_time_ns", "ns")
    prompt, output = table.tokens("input_toks"), table.tokens("output_toks")
    return build(
        path,
        FORMAT.name,
        times,
        prompt,
        output,
        links=links,
        session=table.ids("session_id") if table.has("session_id") else None,
        prefix=_prefix(table, prompt.tolist(), prefix_block_tokens) if table.has("input_tok_ids") else None,
        extra=kept_columns(table, keep),
        source={"prefix_scope": "trace", **table.about_unused(KNOWN)},
    )


def _rows(path: Path) -> tuple[Table, list[int]]:
    """All requests, sessions opened, and the row that each waits for."""
    rows: list[dict[str, Any]] = []
    lines: list[Any] = []
    parent: list[int] = []
    for row, line in zip(*parse_json(read_bytes(path), str(path)), strict=True):
        inner = row.get("sub_requests")
        if inner is None:
            rows.append(row)
            lines.append(line)
            parent.append(NO_PARENT)
            continue
        if not isinstance(inner, list) or not all(isinstance(each, dict) for each in inner):
            fail(path, line, "sub_requests", inner, "a list of objects")
        shared = {name: value for name, value in row.items() if name != "sub_requests"}
        shared.setdefault("session_id", f"line {line}")
        for number, each in enumerate(inner, start=1):
            parent.append(NO_PARENT if number == 1 else len(rows) - 1)
            rows.append({"tool_duration_ns": 0, **each, **shared})
            lines.append(f"{line}.{number}")
    if not rows:
        fail(path, lines[0] if lines else 1, "sub_requests", [], "at least one request")
    return of_rows(rows, lines, str(path)), parent


def _prefix(table: Table, prompt: list[int], block_tokens: int) -> Prefix:
    """Blocks by what is in them and before them: a block is known by its tokens and the block that it follows."""
    known: dict[Any, int] = {}
    ids: list[int] = []
    lengths: list[int] = []
    column = table.columns["input_tok_ids"]
    for row, tokens in enumerate(column if isinstance(column, list) else column.to_pylist()):
        if tokens is not None and (not isinstance(tokens, list) or not set(map(type, tokens)) <= {int}):
            table.fail(row, "input_tok_ids", "a list of whole numbers")
        if tokens is not None and len(tokens) != prompt[row]:
            fail(table.file, table.line(row), "input_tok_ids", f"{len(tokens)} ids", f"input_toks = {prompt[row]}")
        before = -1
        tokens = tokens or []
        count = len(tokens) // block_tokens
        for begin in range(0, count * block_tokens, block_tokens):
            before = known.setdefault((before, *tokens[begin : begin + block_tokens]), len(known))
            ids.append(before)
        lengths.append(count)
    return Prefix(np.array(ids, dtype=np.int64), np.array(lengths, dtype=np.int64), block_tokens)


FORMAT = FileFormat(
    "llmservingsim-jsonl",
    "LLMServingSim JSON lines: requests, and sessions with tool times",
    matches,
    load,
    {"prefix_block_tokens": parse_count, "keep": parse_names},
)
