"""A batch described by hand, as the formula of an iteration takes it: ``Tables.iteration_s``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l3env.errors import SpecError
from l3env.machine.arrays import TableArrays

PLACES = ("hbm", "pim", "pim-decompressed")
LOAD_DTYPE = np.dtype([("count", np.float64), ("kv", np.float64)])
CHUNK_DTYPE = np.dtype([(name, np.int64) for name in ("sub_batch", "tokens", "history_tokens", "lane", "ends")])


@dataclass(frozen=True)
class Decodes:
    """Equal requests that decode.

    Attributes:
        requests_count: how many.
        kv_tokens: KV of each before the step.
        place: "hbm", "pim" (dealt over its lanes), "pim-decompressed", or a pool by its number.
        sub_batch: 0 or 1; None deals them to both.
    """

    requests_count: int
    kv_tokens: float
    place: str | int = "hbm"
    sub_batch: int | None = None


@dataclass(frozen=True)
class Chunk:
    """New tokens of a prompt.

    Attributes:
        tokens: how many.
        history_tokens: tokens of the prompt that were processed before.
        place: where its KV goes, as of ``Decodes``.
        ends: the prompt ends with it, and its first token is emitted.
        sub_batch: 0 or 1.
    """

    tokens: int
    history_tokens: int = 0
    place: str | int = "hbm"
    ends: bool = True
    sub_batch: int = 0


def lanes_of(arrays: TableArrays, place: str | int) -> NDArray[np.int64]:
    """Lanes of a place. Raises SpecError where the system has none such."""
    coef = arrays.coef[0]
    lanes = np.arange(coef["lanes_count"])
    decompressed = int(coef["decompressed_lane"])
    stored = lanes[: decompressed or None]
    if isinstance(place, str):
        found = {"hbm": lanes[:1], "pim": stored[1:], "pim-decompressed": lanes[decompressed or lanes.size :]}
        chosen = found.get(place, lanes[:0])
    else:
        chosen = lanes[arrays.lane_pool[0, : lanes.size] == place]
    if not chosen.size:
        raise SpecError(f"place = {place!r}: not on this system; expected one of {', '.join(PLACES)} or a pool")
    return chosen


def loads(arrays: TableArrays, decodes: Iterable[Decodes]) -> NDArray[np.void]:
    """(S, L) decoding requests and KV of each lane: dealt to the sub-batches, then one by one to the lanes."""
    out = np.zeros((2, int(arrays.coef["lanes_count"][0])), LOAD_DTYPE)
    for each in decodes:
        lanes, halves = lanes_of(arrays, each.place), [-(-each.requests_count // 2), each.requests_count // 2]
        if each.sub_batch is not None:
            halves = [0, 0]
            halves[each.sub_batch] = each.requests_count
        first = 0
        for sub, count in enumerate(halves):
            dealt = np.bincount(np.arange(first, first + count) % lanes.size, minlength=lanes.size)
            out["count"][sub, lanes] += dealt
            out["kv"][sub, lanes] += dealt * each.kv_tokens
            first += count
    return out


def chunk_rows(arrays: TableArrays, chunks: Iterable[Chunk]) -> NDArray[np.void]:
    """(C,) CHUNK_DTYPE."""
    rows = [
        (each.sub_batch, each.tokens, each.history_tokens, lanes_of(arrays, each.place)[0], each.ends)
        for each in chunks
    ]
    return np.array(rows, CHUNK_DTYPE)
