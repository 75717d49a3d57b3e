"""What must hold of the prefix cache's arrays at any time, derived anew from who runs."""

from __future__ import annotations

from collections import Counter

import numpy as np

from l3env.choices import Status
from l3env.engine.state import NOWHERE, PrefixArrays

RUNNING = (Status.PREFILL, Status.DECODE, Status.PAUSED)


def check_prefix(state, lane_pool, e=0):
    """No slot leaks or is freed twice, holders are counted exactly, nothing in use is gone.

    Returns blocks in use by pool, each shared one counted once.
    """
    pools = state.pool.shape[1]
    in_use = np.zeros(pools, int)
    prefix = state.prefix
    if not isinstance(prefix, PrefixArrays):
        assert prefix == ()
        return in_use
    requests, req = (array[e, : state.env["requests_count"][e]] for array in (state.req, prefix.req))
    if not prefix.env["eviction"][e]:
        assert not req["ids_count"].any()
        assert not prefix.pool["cached"][e].any()
        return in_use
    where = copies(prefix, e)
    holders = held(prefix, e, requests, req, lane_pool)
    assert holders.keys() <= where.keys()  # what is in use is there
    slot = prefix.slot[e]
    for (pool, number), place in where.items():
        assert slot["refs"][pool, place] == holders[pool, number]
        assert slot["uses"][pool, place] >= max(holders[pool, number], 1)
    for pool in range(pools):
        in_use[pool] = blocks_in_use(prefix, e, pool, where, holders)
    return in_use


def copies(prefix, e):
    """(pool, segment) -> its slot: each copy in one slot, at most one a pool and segment, all others free once."""
    segment, slot = prefix.segment[e], prefix.slot[e]
    pools, where = len(slot), {}
    count = int((segment["tokens"] > 0).sum())
    for number in range(count):
        copy = int(segment["first_copy"][number])
        while copy != NOWHERE:
            pool, place = copy % pools, copy // pools
            assert slot["segment"][pool, place] == number
            assert (pool, number) not in where
            where[pool, number] = place
            copy = int(slot["next_copy"][pool, place])
    taken = Counter((pool, place) for (pool, _), place in where.items())
    assert max(taken.values(), default=1) == 1
    for pool in range(pools):
        free, place = [], int(prefix.pool["free_slot"][e, pool])
        while place != NOWHERE:
            free.append(place)
            place = int(slot["next_copy"][pool, place])
        mine = [p for (at, p) in taken if at == pool]
        assert sorted(free + mine) == list(range(len(free) + len(mine)))
    return where


def held(prefix, e, requests, req, lane_pool):
    """(pool, segment) -> how many hold it, from who runs."""
    segment, holders = prefix.segment[e], Counter()
    for r in np.flatnonzero(np.isin(requests["status"], RUNNING)).tolist():
        row = req[r]
        mine = prefix.ids[e, row["ids_first"] : row["ids_first"] + row["held_count"]].tolist()
        holders.update((int(lane_pool[requests["lane"][r]]), number) for number in mine)
        if mine:
            computed = segment["end_tokens"][mine[-1]] - 1 <= requests["prefilled_tokens"][r]
            assert computed or requests["status"][r] != Status.PREFILL
    assert not req["held_count"][~np.isin(requests["status"], RUNNING)].any()
    return holders


def blocks_in_use(prefix, e, pool, where, holders):
    """Blocks that somebody holds; idle ones wait in their heap, and their blocks are counted."""
    idle = [p for (at, number), p in where.items() if at == pool and not holders[at, number]]
    length = int(prefix.idle_len[e, pool])
    heap = prefix.idle[e, pool]
    assert sorted(heap["item"][:length].tolist()) == sorted(idle)
    assert heap["pos"][heap["item"][:length]].tolist() == list(range(length))
    keys = heap["key"][heap["item"][:length]]
    assert all(keys[(i - 1) // 2] <= keys[i] for i in range(1, length))
    blocks = {p: int(prefix.segment["blocks"][e, number]) for (at, number), p in where.items() if at == pool}
    assert prefix.pool["cached"][e, pool] == sum(blocks[p] for p in idle)
    return sum(blocks.values()) - sum(blocks[p] for p in idle)
