"""TraceLab: rounds of coding agents (Claude Code, Codex), one JSON object a model call, with their times and tools.

Read are ``session_id`` (of a ``user``, ``provider`` and ``project``), ``round_index``, ``input_tokens_total`` (or
``prefix_tokens`` + ``newly_append_tokens``), ``output_tokens`` and ``timing_events``. Source:
github.com/uw-syfi/TraceLab (code Apache-2.0, data CC-BY-4.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from l3env.errors import TraceError
from l3env.requests.workload import NO_PARENT, Workload
from l3env.traces.containers import has_names, iterate_json, of_rows
from l3env.traces.named_columns import Codes, Table
from l3env.traces.reading import FileFormat, fail, read_bytes
from l3env.traces.rows import ZERO_OUTPUT, ZERO_PROMPT, Links, Prefix, build
from l3env.traces.spec import parse_count

BLOCK_TOKENS = 512
OWNER = ("user", "provider", "project", "session_id")
INPUTS = ("user_message", "tool_result")
NO_TIME = "no time recorded"
NOT_READ = "tools, models, characters and cache accounting"


def matches(path: Path) -> bool:
    """True for rounds of sessions with their times."""
    return has_names(path, "session_id", "timing_events")


def load(path: Path, *, sessions: int | None = None, prefix_block_tokens: int = BLOCK_TOKENS) -> Workload:
    """One request a round; arrival in s.

    A round begins with the last of its ``user_message`` and ``tool_result`` events before the model's first, and ends
    with its last event. It waits for the round before it in its session, and then for tools or the user: ``think_s`` is
    the time from that one's end to its beginning. Prefixes follow from the order of the session: a prompt begins with
    the ``prefix_tokens`` (whole blocks of ``prefix_block_tokens``) of the one before it; nothing is shared between
    sessions. ``sessions`` keeps the first so many. Raises TraceError naming file, line and field.
    """
    table, skipped = _rounds(path, sessions)
    session = table.ids("session")
    begin, end = table.times("begin"), table.times("end")
    order = np.lexsort((np.arange(len(table)), table.integers("round", -(2**53), 2**53, default=0), session))
    follows = np.concatenate([[False], session[order][1:] == session[order][:-1]])
    parent = np.full(len(table), NO_PARENT, dtype=np.int64)
    parent[order[1:]] = np.where(follows[1:], order[:-1], NO_PARENT)
    before = np.maximum(parent, 0)
    gap_s = np.where(parent >= 0, begin.minus(end.select(before)), 0.0)
    prompt, output = table.tokens("prompt"), table.tokens("output")
    prefix = _prefix(order, follows, prompt, table.tokens("prefix", default=0), prefix_block_tokens)
    return build(
        path,
        FORMAT.name,
        begin,
        prompt,
        output,
        links=Links(parent, np.maximum(gap_s, 0.0)),
        session=session,
        prefix=prefix,
        skipped=skipped,
        rows_out_of_order=int((begin.minus(begin.select(before))[parent >= 0] < 0).sum()),
        source={
            "prefix_scope": "session",
            "sessions": int(np.unique(session).size),
            "prefix_blocks": f"{prefix_block_tokens} tokens an id, from the order of each session",
            "not_read": NOT_READ,
        },
    )


def _rounds(path: Path, sessions: int | None) -> tuple[Table, dict[str, int]]:
    """The rounds that have tokens and times, and how many have not."""
    file = str(path)
    rows: list[dict[str, Any]] = []
    lines: list[Any] = []
    numbers: dict[tuple[str, ...], int] = {}
    skipped: dict[str, int] = {}
    for row, line in iterate_json(read_bytes(path), file):
        if row.get("session_id") is None:
            fail(file, line, "session_id", None, "a text or a whole number")
        owner = tuple(str(row.get(name)) for name in OWNER)
        if owner not in numbers and len(numbers) == sessions:
            continue
        number = numbers.setdefault(owner, len(numbers))
        found = {
            "session": number,
            "round": row.get("round_index"),
            **_tokens(file, line, row),
            **_span(file, line, row),
        }
        reason = ZERO_OUTPUT if found["output"] == 0 else ZERO_PROMPT if found["prompt"] == 0 else ""
        reason = reason or ("" if found["begin"] is not None else NO_TIME)
        if reason:
            skipped[reason] = skipped.get(reason, 0) + 1
            continue
        rows.append(found)
        lines.append(line)
    if not rows:
        raise TraceError(
            f"{file}: no request left of {sum(skipped.values())} rows; expected rounds with tokens and times"
        )
    return of_rows(rows, lines, file), skipped


def _tokens(file: str, line: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    total, prefix, more = (row.get(name) for name in ("input_tokens_total", "prefix_tokens", "newly_append_tokens"))
    if total is None and type(prefix) is int and type(more) is int:
        total = prefix + more
    if total is None:
        fail(file, line, "input_tokens_total", None, "a number of tokens, or prefix_tokens and newly_append_tokens")
    return {"prompt": total, "prefix": prefix, "output": row.get("output_tokens")}


def _span(file: str, line: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    """When a round began and ended, as the file writes it; None where it has no events."""
    events = row.get("timing_events") or []
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
        fail(file, line, "timing_events", events, "a list of objects")
    events = [event for event in events if event.get("timestamp") is not None]
    if not events:
        return {"begin": None, "end": None}
    inputs = 0
    while inputs < len(events) and events[inputs].get("event_type") in INPUTS:
        inputs += 1
    return {"begin": events[max(inputs - 1, 0)]["timestamp"], "end": events[-1]["timestamp"]}


def _prefix(order: Codes, follows: Any, prompt: Codes, shared: Codes, block_tokens: int) -> Prefix:
    """Ids of the whole blocks of every prompt: first those that it shares with the one before it, then new ones."""
    rows: list[Codes] = [np.zeros(0, dtype=np.int64)] * order.size
    before, fresh = np.zeros(0, dtype=np.int64), 0
    for row, is_next in zip(order.tolist(), follows.tolist(), strict=True):
        count = int(prompt[row]) // block_tokens
        same = min(int(shared[row]) // block_tokens, before.size, count) if is_next else 0
        before = np.concatenate([before[:same], np.arange(fresh, fresh + count - same)])
        fresh += count - same
        rows[row] = before
    lengths = np.array([ids.size for ids in rows], dtype=np.int64)
    return Prefix(np.concatenate(rows), lengths, block_tokens)


FORMAT = FileFormat(
    "tracelab-jsonl",
    "TraceLab JSON lines: rounds of coding agents as closed loops",
    matches,
    load,
    {"sessions": parse_count, "prefix_block_tokens": parse_count},
)
