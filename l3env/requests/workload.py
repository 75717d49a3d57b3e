"""The validated request table: what a trace becomes and all that the engine reads of one.

Columns are parallel arrays of length N, sorted by arrival. A request may depend on another (``parent_idx``):
it then arrives ``think_s`` after its parent has finished (a closed loop), whatever its recorded ``arrival_s``; where
``recorded_floor`` is set, not before that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from l3env.errors import WorkloadError

NO_PARENT = -1
COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens", "parent_idx", "think_s", "session_idx", "prefix_ids")


@dataclass(frozen=True)
class Workload:
    """Requests to serve.

    Attributes:
        name: what reports call it.
        arrival_s: (N,) float64, seconds from the start, ascending, finite, >= 0.
        prompt_tokens: (N,) int64, >= 1.
        output_tokens: (N,) int64, >= 1. The truth: only policies named ``oracle-*`` may be given it.
        parent_idx: (N,) int64, index of the request this one waits for, or -1. Parents come earlier in the table.
        think_s: (N,) float64, pause between the parent's finish and this arrival.
        session_idx: (N,) int64, session or client number, or -1.
        prefix_ids: (M,) int64, ids of the prompt's KV blocks, requests one after the other; equal leading ids mean
            an equal prefix. Empty where the trace has none.
        prefix_offsets: (N + 1,) int64, request i owns ``prefix_ids[prefix_offsets[i]:prefix_offsets[i + 1]]``.
        prefix_block_tokens: tokens per id; 0 where the trace has none.
        recorded_floor: dependent requests arrive at their recorded ``arrival_s`` at the earliest.
        source: where the rows come from: url, licence, loader, what was skipped and why.
        extra: further columns by name, (N,) each: whole numbers, floats, truths or texts. Nothing here reads them.
    """

    name: str
    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    parent_idx: NDArray[np.int64]
    think_s: NDArray[np.float64]
    session_idx: NDArray[np.int64]
    prefix_ids: NDArray[np.int64]
    prefix_offsets: NDArray[np.int64]
    prefix_block_tokens: int = 0
    recorded_floor: bool = False
    source: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        name: str,
        arrival_s: ArrayLike,
        prompt_tokens: ArrayLike,
        output_tokens: ArrayLike,
        *,
        parent_idx: ArrayLike | None = None,
        think_s: ArrayLike | None = None,
        session_idx: ArrayLike | None = None,
        prefix_ids: ArrayLike | None = None,
        prefix_offsets: ArrayLike | None = None,
        prefix_block_tokens: int = 0,
        recorded_floor: bool = False,
        source: Mapping[str, Any] | None = None,
        extra: Mapping[str, ArrayLike] | None = None,
    ) -> Workload:
        """Copies the columns into arrays of the right type, checks them, raises WorkloadError naming row and field."""
        arrival = np.array(arrival_s, dtype=np.float64, ndmin=1)
        count = arrival.size

        def integers(column: ArrayLike | None, default: int) -> NDArray[np.int64]:
            if column is None:
                return np.full(count, default, dtype=np.int64)
            return np.array(column, dtype=np.int64, ndmin=1)

        workload = cls(
            name=name,
            arrival_s=arrival,
            prompt_tokens=integers(prompt_tokens, 0),
            output_tokens=integers(output_tokens, 0),
            parent_idx=integers(parent_idx, NO_PARENT),
            think_s=np.zeros(count) if think_s is None else np.array(think_s, dtype=np.float64, ndmin=1),
            session_idx=integers(session_idx, -1),
            prefix_ids=np.array([] if prefix_ids is None else prefix_ids, dtype=np.int64),
            prefix_offsets=np.zeros(count + 1, dtype=np.int64)
            if prefix_offsets is None
            else np.array(prefix_offsets, dtype=np.int64),
            prefix_block_tokens=int(prefix_block_tokens),
            recorded_floor=recorded_floor,
            source=dict(source or {}),
            extra={column: np.array(values, ndmin=1) for column, values in (extra or {}).items()},
        )
        workload.check()
        return workload

    def __len__(self) -> int:
        return int(self.arrival_s.size)

    @property
    def span_s(self) -> float:
        """Time between the first and the last arrival."""
        return float(self.arrival_s[-1] - self.arrival_s[0]) if len(self) else 0.0

    @property
    def rate_per_s(self) -> float:
        """Requests that are offered a second; infinite where all arrive at once.

        The first of the R requests that depend on no other arrive at (R - 1) / their span; each brings N / R in all.
        """
        roots = self.arrival_s[self.parent_idx < 0]
        span_s = float(roots[-1] - roots[0])
        return (roots.size - 1) / span_s * (len(self) / roots.size) if span_s > 0 else float("inf")

    @property
    def stand_ins(self) -> list[str]:
        """Real traces that are not on this machine and whose embedded profiles serve instead."""
        parts = [self.source, *self.source.get("parts", ())]
        return [str(part["stands_in_for"]) for part in parts if "stands_in_for" in part]

    def check(self) -> None:
        """Raises WorkloadError with workload, row and field for the first thing that is wrong."""
        count = len(self)
        if count == 0:
            raise WorkloadError(f"{self.name}: no requests; expected at least one row")
        for column in ("prompt_tokens", "output_tokens", "parent_idx", "think_s", "session_idx"):
            if getattr(self, column).shape != (count,):
                shape = getattr(self, column).shape
                raise WorkloadError(f"{self.name}: field {column} has shape {shape}; expected ({count},)")
        for column, values in self.extra.items():
            if column in COLUMNS or values.shape != (count,) or values.dtype.kind not in "biufU":
                raise WorkloadError(
                    f"{self.name}: extra column {column!r} of shape {values.shape}, type {values.dtype}; "
                    f"expected a name of its own, shape ({count},) and numbers, truths or texts"
                )
        self._require(np.isfinite(self.arrival_s) & (self.arrival_s >= 0), "arrival_s", "a finite number >= 0")
        unsorted_mask = np.concatenate([[True], np.diff(self.arrival_s) >= 0])
        self._require(unsorted_mask, "arrival_s", "a time not before the row above (rows sorted by arrival)")
        for column in ("prompt_tokens", "output_tokens"):
            self._require(getattr(self, column) >= 1, column, "at least 1 token")
            self._require(getattr(self, column) < 2**31, column, "fewer than 2^31 tokens")
        self._require(np.isfinite(self.think_s) & (self.think_s >= 0), "think_s", "a finite number >= 0")
        rows = np.arange(count)
        earlier_mask = (self.parent_idx >= NO_PARENT) & (self.parent_idx < rows)
        self._require(earlier_mask, "parent_idx", "-1 or the index of an earlier row")
        offsets = self.prefix_offsets
        if offsets.shape != (count + 1,) or offsets[0] != 0 or offsets[-1] != self.prefix_ids.size:
            raise WorkloadError(f"{self.name}: field prefix_offsets does not index prefix_ids; expected N + 1 offsets")
        self._require(np.diff(offsets) >= 0, "prefix_offsets", "ascending offsets")
        if self.prefix_ids.size and self.prefix_block_tokens < 1:
            raise WorkloadError(f"{self.name}: prefix_ids need prefix_block_tokens >= 1")

    def _require(self, good_mask: NDArray[np.bool_], column: str, expected: str) -> None:
        if not good_mask.all():
            row = int(np.argmin(good_mask))
            got = getattr(self, column)[row]
            raise WorkloadError(f"{self.name}: row {row}, field {column}: got {got}; expected {expected}")

    def select(self, rows: ArrayLike, name: str | None = None) -> Workload:
        """The requests at ``rows`` (indices or mask), in table order; a child loses a parent that is left out."""
        chosen = np.asarray(rows)
        idx = np.flatnonzero(chosen) if chosen.dtype == bool else np.sort(chosen.astype(np.int64))
        new_index = np.full(len(self) + 1, NO_PARENT, dtype=np.int64)
        new_index[idx] = np.arange(idx.size)
        parent = np.where(self.parent_idx[idx] >= 0, new_index[self.parent_idx[idx]], NO_PARENT)
        lengths = np.diff(self.prefix_offsets)[idx]
        pieces = [
            self.prefix_ids[self.prefix_offsets[i] : self.prefix_offsets[i + 1]] for i in idx if self.prefix_ids.size
        ]
        return Workload.build(
            name or self.name,
            self.arrival_s[idx],
            self.prompt_tokens[idx],
            self.output_tokens[idx],
            parent_idx=parent,
            think_s=np.where(parent >= 0, self.think_s[idx], 0.0),
            session_idx=self.session_idx[idx],
            prefix_ids=np.concatenate(pieces) if pieces else None,
            prefix_offsets=np.concatenate([[0], np.cumsum(lengths)]),
            prefix_block_tokens=self.prefix_block_tokens,
            recorded_floor=self.recorded_floor,
            source=self.source,
            extra={column: values[idx] for column, values in self.extra.items()},
        )

    def stretch(self, first: int, last: int) -> Workload:
        """Requests first to last - 1, the clock moved so that the first arrives at 0; quick, for episodes.

        As ``select`` and ``window`` together; nothing is checked anew, since a stretch of valid rows is valid.
        """
        parent = self.parent_idx[first:last] - first
        parent = np.where(parent >= 0, parent, NO_PARENT)
        begin, end = self.prefix_offsets[first], self.prefix_offsets[last]
        return replace(
            self,
            arrival_s=self.arrival_s[first:last] - self.arrival_s[first],
            prompt_tokens=self.prompt_tokens[first:last],
            output_tokens=self.output_tokens[first:last],
            parent_idx=parent,
            think_s=np.where(parent >= 0, self.think_s[first:last], 0.0),
            session_idx=self.session_idx[first:last],
            prefix_ids=self.prefix_ids[begin:end],
            prefix_offsets=self.prefix_offsets[first : last + 1] - begin,
            extra={column: values[first:last] for column, values in self.extra.items()},
        )

    def window(self, start_s: float, end_s: float) -> Workload:
        """Requests with start_s <= arrival < end_s, the clock moved so that the window starts at 0."""
        mask = (self.arrival_s >= start_s) & (self.arrival_s < end_s)
        if not mask.any():
            raise WorkloadError(
                f"{self.name}: no request arrives in [{start_s:g}, {end_s:g}) s; the trace spans "
                f"[{self.arrival_s[0]:g}, {self.arrival_s[-1]:g}] s"
            )
        part = self.select(mask)
        return replace(part, arrival_s=part.arrival_s - start_s)

    def head(self, count: int) -> Workload:
        """The first ``count`` requests."""
        return self.select(np.arange(min(count, len(self))))

    def at_load(self, load: float) -> Workload:
        """The same requests at ``load`` times their own rate: arrival times divided by it, think times as they are."""
        if not (np.isfinite(load) and load > 0):
            raise WorkloadError(f"{self.name}: load {load}; expected a finite number > 0")
        return replace(self, arrival_s=self.arrival_s / load)

    def closed_loop(self) -> Workload:
        """All requests present at time 0 (children still follow their parents)."""
        return replace(self, arrival_s=np.zeros(len(self)))

    def all_at_once(self) -> Workload:
        """The same, and nobody pauses between requests: what is left of the time is the machine's."""
        return replace(self.closed_loop(), think_s=np.zeros(len(self)))
