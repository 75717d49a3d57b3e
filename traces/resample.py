"""Another sample of a trace: what seeds other than 0 mean for rows that are fixed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from l3env.requests.workload import NO_PARENT, Workload

BLOCK_S = 60.0
BLOCK_REQUESTS = 10  # a block is long enough for this many requests on average ...
MIN_BLOCKS = 10  # ... but a trace is cut into at least so many blocks
MIN_SPAN_S = 1e-6  # a shorter trace has no clock to keep


def resample(workload: Workload, seed: int) -> Workload:
    """A bootstrap sample with the same clock, named by ``seed``; the same seed gives the same rows.

    Sessions (requests that follow others): whole sessions, drawn with replacement onto the same session starts.
    No clock (all present at 0): single rows. Otherwise moving blocks of 60 s (``block_bootstrap``).
    """
    rng = np.random.default_rng([seed, 0xB0])
    if (workload.parent_idx >= 0).any():
        sample, what = _sessions(workload, rng), "whole sessions drawn with replacement"
    elif workload.span_s < MIN_SPAN_S:
        rows = np.sort(rng.integers(0, len(workload), len(workload)))
        sample, what = take(workload, rows, workload.arrival_s[rows]), "rows drawn with replacement"
    else:
        block_s = block_length_s(workload)
        sample, what = block_bootstrap(workload, block_s, rng), f"moving-block bootstrap, blocks of {block_s:g} s"
    return replace(sample, source={**workload.source, "resampled": f"{what}, seed {seed}"})


def block_length_s(workload: Workload) -> float:
    """60 s; longer where 60 s hold fewer than ten requests; never more than a tenth of the trace."""
    return min(max(BLOCK_S, BLOCK_REQUESTS / workload.rate_per_s), workload.span_s / MIN_BLOCKS)


def block_bootstrap(workload: Workload, block_s: float, rng: np.random.Generator) -> Workload:
    """Blocks of ``block_s`` seconds that start anywhere (the trace closed to a circle) laid one after another.

    Arrivals keep their place within a block, so lengths, bursts and their dependence stay within blocks; prefix ids are
    kept. Kunsch 1989; circular: Politis and Romano 1992. The number of requests varies as the blocks do.
    """
    first_s = float(workload.arrival_s[0])
    circle_s = workload.span_s * len(workload) / (len(workload) - 1)  # the span and one mean gap
    times_s = workload.arrival_s - first_s
    doubled_s = np.concatenate([times_s, times_s + circle_s])
    starts_s = np.arange(0.0, circle_s, block_s)
    widths_s = np.minimum(block_s, circle_s - starts_s)
    while True:
        origins_s = rng.random(starts_s.size) * circle_s
        low = np.searchsorted(doubled_s, origins_s, side="left")
        counts = np.searchsorted(doubled_s, origins_s + widths_s, side="left") - low
        if counts.sum() > 0:
            break
    places = ragged_places(low, counts)
    arrival_s = doubled_s[places] + np.repeat(starts_s - origins_s, counts)
    arrival_s = np.maximum.accumulate(np.maximum(arrival_s, 0.0))  # rounding at the seams
    return take(workload, places % len(workload), first_s + arrival_s)


def _sessions(workload: Workload, rng: np.random.Generator) -> Workload:
    """Whole sessions with replacement; the k-th drawn takes the k-th start. Local prefix ids stay apart."""
    root = roots(workload.parent_idx)
    key = np.where(workload.session_idx >= 0, workload.session_idx, -1 - root)
    _, session = np.unique(key, return_inverse=True)
    order = np.argsort(session, kind="stable")
    sizes = np.bincount(session)
    begins = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    session_start_s = workload.arrival_s[order[begins]]
    drawn = rng.integers(0, sizes.size, sizes.size)
    rows = order[ragged_places(begins[drawn], sizes[drawn])]
    copy = np.repeat(np.arange(drawn.size), sizes[drawn])
    arrival_s = workload.arrival_s[rows] + (np.sort(session_start_s) - session_start_s[drawn])[copy]
    local = np.empty(len(workload), dtype=np.int64)  # place of a row within its session
    local[order] = np.arange(len(workload)) - np.repeat(begins, sizes)
    new_begin = np.concatenate([[0], np.cumsum(sizes[drawn])[:-1]])[copy]
    parent = workload.parent_idx[rows]
    parent = np.where(parent >= 0, new_begin + local[np.maximum(parent, 0)], NO_PARENT)
    sample = _sorted(take(workload, rows, arrival_s), arrival_s, parent, copy)
    if workload.source.get("prefix_scope") == "session" and workload.prefix_ids.size:
        stride = int(workload.prefix_ids.max()) + 1
        shift = np.repeat(sample.session_idx * stride, np.diff(sample.prefix_offsets))
        sample = replace(sample, prefix_ids=sample.prefix_ids + shift)
    sample.check()
    return sample


def _sorted(
    workload: Workload, arrival_s: NDArray[np.float64], parent: NDArray[np.int64], session: NDArray[np.int64]
) -> Workload:
    """Rows stably sorted by arrival, ``parent`` (indices before sorting) following them."""
    order = np.argsort(arrival_s, kind="stable")
    place = np.empty(order.size, dtype=np.int64)
    place[order] = np.arange(order.size)
    parent = parent[order]
    moved = take(workload, order, arrival_s[order])
    return replace(
        moved, parent_idx=np.where(parent >= 0, place[np.maximum(parent, 0)], NO_PARENT), session_idx=session[order]
    )


def take(workload: Workload, rows: NDArray[np.int64], arrival_s: NDArray[np.float64]) -> Workload:
    """Rows by index, repeats allowed, at new times; parents are dropped (the caller sets them); nothing is checked."""
    counts = np.diff(workload.prefix_offsets)[rows]
    places = ragged_places(workload.prefix_offsets[rows], counts)
    return replace(
        workload,
        arrival_s=arrival_s,
        prompt_tokens=workload.prompt_tokens[rows],
        output_tokens=workload.output_tokens[rows],
        parent_idx=np.full(rows.size, NO_PARENT, dtype=np.int64),
        think_s=workload.think_s[rows],
        session_idx=workload.session_idx[rows],
        prefix_ids=workload.prefix_ids[places],
        prefix_offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        extra={column: values[rows] for column, values in workload.extra.items()},
    )


def ragged_places(begins: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices ``begins[i] .. begins[i] + counts[i] - 1`` for all i, one after the other."""
    ends = np.cumsum(counts)
    places: NDArray[np.int64] = np.arange(int(ends[-1]) if ends.size else 0) + np.repeat(begins - ends + counts, counts)
    return places


def roots(parent_idx: NDArray[np.int64]) -> NDArray[np.int64]:
    """(N,) the first ancestor of every row (parents come earlier), by pointer doubling."""
    up = np.where(parent_idx >= 0, parent_idx, np.arange(parent_idx.size))
    while True:
        further = up[up]
        if np.array_equal(further, up):
            return up
        up = further
