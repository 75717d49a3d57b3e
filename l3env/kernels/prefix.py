"""The prefix cache: KV of prompt segments, kept in the pools and shared by requests whose prompts begin alike.

A *segment* is the KV of one prefix id on top of all ids before it, in blocks of its own; ``prefix.py`` makes them. A
pool holds at most one copy of a segment, in a *slot*. Running requests hold references on the leading segments of their
prompts: those found at admission, and those they computed themselves, from the end of the chunk that completes them on.
A slot without references is idle: it keeps its KV, is not counted as used, and is given up when its room is needed.

What a hit costs: prefill attends on a GPU, so KV that is not in HBM crosses the link once to be read; KV for a request
that lives on the PIM side, and is not in its pool yet, crosses once to get there and makes a copy in that pool.
"""

from __future__ import annotations

import numpy as np

from l3env.jit import helper, inner
from l3env.kernels.heap import push, remove
from l3env.state import HEAPS_COUNT, NOWHERE, Eviction

MAJOR = 2.0**34  # scales counts over the order in which segments became idle; keys stay exact in a float


@inner
def footprint_blocks(t, s, e, r, tokens):
    """Blocks for so much of a request's KV (at least its prompt): its segments', and blocks of its own for the rest."""
    block = t.coef[s.env[e]["table_idx"]]["block_tokens"]
    return s.req[e, r]["ids_blocks"] + (tokens - s.req[e, r]["ids_tokens"] + block - 1) // block


@inner
def segment_of(s, e, r, i):
    """The i-th segment of a request's prompt."""
    return s.ids[e, s.req[e, r]["ids_first"] + i]


@helper
def find_copy(s, e, segment, pool):
    """The slot of a segment's copy in a pool, or -1."""
    pools = s.pool.shape[1]
    copy = s.segment[e, segment]["first_copy"]
    while copy != NOWHERE:
        if copy % pools == pool:
            return copy // pools
        copy = s.slot[e, copy % pools, copy // pools]["next_copy"]
    return np.int64(NOWHERE)


@helper
def ask_pools(s, e, r):
    """Notes in every pool what it holds of a waiting request's prefix: tokens, and blocks that are in use anyway."""
    pools = s.pool.shape[1]
    for pool in range(pools):
        s.pool[e, pool]["offer_tokens"] = 0
        s.pool[e, pool]["offer_blocks"] = 0
    for i in range(s.req[e, r]["ids_count"]):
        segment = segment_of(s, e, r, i)
        copy = s.segment[e, segment]["first_copy"]
        if copy == NOWHERE:
            return
        while copy != NOWHERE:
            pool, slot = copy % pools, copy // pools
            s.pool[e, pool]["offer_tokens"] += s.segment[e, segment]["tokens"]
            if s.slot[e, pool, slot]["refs"] > 0:
                s.pool[e, pool]["offer_blocks"] += s.segment[e, segment]["blocks"]
            copy = s.slot[e, pool, slot]["next_copy"]


@helper
def eviction_key(s, e, pool, slot):
    """Idle slots are given up in order of this key, small first. A new rule of eviction is a branch here.

    A request gives its segments up from the last to the first, so that of those it held to its end the deeper always
    come first (as in vLLM), whatever the rule. TREE: leaves first over the whole pool (compare Mooncake's
    LengthAwareCache, Qin et al., FAST 2025).
    """
    rule = s.env[e]["eviction"]
    recency = float(s.slot[e, pool, slot]["idle_seq"])
    if rule == Eviction.LFU:
        return s.slot[e, pool, slot]["uses"] * MAJOR + recency
    if rule == Eviction.TREE:
        return recency - s.segment[e, s.slot[e, pool, slot]["segment"]]["depth"] * MAJOR
    return recency


@helper
def fill_slot(s, e, pool, segment):
    """A copy of a segment comes into a pool, held by one request. The blocks are those of that request."""
    slot = s.pool[e, pool]["free_slot"]
    row = s.slot[e, pool, slot]
    s.pool[e, pool]["free_slot"] = row["next_copy"]
    row["segment"], row["refs"], row["uses"] = segment, 1, 1
    row["next_copy"] = s.segment[e, segment]["first_copy"]
    s.segment[e, segment]["first_copy"] = slot * s.pool.shape[1] + pool


@helper
def take_slot(s, e, pool, slot):
    """One more request holds a slot instead of blocks of its own."""
    row = s.slot[e, pool, slot]
    blocks = s.segment[e, row["segment"]]["blocks"]
    if row["refs"] == 0:
        remove(s.idle[e, pool], s.heap_len[e], HEAPS_COUNT + pool, slot)
        s.pool[e, pool]["cached"] -= blocks
    else:
        s.pool[e, pool]["used"] -= blocks
    row["refs"] += 1
    row["uses"] += 1


@helper
def hold_prefix(t, s, e, r, pool):
    """At admission: references on all leading segments that are cached anywhere; they need no prefill.

    The caller has counted the whole footprint as used. What the pool holds is taken before others are evicted for the
    rest, and the rest copied after. The last token of a prompt is always computed, for its logits.
    """
    req, env = s.req, s.env[e]
    count, tokens, blocks, moving = 0, 0, 0, 0
    while count < req[e, r]["ids_count"]:
        segment = segment_of(s, e, r, count)
        if s.segment[e, segment]["first_copy"] == NOWHERE:
            break
        slot = find_copy(s, e, segment, pool)
        if slot != NOWHERE:
            take_slot(s, e, pool, slot)
        size = s.segment[e, segment]["tokens"]
        moving += size if find_copy(s, e, segment, 0) == NOWHERE else 0
        moving += size if pool > 0 and slot == NOWHERE else 0
        count += 1
        tokens += size
        blocks += s.segment[e, segment]["blocks"]
    evict_to_fit(t, s, e, pool)
    for i in range(count):
        segment = segment_of(s, e, r, i)
        if find_copy(s, e, segment, pool) == NOWHERE:
            fill_slot(s, e, pool, segment)
    if req[e, r]["preemptions_count"] == 0:
        req[e, r]["hit_tokens"] = tokens
        env["prefix_ids_count"] += req[e, r]["ids_count"]
        env["prefix_hits_count"] += count
        env["prefix_prompt_tokens"] += req[e, r]["prompt_tokens"]
        env["prefix_hit_tokens"] += tokens
    req[e, r]["held_count"] = count
    req[e, r]["held_blocks"] = blocks
    req[e, r]["moving_tokens"] = moving
    req[e, r]["prefilled_tokens"] = min(tokens, req[e, r]["target_tokens"] - 1)


@helper
def publish(s, e, r, pool):
    """After a chunk: the segments it completed are there for others; copies that came in meanwhile are shared."""
    req = s.req
    i = req[e, r]["held_count"]
    while i < req[e, r]["ids_count"]:
        segment = segment_of(s, e, r, i)
        if s.segment[e, segment]["end_tokens"] > req[e, r]["prefilled_tokens"]:
            break
        slot = find_copy(s, e, segment, pool)
        if slot == NOWHERE:
            fill_slot(s, e, pool, segment)
        else:
            take_slot(s, e, pool, slot)
        req[e, r]["held_blocks"] += s.segment[e, segment]["blocks"]
        i += 1
    req[e, r]["held_count"] = i


@helper
def release_prefix(s, e, r, pool):
    """A request gives its references up, the last segment first; slots that nobody holds any more become idle."""
    req, env = s.req, s.env[e]
    for i in range(req[e, r]["held_count"] - 1, -1, -1):
        segment = segment_of(s, e, r, i)
        slot = find_copy(s, e, segment, pool)
        s.slot[e, pool, slot]["refs"] -= 1
        if s.slot[e, pool, slot]["refs"] == 0:
            blocks = s.segment[e, segment]["blocks"]
            s.pool[e, pool]["used"] -= blocks
            s.pool[e, pool]["cached"] += blocks
            env["eviction_seq"] += 1
            s.slot[e, pool, slot]["idle_seq"] = env["eviction_seq"]
            push(s.idle[e, pool], s.heap_len[e], HEAPS_COUNT + pool, slot, eviction_key(s, e, pool, slot))
    req[e, r]["held_count"] = 0
    req[e, r]["held_blocks"] = 0
    req[e, r]["moving_tokens"] = 0


@helper
def evict_to_fit(t, s, e, pool):
    """Gives up idle slots of a pool until what is used and what is cached fit into it together."""
    pools = s.pool.shape[1]
    while s.pool[e, pool]["used"] + s.pool[e, pool]["cached"] > t.pool_blocks[s.env[e]["table_idx"], pool]:
        slot = np.int64(s.idle[e, pool, 0]["item"])
        remove(s.idle[e, pool], s.heap_len[e], HEAPS_COUNT + pool, slot)
        segment = s.slot[e, pool, slot]["segment"]
        mine, after = slot * pools + pool, s.slot[e, pool, slot]["next_copy"]
        copy = s.segment[e, segment]["first_copy"]
        if copy == mine:
            s.segment[e, segment]["first_copy"] = after
        else:
            while s.slot[e, copy % pools, copy // pools]["next_copy"] != mine:
                copy = s.slot[e, copy % pools, copy // pools]["next_copy"]
            s.slot[e, copy % pools, copy // pools]["next_copy"] = after
        s.slot[e, pool, slot]["next_copy"] = s.pool[e, pool]["free_slot"]
        s.pool[e, pool]["free_slot"] = slot
        s.pool[e, pool]["cached"] -= s.segment[e, segment]["blocks"]
        s.env[e]["prefix_evictions_count"] += 1


@helper
def change_eviction(s, e, rule):
    """Another rule from now on: idle slots are ordered anew."""
    s.env[e]["eviction"] = rule
    for pool in range(s.pool.shape[1]):
        length = s.heap_len[e, HEAPS_COUNT + pool]
        for place in range(length):  # a heap of the first ``place``, then one more
            slot = np.int64(s.idle[e, pool, place]["item"])
            s.heap_len[e, HEAPS_COUNT + pool] = place
            push(s.idle[e, pool], s.heap_len[e], HEAPS_COUNT + pool, slot, eviction_key(s, e, pool, slot))
