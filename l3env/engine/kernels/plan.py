"""Applies a policy's own plan: checked operation by operation, then one iteration."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from l3env.choices import Eviction, Status, SubBatching, Victim
from l3env.engine.kernels.drafts import set_drafting
from l3env.engine.kernels.iteration import execute
from l3env.engine.kernels.memory import (
    admit,
    decoding_count,
    give_growth_back,
    lane_load,
    make_room_to_grow,
    move,
    pause,
    preempt,
    resume,
    take_chunks,
)
from l3env.engine.kernels.prefix import ask_pools, blocks_of, change_eviction, offered_blocks, offered_tokens
from l3env.engine.kernels.run import Stop, ready, skip_idle
from l3env.engine.kernels.schedule import lighter_sub
from l3env.engine.state import NOWHERE, SUB_BATCHES
from l3env.jit import helper, kernel
from l3env.machine.arrays import FIRST_PIM, HBM
from l3env.machine.forms import room, stored_lanes

AUTO = -1  # sub-batch or place left to the engine
ANY_PIM = -2  # any PIM pool, KV as the model stores it
DECOMPRESSED = -3  # the PIM side, a latent as plain keys and values


class Op(IntEnum):
    """Operations of a plan, applied in this order."""

    PREEMPT = 0
    PAUSE = 1
    MOVE = 2  # a = sub-batch
    RESUME = 3  # a = sub-batch
    ADMIT = 4  # a = pool or AUTO or ANY_PIM or DECOMPRESSED, b = sub-batch
    PREFILL = 5  # a = tokens


class Fault(IntEnum):
    """What can be wrong with a plan."""

    NONE = 0
    UNKNOWN_REQUEST = 1
    NOT_RUNNING = 2
    NOT_DECODING = 3
    NOT_PAUSED = 4
    NOT_WAITING = 5
    NOT_PREFILLING = 6
    BAD_SUB_BATCH = 7
    BAD_POOL = 8
    NO_ROOM = 9
    TOO_MANY_TOKENS = 10


@helper
def pick_lane(t, s, e, r, pool, sub, interleaved):
    """The least loaded lane of the wanted pool (or of any, by AUTO / ANY_PIM) with room for the prompt, or -1."""
    table = s.env[e]["table_idx"]
    ask_pools(s.prefix, e, r)
    target, block = np.int64(s.req[e, r]["target_tokens"]), t.coef[table]["block_tokens"]
    whole = blocks_of(s.prefix, e, r, target, block)
    best, least = NOWHERE, np.inf
    own = t.coef[table]["decompressed_lane"]
    first = FIRST_PIM if pool == ANY_PIM or (pool == AUTO and t.coef[table]["has_pim"]) else HBM
    end = np.int64(stored_lanes(t.forms, t.coef[table]))
    if pool == DECOMPRESSED or (own > 0 and pool == t.coef[table]["decompressed_pool"]):
        first, end = own, own + 1
    for lane in range(first, end):
        of = t.lane_pool[table, lane]
        need = whole - offered_blocks(s.prefix, e, of)
        capacity = room(t.forms, t.coef[table], t.pool_blocks[table], s.pool[e], of)
        if (pool < 0 or of == pool) and s.pool[e, of]["used"] + need <= capacity:
            load = lane_load(s, e, sub, lane, interleaved) - offered_tokens(s.prefix, e, of)
            if load < least:
                best, least = lane, load
    if best == NOWHERE and pool == AUTO and first == FIRST_PIM:
        if s.pool[e, HBM]["used"] + whole - offered_blocks(s.prefix, e, HBM) <= t.pool_blocks[table, HBM]:
            return HBM
    return best


@helper
def apply_op(t, s, e, op, r, a, b, interleaved, admitted_before):
    """One operation; returns a Fault. ``admitted_before``: admissions until this plan.

    What is found cached of those that it admits it cannot know yet, so their chunks may be as long as the whole prompt.
    """
    env, req = s.env[e], s.req
    if r < 0 or r >= env["requests_count"]:
        return Fault.UNKNOWN_REQUEST
    status = req[e, r]["status"]
    sub = a if op == Op.MOVE or op == Op.RESUME else b
    if sub < AUTO or sub >= SUB_BATCHES:
        return Fault.BAD_SUB_BATCH
    if sub == AUTO:
        sub = lighter_sub(s, e) if op == Op.ADMIT else np.int64(req[e, r]["sub"])
    running = status == Status.PREFILL or status == Status.DECODE or status == Status.PAUSED
    if op == Op.PREEMPT:
        if not running:
            return Fault.NOT_RUNNING
        preempt(t, s, e, r)
    elif op == Op.PAUSE:
        if status != Status.DECODE:
            return Fault.NOT_DECODING
        pause(t, s, e, r)
    elif op == Op.MOVE:
        if not running:
            return Fault.NOT_RUNNING
        if sub != req[e, r]["sub"]:
            move(t, s, e, r, sub)
    elif op == Op.RESUME:
        if status != Status.PAUSED:
            return Fault.NOT_PAUSED
        if sub != req[e, r]["sub"]:
            move(t, s, e, r, sub)
        resume(t, s, e, r, sub)
    elif op == Op.ADMIT:
        if status != Status.WAITING:
            return Fault.NOT_WAITING
        if a < DECOMPRESSED or a >= t.coef[env["table_idx"]]["pools_count"]:
            return Fault.BAD_POOL
        if a == DECOMPRESSED and t.coef[env["table_idx"]]["decompressed_lane"] == 0:
            return Fault.BAD_POOL
        lane = pick_lane(t, s, e, r, a, sub, interleaved)
        if lane == NOWHERE:
            return Fault.NO_ROOM
        admit(t, s, e, r, lane, sub)
    else:
        if status != Status.PREFILL:
            return Fault.NOT_PREFILLING
        left = req[e, r]["target_tokens"] - req[e, r]["prefilled_tokens"]
        most = req[e, r]["target_tokens"] if req[e, r]["admitted_seq"] > admitted_before else left
        if a < 0 or a > most:
            return Fault.TOO_MANY_TOKENS
        req[e, r]["chunk_tokens"] = min(a, left)
    return Fault.NONE


@kernel
def step_plan(t, s, e, ops, prefill_all, decode_wanted, interleaved, multi_token):
    """Applies a plan's operations ((M, 4): op, request, a, b, sorted by op) and runs one iteration.

    Decoding requests go on unless ``decode_wanted`` is false. Growth takes its blocks before admissions; where it does
    not fit, the newest are preempted. ``prefill_all`` gives every prefilling request its whole rest.

    Returns a Fault; ``env["bad_request_idx"]`` names the request; operations before the faulty one stand, no time
    passes. ``env["stop"]`` is set as by ``run``.
    """
    env, req = s.env[e], s.req
    before, admitted_before = env["preemptions_count"], env["admitted_seq"]
    for i in range(env["prefill_count"]):
        req[e, s.lists[e, i]["prefill"]]["chunk_tokens"] = 0
    set_drafting(s.lane_class, t, env, multi_token)
    change_eviction(s.prefix, e, np.int64(Eviction.OFF))
    grown = not decode_wanted
    for i in range(ops.shape[0]):
        if ops[i, 0] >= Op.ADMIT and not grown:
            make_room_to_grow(t, s, e, Victim.NEWEST_ADMITTED)
            grown = True
        fault = apply_op(t, s, e, ops[i, 0], ops[i, 1], ops[i, 2], ops[i, 3], interleaved, admitted_before)
        if fault != Fault.NONE:
            env["bad_request_idx"] = ops[i, 1]
            if grown and decode_wanted:
                give_growth_back(t, s, e)
            return fault
    if not grown:
        make_room_to_grow(t, s, e, Victim.NEWEST_ADMITTED)
    planned = 0
    for i in range(env["prefill_count"]):
        r = s.lists[e, i]["prefill"]
        if prefill_all:
            req[e, r]["chunk_tokens"] = req[e, r]["target_tokens"] - req[e, r]["prefilled_tokens"]
        planned += req[e, r]["chunk_tokens"]
    if env["by_chunk"]:
        planned = take_chunks(t, s, e, Victim.NEWEST_ADMITTED, decode_wanted)
    decode = decode_wanted and decoding_count(s, e, 0) + decoding_count(s, e, 1) > 0
    env["stop"] = Stop.RUNNING
    if decode or planned > 0:
        mode = np.int64(SubBatching.ON if interleaved and t.coef[env["table_idx"]]["has_pim"] else SubBatching.OFF)
        execute(t, s, e, decode, mode)
    elif env["preemptions_count"] == before and not skip_idle(t, s, e):  # who was preempted may be admitted at once
        return Fault.NONE
    ready(t, s, e)
    return Fault.NONE


@kernel
def await_work(t, s, first, last):
    """Lets arrivals in and jumps over idle time, so that a policy always sees something to decide on."""
    for e in range(first, last):
        ready(t, s, e)
