"""Qwen-Bailian: chats of a served Qwen model, one JSON object a request, with the ids of the prompt's 16-token blocks.

Fields: ``chat_id``, ``parent_chat_id`` (-1: none), ``timestamp`` (s), ``input_length``, ``output_length``, ``type``,
``turn``, ``hash_ids``. Source: github.com/alibaba-edu/qwen-bailian-usagetraces-anon; Wang et al., ATC 2025. Licence
Apache-2.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from l3env.requests.workload import NO_PARENT, Workload
from l3env.traces.containers import has_names, read_table
from l3env.traces.named_columns import Codes, Table
from l3env.traces.reading import FileFormat
from l3env.traces.resample import roots
from l3env.traces.rows import Links, build, kept_columns, parse_names, prefix_of, rows_of_parents
from l3env.traces.spec import parse_count
from l3env.traces.times import Times

BLOCK_TOKENS = 16
NEEDED = ("chat_id", "timestamp", "input_length", "output_length")
KNOWN = ("chat_id", "parent_chat_id", "type", "turn", "hash_ids")


def matches(path: Path) -> bool:
    """True for a table with chats and lengths."""
    return has_names(path, "chat_id", "input_length")


def load(path: Path, *, prefix_block_tokens: int | None = None, keep: Sequence[str] = ()) -> Workload:
    """One request a line; a turn waits for its ``parent_chat_id`` and then thinks.

    How long an answer took is not in the file, so ``think_s`` is the whole time between the arrivals of parent and
    child: service time included. ``session_idx`` numbers the conversations, by their first request. Raises TraceError
    naming file, line and field.
    """
    table = read_table(path)
    table.need(*NEEDED)
    times = table.times("timestamp")
    prompt, output = table.tokens("input_length"), table.tokens("output_length")
    links = _links(table, times)
    root = roots(links.parent)
    return build(
        path,
        FORMAT.name,
        times,
        prompt,
        output,
        links=links,
        session=np.array(np.unique(root, return_inverse=True)[1], dtype=np.int64),
        prefix=prefix_of(table, "hash_ids", prompt, BLOCK_TOKENS, prefix_block_tokens),
        extra=kept_columns(table, keep),
        source={
            "prefix_scope": "trace",
            "think_times": "from arrival to arrival: service is not recorded",
            **table.about_unused(KNOWN),
        },
    )


def _links(table: Table, times: Times) -> Links:
    if not table.has("parent_chat_id"):
        return Links(np.full(len(table), NO_PARENT, dtype=np.int64), np.zeros(len(table)))
    parent: Codes = rows_of_parents(table, "chat_id", "parent_chat_id")
    gap_s = np.where(parent >= 0, times.minus(times.select(np.maximum(parent, 0))), 0.0)
    return Links(parent, np.maximum(gap_s, 0.0))


FORMAT = FileFormat(
    "bailian-jsonl",
    "Qwen-Bailian JSON lines: chats as closed loops, prefix ids of 16 tokens",
    matches,
    load,
    {"prefix_block_tokens": parse_count, "keep": parse_names},
)
