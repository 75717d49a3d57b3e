"""kv-cache-tester: coding-agent sessions, with the ids of the prompt's blocks (of 64 tokens unless the file says else).

A session is a closed loop: a request, its service, a think time. There is no common clock. A file holds one session (a
JSON document), a list of them or one a line; a folder or a tar archive holds such files. What a session must have is
``requests``, each with ``in`` and ``out`` (tokens); everything else has a default. Source:
github.com/callanjfox/kv-cache-tester; Callan Fox, WEKA. Licence Apache-2.0.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.errors import TraceError, UnusedWarning
from l3env.requests.workload import NO_PARENT, Workload
from l3env.traces.containers import look, parse_json
from l3env.traces.named_columns import EXACT_WHOLE, Codes, codes, shown
from l3env.traces.reading import MAX_TOKENS, FileFormat, fail, is_tar, member_names, read_members
from l3env.traces.rows import ZERO_OUTPUT, ZERO_PROMPT, Links, Prefix, build
from l3env.traces.spec import parse_count, parse_positive, parse_seed
from l3env.traces.times import Times

BLOCK_TOKENS = 64
SESSION_FIELDS = {"id", "models", "block_size", "hash_id_scope", "tool_tokens", "system_tokens", "requests", "totals"}
REQUEST_FIELDS = {
    *("t", "type", "model", "in", "out", "hash_ids", "input_types", "output_types", "stop"),
    *("think_time", "api_time", "ttft"),
    *("requests", "agent_id", "subagent_type", "duration_ms", "total_tokens", "tool_use_count", "status"),
    *("models", "tool_tokens", "system_tokens"),
}
WIDE = 2**40  # ids above this are numbered anew, so that those of all sessions fit 64 bits beside each other
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
    ids: list[Any] = field(default_factory=list)  # rows of the session that is being read, or of all
    coded: list[Codes] = field(default_factory=list)  # of the sessions before it
    lengths: list[int] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    out_of_order: int = 0
    unused: dict[str, None] = field(default_factory=dict)


def matches(path: Path) -> bool:
    """True for sessions as JSON, or a folder or archive that holds such files."""
    if path.is_file() and not is_tar(path):
        found = look(path)
        return found.kind == "json" and "requests" in found.names
    try:
        return any(_is_session(name) for name in member_names(path, limit=3))
    except TraceError:
        return False


def _is_session(name: str) -> bool:
    last = name.rpartition("/")[2]
    return last.startswith("trace_") and last.endswith((".json", ".json.gz"))


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
    ``arrival_s`` is the recorded time: session start + ``t``, never before the parent's.

    Requests with zero tokens are skipped and counted; what follows one waits for the request before it, with the
    skipped one's think and service times added. Prefix ids are made unique per session, unless the file's
    ``hash_id_scope`` is global. ``sessions`` keeps the first so many. Raises TraceError naming file, request and field.
    """
    if not (np.isfinite(session_rate) and session_rate > 0):
        raise TraceError(f"{path}: session_rate {session_rate}; expected a finite number of sessions/s > 0")
    if sessions is not None and sessions < 1:
        raise TraceError(f"{path}: sessions {sessions}; expected a whole number >= 1")
    columns, count, block_tokens, scopes = Columns(), 0, 0, set()
    for name, document in _documents(path, sessions):
        size, scope = _check_session(name, document)
        if block_tokens not in (0, size):
            fail(name, "session", "block_size", size, f"{block_tokens}, as in the other sessions")
        block_tokens = size
        scopes.add(scope)
        columns.unused.update(dict.fromkeys(key for key in document if key not in SESSION_FIELDS))
        _read_session(name, document, count, size, columns)
        if scope == "local":
            columns.coded.append(_coded(columns.ids, WIDE))
            columns.ids = []
        count += 1
    if len(scopes) > 1:
        fail(path, "session", "hash_id_scope", "local", "'global', as in the other sessions")
    if not columns.prompt:
        raise TraceError(f"{path}: no request with output in it; expected kv-cache-tester sessions")
    return _build(path, columns, count, block_tokens, scopes == {"local"}, session_rate, seed)


def _documents(path: Path, sessions: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    pattern = r"\.jsonl?(\.(gz|bz2|xz|zst))?$" if path.is_dir() or is_tar(path) else ""
    count = 0
    for name, data in read_members(path, pattern):
        file = str(path) if path.is_file() and name == path.name else f"{path}!{name}"
        for document, line in zip(*parse_json(data, file), strict=True):
            if count == sessions:
                return
            count += 1
            yield file if line == 1 else f"{file}: line {line}", document


def _check_session(file: str, document: dict[str, Any]) -> tuple[int, str]:
    """Checks the top level; returns the tokens per block and where ids are comparable."""
    scope, size = document.get("hash_id_scope") or "local", document.get("block_size") or BLOCK_TOKENS
    if scope not in ("local", "global"):
        fail(file, "session", "hash_id_scope", scope, "'local' or 'global'")
    if type(size) is not int or not 1 <= size <= MAX_TOKENS:
        fail(file, "session", "block_size", size, "a whole number >= 1")
    if not isinstance(document.get("requests"), list) or not document["requests"]:
        fail(file, "session", "requests", document.get("requests"), "a list of at least one request")
    return size, scope


def _number(file: str, row: object, entry: dict[str, Any], name: str, default: float | None = None) -> float:
    value = entry.get(name)
    value = default if value is None else value
    if type(value) not in (int, float, Decimal) or not 0 <= value < float("inf"):  # type: ignore[operator]
        fail(file, row, name, value, "a number of seconds >= 0")
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        fail(file, row, name, value, "a number of seconds >= 0")


def _in_order(file: str, requests: list[Any], label: str, columns: Columns) -> list[tuple[str, dict[str, Any]]]:
    """The entries by their time, each with what errors call it; one without a time comes with the one before it."""
    timed: list[tuple[float, str, dict[str, Any]]] = []
    latest_s = 0.0
    for number, entry in enumerate(requests, start=1):
        row = f"{label}{number}"
        if not isinstance(entry, dict):
            raise TraceError(f"{file}: row {row}: got {str(entry)[:40]!r}; expected an object")
        columns.unused.update(dict.fromkeys(key for key in entry if key not in REQUEST_FIELDS))
        t_s = _number(file, row, entry, "t", latest_s)
        columns.out_of_order += t_s < latest_s
        latest_s = max(latest_s, t_s)
        timed.append((t_s, row, entry))
    return [(row, {**entry, "t": t_s}) for t_s, row, entry in sorted(timed, key=lambda each: each[0])]


def _read_session(file: str, document: dict[str, Any], session: int, block_tokens: int, columns: Columns) -> None:
    """Adds the main chain, and each sub-agent's chain forked from the last main request before it."""
    chain = _Chain(file, session, block_tokens, columns)
    for row, entry in _in_order(file, document["requests"], "", columns):
        if entry.get("type") == "subagent" or "requests" in entry:
            fork = _Chain(file, session, block_tokens, columns, entry["t"], chain.parent, chain.end_s, chain.extra_s)
            if not isinstance(entry.get("requests"), list):
                fail(file, row, "requests", entry.get("requests"), "a list of requests")
            for inner, request in _in_order(file, entry["requests"], f"{row}.", columns):
                fork.add(inner, request)
        else:
            chain.add(row, entry)


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

    def __post_init__(self) -> None:
        self.forked = self.parent != NO_PARENT  # a fork's first think time counts from the chain, not the parent

    def add(self, row: str, entry: dict[str, Any]) -> None:
        """Checks one request and adds it to the columns, or counts it as skipped."""
        if entry.get("type", "n") not in ("s", "n"):
            fail(self.file, row, "type", entry["type"], "'s', 'n' or 'subagent'")
        if missing := [name for name in ("in", "out") if name not in entry]:
            raise TraceError(f"{self.file}: row {row}: missing field {', '.join(missing)}; expected in, out")
        t_s = self.start_s + entry["t"]
        service_s = _number(self.file, row, entry, "api_time", 0.0)
        think_s = self._think_s(row, entry, t_s)
        self.end_s = t_s + service_s
        prompt, output = self._tokens(row, entry, "in"), self._tokens(row, entry, "out")
        if prompt == 0 or output == 0:
            reason = ZERO_OUTPUT if output == 0 else ZERO_PROMPT
            self.columns.skipped[reason] = self.columns.skipped.get(reason, 0) + 1
            self.extra_s += think_s + service_s
            return
        self._append(row, entry, t_s, think_s + self.extra_s, prompt, output)
        self.extra_s, self.forked = 0.0, False

    def _think_s(self, row: str, entry: dict[str, Any], t_s: float) -> float:
        """Pause since the chain's last request ended: recorded, or where missing (or at a fork) derived from ``t``."""
        if entry.get("think_time") is not None:
            recorded_s = _number(self.file, row, entry, "think_time")
            if not self.forked:
                return recorded_s
        return max(0.0, t_s - self.end_s) if self.end_s is not None else 0.0

    def _tokens(self, row: str, entry: dict[str, Any], name: str) -> int:
        value = entry[name]
        is_whole = type(value) is int or (type(value) is float and value.is_integer())
        if not is_whole or not 0 <= value <= MAX_TOKENS:
            fail(self.file, row, name, value, f"a whole number from 0 to {MAX_TOKENS}")
        return int(value)

    def _append(self, row: str, entry: dict[str, Any], t_s: float, think_s: float, prompt: int, output: int) -> None:
        columns, blocks = self.columns, prompt // self.block_tokens
        ids = self._ids(row, entry.get("hash_ids"))
        if entry.get("hash_ids") is not None and len(ids) not in (blocks, -(-prompt // self.block_tokens)):
            fail(self.file, row, "hash_ids", f"{len(ids)} ids", f"{blocks}, one per whole block of 'in', or one more")
        columns.offset_s.append(t_s)
        columns.prompt.append(prompt)
        columns.output.append(output)
        columns.parent.append(self.parent)
        columns.think_s.append(think_s if self.parent != NO_PARENT else 0.0)
        columns.session.append(self.session)
        columns.ids.append(ids)
        columns.lengths.append(len(ids))
        self.parent = len(columns.prompt) - 1

    def _ids(self, row: str, ids: Any) -> Any:
        """The ids of a request: an array where they are numbers that fit, else the list; empty where there are none."""
        try:
            found = np.array([] if ids is None else ids, dtype=None if ids else np.int64)
        except (ValueError, OverflowError):
            found = np.zeros(0)
        if found.dtype == np.int64 and found.ndim == 1:
            return found
        if not isinstance(ids, list) or not set(map(type, ids)) <= {int, str}:
            fail(self.file, row, "hash_ids", ids, "a list of ids (whole numbers of 64 bits, or texts)")
        return ids


def _coded(rows: list[Any], below: int) -> Codes:
    """The ids of rows, one after the other, as whole numbers >= 0 below a bound: their own where they are such."""
    if not all(isinstance(row, np.ndarray) for row in rows):
        return codes([each for row in rows for each in (row.tolist() if isinstance(row, np.ndarray) else row)])
    flat: Codes = np.concatenate([np.zeros(0, dtype=np.int64), *rows])
    is_plain = not flat.size or (flat.min() >= 0 and flat.max() < below)
    return flat if is_plain else np.array(np.unique(flat, return_inverse=True)[1], dtype=np.int64)


def _build(
    path: Path, columns: Columns, count: int, block_tokens: int, local: bool, session_rate: float, seed: int
) -> Workload:
    rng = np.random.default_rng([seed, 0x5E])
    start_s = np.concatenate([[0.0], np.cumsum(rng.exponential(1 / session_rate, count - 1))])
    session = np.array(columns.session, dtype=np.int64)
    source: dict[str, Any] = {
        "sessions": count,
        "session_starts": f"drawn: Poisson, {session_rate:g} sessions/s, seed {seed}",
        "prefix_scope": "session" if local else "trace",
    }
    if columns.unused:
        source["unused"] = list(columns.unused)
        warnings.warn(f"{path}: fields that are not used: {shown(columns.unused)}", UnusedWarning, stacklevel=3)
    return build(
        path,
        FORMAT.name,
        Times(start_s[session] + np.array(columns.offset_s)),
        np.array(columns.prompt, dtype=np.int64),
        np.array(columns.output, dtype=np.int64),
        links=Links(np.array(columns.parent, dtype=np.int64), np.array(columns.think_s)),
        session=session,
        prefix=Prefix(_global_ids(columns, local), np.array(columns.lengths, dtype=np.int64), block_tokens),
        skipped=columns.skipped,
        rows_out_of_order=columns.out_of_order,
        source=source,
    )


def _global_ids(columns: Columns, local: bool) -> NDArray[np.int64]:
    """All ids; where they are local, shifted so that no two sessions share one."""
    if not local:
        return _coded(columns.ids, EXACT_WHOLE)
    coded, columns.coded = columns.coded, []  # the largest column by far: not held twice
    shift = 0
    for number, part in enumerate(coded):
        coded[number] = part + shift
        shift += int(part.max()) + 1 if part.size else 0
    return np.concatenate(coded)


FORMAT = FileFormat(
    "kv-cache-tester",
    "kv-cache-tester sessions (JSON, folder or tar): closed loops with prefix ids",
    matches,
    load,
    {"session_rate": parse_positive, "sessions": parse_count, "seed": parse_seed},
)
