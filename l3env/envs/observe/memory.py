"""KV memory: what is held, what will be, how evenly."""

from __future__ import annotations

import numpy as np

from l3env.engine.kernels.memory import decoding_count, growth_blocks
from l3env.envs.observe.feature import Feature, scales_of, share, squash
from l3env.jit import helper, inner
from l3env.machine.arrays import FIRST_PIM, HBM
from l3env.machine.forms import decompressed_scale, pim_blocks_used, stored_lanes, stored_pools


class Memory(Feature):
    """KV memory."""

    kv_hbm_share = "share of the HBM pool that is held"
    kv_pim_share = "share of the PIM pools that is held"
    kv_pim_fullest_share = "share held of the fullest PIM pool"
    hbm_steps_to_full = (
        "decode steps until the HBM pool is full at the present growth, scale {scale}; 1 without growth",
        256.0,
    )
    pim_steps_to_full = "the same of the PIM pools, scale {scale}", 256.0
    next_growth = "blocks that the next decode step takes over free blocks, scale 1"
    promised = "predicted blocks of all residents at their ends over all blocks, scale 1"
    lane_imbalance = "slowest PIM lane over the mean lane, minus 1, scale 1"


SCALE = scales_of(Memory)


@inner
def with_decompressed(forms, t, s, e, used):
    """Blocks used, promised and to grow of decompressed KV, which takes blocks of all PIM pools; the first added to
    ``used``."""
    if len(forms) == 1:
        return used, 0, 0
    coef = t.coef[s.env[e]["table_idx"]]
    pool, scale = coef["decompressed_pool"], decompressed_scale(forms, coef)
    promised, growth = scale * s.pool[e, pool]["promised"], scale * growth_blocks(t, s, e, pool)
    return pim_blocks_used(forms, coef, s.pool[e]), np.int64(promised), np.int64(growth)


@helper
def write_memory(t, s, e, mark, row):
    table = s.env[e]["table_idx"]
    block = t.coef[table]["block_tokens"]
    used, blocks, promised, growth, fullest = 0, 0, 0, 0, 0.0
    for pool in range(FIRST_PIM, stored_pools(t.forms, t.coef[table])):
        used += s.pool[e, pool]["used"]
        blocks += t.pool_blocks[table, pool]
        promised += s.pool[e, pool]["promised"]
        growth += growth_blocks(t, s, e, pool)
        fullest = max(fullest, share(float(s.pool[e, pool]["used"]), float(t.pool_blocks[table, pool])))
    used, more_promised, more_growth = with_decompressed(t.forms, t, s, e, used)
    promised, growth = promised + more_promised, growth + more_growth
    fullest = max(fullest, share(float(used), float(blocks)))
    hbm_used, hbm_blocks = s.pool[e, HBM]["used"], t.pool_blocks[table, HBM]
    free = blocks + hbm_blocks - used - hbm_used
    mark["free_tokens"] = float(free * block) + 1.0
    hbm_count = s.lane[e, 0, 0]["count"] + s.lane[e, 1, 0]["count"]
    pim_count = decoding_count(s, e, 0) + decoding_count(s, e, 1) - hbm_count
    row[Memory.kv_hbm_share] = share(float(hbm_used), float(hbm_blocks))
    row[Memory.kv_pim_share] = share(float(used), float(blocks))
    row[Memory.kv_pim_fullest_share] = fullest
    hbm_free, pim_free = float((hbm_blocks - hbm_used) * block), float((blocks - used) * block)
    row[Memory.hbm_steps_to_full] = squash(hbm_free, SCALE.hbm_steps_to_full * hbm_count) if hbm_count > 0 else 1.0
    row[Memory.pim_steps_to_full] = squash(pim_free, SCALE.pim_steps_to_full * pim_count) if pim_count > 0 else 1.0
    row[Memory.next_growth] = squash(float(growth + growth_blocks(t, s, e, 0)), float(free) + 1.0)
    row[Memory.promised] = squash(float(promised + s.pool[e, HBM]["promised"]), float(blocks + hbm_blocks))
    slowest, total, lanes = 0.0, 0.0, stored_lanes(t.forms, t.coef[table])
    for lane in range(FIRST_PIM, lanes):
        load = s.lane[e, 0, lane]["kv"] + s.lane[e, 1, lane]["kv"]
        slowest = max(slowest, load)
        total += load
    row[Memory.lane_imbalance] = squash(slowest * (lanes - 1) / total - 1.0, 1.0) if total > 0 else 0.0
