"""A workload's prefix ids as segments: the content-addressed pieces of prompts that the prefix cache keeps and shares.

A segment is one prefix id on top of all the ids before it, as in paged serving systems, which address a block by a hash
of its tokens and of all before them (vLLM, "Automatic Prefix Caching"). Equal segments hold equal KV.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from l3env.choices import Eviction
from l3env.engine.state import NOWHERE, PrefixArrays, State, with_prefix_room
from l3env.errors import WorkloadError
from l3env.requests.workload import Workload

RULES = {rule.name.lower(): rule for rule in Eviction}


@dataclass(frozen=True)
class Segments:
    """The M prefix ids of a workload as U segments.

    Attributes:
        ids: (M,) segment of each prefix id, 0 to U - 1.
        tokens: (U,) prompt tokens of a segment; the last of a prompt may be shorter than the others.
        depth: (U,) its place in the prompt, from 0.
        end_tokens: (U,) prompt tokens up to its end.
        request_tokens: (N,) prompt tokens that lie in segments.
        names: (U,) the same for equal segments of any workloads.
    """

    ids: NDArray[np.int64]
    tokens: NDArray[np.int64]
    depth: NDArray[np.int64]
    end_tokens: NDArray[np.int64]
    request_tokens: NDArray[np.int64]
    names: NDArray[np.uint64]


def eviction_rule(name: str) -> Eviction:
    """``off``, ``lru``, ``lfu``, ``tree`` or ``score``. Raises WorkloadError for another name."""
    if not isinstance(name, str) or name not in RULES:
        raise WorkloadError(f"prefix cache {name!r}; expected one of {', '.join(RULES)}")
    return RULES[name]


def segments(workload: Workload) -> Segments:
    """Numbers the segments of a workload.

    Two prompts share their i-th segment where their first i + 1 ids and the tokens these stand for are the same; told
    by a 64-bit hash of them, as in serving systems.

    Raises:
        WorkloadError: a request has more ids than its prompt has blocks.
    """
    size, offsets = workload.prefix_block_tokens, workload.prefix_offsets
    counts = np.diff(offsets)
    depth = np.arange(workload.prefix_ids.size) - np.repeat(offsets[:-1], counts)
    tokens = np.minimum(np.repeat(workload.prompt_tokens, counts) - depth * size, size)
    if tokens.size and tokens.min() < 1:
        row = int(np.searchsorted(offsets, np.argmin(tokens), side="right")) - 1
        most = -(-int(workload.prompt_tokens[row]) // size)
        raise WorkloadError(
            f"{workload.name}: row {row}, field prefix_ids: got {counts[row]} ids of {size} tokens; expected at most "
            f"{most}, for {workload.prompt_tokens[row]} prompt tokens"
        )
    parts = _mix(_mix(workload.prefix_ids.astype(np.uint64)) + _mix(depth.astype(np.uint64) << np.uint64(32)))
    parts = _mix(parts + tokens.astype(np.uint64))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(parts, dtype=np.uint64)])
    prefix_hash = sums[1:] - np.repeat(sums[offsets[:-1]], counts)  # of all ids of the request up to this one
    names, first, ids = np.unique(prefix_hash, return_index=True, return_inverse=True)
    request_tokens = np.minimum(counts * size, workload.prompt_tokens)
    return Segments(ids, tokens[first], depth[first], depth[first] * size + tokens[first], request_tokens, names)


@dataclass
class Known:
    """The segments that an environment has arrays for, by name. A mere index of them: made anew where they differ."""

    numbers: dict[int, int] = field(default_factory=dict)
    digest: int = 0

    def find(self, prefix: PrefixArrays, e: int, names: NDArray[np.uint64]) -> NDArray[np.int64]:
        """(U,) number of each segment, or NOWHERE."""
        if self.digest != int(prefix.env["digest"][e]):
            there = prefix.segment["name"][e, : prefix.env["segments_count"][e]]
            self.numbers = {name: number for number, name in enumerate(there.tolist())}
            self.digest = int(prefix.env["digest"][e])
        return np.array([self.numbers.get(name, NOWHERE) for name in names.tolist()], np.int64)

    def add(self, names: NDArray[np.uint64], first: int, digest: int) -> None:
        self.numbers.update(zip(names.tolist(), range(first, first + names.size), strict=True))
        self.digest = digest


def open_cache(state: State, e: int, rule: Eviction) -> State:
    """An empty prefix cache in an environment whose arrays are zero."""
    state = with_prefix_room(state, 0, 0, 0)
    prefix = state.prefix
    assert isinstance(prefix, PrefixArrays)
    prefix.env["eviction"][e] = rule
    prefix.pool["free_slot"][e] = NOWHERE
    return state


def add_prefixes(
    state: State,
    e: int,
    rows: NDArray[np.int64],
    workload: Workload,
    found: Segments,
    block: int,
    room: int,
    known: Known,
) -> State:
    """Makes the segments of some requests known to an open cache.

    Args:
        rows: (N,) slots of the requests.
        found: ``segments(workload)``.
        block: tokens of a KV block.
        room: blocks of the largest pool: it holds a segment once, in a block at least.
    """
    prefix = state.prefix
    assert isinstance(prefix, PrefixArrays)
    first, ids_first = int(prefix.env["segments_count"][e]), int(prefix.env["ids_used"][e])
    numbers = known.find(prefix, e, found.names) if first else np.full(found.names.size, NOWHERE)
    new = np.flatnonzero(numbers == NOWHERE)
    numbers[new] = np.arange(first, first + new.size)
    last, ids_last = first + new.size, ids_first + found.ids.size
    slots = max(min(room, last), int(prefix.env["slots_count"][e]))
    have = prefix.ids.shape[-1], prefix.segment.shape[-1], prefix.slot.shape[-1]
    need = ids_last, last, slots  # twice as much, where an environment grows time and again
    state = with_prefix_room(
        state, *(n if n <= h or not first else max(n, 2 * h) for n, h in zip(need, have, strict=True))
    )
    prefix = state.prefix
    assert isinstance(prefix, PrefixArrays)
    _link_slots(prefix, e, slots)
    segment = prefix.segment[e, first:last]
    segment["tokens"], segment["depth"] = found.tokens[new], found.depth[new]
    segment["blocks"] = -(-found.tokens[new] // block)
    segment["end_tokens"], segment["first_copy"] = found.end_tokens[new], NOWHERE
    segment["name"] = found.names[new]
    prefix.ids[e, ids_first:ids_last] = numbers[found.ids]
    offsets = workload.prefix_offsets
    sums = np.concatenate([[0], np.cumsum(-(-found.tokens // block)[found.ids])])
    req = prefix.req
    req["ids_first"][e, rows], req["ids_count"][e, rows] = ids_first + offsets[:-1], np.diff(offsets)
    req["ids_tokens"][e, rows], req["ids_blocks"][e, rows] = found.request_tokens, np.diff(sums[offsets])
    env = prefix.env[e]
    env["segments_count"], env["ids_used"] = last, ids_last
    told = np.append(_mix(found.names[new] + _mix(numbers[new].astype(np.uint64))), env["digest"])
    env["digest"] = told.sum(dtype=np.uint64)
    if first:  # at the opening nobody has asked yet
        known.add(found.names[new], first, int(env["digest"]))
    return state


def _link_slots(prefix: PrefixArrays, e: int, count: int) -> None:
    """Each pool of an environment has ``count`` slots from now on; new ones are free."""
    had = int(prefix.env["slots_count"][e])
    if count == had:
        return
    prefix.slot["next_copy"][e, :, had : count - 1] = np.arange(had + 1, count)
    prefix.slot["next_copy"][e, :, count - 1] = prefix.pool["free_slot"][e]
    prefix.pool["free_slot"][e] = had
    prefix.idle["pos"][e, :, had:count] = NOWHERE
    prefix.env["slots_count"][e] = count


SEGMENT_ROW_DTYPE = np.dtype(
    [
        ("pool", np.int64),
        ("segment", np.int64),  # which; the same for copies in several pools
        ("tokens", np.int64),
        ("depth", np.int64),  # its place in the prompt, from 0
        ("uses", np.int64),  # requests that held this copy since it came in
        ("idle_rank", np.int64),  # 0: idle for longest, over all pools
        ("score", np.float64),  # as given last
    ],
    align=True,
)


def idle_segments(state: State, e: int) -> NDArray[np.void]:
    """SEGMENT_ROW_DTYPE rows of the copies that nobody holds, longest idle first."""
    prefix = state.prefix
    if not isinstance(prefix, PrefixArrays):
        return np.empty(0, SEGMENT_ROW_DTYPE)
    slots = [prefix.idle["item"][e, pool, :count] for pool, count in enumerate(prefix.idle_len[e].tolist())]
    pools = np.repeat(np.arange(len(slots)), [each.size for each in slots])
    copies = prefix.slot[e, pools, np.concatenate(slots)]
    order = np.argsort(copies["idle_seq"])
    pools, copies = pools[order], copies[order]
    rows = np.empty(copies.size, SEGMENT_ROW_DTYPE)
    segment = prefix.segment[e, copies["segment"]]
    rows["pool"], rows["segment"], rows["uses"] = pools, copies["segment"], copies["uses"]
    rows["tokens"], rows["depth"], rows["score"] = segment["tokens"], segment["depth"], segment["score"]
    rows["idle_rank"] = np.arange(rows.size)
    return rows


def score_segments(state: State, e: int, segment: NDArray[np.int64], scores: NDArray[np.float64]) -> None:
    """Sets what the rule SCORE goes by, clipped to -1 to 1; the lowest goes first."""
    prefix = state.prefix
    assert isinstance(prefix, PrefixArrays)
    prefix.segment["score"][e, segment] = np.clip(scores, -1.0, 1.0)
    prefix.env["scored"][e] = 1


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014): a bijection that scatters close values."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
