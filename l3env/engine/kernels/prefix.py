"""The prefix cache: KV of prompt segments, kept in the pools and shared by requests whose prompts begin alike.

A *segment* is the KV of one prefix id on top of all ids before it, in blocks of its own; ``prefix.py`` makes them. A
pool holds at most one copy of a segment, in a *slot*. Running requests hold references on the leading segments of their
prompts: those found at admission, and those they computed themselves, from the end of the chunk that completes them on.
A slot without references is idle: it keeps its KV, is not counted as used, and is given up when its room is needed.

What a hit costs: prefill attends on a GPU, so KV that is not in HBM crosses the link once to be read; KV for a request
that lives on the PIM side, and is not in its pool yet, crosses once to get there and makes a copy in that pool.

A run without prefix ids has no arrays for all this: ``s.prefix`` is ``()``. The functions for other kernels take
``prefix`` and begin with ``if len(prefix) == 0``, which numba decides by type when it compiles, dropping the other
branch: such a run is compiled as if there were no prefix cache, and one with a cache anew on first use.
"""

from __future__ import annotations

import numpy as np

from l3env.choices import Eviction
from l3env.engine.kernels.heap import push, remove
from l3env.engine.state import NOWHERE
from l3env.jit import helper, inner

MAJOR = 2.0**34  # scales counts over the order in which segments became idle; keys stay exact in a float


# --- what a request and a pool are, seen from the other kernels


@inner
def segment_tokens(prefix, e, r):
    """Tokens of a request's prompt that lie in segments."""
    if len(prefix) == 0:
        return 0
    return np.int64(prefix.req[e, r]["ids_tokens"])


@inner
def blocks_of(prefix, e, r, tokens, block):
    """Blocks for so much of a request's KV (at least its prompt): its segments', and blocks of its own for the rest."""
    if len(prefix) == 0:
        return (tokens + block - 1) // block
    return prefix.req[e, r]["ids_blocks"] + (tokens - prefix.req[e, r]["ids_tokens"] + block - 1) // block


@inner
def moving_tokens(prefix, e, r):
    """Cached KV that a request's next chunk waits for, times the links it crosses."""
    if len(prefix) == 0:
        return 0
    return np.int64(prefix.req[e, r]["moving_tokens"])


@inner
def offered_tokens(prefix, e, pool):
    """What a pool holds of the prefix last asked about."""
    if len(prefix) == 0:
        return 0
    return prefix.pool[e, pool]["offer_tokens"]


@inner
def offered_blocks(prefix, e, pool):
    """Blocks of that which are in use, and so need no room."""
    if len(prefix) == 0:
        return 0
    return prefix.pool[e, pool]["offer_blocks"]


@inner
def shares(prefix):
    """Is there a prefix cache?"""
    return len(prefix) != 0


@inner
def cached_blocks(prefix, e, pool):
    """Blocks of a pool that nobody holds and that keep their KV."""
    if len(prefix) == 0:
        return 0
    return prefix.pool[e, pool]["cached"]


@inner
def cache_of(prefix, pools, e):
    """What the functions below work on: an environment's pools, segments, slots, idle heaps and their lengths.

    Not the whole state, since every call of a function copies all it is given.
    """
    return pools[e], prefix.pool[e], prefix.segment[e], prefix.slot[e], prefix.idle[e], prefix.idle_len[e]


# --- slots


@helper
def find_copy(cache, segment, pool):
    """The slot of a segment's copy in a pool, or -1."""
    _, banks, segments, slots, _, _ = cache
    count = banks.shape[0]
    copy = segments[segment]["first_copy"]
    while copy != NOWHERE:
        if copy % count == pool:
            return copy // count
        copy = slots[copy % count, copy // count]["next_copy"]
    return np.int64(NOWHERE)


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
    if rule == Eviction.SCORE:
        return recency + segments[slot["segment"]]["score"] * MAJOR
    return recency


@helper
def take_slot(cache, segment, pool, slot):
    """One more request holds a slot instead of blocks of its own; -1: a new one, made of the request's blocks."""
    used, banks, segments, slots, idle, lengths = cache
    if slot == NOWHERE:
        slot = banks[pool]["free_slot"]
        row = slots[pool, slot]
        banks[pool]["free_slot"] = row["next_copy"]
        row["segment"], row["refs"], row["uses"] = segment, 0, 0
        row["next_copy"] = segments[segment]["first_copy"]
        segments[segment]["first_copy"] = slot * banks.shape[0] + pool
    elif slots[pool, slot]["refs"] == 0:
        remove(idle[pool], lengths, pool, slot)
        banks[pool]["cached"] -= segments[segment]["blocks"]
    else:
        used[pool]["used"] -= segments[segment]["blocks"]
    slots[pool, slot]["refs"] += 1
    slots[pool, slot]["uses"] += 1


@helper
def evict_slots(cache, env, pool, capacity):
    """Gives up idle slots of a pool until what is used and what is cached fit into its capacity together."""
    used, banks, segments, slots, idle, lengths = cache
    count = banks.shape[0]
    while used[pool]["used"] + banks[pool]["cached"] > capacity:
        slot = np.int64(idle[pool, 0]["item"])
        remove(idle[pool], lengths, pool, slot)
        row = slots[pool, slot]
        segment = segments[row["segment"]]
        mine, copy = slot * count + pool, segment["first_copy"]
        if copy == mine:
            segment["first_copy"] = row["next_copy"]
        else:
            while slots[copy % count, copy // count]["next_copy"] != mine:
                copy = slots[copy % count, copy // count]["next_copy"]
            slots[copy % count, copy // count]["next_copy"] = row["next_copy"]
        row["next_copy"] = banks[pool]["free_slot"]
        banks[pool]["free_slot"] = slot
        banks[pool]["cached"] -= segment["blocks"]
        env["evictions_count"] += 1


# --- what happens to requests and pools


@helper
def ask_pools(prefix, e, r):
    """Notes in every pool what it holds of a waiting request's prefix: tokens, and blocks that are in use anyway."""
    if len(prefix) == 0:
        return
    banks, segments, slots, req = prefix.pool[e], prefix.segment[e], prefix.slot[e], prefix.req[e, r]
    count = banks.shape[0]
    for pool in range(count):
        banks[pool]["offer_tokens"] = 0
        banks[pool]["offer_blocks"] = 0
    for i in range(req["ids_count"]):
        segment = prefix.ids[e, req["ids_first"] + i]
        copy = segments[segment]["first_copy"]
        if copy == NOWHERE:
            return
        while copy != NOWHERE:
            pool, slot = copy % count, copy // count
            banks[pool]["offer_tokens"] += segments[segment]["tokens"]
            if slots[pool, slot]["refs"] > 0:
                banks[pool]["offer_blocks"] += segments[segment]["blocks"]
            copy = slots[pool, slot]["next_copy"]


@helper
def hold_prefix(prefix, requests, pools, e, r, pool, capacity):
    """At admission: references on all leading segments that are cached anywhere; they need no prefill.

    The caller has counted the whole footprint as used. What the pool holds is taken before others are evicted for the
    rest, and the rest copied after. The last token of a prompt is always computed, for its logits.
    """
    if len(prefix) == 0:
        return
    cache, ids, segments = cache_of(prefix, pools, e), prefix.ids[e], prefix.segment[e]
    env, req, request = prefix.env[e], prefix.req[e, r], requests[e, r]
    count, tokens, moving = 0, 0, 0
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
    evict_slots(cache, env, pool, capacity)
    for i in range(count):
        segment = ids[req["ids_first"] + i]
        if find_copy(cache, segment, pool) == NOWHERE:
            take_slot(cache, segment, pool, np.int64(NOWHERE))
    if request["preemptions_count"] == 0:
        req["hit_tokens"] = tokens
        env["ids_count"] += req["ids_count"]
        env["hits_count"] += count
        env["prompt_tokens"] += request["prompt_tokens"]
        env["hit_tokens"] += tokens
    req["held_count"] = count
    req["moving_tokens"] = moving
    request["prefilled_tokens"] = min(tokens, request["target_tokens"] - 1)


@helper
def publish(prefix, pools, e, r, pool, prefilled_tokens):
    """After a chunk: the segments it completed are there for others; copies that came in meanwhile are shared."""
    if len(prefix) == 0:
        return
    cache, ids, segments = cache_of(prefix, pools, e), prefix.ids[e], prefix.segment[e]
    req = prefix.req[e, r]
    req["moving_tokens"] = 0
    i = req["held_count"]
    while i < req["ids_count"]:
        segment = ids[req["ids_first"] + i]
        if segments[segment]["end_tokens"] > prefilled_tokens:
            break
        take_slot(cache, segment, pool, find_copy(cache, segment, pool))
        i += 1
    req["held_count"] = i


@helper
def release_prefix(prefix, pools, e, r, pool):
    """A request gives its references up, the last segment first; slots that nobody holds any more become idle.

    The caller has given the whole footprint back; what others still hold is counted as used again.
    """
    if len(prefix) == 0:
        return
    cache, ids, env, req = cache_of(prefix, pools, e), prefix.ids[e], prefix.env[e], prefix.req[e, r]
    used, banks, segments, slots, idle, lengths = cache
    for i in range(req["held_count"] - 1, -1, -1):
        segment = ids[req["ids_first"] + i]
        slot = find_copy(cache, segment, pool)
        row = slots[pool, slot]
        row["refs"] -= 1
        if row["refs"] > 0:
            used[pool]["used"] += segments[segment]["blocks"]
            continue
        banks[pool]["cached"] += segments[segment]["blocks"]
        env["idle_seq"] += 1
        row["idle_seq"] = env["idle_seq"]
        push(idle[pool], lengths, pool, slot, eviction_key(env["eviction"], segments, row))
    req["held_count"] = 0
    req["moving_tokens"] = 0


@helper
def evict_to_fit(prefix, pools, e, pool, capacity):
    """A pool's growth has its room: idle slots go where what is used and cached exceeds the capacity."""
    if len(prefix) == 0:
        return
    if prefix.pool[e, pool]["cached"] > 0:
        evict_slots(cache_of(prefix, pools, e), prefix.env[e], pool, capacity)


@helper
def change_eviction(prefix, e, rule):
    """Another rule from now on, unless it is OFF; idle slots are ordered anew, as they are after new scores."""
    if len(prefix) == 0:
        return
    env, segments, slots, idle = prefix.env[e], prefix.segment[e], prefix.slot[e], prefix.idle[e]
    lengths = prefix.idle_len[e]
    if env["eviction"] == Eviction.OFF:
        return
    if rule == Eviction.OFF:
        rule = env["eviction"]
    if rule == env["eviction"] and not (env["scored"] and rule == Eviction.SCORE):
        return
    env["eviction"] = rule
    env["scored"] = 0
    for pool in range(idle.shape[0]):
        length = lengths[pool]
        for place in range(length):  # a heap of the first ``place``, then one more
            slot = np.int64(idle[pool, place]["item"])
            lengths[pool] = place
            push(idle[pool], lengths, pool, slot, eviction_key(rule, segments, slots[pool, slot]))
