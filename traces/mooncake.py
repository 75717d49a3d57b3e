"""Mooncake: one JSON object a line, with the ids of the prompt's blocks (512 tokens where the file has no other size).

Fields: ``timestamp`` (ms), ``input_length``, ``output_length`` (tokens); perhaps ``hash_ids``; perhaps ``session_id``,
with ``delay`` (ms after the answer to the request before it in the session) in place of a timestamp.

Source: github.com/kvcache-ai/Mooncake (FAST25-release); Qin et al., FAST 2025. Licence Apache-2.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from l3env.requests.workload import NO_PARENT, Workload
from l3env.traces.containers import look, read_table
from l3env.traces.named_columns import Codes, Table
from l3env.traces.reading import FileFormat
from l3env.traces.rows import Links, build, kept_columns, parse_names, prefix_of
from l3env.traces.spec import parse_count
from l3env.traces.times import Times

FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")
BLOCK_TOKENS = 512
SPREAD_SEED = 20250225  # fixed: the spread is part of the trace's reading, not of a resample
COARSE_SHARE = 0.5  # a clock is coarse when fewer than this share of rows have a time of their own
COARSE_STEP_S = 0.5


def matches(path: Path) -> bool:
    """True for JSON objects with lengths, and for other tables that have block ids too; not for chats (Bailian's)."""
    found = look(path)
    if "chat_id" in found.names:
        return False
    if found.kind == "json":
        return bool(found.names & set(FIELDS[1:3])) and bool(found.names & {FIELDS[0], "delay"})
    return found.names >= set(FIELDS)


def load(
    path: Path, *, spread: bool = True, prefix_block_tokens: int | None = None, keep: Sequence[str] = ()
) -> Workload:
    """One request a line; arrival in s; prefix ids comparable over the trace.

    The conversation trace's clock moves in steps of about 3 s. ``spread`` places the requests of one step at sorted
    uniform times within it (fixed seed; at most one median step ahead), only where the clock is that coarse;
    ``source["spread"]`` says what was done. ``prefix_block_tokens`` is found from the numbers of ids where these tell.
    Raises TraceError naming file, line and field.
    """
    table = read_table(path)
    table.need(*FIELDS[1:3])
    if not table.has("delay"):
        table.need(FIELDS[0])
    prompt, output = table.tokens("input_length"), table.tokens("output_length")
    session = table.ids("session_id") if table.has("session_id") else None
    times, links = _clock(table, session)
    workload = build(
        path,
        FORMAT.name,
        times,
        prompt,
        output,
        links=links,
        session=session,
        prefix=prefix_of(table, "hash_ids", prompt, BLOCK_TOKENS, prefix_block_tokens),
        extra=kept_columns(table, keep),
        source={"prefix_scope": "trace", **table.about_unused()},
    )
    is_open = not (workload.parent_idx >= 0).any()
    arrival_s, said = _spread(workload.arrival_s) if spread and is_open else (workload.arrival_s, "off")
    return replace(workload, arrival_s=arrival_s, source={**workload.source, "spread": said})


def _clock(table: Table, session: Codes | None) -> tuple[Times, Links | None]:
    """Times, and where the file has delays what each request waits for; a delay sets the earliest time too."""
    if not table.has("delay"):
        return table.times("timestamp", "ms"), None
    delayed = table.present("delay")
    think_s = table.seconds("delay", "ms")
    if table.has("timestamp"):
        stamped = table.present("timestamp")
        table.require(stamped | delayed, "timestamp", "milliseconds >= 0, or a delay")
        times = table.times("timestamp", "ms", may_miss=True)
    else:
        stamped, times = np.zeros(len(table), dtype=bool), Times(np.zeros(len(table), dtype=np.int64))
    parent = np.full(len(table), NO_PARENT, dtype=np.int64)
    last: dict[int, int] = {}
    for row in range(len(table)):
        key = NO_PARENT if session is None else int(session[row])
        if key != NO_PARENT:
            if delayed[row]:
                parent[row] = last.get(key, NO_PARENT)
            last[key] = row
    rows = np.flatnonzero(~stamped)
    return times.moved(rows, parent[rows], think_s[rows]), Links(parent, np.where(parent >= 0, think_s, 0.0))


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
    "mooncake-jsonl",
    "Mooncake JSON lines, perhaps with prefix block ids and sessions",
    matches,
    load,
    {"spread": _yes_or_no, "prefix_block_tokens": parse_count, "keep": parse_names},
)
