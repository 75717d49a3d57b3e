"""From a file's columns to a workload: the rules that all formats share.

Requests without prompt or output tokens are skipped and counted; what waited for one waits for what that one waited
for. Time begins at the first request that is left. Rows are sorted by arrival, stably, and those that stood below a
later one are counted. A request never arrives before the one that it waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from l3env.errors import TraceError
from l3env.requests.workload import NO_PARENT, Workload
from l3env.traces.named_columns import NONE, Codes, Table, shown
from l3env.traces.resample import ragged_places
from l3env.traces.times import UNIT_DIGITS, Times

ZERO_OUTPUT = "zero output tokens"
ZERO_PROMPT = "zero prompt tokens"


@dataclass(frozen=True)
class Prefix:
    """Ids of the prompts' blocks, rows one after the other; how many each row has; tokens per block."""

    ids: Codes
    lengths: Codes
    block_tokens: int


@dataclass(frozen=True)
class Links:
    """What each row waits for: (N,) rows or -1, and how long after those have finished, in s."""

    parent: Codes
    think_s: NDArray[np.float64]


def build(
    path: Path,
    format_name: str,
    times: Times,
    prompt: Codes,
    output: Codes,
    *,
    name: str | None = None,
    links: Links | None = None,
    session: Codes | None = None,
    prefix: Prefix | None = None,
    extra: Mapping[str, NDArray[Any]] | None = None,
    chosen: NDArray[np.bool_] | None = None,
    skipped: Mapping[str, int] | None = None,
    rows_out_of_order: int | None = None,
    source: Mapping[str, Any] | None = None,
) -> Workload:
    """The workload of (N,) columns in a file's order; called as the file is up to its first dot, or by ``name``.

    ``chosen`` are the rows that the options ask for; others are left out without being counted. ``skipped`` counts, by
    reason, rows that are no longer among these; ``rows_out_of_order`` is given where a loader has counted them itself.
    Raises TraceError where no request is left, WorkloadError for what cannot be served.
    """
    everything = np.ones(len(times), dtype=bool) if chosen is None else chosen
    kept = everything & (prompt > 0) & (output > 0)
    file = str(path)
    rows, counts = _counted(file, everything, prompt, output, skipped or {})
    links = _without(links or Links(np.full(len(times), NO_PARENT), np.zeros(len(times))), everything, kept)
    left = times.select(kept)
    arrival_s = left.since_first()
    late = int((arrival_s < np.maximum.accumulate(arrival_s)).sum()) if rows_out_of_order is None else rows_out_of_order
    raised_s, order = _in_order(arrival_s, links.parent)
    place = np.empty(order.size, dtype=np.int64)
    place[order] = np.arange(order.size)
    parent = links.parent[order]
    about = {
        "file": file,
        "format": format_name,
        "rows": rows,
        "skipped": counts,
        "rows_out_of_order": late,
        "clock_began_at": left.began_at(),
    }
    if moved := int((raised_s > arrival_s).sum()):
        about["arrivals_moved_to_their_parents"] = moved
    return Workload.build(
        path.name.partition(".")[0] if name is None else name,
        raised_s[order],
        prompt[kept][order],
        output[kept][order],
        parent_idx=np.where(parent >= 0, place[np.maximum(parent, 0)], NO_PARENT),
        think_s=links.think_s[order],
        session_idx=None if session is None else session[kept][order],
        **_ordered_prefix(prefix, np.flatnonzero(kept)[order]),
        source={**about, **(source or {})},
        extra={column: values[kept][order] for column, values in (extra or {}).items()},
    )


def _counted(
    file: str, chosen: NDArray[np.bool_], prompt: Codes, output: Codes, before: Mapping[str, int]
) -> tuple[int, dict[str, int]]:
    """Rows of the file, and how many of them are skipped by reason; ``before`` the loader itself. Raises for all."""
    counts = {
        ZERO_OUTPUT: int((chosen & (output == 0)).sum()),
        ZERO_PROMPT: int((chosen & (output > 0) & (prompt == 0)).sum()),
    }
    for reason, count in before.items():
        counts[reason] = counts.get(reason, 0) + count
    counts = {reason: count for reason, count in counts.items() if count}
    rows = chosen.size + sum(before.values())
    if not (chosen & (prompt > 0) & (output > 0)).any():
        why = ", ".join(f"{count} with {reason}" for reason, count in counts.items())
        raise TraceError(f"{file}: no request left of {rows} rows ({why or 'none chosen'})")
    return rows, counts


def _in_order(arrival_s: NDArray[np.float64], parent: Codes) -> tuple[NDArray[np.float64], Codes]:
    """Arrivals, none before its parent's, and the rows sorted by them: as in the file where equal, parents first."""
    depth = depths(parent)
    raised_s = _after_parents(arrival_s, parent, depth)
    return raised_s, np.lexsort((depth, _after_parents(np.arange(depth.size), parent, depth), raised_s))


def _ordered_prefix(prefix: Prefix | None, rows: Codes) -> dict[str, Any]:
    if prefix is None or not prefix.ids.size:
        return {}
    begins = np.cumsum(prefix.lengths) - prefix.lengths
    lengths = prefix.lengths[rows]
    return {
        "prefix_ids": prefix.ids[ragged_places(begins[rows], lengths)],
        "prefix_offsets": np.concatenate([[0], np.cumsum(lengths)]),
        "prefix_block_tokens": prefix.block_tokens,
    }


def _without(links: Links, everything: NDArray[np.bool_], kept: NDArray[np.bool_]) -> Links:
    """The links among the kept rows: past skipped ones, whose pauses are added; none to rows that are not asked for."""
    parent, think_s = links.parent.copy(), links.think_s.copy()
    skipped = everything & ~kept
    while (through := (parent >= 0) & skipped[np.maximum(parent, 0)]).any():
        over = parent[through]
        think_s[through] += links.think_s[over]
        parent[through] = links.parent[over]
    place = np.cumsum(kept) - 1
    has_parent = (parent >= 0) & kept[np.maximum(parent, 0)]
    parent = np.where(has_parent, place[np.maximum(parent, 0)], NO_PARENT)[kept]
    return Links(parent, np.where(parent >= 0, think_s[kept], 0.0))


def depths(parent: Codes) -> Codes:
    """(N,) how many rows each waits for, one after the other, by pointer doubling; no row may wait for itself."""
    up = np.where(parent >= 0, parent, np.arange(parent.size))
    depth = np.array(parent >= 0, dtype=np.int64)
    while (further := up[up]).tobytes() != up.tobytes():
        depth += depth[up]
        up = further
    return depth


def _after_parents(values: NDArray[Any], parent: Codes, depth: Codes) -> NDArray[Any]:
    """(N,) values (times, places), none below that of its parent."""
    if not depth.any():
        return values
    raised = values.copy()
    order = np.argsort(depth, kind="stable")
    bounds = np.searchsorted(depth[order], np.arange(1, int(depth.max()) + 2))
    for begin, end in pairwise(bounds.tolist()):
        rows = order[begin:end]
        raised[rows] = np.maximum(raised[rows], raised[parent[rows]])
    return raised


def check_links(parent: Codes, wrong: Callable[[int], NoReturn]) -> None:
    """Calls ``wrong`` with the first row that waits, over others or at once, for itself."""
    up = np.where(parent >= 0, parent, np.arange(parent.size))
    for _ in range(int(parent.size).bit_length() + 1):
        up = up[up]
    circle = parent[up] >= 0
    if circle.any():
        wrong(int(np.argmax(circle)))


def rows_of_parents(table: Table, id_column: str, parent_column: str) -> Codes:
    """(N,) the row whose id a row's parent column names; -1 where it is absent, -1, or no row's. The last such row."""
    row_of = {key: row for row, key in enumerate(table.keys(id_column)) if key is not None and key != NONE}
    parent = np.array([row_of.get(key, NO_PARENT) for key in table.keys(parent_column)], dtype=np.int64)
    expected = f"the {id_column} of another row that does not wait for this one"
    check_links(parent, lambda row: table.fail(row, parent_column, expected))
    return parent


# ------------------------------------------------------------------------------------------------ blocks, extra columns


def block_size(table: Table, column: str, prompt: Codes, lengths: Codes, default: int, given: int | None) -> int:
    """Tokens per block: what is given, else the one size that all rows agree on, else ``default``.

    Rows agree on a size of which they have an id for each block begun, or for each whole block; where several sizes are
    possible it is the default, else the one power of two among them. Raises TraceError for ids that fit no size.
    """
    if given is not None:
        table.require(
            lengths <= -(-prompt // given),
            column,
            f"at most one id for each {given} prompt tokens (prefix_block_tokens)",
        )
        return given
    some = (lengths > 0) & (prompt > 0)
    if not some.any():
        return default
    tokens, count = prompt[some], lengths[some]
    begun = (
        int((-(-tokens // count)).max()),
        int(np.where(count > 1, (tokens - 1) // np.maximum(count - 1, 1), 2**31).min()),
    )
    whole = (int((tokens // (count + 1)).max()) + 1, int((tokens // count).min()))
    for low, high in (begun, whole):
        if low <= default <= high:
            return default
    for low, high in (begun, whole):
        if low <= high < 2**31:
            powers = [2**power for power in range(31) if low <= 2**power <= high]
            if len(powers) == 1 or low == high:
                return powers[0] if len(powers) == 1 else low
    blocks = -(-prompt // default)
    row = int(np.argmax((lengths != blocks) & some))
    raise TraceError(
        f"{table.file}: row {table.line(row)}, field {column}: got '{lengths[row]} ids'; expected {blocks[row]}, "
        f"one per {default} prompt tokens; ?prefix_block_tokens= says how many else"
    )


def prefix_of(table: Table, column: str, prompt: Codes, default: int, given: int | None) -> Prefix | None:
    """The blocks that a column of lists of ids names, see ``block_size``; None where there is no such column."""
    if not table.has(column):
        return None
    ids, lengths = table.id_lists(column)
    return Prefix(ids, lengths, block_size(table, column, prompt, lengths, default, given))


def kept_columns(table: Table, names: Sequence[str], always: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
    """Columns for ``Workload.extra``: those asked for, which must be there, and what the format keeps, where it is."""
    if missing := [name for name in names if not table.has(name)]:
        raise TraceError(f"{table.file}: keep: no column {missing[0]!r}; the file has {shown(table.columns)}")
    wanted = dict.fromkeys((*names, *(name for name in always if table.has(name))))
    return {name: table.kept(name) for name in wanted}


def parse_unit(text: str) -> str:
    """A unit of time. Raises ValueError."""
    if text not in UNIT_DIGITS:
        raise ValueError(f"one of {', '.join(UNIT_DIGITS)}")
    return text


def parse_names(text: str) -> tuple[str, ...]:
    """Names with commas between. Raises ValueError."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise ValueError("names of columns with commas between")
    return names
