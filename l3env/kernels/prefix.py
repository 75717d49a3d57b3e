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
def cache_of(s, e):
    """What the functions below work on: an environment's pools, segments, slots, idle heaps and their lengths.

    Not the whole state, since every call of a function copies all it is given.
    """
    return s.pool[e], s.segment[e], s.slot[e], s.idle[e], s.heap_len[e]


@helper
def find_copy(cache, segment, pool):
    """The slot of a segment's copy in a pool, or -1."""
    pools, segments, slots, _, _ = cache
    copy = segments[segment]["first_copy"]
    while copy != NOWHERE:
        if copy % pools.shape[0] == pool:
            return copy // pools.shape[0]
        copy = slots[copy % pools.shape[0], copy // pools.shape[0]]["next_copy"]
    return np.int64(NOWHERE)


@helper
def ask_pools(cache, ids, req):
    """Notes in every pool what it holds of a waiting request's prefix: tokens, and blocks that are in use anyway."""
    pools, segments, slots, _, _ = cache
    for pool in range(pools.shape[0]):
        pools[pool]["offer_tokens"] = 0
        pools[pool]["offer_blocks"] = 0
    for i in range(req["ids_count"]):
        segment = ids[req["ids_first"] + i]
        copy = segments[segment]["first_copy"]
        if copy == NOWHERE:
            return
        while copy != NOWHERE:
            pool, slot = copy % pools.shape[0], copy // pools.shape[0]
            pools[pool]["offer_tokens"] += segments[segment]["tokens"]
            if slots[pool, slot]["refs"] > 0:
                pools[pool]["offer_blocks"] += segments[segment]["blocks"]
            copy = slots[pool, slot]["next_copy"]


@inner
def eviction_key(rule, segments, slot):
    """Idle slots are given up in order of this key, small first. A new rule of eviction is a branch here.

    A request gives its segments up from the last to the first, so that of those it held to its end the deeper always
    come first (as in vLLM), whatever the rule. TREE: leaves first over the whole pool (compare Mooncake's
    LengthAwareCache, Qin et al., FAST 2025).
    """
    recency = float(slot["idle_seq"])
    if rule == Eviction.LFU:
        return slot["uses"] * MAJOR + recency
    if rule == Eviction.TREE:
        return recency - segments[slot["segment"]]["depth"] * MAJOR
    return recency


@helper
def take_slot(cache, segment, pool, slot):
    """One more request holds a slot instead of blocks of its own; -1: a new one, made of the request's blocks."""
    pools, segments, slots, idle, lengths = cache
    if slot == NOWHERE:
        slot = pools[pool]["free_slot"]
        row = slots[pool, slot]
        pools[pool]["free_slot"] = row["next_copy"]
        row["segment"], row["refs"], row["uses"] = segment, 0, 0
        row["next_copy"] = segments[segment]["first_copy"]
        segments[segment]["first_copy"] = slot * pools.shape[0] + pool
    elif slots[pool, slot]["refs"] == 0:
        remove(idle[pool], lengths, HEAPS_COUNT + pool, slot)
        pools[pool]["cached"] -= segments[segment]["blocks"]
    else:
        pools[pool]["used"] -= segments[segment]["blocks"]
    slots[pool, slot]["refs"] += 1
    slots[pool, slot]["uses"] += 1


@helper
def hold_prefix(cache, ids, env, req, pool, capacity):
    """At admission: references on all leading segments that are cached anywhere; they need no prefill.

    The caller has counted the whole footprint as used. What the pool holds is taken before others are evicted for the
    rest, and the rest copied after. The last token of a prompt is always computed, for its logits.
    """
    segments = cache[1]
    count, tokens, blocks, moving = 0, 0, 0, 0
    while count < req["ids_count"]:
        segment = ids[req["ids_first"] + count]
        if segments[segment]["first_copy"] == NOWHERE:
            break
        slot = find_copy(cache, segment, pool)
        size = segments[segment]["tokens"]
        moving += size if find_copy(cache, segment, 0) == NOWHERE else 0
        if slot != NOWHERE:
            take_slot(cache, segment, pool, slot)
        elif pool > 0:
            moving += size
        count += 1
        tokens += size
        blocks += segments[segment]["blocks"]
    evict_to_fit(cache, env, pool, capacity)
    for i in range(count):
        segment = ids[req["ids_first"] + i]
        if find_copy(cache, segment, pool) == NOWHERE:
            take_slot(cache, segment, pool, NOWHERE)
    if req["preemptions_count"] == 0:
        req["hit_tokens"] = tokens
        env["prefix_ids_count"] += req["ids_count"]
        env["prefix_hits_count"] += count
        env["prefix_prompt_tokens"] += req["prompt_tokens"]
        env["prefix_hit_tokens"] += tokens
    req["held_count"] = count
    req["held_blocks"] = blocks
    req["moving_tokens"] = moving
    req["prefilled_tokens"] = min(tokens, req["target_tokens"] - 1)


@helper
def publish(cache, ids, req, pool):
    """After a chunk: the segments it completed are there for others; copies that came in meanwhile are shared."""
    segments = cache[1]
    i = req["held_count"]
    while i < req["ids_count"]:
        segment = ids[req["ids_first"] + i]
        if segments[segment]["end_tokens"] > req["prefilled_tokens"]:
            break
        take_slot(cache, segment, pool, find_copy(cache, segment, pool))
        req["held_blocks"] += segments[segment]["blocks"]
        i += 1
    req["held_count"] = i


@helper
def release_prefix(cache, ids, env, req, pool):
    """A request gives its references up, the last segment first; slots that nobody holds any more become idle."""
    pools, segments, slots, idle, lengths = cache
    for i in range(req["held_count"] - 1, -1, -1):
        segment = ids[req["ids_first"] + i]
        slot = find_copy(cache, segment, pool)
        row = slots[pool, slot]
        row["refs"] -= 1
        if row["refs"] == 0:
            pools[pool]["used"] -= segments[segment]["blocks"]
            pools[pool]["cached"] += segments[segment]["blocks"]
            env["eviction_seq"] += 1
            row["idle_seq"] = env["eviction_seq"]
            push(idle[pool], lengths, HEAPS_COUNT + pool, slot, eviction_key(env["eviction"], segments, row))
    req["held_count"] = 0
    req["held_blocks"] = 0
    req["moving_tokens"] = 0


@helper
def evict_to_fit(cache, env, pool, capacity):
    """Gives up idle slots of a pool until what is used and what is cached fit into its capacity together."""
    pools, segments, slots, idle, lengths = cache
    count = pools.shape[0]
    while pools[pool]["used"] + pools[pool]["cached"] > capacity:
        slot = np.int64(idle[pool, 0]["item"])
        remove(idle[pool], lengths, HEAPS_COUNT + pool, slot)
        row = slots[pool, slot]
        segment = segments[row["segment"]]
        mine, copy = slot * count + pool, segment["first_copy"]
        if copy == mine:
            segment["first_copy"] = row["next_copy"]
        else:
            while slots[copy % count, copy // count]["next_copy"] != mine:
                copy = slots[copy % count, copy // count]["next_copy"]
            slots[copy % count, copy // count]["next_copy"] = row["next_copy"]
        row["next_copy"] = pools[pool]["free_slot"]
        pools[pool]["free_slot"] = slot
        pools[pool]["cached"] -= segment["blocks"]
        env["prefix_evictions_count"] += 1


@helper
def change_eviction(cache, env, rule):
    """Another rule from now on: idle slots are ordered anew."""
    pools, segments, slots, idle, lengths = cache
    env["eviction"] = rule
    for pool in range(pools.shape[0]):
        length = lengths[HEAPS_COUNT + pool]
        for place in range(length):  # a heap of the first ``place``, then one more
            slot = np.int64(idle[pool, place]["item"])
            lengths[HEAPS_COUNT + pool] = place
            push(idle[pool], lengths, HEAPS_COUNT + pool, slot, eviction_key(rule, segments, slots[pool, slot]))
