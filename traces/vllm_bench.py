"""vLLM's serving benchmark: its results (JSON, or one a line), and its data sets of prompts and conversations.

A result has ``input_lens`` and ``output_lens`` and, saved in detail, ``start_times``, ``ttfts``, ``itls`` (s). A data
set has texts: ``prompt`` and perhaps ``output_tokens`` (custom), or ``conversations`` (ShareGPT, of which the first two
turns count). Source: github.com/vllm-project/vllm (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.errors import TraceError
from l3env.requests.workload import Workload
from l3env.traces.containers import look, of_rows, parse_json
from l3env.traces.named_columns import Table
from l3env.traces.reading import FileFormat, fail, read_bytes
from l3env.traces.rows import build
from l3env.traces.spec import parse_count, parse_positive
from l3env.traces.times import Times

DEFAULT_OUTPUT_TOKENS = 256  # as vLLM's own default for custom prompts
CHARS_PER_TOKEN = 4.0
NO_CLOCK = "none in the file: all present at 0"
ONE_TURN = "fewer than two turns"


def matches(path: Path) -> bool:
    """True for JSON with lists of lengths, with conversations, or with prompts and no counts of their tokens."""
    found = look(path)
    if found.kind != "json":
        return False
    is_custom = "prompt" in found.names and not found.names & {"prompt_tokens", "input_length", "input_toks", "theorem"}
    return found.names >= {"input_lens", "output_lens"} or "conversations" in found.names or is_custom


def load(
    path: Path, *, run: int | None = None, chars_per_token: float = CHARS_PER_TOKEN, output_tokens: int | None = None
) -> Workload:
    """One request an entry; arrival in s where the file has it, else all present at 0.

    ``run`` chooses one of several results (from 1). Texts are counted in characters, ``chars_per_token`` a token;
    lists of token ids exactly. ``output_tokens`` (default 256) is for prompts that do not say. Failed requests (no
    output) are skipped and counted. Raises TraceError naming file, row and field.
    """
    rows, lines = parse_json(read_bytes(path), str(path))
    if "input_lens" in rows[0]:
        return _result(path, rows, run)
    table, estimated, skipped = _prompts(path, rows, lines, chars_per_token, output_tokens or DEFAULT_OUTPUT_TOKENS)
    about = {"arrivals": NO_CLOCK}
    if estimated:
        about["lengths"] = f"{estimated} texts estimated at {chars_per_token:g} characters a token"
    prompt, output = table.tokens("prompt"), table.tokens("output")
    times = Times(np.zeros(len(table)))
    return build(path, FORMAT.name, times, prompt, output, skipped=skipped, source=about)


def _result(path: Path, rows: list[dict[str, Any]], run: int | None) -> Workload:
    if run is None and len(rows) > 1:
        raise TraceError(f"{path}: {len(rows)} results; expected ?run= with one of 1 to {len(rows)}")
    if run is not None and run > len(rows):
        raise TraceError(f"{path}: run={run}: no such result; expected 1 to {len(rows)}")
    row = rows[(run or 1) - 1]
    columns = {
        name: row[name] for name in ("input_lens", "output_lens", "start_times", "ttfts", "itls") if row.get(name)
    }
    for name in ("input_lens", "output_lens"):
        if not isinstance(columns.get(name), list):
            fail(path, "result", name, row.get(name), "a list of numbers of tokens")
    count = len(columns["input_lens"])
    for name, values in columns.items():
        if not isinstance(values, list) or len(values) != count:
            got = f"{len(values)} values" if isinstance(values, list) else values
            fail(path, "result", name, got, f"a list of {count}, as input_lens")
    table = Table(str(path), columns, lambda place: f"entry {place + 1}")
    has_clock = table.has("start_times")
    times = table.times("start_times") if has_clock else Times(np.zeros(count))
    prompt, output = table.tokens("input_lens"), table.tokens("output_lens")
    return build(
        path,
        FORMAT.name,
        times,
        prompt,
        output,
        extra=_measured(table),
        source={
            "arrivals": "start_times" if has_clock else NO_CLOCK,
            "run": {name: value for name, value in row.items() if isinstance(value, str | int | float)},
        },
    )


def _measured(table: Table) -> dict[str, NDArray[Any]]:
    """Time to the first token and to the last, in s, where the result has them."""
    if not table.has("ttfts"):
        return {}
    first_s = table.measured("ttfts")
    if not table.has("itls"):
        return {"ttft_s": first_s}
    more_s = np.zeros(len(table))
    for place, gaps in enumerate(table.columns["itls"]):
        if not isinstance(gaps, list) or not set(map(type, gaps)) <= {int, float}:
            table.fail(place, "itls", "a list of s")
        more_s[place] = sum(gaps)
    return {"ttft_s": first_s, "e2e_s": first_s + more_s}


def _prompts(
    path: Path, rows: list[dict[str, Any]], lines: list[int], chars_per_token: float, output_tokens: int
) -> tuple[Table, int, dict[str, int]]:
    """Tokens of prompt and output by entry, how many were estimated from text, and what was skipped."""
    found: list[dict[str, Any]] = []
    kept: list[int] = []
    skipped: dict[str, int] = {}
    estimated = 0

    def count(line: int, field: str, value: Any) -> int:
        nonlocal estimated
        if isinstance(value, list) and set(map(type, value)) <= {int}:
            return len(value)
        text = _text(value)
        if text is None:
            fail(path, line, field, value, "a text, messages or a list of token ids")
        estimated += 1
        return min(round(len(text) / chars_per_token) or int(bool(text)), 2**31)

    for row, line in zip(rows, lines, strict=True):
        if "conversations" in row:
            turns = row["conversations"]
            if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
                fail(path, line, "conversations", turns, "a list of turns")
            if len(turns) < 2:
                skipped[ONE_TURN] = skipped.get(ONE_TURN, 0) + 1
                continue
            said: list[Any] = [count(line, "conversations", turn.get("value")) for turn in turns[:2]]
        else:
            said = [count(line, "prompt", row.get("prompt")), row.get("output_tokens")]
        found.append({"prompt": said[0], "output": output_tokens if said[1] is None else said[1]})
        kept.append(line)
    if not found:
        raise TraceError(
            f"{path}: no request left of {len(rows)} rows; expected prompts, or conversations of two turns"
        )
    return of_rows(found, kept, str(path)), estimated, skipped


def _text(value: Any) -> str | None:
    """A text, or those of a list of chat messages."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
        parts = [_text(each.get("content", each.get("text", ""))) for each in value]
        return None if None in parts else "".join(part or "" for part in parts)
    return None


FORMAT = FileFormat(
    "vllm-bench",
    "vLLM serving benchmark: results with input_lens and output_lens, data sets of prompts or conversations",
    matches,
    load,
    {"run": parse_count, "chars_per_token": parse_positive, "output_tokens": parse_count},
)
