"""kv-cache-tester: one JSON file per coding-agent session, with the ids of the prompt's 64-token blocks.

A session is a closed loop: a request, its service, a think time. There is no common clock. Source:
github.com/callanjfox/kv-cache-tester; Callan Fox, WEKA. Licence Apache-2.0.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.errors import TraceError
from l3env.requests.workload import NO_PARENT, Workload
from l3env.traces.reading import MAX_TOKENS, FileFormat, fail, first_bytes, member_names, read_members
from l3env.traces.resample import ragged_places
from l3env.traces.spec import parse_count, parse_positive, parse_seed

SESSION_FIELDS = ("id", "models", "block_size", "hash_id_scope", "tool_tokens", "system_tokens", "requests", "totals")
REQUEST_FIELDS = ("t", "type", "model", "in", "out", "hash_ids", "input_types", "output_types", "stop")
REQUEST_OPTIONAL = ("think_time", "api_time", "ttft")
SUBAGENT_FIELDS = ("t", "type", "requests")
SUBAGENT_OPTIONAL = (
    *("agent_id", "subagent_type", "duration_ms", "total_tokens", "tool_use_count", "status"),
    *("models", "tool_tokens", "system_tokens"),
)
EMPTY = "zero output tokens"
DEFAULT_SESSION_RATE_PER_S = 1 / 60  # about one request a second at 62 requests a session


@dataclass
class Columns:
    """Rows of all sessions read so far, session after session, each session in the order of its requests."""

    offset_s: list[float] = field(default_factory=list)  # earliest start, from the session's start
    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)  # row, or -1
    think_s: list[float] = field(default_factory=list)
    session: list[int] = field(default_factory=list)
    ids: list[NDArray[np.int64]] = field(default_factory=list)
    skipped: int = 0


def matches(path: Path) -> bool:
    """True for a session's JSON, or a folder or archive that holds such files."""
    if path.is_file() and path.name.endswith((".json", ".json.gz")):
        head = first_bytes(path)
        return head.lstrip().startswith(b"{") and b'"hash_id_scope"' in head
    try:
        return any(_is_session(name) for name in member_names(path, limit=3))
    except TraceError:
        return False


def _is_session(name: str) -> bool:
    last = name.rpartition("/")[2]
    return last.startswith("trace_") and last.endswith(".json")


def load(
    path: Path,
    *,
    session_rate: float = DEFAULT_SESSION_RATE_PER_S,
    sessions: int | None = None,
    seed: int = 0,
) -> Workload:
    """Sessions as chains of requests; the session starts are drawn (Poisson, ``session_rate`` sessions/s, ``seed``).

    A request waits for the one before it in its session (``parent_idx``) and then ``think_s``: ``think_time``, or where
    that is missing the recorded gap less the recorded service (``t`` and ``api_time``), not below 0. A sub-agent's
    requests are a chain that forks from the request before it; the session's own chain goes on beside it.
    ``arrival_s`` is the earliest time: session start + recorded ``t``, never before the parent's.

    Requests with zero output are skipped and counted; what follows one waits for the request before it, with the
    skipped one's think and service times added. Prefix ids (64 tokens) are made unique per session, since the file's
    are comparable only within one. ``sessions`` keeps the first so many files. Raises TraceError naming file, request
    and field.
    """
    if not (np.isfinite(session_rate) and session_rate > 0):
        raise TraceError(f"{path}: session_rate {session_rate}; expected a finite number of sessions/s > 0")
    if sessions is not None and sessions < 1:
        raise TraceError(f"{path}: sessions {sessions}; expected a whole number >= 1")
    columns, count, block_tokens = Columns(), 0, 0
    for name, document in _documents(path, sessions):
        size = _check_session(name, document)
        if block_tokens not in (0, size):
            fail(name, "session", "block_size", size, f"{block_tokens}, as in the other sessions")
        block_tokens = size
        _read_session(name, document, count, columns)
        count += 1
    if not columns.prompt:
        raise TraceError(f"{path}: no request with output in it; expected kv-cache-tester sessions")
    return _build(path, columns, count, block_tokens, session_rate, seed)


def _documents(path: Path, sessions: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    pattern = r"\.json(\.gz)?$"
    for number, (name, data) in enumerate(read_members(path, pattern)):
        if number == sessions:
            return
        file = str(path) if path.is_file() and name == path.name else f"{path}!{name}"
        try:
            yield file, json.loads(data)
        except ValueError as error:
            raise TraceError(f"{file}: not JSON: {error}") from error


def _check_session(file: str, document: Any) -> int:
    """Checks the top level; returns the tokens per block."""
    _check_fields(file, "session", document, SESSION_FIELDS, ())
    scope, size = document["hash_id_scope"], document["block_size"]
    if scope != "local":
        fail(file, "session", "hash_id_scope", scope, "'local'")
    if type(size) is not int or size < 1:
        fail(file, "session", "block_size", size, "a whole number >= 1")
    if not isinstance(document["requests"], list) or not document["requests"]:
        fail(file, "session", "requests", document["requests"], "a list of at least one request")
    return size


def _check_fields(file: str, row: object, entry: Any, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    if not isinstance(entry, dict):
        raise TraceError(f"{file}: row {row}: got {str(entry)[:40]!r}; expected an object")
    missing = [name for name in required if name not in entry]
    unknown = [name for name in entry if name not in required and name not in optional]
    for what, names in (("missing", missing), ("unknown", unknown)):
        if names:
            known = f"{', '.join(required)}" + (f" and optionally {', '.join(optional)}" if optional else "")
            raise TraceError(f"{file}: row {row}: {what} field {', '.join(names)}; expected {known}")


def _number(file: str, row: object, entry: dict[str, Any], name: str, default: float | None = None) -> float:
    value = entry.get(name, default)
    if type(value) not in (int, float) or not 0 <= value < float("inf"):  # type: ignore[operator]
        fail(file, row, name, value, "a number of seconds >= 0")
    return float(value)  # type: ignore[arg-type]


def _read_session(file: str, document: dict[str, Any], session: int, columns: Columns) -> None:
    """Adds the main chain, and each sub-agent's chain forked from the last main request before it."""
    chain = _Chain(file, session, document["block_size"], columns)
    for number, entry in enumerate(document["requests"], start=1):
        if isinstance(entry, dict) and entry.get("type") == "subagent":
            _check_fields(file, number, entry, SUBAGENT_FIELDS, SUBAGENT_OPTIONAL)
            start_s = _number(file, number, entry, "t")
            fork = _Chain(file, session, chain.block_tokens, columns, start_s, chain.parent, chain.end_s, chain.extra_s)
            if not isinstance(entry["requests"], list):
                fail(file, number, "requests", entry["requests"], "a list of requests")
            for inner, request in enumerate(entry["requests"], start=1):
                fork.add(f"{number}.{inner}", request)
        else:
            chain.add(str(number), entry)


@dataclass
class _Chain:
    """Requests one after the other, from the last of which the next one waits."""

    file: str
    session: int
    block_tokens: int
    columns: Columns
    start_s: float = 0.0  # of the chain, in the session's time
    parent: int = NO_PARENT  # row of the last request
    end_s: float | None = None  # its recorded end, in the session's time
    extra_s: float = 0.0  # think and service of skipped requests since then
    forked: bool = field(init=False)
    before_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.forked = self.parent != NO_PARENT  # a fork's first think time counts from the chain, not the parent
        self.before_s = self.start_s

    def add(self, row: str, entry: Any) -> None:
        """Checks one request and adds it to the columns, or counts it as skipped."""
        _check_fields(self.file, row, entry, REQUEST_FIELDS, REQUEST_OPTIONAL)
        if entry["type"] not in ("s", "n"):
            fail(self.file, row, "type", entry["type"], "'s', 'n' or 'subagent'")
        t_s = self.start_s + _number(self.file, row, entry, "t")
        if t_s < self.before_s:
            fail(self.file, row, "t", entry["t"], "a time not before the request above")
        self.before_s = t_s
        service_s = _number(self.file, row, entry, "api_time", 0.0)
        think_s = self._think_s(row, entry, t_s)
        self.end_s = t_s + service_s
        if self._tokens(row, entry, "out", 0) == 0:
            self.columns.skipped += 1
            self.extra_s += think_s + service_s
            return
        self._append(row, entry, t_s, think_s + self.extra_s)
        self.extra_s, self.forked = 0.0, False

    def _think_s(self, row: str, entry: dict[str, Any], t_s: float) -> float:
        """Pause since the chain's last request ended: recorded, or where missing (or at a fork) derived from ``t``."""
        if "think_time" in entry:
            recorded_s = _number(self.file, row, entry, "think_time")
            if not self.forked:
                return recorded_s
        return max(0.0, t_s - self.end_s) if self.end_s is not None else 0.0

    def _tokens(self, row: str, entry: dict[str, Any], name: str, low: int) -> int:
        value = entry[name]
        if type(value) is not int or not low <= value <= MAX_TOKENS:
            fail(self.file, row, name, value, f"a whole number from {low} to {MAX_TOKENS}")
        return int(value)

    def _append(self, row: str, entry: dict[str, Any], t_s: float, think_s: float) -> None:
        columns = self.columns
        prompt = self._tokens(row, entry, "in", 1)
        blocks = prompt // self.block_tokens
        if not isinstance(entry["hash_ids"], list) or len(entry["hash_ids"]) != blocks:
            fail(self.file, row, "hash_ids", f"{len(entry['hash_ids'])} ids", f"{blocks}, one per whole block of 'in'")
        try:
            ids = np.array(entry["hash_ids"], dtype=np.int64)
        except (ValueError, TypeError, OverflowError):
            fail(self.file, row, "hash_ids", entry["hash_ids"][:5], "whole numbers >= 0")
        if ids.size and ids.min() < 0:
            fail(self.file, row, "hash_ids", int(ids.min()), "whole numbers >= 0")
        parent_s = columns.offset_s[self.parent] if self.parent != NO_PARENT else 0.0
        columns.offset_s.append(max(t_s, parent_s))
        columns.prompt.append(prompt)
        columns.output.append(entry["out"])
        columns.parent.append(self.parent)
        columns.think_s.append(think_s if self.parent != NO_PARENT else 0.0)
        columns.session.append(self.session)
        columns.ids.append(ids)
        self.parent = len(columns.prompt) - 1


def _build(path: Path, columns: Columns, count: int, block_tokens: int, session_rate: float, seed: int) -> Workload:
    rng = np.random.default_rng([seed, 0x5E])
    start_s = np.concatenate([[0.0], np.cumsum(rng.exponential(1 / session_rate, count - 1))])
    session = np.array(columns.session, dtype=np.int64)
    arrival_s = start_s[session] + np.array(columns.offset_s)
    order = np.argsort(arrival_s, kind="stable")
    place = np.empty(order.size, dtype=np.int64)
    place[order] = np.arange(order.size)
    parent = np.array(columns.parent, dtype=np.int64)[order]
    ids, lengths = _global_ids(columns, session)
    begins = np.cumsum(lengths) - lengths
    return Workload.build(
        path.name.partition(".")[0],
        arrival_s[order],
        np.array(columns.prompt)[order],
        np.array(columns.output)[order],
        parent_idx=np.where(parent >= 0, place[np.maximum(parent, 0)], NO_PARENT),
        think_s=np.array(columns.think_s)[order],
        session_idx=session[order],
        prefix_ids=ids[ragged_places(begins[order], lengths[order])],
        prefix_offsets=np.concatenate([[0], np.cumsum(lengths[order])]),
        prefix_block_tokens=block_tokens,
        source={
            "file": str(path),
            "format": FORMAT.name,
            "rows": len(columns.prompt) + columns.skipped,
            "skipped": {EMPTY: columns.skipped},
            "sessions": count,
            "session_starts": f"drawn: Poisson, {session_rate:g} sessions/s, seed {seed}",
            "prefix_scope": "session",
        },
    )


def _global_ids(columns: Columns, session: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All ids, shifted so that no two sessions share one, and the number of them in each row."""
    lengths = np.array([row.size for row in columns.ids], dtype=np.int64)
    ids = np.concatenate(columns.ids)
    columns.ids.clear()  # the largest column by far: not held twice
    owner = np.repeat(session, lengths)
    width = np.zeros(int(session.max()) + 1, dtype=np.int64)
    np.maximum.at(width, owner, ids + 1)
    shift = np.cumsum(width) - width
    return ids + shift[owner], lengths


FORMAT = FileFormat(
    "kv-cache-tester",
    "kv-cache-tester sessions (JSON, folder or tar): closed loops with prefix ids",
    matches,
    load,
    {"session_rate": parse_positive, "sessions": parse_count, "seed": parse_seed},
)
