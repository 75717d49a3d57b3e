"""A workload's prefix ids as segments: the content-addressed pieces of prompts that the prefix cache keeps and shares.

A segment is one prefix id on top of all the ids before it, as in paged serving systems, which address a block by a hash
of its tokens and of all before them (vLLM, "Automatic Prefix Caching"). Equal segments hold equal KV.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l3env.errors import WorkloadError
from l3env.state import Eviction
from l3env.workload import Workload

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
    """

    ids: NDArray[np.int64]
    tokens: NDArray[np.int64]
    depth: NDArray[np.int64]
    end_tokens: NDArray[np.int64]
    request_tokens: NDArray[np.int64]


def eviction_rule(name: str) -> Eviction:
    """``off``, ``lru``, ``lfu`` or ``tree``. Raises WorkloadError for another name."""
    if name not in RULES:
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
    _, first, ids = np.unique(prefix_hash, return_index=True, return_inverse=True)
    request_tokens = np.minimum(counts * size, workload.prompt_tokens)
    return Segments(ids, tokens[first], depth[first], depth[first] * size + tokens[first], request_tokens)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014): a bijection that scatters close values."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
