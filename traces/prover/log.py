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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.errors import TraceError
from l3env.files import write_text
from l3env.requests.workload import NO_PARENT, Workload
from l3env.traces.containers import has_names, read_table
from l3env.traces.named_columns import Codes, Table
from l3env.traces.reading import FileFormat, fail
from l3env.traces.rows import ZERO_OUTPUT, ZERO_PROMPT, Links, Prefix, build, kept_columns, parse_names
from l3env.traces.times import Times

BLOCK_TOKENS = 16
NEEDED = ("theorem", "job", "submitted_s", "generated_s", "prompt_tokens", "output_tokens")
KNOWN = ("verified_s", "success", "depth", "process", "prefix_ids")


def matches(path: Path) -> bool:
    """True for a table with theorems and jobs."""
    return has_names(path, "theorem", "job")


def write(rows: Iterable[Mapping[str, Any]], path: Path) -> Path:
    """Writes a log, whole or not at all: rows in order of submission."""
    ordered = sorted(rows, key=lambda row: float(row["submitted_s"]))
    write_text(path, "".join(json.dumps(dict(row)) + "\n" for row in ordered))
    return path


def load(path: Path, *, keep: Sequence[str] = ()) -> Workload:
    """One request a line. Raises TraceError naming file, line and field."""
    table = read_table(path)
    table.need(*NEEDED)
    prompt, output = table.tokens("prompt_tokens"), table.tokens("output_tokens")
    skipped = {ZERO_OUTPUT: int((output == 0).sum()), ZERO_PROMPT: int(((output > 0) & (prompt == 0)).sum())}
    sent_s = table.times("submitted_s").since_first()
    late = int((sent_s < np.maximum.accumulate(sent_s)).sum())
    order = np.argsort(sent_s, kind="stable")
    table = table.take(order[((prompt > 0) & (output > 0))[order]])
    if not len(table):
        raise TraceError(f"{path}: no request left of {prompt.size} rows; expected some with prompt and output tokens")
    submitted, generated = table.times("submitted_s"), table.times("generated_s")
    table.require(generated.minus(submitted) >= 0, "generated_s", "seconds >= submitted_s")
    theorems = _named(table, "theorem")
    numbers = {theorem: number for number, theorem in enumerate(dict.fromkeys(theorems))}
    links = _links(table, submitted, generated, list(zip(theorems, _named(table, "job"), strict=True)))
    return build(
        path,
        FORMAT.name,
        Times(_earliest_s(submitted.since_first(), links.parent)),
        table.tokens("prompt_tokens"),
        table.tokens("output_tokens"),
        links=links,
        session=np.array([numbers[theorem] for theorem in theorems], dtype=np.int64),
        prefix=_prefix(table),
        extra=kept_columns(table, keep),
        skipped=skipped,
        rows_out_of_order=late,
        source={"prefix_scope": "trace", "clock_began_at": submitted.began_at(), **table.about_unused(KNOWN)},
    )


def _named(table: Table, column: str) -> list[Any]:
    """The names in a column, of which none may miss."""
    table.require(table.present(column), column, "a text or a whole number")
    return table.keys(column)


def _links(table: Table, submitted: Times, generated: Times, chains: list[Any]) -> Links:
    """Each generation waits for the last one before it of the same theorem and job; rows are in order of submission."""
    last: dict[Any, int] = {}
    parent = np.full(len(table), NO_PARENT, dtype=np.int64)
    for row, chain in enumerate(chains):
        parent[row] = last.get(chain, NO_PARENT)
        last[chain] = row
    pause_s = np.where(parent >= 0, submitted.minus(generated.select(np.maximum(parent, 0))), 0.0)
    expected = "no earlier than the generation before it of the same job ended"
    table.require(pause_s >= 0, "submitted_s", expected)
    return Links(parent, pause_s)


def _earliest_s(sent_s: NDArray[np.float64], parent: Codes) -> NDArray[np.float64]:
    """Roots arrive as in the log; what depends on others arrives by its pause, so its bound is the roots' so far."""
    earliest_s: NDArray[np.float64] = np.maximum.accumulate(np.where(parent == NO_PARENT, sent_s, 0.0))
    return earliest_s


def _prefix(table: Table) -> Prefix | None:
    if not table.has("prefix_ids"):
        return None
    ids, lengths = table.id_lists("prefix_ids")
    many = lengths > table.tokens("prompt_tokens") // BLOCK_TOKENS
    if many.any():
        row = int(np.argmax(many))
        expected = f"at most one for each {BLOCK_TOKENS} prompt tokens"
        fail(table.file, table.line(row), "prefix_ids", f"{lengths[row]} ids", expected)
    return Prefix(ids, lengths, BLOCK_TOKENS)


FORMAT = FileFormat(
    "prover-log", "Proof-search log, one JSON object a generation", matches, load, {"keep": parse_names}
)
