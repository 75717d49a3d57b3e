"""A latent's KV decompressed on the PIM side, as other kernels see it: one more lane and pool, spread over all ranks.

Where no model stores a latent, ``t.forms`` has one entry. The functions begin with ``if len(forms) == 1``, which numba
decides by type when it compiles, dropping the other branch: kernels are then compiled as if there were no other form,
and anew on first use for a model with a latent.
"""

from __future__ import annotations

import numpy as np

from l3env.jit import helper, inner
from l3env.machine.arrays import FIRST_PIM, HBM
from l3env.machine.price import decompressed_attention_s


@inner
def stored_lanes(forms, coef):
    """Lanes of KV as the model stores it, HBM's included: all but the one of decompressed KV."""
    if len(forms) == 1:
        return coef["lanes_count"]
    return coef["decompressed_lane"] if coef["decompressed_lane"] > 0 else coef["lanes_count"]


@inner
def stored_pools(forms, coef):
    """Pools of KV as the model stores it, HBM's included."""
    if len(forms) == 1:
        return coef["pools_count"]
    return coef["decompressed_pool"] if coef["decompressed_pool"] > 0 else coef["pools_count"]


@inner
def room(forms, coef, blocks, pools, pool):
    """Blocks that a pool may hold: its capacity, less what KV of another form takes of the same memory.

    ``blocks`` and ``pools`` are (P,): capacities, and what is held.
    """
    if len(forms) == 1:
        return blocks[pool]
    return shared_room(coef, blocks, pools, pool)


@helper
def shared_room(coef, blocks, pools, pool):
    """``room`` where both forms share the ranks: decompressed KV takes the same share of all other PIM pools."""
    own, share = coef["decompressed_pool"], coef["decompressed_share"]
    if pool == HBM or own == 0:
        return blocks[pool]
    if pool != own:
        return blocks[pool] - np.int64(np.ceil(pools[own]["used"] * share))
    capacity = blocks[own]
    for other in range(FIRST_PIM, own):
        capacity = min(capacity, np.int64((blocks[other] - pools[other]["used"]) / share))
    return capacity


@inner
def pim_blocks_used(forms, coef, pools):
    """Blocks held on the PIM side, in blocks of KV as stored."""
    used = np.int64(0)
    for pool in range(FIRST_PIM, stored_pools(forms, coef)):
        used += pools[pool]["used"]
    return used + np.int64(pools[coef["decompressed_pool"]]["used"] * decompressed_scale(forms, coef))


@inner
def decompressed_scale(forms, coef):
    """Blocks of KV as stored that a block of decompressed KV takes, over all pools; 0 where there is none."""
    if len(forms) == 1:
        return 0.0
    return coef["decompressed_share"] * (coef["decompressed_pool"] - 1)  # the share is 0 without


@inner
def decompressed_load(forms, t, table, lanes, queries):
    """KV tokens of a sub-batch ((L,) lanes) that lie decompressed, the next step's included, and their attention."""
    if len(forms) == 1:
        return 0.0, 0.0
    lane = t.coef[table]["decompressed_lane"]
    if lane == HBM:
        return 0.0, 0.0
    kv = lanes[lane]["kv"] + queries * lanes[lane]["count"]
    return kv, decompressed_attention_s(t, table, kv, queries)


@inner
def stored_tokens(forms, coef, lane, tokens):
    """KV of so many tokens in a lane, in tokens of KV as stored."""
    if len(forms) == 1:
        return float(tokens)
    if lane > 0 and lane == coef["decompressed_lane"]:
        return tokens * coef["decompressed_token_ratio"]
    return float(tokens)


@inner
def stored_requests(forms, coef, lanes, count):
    """Decoding requests on the PIM side, in requests that move what they would with KV as stored."""
    if len(forms) == 1:
        return count
    lane = coef["decompressed_lane"]
    return count + (coef["decompressed_request_ratio"] - 1.0) * lanes[lane]["count"] if lane > 0 else count


@inner
def pim_lanes(forms, coef, decompressed):
    """First PIM lane of a form of KV, and the one after its last."""
    if len(forms) == 1:
        return np.int64(1), np.int64(coef["lanes_count"])
    lane = coef["decompressed_lane"]
    if lane == HBM:
        return np.int64(1), np.int64(coef["lanes_count"])
    return (lane, lane + 1) if decompressed else (np.int64(1), np.int64(lane))
