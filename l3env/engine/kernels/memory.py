"""KV accounting: which blocks a request holds from admission to its end, and what it adds to its lane's load.

Blocks for the whole prompt are taken at admission, or chunk by chunk once all of it would fit, as the engine's rules
are; a decoding request takes one more whenever its KV fills the last.
KV of a request that emitted its first token from a prompt of P tokens is P; each token that a decode step emits adds
one (a guess that did not hold leaves none).
"""

from __future__ import annotations

import numpy as np

from l3env.choices import SloForm, Status, Victim
from l3env.engine.kernels.drafts import class_of, classes_count, count_class, drop_surplus, second_tokens
from l3env.engine.kernels.heap import push, remove
from l3env.engine.kernels.prefix import (
    blocks_of,
    cached_blocks,
    evict_to_fit,
    hold_prefix,
    release_prefix,
    segment_tokens,
    shares,
)
from l3env.engine.kernels.queue import dequeue, enqueue, note_end, release_children, running_mean
from l3env.engine.kernels.slo import is_met, note_join, note_leave
from l3env.engine.state import FINISH_HEAP, FINISHED_WEIGHT, NOWHERE, SUB_BATCHES
from l3env.jit import helper, inner
from l3env.machine.forms import room


@inner
def decoding_count(s, e, sub):
    return s.sub[e, sub]["decoding"]


@inner
def clock_of(s, e, r):
    """The decode clock that a request goes by."""
    return s.group[e, s.req[e, r]["sub"], class_of(s.lane_class, s.req[e, r])]["clock"]


@inner
def kv_now(s, e, r):
    """KV tokens of a request that holds KV: for prefilling ones what was prefilled, for others what they grew to."""
    req = s.req
    if req[e, r]["status"] == Status.DECODE:
        return req[e, r]["kv_tokens"] + (clock_of(s, e, r) - req[e, r]["joined_clock"])
    if req[e, r]["status"] == Status.PREFILL:
        return np.int64(req[e, r]["prefilled_tokens"])
    return np.int64(req[e, r]["kv_tokens"])


@inner
def emitted_now(s, e, r):
    """Output tokens so far."""
    req = s.req
    if req[e, r]["status"] == Status.DECODE:
        return req[e, r]["emitted_tokens"] + (clock_of(s, e, r) - req[e, r]["joined_clock"])
    return np.int64(req[e, r]["emitted_tokens"])


@inner
def held_blocks(t, s, e, r):
    """Blocks a running request holds, shared ones too; growth of the present step only once its clock has moved."""
    block = t.coef[s.env[e]["table_idx"]]["block_tokens"]
    if s.req[e, r]["status"] == Status.PREFILL:
        return blocks_of(s.prefix, e, r, np.int64(s.req[e, r]["held_tokens"]), block)
    return blocks_of(s.prefix, e, r, kv_now(s, e, r), block)


@inner
def pool_of(t, s, e, r):
    return t.lane_pool[s.env[e]["table_idx"], s.req[e, r]["lane"]]


@inner
def lane_load(s, e, sub, lane, interleaved):
    """KV tokens that compete in a lane: of one sub-batch, or of both where they run as one batch."""
    mine = s.lane[e, sub, lane]["kv"] + s.lane[e, sub, lane]["pending"]
    if interleaved:
        return mine
    return mine + s.lane[e, 1 - sub, lane]["kv"] + s.lane[e, 1 - sub, lane]["pending"]


@helper
def admit(t, s, e, r, lane, sub):
    """Takes a request from the queue and gives it a lane and the blocks of its prompt. The caller checked the room."""
    req, env = s.req, s.env[e]
    table = env["table_idx"]
    block = t.coef[table]["block_tokens"]
    dequeue(s, e, r)
    pool = t.lane_pool[table, lane]
    target = np.int64(req[e, r]["target_tokens"])
    left = max(req[e, r]["predicted_tokens"] - req[e, r]["emitted_tokens"], 1)
    promised = blocks_of(s.prefix, e, r, target + left - 1, block)
    req[e, r]["promised_blocks"] = promised
    req[e, r]["prefilled_tokens"] = 0
    held = np.int64(0) if env["by_chunk"] and not shares(s.prefix) else target
    req[e, r]["held_tokens"] = held
    s.pool[e, pool]["used"] += blocks_of(s.prefix, e, r, held, block)
    hold_prefix(s.prefix, req, s.pool, e, r, pool, t.pool_blocks[table, pool])
    s.pool[e, pool]["peak"] = max(s.pool[e, pool]["peak"], s.pool[e, pool]["used"])
    s.pool[e, pool]["promised"] += promised
    s.lane[e, sub, lane]["pending"] += target
    req[e, r]["status"] = Status.PREFILL
    req[e, r]["lane"] = lane
    req[e, r]["sub"] = sub
    req[e, r]["chunk_tokens"] = 0
    env["admitted_seq"] += 1
    req[e, r]["admitted_seq"] = env["admitted_seq"]
    env["admitted_count"] += 1
    env["prefill_left_tokens"] += target - req[e, r]["prefilled_tokens"]
    s.sub[e, sub]["members"] += 1
    req[e, r]["running_pos"] = env["running_count"]
    s.lists[e, env["running_count"]]["running"] = r
    env["running_count"] += 1
    s.lists[e, env["prefill_count"]]["prefill"] = r
    env["prefill_count"] += 1


@inner
def chunk_blocks(t, s, e, r):
    """Blocks that a prompt's planned chunk takes."""
    block = t.coef[s.env[e]["table_idx"]]["block_tokens"]
    tokens = np.int64(s.req[e, r]["prefilled_tokens"]) + s.req[e, r]["chunk_tokens"]
    if tokens <= s.req[e, r]["held_tokens"]:
        return np.int64(0)
    return blocks_of(s.prefix, e, r, tokens, block) - held_blocks(t, s, e, r)


@inner
def hold_chunk(s, e, r):
    """Notes that the blocks of a prompt's planned chunk are taken."""
    req = s.req[e, r]
    req["held_tokens"] = max(req["held_tokens"], req["prefilled_tokens"] + req["chunk_tokens"])


@inner
def overruns(t, s, e, pool, need):
    """Would a pool run over with so many blocks more?"""
    table = s.env[e]["table_idx"]
    return s.pool[e, pool]["used"] + need > room(t.forms, t.coef[table], t.pool_blocks[table], s.pool[e], pool)


@inner
def take_blocks(t, s, e, pool, need):
    """Takes blocks of a pool that has them; cached ones give way."""
    if need > 0:
        s.pool[e, pool]["used"] += need
        s.pool[e, pool]["peak"] = max(s.pool[e, pool]["peak"], s.pool[e, pool]["used"])
        evict_to_fit(s.prefix, s.pool, e, pool, t.pool_blocks[s.env[e]["table_idx"], pool])


@helper
def take_growth(t, s, e, pool):
    """Blocks of a pool for a decode step and the planned chunks of its prompts under way, if it has them all."""
    need = growth_blocks(t, s, e, pool)
    for i in range(s.env[e]["prefill_count"]):
        r = s.lists[e, i]["prefill"]
        if pool_of(t, s, e, r) == pool:
            need += chunk_blocks(t, s, e, r)
    if overruns(t, s, e, pool, need):
        return False
    take_blocks(t, s, e, pool, need)
    for i in range(s.env[e]["prefill_count"]):
        r = s.lists[e, i]["prefill"]
        if pool_of(t, s, e, r) == pool:
            hold_chunk(s, e, r)
    return True


@helper
def take_chunk(t, s, e, r, rule, grown):
    """Takes the blocks of a prompt's planned chunk; where there are none, requests are preempted, maybe this one.

    ``grown``: decoding requests hold the block of the coming step.
    """
    pool, need = pool_of(t, s, e, r), chunk_blocks(t, s, e, r)
    while overruns(t, s, e, pool, need):
        before = growth_blocks(t, s, e, pool) if grown else 0
        victim = preempt_from(t, s, e, pool, rule)
        s.pool[e, pool]["used"] -= before - growth_blocks(t, s, e, pool) if grown else 0
        if victim == r:
            return
    take_blocks(t, s, e, pool, need)
    hold_chunk(s, e, r)


@helper
def take_chunks(t, s, e, rule, grown):
    """``take_chunk`` for all that are planned, in order of admission; returns their tokens."""
    i, planned = 0, 0
    while i < s.env[e]["prefill_count"]:
        r = np.int64(s.lists[e, i]["prefill"])
        take_chunk(t, s, e, r, rule, grown)
        i = min(i + 1, s.env[e]["prefill_count"])  # who was preempted may have stood before it, or be itself
        while i > 0 and s.req[e, s.lists[e, i - 1]["prefill"]]["admitted_seq"] > s.req[e, r]["admitted_seq"]:
            i -= 1
    for place in range(s.env[e]["prefill_count"]):
        planned += s.req[e, s.lists[e, place]["prefill"]]["chunk_tokens"]
    return planned


@helper
def keep_until_seen(s, e, r, pool, blocks):
    """Who schedules ahead learns of a finish one iteration later: until then its blocks and its place are taken."""
    s.pool[e, pool]["used"] += blocks
    s.pool[e, pool]["leaving"] += blocks
    s.req[e, r]["held_tokens"] = blocks
    s.lists[e, s.env[e]["leaving_count"]]["leaving"] = r
    s.env[e]["leaving_count"] += 1


@helper
def leave_now(t, s, e, pool, victim):
    """One that has finished unseen is preempted where it came in after the victim; True where there was one."""
    env = s.env[e]
    chosen, newest = NOWHERE, np.int64(-1)
    if victim != NOWHERE:
        newest = s.req[e, victim]["admitted_seq"]
    for i in range(env["leaving_count"]):
        r = s.lists[e, i]["leaving"]
        if pool_of(t, s, e, r) == pool and s.req[e, r]["admitted_seq"] > newest:
            chosen, newest = i, s.req[e, r]["admitted_seq"]
    if chosen == NOWHERE:
        return False
    blocks = s.req[e, s.lists[e, chosen]["leaving"]]["held_tokens"]
    s.pool[e, pool]["used"] -= blocks
    s.pool[e, pool]["leaving"] -= blocks
    env["leaving_count"] -= 1
    s.lists[e, chosen]["leaving"] = s.lists[e, env["leaving_count"]]["leaving"]
    env["preemptions_count"] += 1
    return True


@helper
def preempt_from(t, s, e, pool, rule):
    """Preempts whom the rule says; returns who, -1 for one that had finished unseen."""
    victim = choose_victim(t, s, e, pool, rule)
    if s.env[e]["leaving_count"] > 0 and rule == Victim.NEWEST_ADMITTED and leave_now(t, s, e, pool, victim):
        return NOWHERE
    preempt(t, s, e, victim)
    return victim


@helper
def catch_up(s, e):
    """All that has happened by now is known."""
    s.env[e]["seen_s"] = s.env[e]["clock_s"]
    let_go(s, e)


@helper
def let_go(s, e):
    """Those who were seen to have finished give up their blocks and places."""
    env = s.env[e]
    if env["leaving_count"] > 0:
        env["leaving_count"] = 0
        for pool in range(s.pool.shape[1]):
            s.pool[e, pool]["used"] -= s.pool[e, pool]["leaving"]
            s.pool[e, pool]["leaving"] = 0


@inner
def count_decoding(s, e, sub, r, sign):
    """Adds a request that joins to its group's sums, or takes out one that leaves (before it is written down)."""
    req, draft = s.req[e, r], class_of(s.lane_class, s.req[e, r])
    group = s.group[e, sub, draft]
    joined = req["joined_clock"]
    age, kv = req["emitted_tokens"] - joined, req["kv_tokens"] - joined
    group["age_sum"] += sign * age
    group["age_sum2"] += sign * age * age
    group["kv_sum"] += sign * kv
    group["kv_sum2"] += sign * kv * kv
    group["predicted_sum"] += sign * req["predicted_tokens"]
    if req["first_token_s"] > req["arrival_s"] + req["ttft_slo_s"]:
        group["late_count"] += sign
    group["tbt_slo_s"] += sign * req["tbt_slo_s"]
    group["due_s"] += sign * (req["first_token_s"] + req["tbt_slo_s"] * age)
    if s.heap_len[e, FINISH_HEAP + sub + SUB_BATCHES * draft] == 0:  # no rounding is carried on
        group["tbt_slo_s"], group["due_s"] = 0.0, 0.0


@helper
def join_decode(t, s, e, r, sub):
    """A request with its KV in place starts (or goes on) decoding in a sub-batch."""
    req, env = s.req, s.env[e]
    table = env["table_idx"]
    block = t.coef[table]["block_tokens"]
    lane = req[e, r]["lane"]
    kv = np.int64(req[e, r]["kv_tokens"])
    draft = class_of(s.lane_class, req[e, r])
    now = s.group[e, sub, draft]["clock"]
    req[e, r]["status"] = Status.DECODE
    req[e, r]["sub"] = sub
    req[e, r]["joined_clock"] = now
    s.lane[e, sub, lane]["count"] += 1
    s.lane[e, sub, lane]["kv"] += kv
    count_class(s.lane_class, e, sub, lane, draft, 1)
    s.sub[e, sub]["decoding"] += 1
    s.phase[e, sub, t.lane_pool[table, lane], draft, (now - kv + segment_tokens(s.prefix, e, r)) % block] += 1
    tokens_left = s.truth[e, r] - req[e, r]["emitted_tokens"]
    heap = FINISH_HEAP + sub + SUB_BATCHES * draft
    push(s.heap[e, heap], s.heap_len[e], heap, r, float(now + tokens_left))
    count_decoding(s, e, sub, r, 1)
    if not req[e, r]["joining"]:
        req[e, r]["joining"] = 1
        s.lists[e, env["joining_count"]]["joining"] = r
        env["joining_count"] += 1
    if env["slo_form"] != SloForm.MEAN_TBT:
        note_join(s, e, r)


@helper
def leave_decode(t, s, e, r):
    """A decoding request stops: what followed from the clock is written down. It keeps its blocks."""
    req = s.req
    table = s.env[e]["table_idx"]
    block = t.coef[table]["block_tokens"]
    lane, sub = req[e, r]["lane"], req[e, r]["sub"]
    if s.env[e]["slo_form"] != SloForm.MEAN_TBT:
        note_leave(s, e, r)
    kv, emitted = kv_now(s, e, r), emitted_now(s, e, r)
    joined, draft = req[e, r]["joined_clock"], class_of(s.lane_class, req[e, r])
    own = req[e, r]["kv_tokens"] - segment_tokens(s.prefix, e, r)
    s.phase[e, sub, t.lane_pool[table, lane], draft, (joined - own) % block] -= 1
    s.lane[e, sub, lane]["count"] -= 1
    s.lane[e, sub, lane]["kv"] -= kv
    count_class(s.lane_class, e, sub, lane, draft, -1)
    s.sub[e, sub]["decoding"] -= 1
    heap = FINISH_HEAP + sub + SUB_BATCHES * draft
    remove(s.heap[e, heap], s.heap_len[e], heap, r)
    count_decoding(s, e, sub, r, -1)
    if s.group[e, sub, draft]["clock"] > joined:
        req[e, r]["last_token_s"] = s.sub[e, sub]["last_step_s"]
    req[e, r]["kv_tokens"] = kv
    req[e, r]["emitted_tokens"] = emitted
    req[e, r]["joined_clock"] = s.group[e, sub, draft]["clock"]


@helper
def release(t, s, e, r):
    """A running request gives its blocks back and leaves the running list. The caller says what it is from here on."""
    req, env = s.req, s.env[e]
    lane, status = req[e, r]["lane"], req[e, r]["status"]
    pool = pool_of(t, s, e, r)
    s.pool[e, pool]["used"] -= held_blocks(t, s, e, r)
    release_prefix(s.prefix, s.pool, e, r, pool)
    s.pool[e, pool]["promised"] -= req[e, r]["promised_blocks"]
    if status == Status.DECODE:
        leave_decode(t, s, e, r)
    elif status == Status.PREFILL:
        s.lane[e, req[e, r]["sub"], lane]["pending"] -= req[e, r]["target_tokens"]
        env["prefill_left_tokens"] -= req[e, r]["target_tokens"] - req[e, r]["prefilled_tokens"]
        leave_prefill(s, e, r)
    else:
        s.lane[e, req[e, r]["sub"], lane]["pending"] -= req[e, r]["kv_tokens"]
    s.sub[e, req[e, r]["sub"]]["members"] -= 1
    last = s.lists[e, env["running_count"] - 1]["running"]
    s.lists[e, req[e, r]["running_pos"]]["running"] = last
    req[e, last]["running_pos"] = req[e, r]["running_pos"]
    env["running_count"] -= 1


@helper
def leave_prefill(s, e, r):
    """Takes a request out of the list of prefilling ones, their order kept."""
    env = s.env[e]
    count = env["prefill_count"]
    place = 0
    while s.lists[e, place]["prefill"] != r:
        place += 1
    for i in range(place, count - 1):
        s.lists[e, i]["prefill"] = s.lists[e, i + 1]["prefill"]
    env["prefill_count"] = count - 1
    s.req[e, r]["chunk_tokens"] = 0


@helper
def pause(t, s, e, r):
    """A decoding request keeps its KV and stops decoding."""
    leave_decode(t, s, e, r)
    s.req[e, r]["status"] = Status.PAUSED
    s.lane[e, s.req[e, r]["sub"], s.req[e, r]["lane"]]["pending"] += s.req[e, r]["kv_tokens"]


@helper
def resume(t, s, e, r, sub):
    """A paused request decodes again."""
    s.lane[e, s.req[e, r]["sub"], s.req[e, r]["lane"]]["pending"] -= s.req[e, r]["kv_tokens"]
    join_decode(t, s, e, r, sub)


@helper
def move(t, s, e, r, sub):
    """A running request changes to another sub-batch; nothing moves in memory."""
    req = s.req
    old, lane = req[e, r]["sub"], req[e, r]["lane"]
    s.sub[e, old]["members"] -= 1
    s.sub[e, sub]["members"] += 1
    if req[e, r]["status"] == Status.DECODE:
        leave_decode(t, s, e, r)
        join_decode(t, s, e, r, sub)
        return
    pending = req[e, r]["target_tokens"] if req[e, r]["status"] == Status.PREFILL else req[e, r]["kv_tokens"]
    s.lane[e, old, lane]["pending"] -= pending
    s.lane[e, sub, lane]["pending"] += pending
    req[e, r]["sub"] = sub


@helper
def preempt(t, s, e, r):
    """Preemption by recompute: all KV is dropped; the request waits again, prompt and emitted tokens to prefill."""
    req, env = s.req, s.env[e]
    release(t, s, e, r)
    req[e, r]["target_tokens"] = req[e, r]["prompt_tokens"] + req[e, r]["emitted_tokens"]
    req[e, r]["prefilled_tokens"] = 0
    req[e, r]["kv_tokens"] = 0
    req[e, r]["preemptions_count"] += 1
    env["preemptions_count"] += 1
    enqueue(s, e, r)


@helper
def finish(t, s, e, r):
    """A request has emitted its last token."""
    req, env = s.req, s.env[e]
    pool = pool_of(t, s, e, r)
    held = s.pool[e, pool]["used"] + cached_blocks(s.prefix, e, pool)
    release(t, s, e, r)
    if env["ahead"]:
        keep_until_seen(s, e, r, pool, held - s.pool[e, pool]["used"] - cached_blocks(s.prefix, e, pool))
    now_s = env["clock_s"]
    drop_surplus(s.lane_class, s, e, r)
    req[e, r]["status"] = Status.FINISHED
    req[e, r]["finish_s"] = now_s
    req[e, r]["last_token_s"] = now_s
    req[e, r]["emitted_tokens"] = s.truth[e, r]
    env["finished_count"] += 1
    if is_met(s, e, r):
        req[e, r]["slo_met"] = 1
        env["slo_met_count"] += 1
    note_end(s, e, float(req[e, r]["slo_met"]))
    env["output_mean_tokens"] = running_mean(
        env["output_mean_tokens"], float(s.truth[e, r]), env["finished_count"], FINISHED_WEIGHT
    )
    release_children(s, e, r)


@inner
def growth_blocks(t, s, e, pool):
    """Blocks that one decode step of both sub-batches takes from a pool."""
    block = t.coef[s.env[e]["table_idx"]]["block_tokens"]
    need = np.int64(0)
    for draft in range(classes_count(s.lane_class)):
        for sub in range(SUB_BATCHES):
            now = s.group[e, sub, draft]["clock"]
            second = second_tokens(s.lane_class, s.env[e], s.sub[e, sub]["drafts"], draft)
            need += s.phase[e, sub, pool, draft, now % block] + second * s.phase[e, sub, pool, draft, (now + 1) % block]
    return need


@helper
def choose_victim(t, s, e, pool, rule):
    """Who is preempted from a pool: its residents compared by ``rule``; prefilling and paused ones count as well."""
    req = s.req
    chosen, worst = NOWHERE, -np.inf
    for i in range(s.env[e]["running_count"]):
        r = s.lists[e, i]["running"]
        if pool_of(t, s, e, r) != pool:
            continue
        badness = float(req[e, r]["admitted_seq"])
        if rule == Victim.MOST_PREDICTED_LEFT:
            badness = float(req[e, r]["predicted_tokens"] - emitted_now(s, e, r))
        elif rule == Victim.LATEST_DEADLINE:
            badness = req[e, r]["arrival_s"] + req[e, r]["ttft_slo_s"]
        elif rule == Victim.LOWEST_SCORE:
            badness = -req[e, r]["score"]
        if badness > worst:
            chosen, worst = r, badness
    return chosen


@inner
def make_room_to_grow(t, s, e, rule):
    """Preempts until every pool holds one decode step of growth; then takes the blocks."""
    for pool in range(t.coef[s.env[e]["table_idx"]]["pools_count"]):
        need = growth_blocks(t, s, e, pool)
        while overruns(t, s, e, pool, need):
            preempt_from(t, s, e, pool, rule)
            need = growth_blocks(t, s, e, pool)
        take_blocks(t, s, e, pool, need)


@helper
def give_growth_back(t, s, e):
    """Returns the blocks that ``make_room_to_grow`` took, where the decode step does not follow after all."""
    for pool in range(t.coef[s.env[e]["table_idx"]]["pools_count"]):
        s.pool[e, pool]["used"] -= growth_blocks(t, s, e, pool)
