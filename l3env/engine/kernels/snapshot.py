"""Copies the present of one environment into another: only requests that are there, with lengths as given."""

from __future__ import annotations

import numpy as np

from l3env.choices import ORDERS_COUNT, SloForm, Status
from l3env.engine.kernels.drafts import copy_classes
from l3env.engine.kernels.heap import push
from l3env.engine.kernels.memory import emitted_now, let_go
from l3env.engine.kernels.run import Stop
from l3env.engine.state import ARRIVAL_HEAP, FINISH_HEAP, NOWHERE, SUB_BATCHES
from l3env.jit import helper, kernel


@kernel
def find_present(s, e, out):
    """Indices of the requests that wait or run, ascending, into ``out``; returns how many."""
    count = 0
    for r in range(s.env[e]["requests_count"]):
        status = s.req[e, r]["status"]
        if status >= Status.WAITING and status <= Status.PAUSED:
            out[count] = r
            count += 1
    return count


@kernel
def extract(s, e, idx, output_tokens, room, new_idx, d, m):
    """Environment ``e`` of ``s`` as environment ``m`` of ``d``, with the requests ``idx`` (ascending) alone.

    Nothing of the truth is read: ``output_tokens`` ((n,), more than emitted so far) takes its place. Request i of the
    copy is ``idx[i]``; the next ``room`` slots are cleared for requests to come. Dependent requests that have not
    arrived are unknown to a scheduler, so they are left out. An SLO on the 99th percentile of gaps becomes one on
    their mean.

    Args:
        new_idx: scratch, one int32 a request slot of ``s``.
    """
    n = idx.shape[0]
    d.env[m] = s.env[e]
    env = d.env[m]
    env["requests_count"] = n
    env["next_root_idx"] = n
    env["stop"] = Stop.RUNNING
    env["log_count"] = 0
    if env["slo_form"] == SloForm.P99_GAP:
        env["slo_form"] = SloForm.MEAN_TBT
    for sub in range(SUB_BATCHES):
        d.sub[m, sub] = s.sub[e, sub]
        for lane in range(s.lane.shape[2]):
            d.lane[m, sub, lane] = s.lane[e, sub, lane]
        for draft in range(s.group.shape[2]):
            d.group[m, sub, draft] = s.group[e, sub, draft]
            for pool in range(s.phase.shape[2]):
                for phase in range(s.phase.shape[4]):
                    d.phase[m, sub, pool, draft, phase] = s.phase[e, sub, pool, draft, phase]
    copy_classes(s.lane_class, e, d.lane_class, m)
    for pool in range(s.pool.shape[1]):
        d.pool[m, pool] = s.pool[e, pool]
    for i in range(s.prompts.shape[1]):
        d.prompts[m, i] = s.prompts[e, i]
    for i in range(n):
        r = idx[i]
        new_idx[r] = i
        d.req[m, i] = s.req[e, r]
        d.req[m, i]["parent_idx"], d.req[m, i]["first_child_idx"] = NOWHERE, NOWHERE
        d.req[m, i]["next_sibling_idx"] = NOWHERE
        d.truth[m, i] = output_tokens[i]
    for i in range(n, n + room):
        clear(d, m, i)
    copy_heaps(s, e, n + room, output_tokens, new_idx, d, m)
    for i in range(env["running_count"]):
        d.lists[m, i]["running"] = new_idx[s.lists[e, i]["running"]]
    for i in range(env["prefill_count"]):
        d.lists[m, i]["prefill"] = new_idx[s.lists[e, i]["prefill"]]
    joining = 0
    for i in range(s.env[e]["joining_count"]):
        r = s.lists[e, i]["joining"]
        if s.req[e, r]["status"] >= Status.WAITING and s.req[e, r]["status"] <= Status.PAUSED:
            d.lists[m, joining]["joining"] = new_idx[r]
            joining += 1
    env["joining_count"] = joining
    copy_entered(s, e, new_idx, d, m)
    copy_prefix(s.prefix, e, idx, room, d.prefix, m)
    let_go(d, m)


@helper
def copy_entered(s, e, new_idx, d, m):
    """Who may still lose patience, in order of arrival."""
    entered = 0
    for i in range(s.env[e]["patience_idx"], s.env[e]["entered_count"]):
        r = s.lists[e, i]["entered"]
        if s.req[e, r]["status"] >= Status.WAITING and s.req[e, r]["status"] <= Status.PAUSED:
            d.lists[m, entered]["entered"] = new_idx[r]
            entered += 1
    d.env[m]["patience_idx"], d.env[m]["entered_count"] = 0, entered


@helper
def copy_heaps(s, e, slots, output_tokens, new_idx, d, m):
    """The queue's orders and who finishes when, by the output that is given; no arrivals to come."""
    for h in range(s.heap_len.shape[1]):
        d.heap_len[m, h] = 0
        for i in range(slots):
            d.heap[m, h, i]["pos"] = NOWHERE
        if h == ARRIVAL_HEAP or (h < ORDERS_COUNT and not s.env[e]["heaps_built"] >> h & 1):
            continue
        finish = h >= FINISH_HEAP
        for place in range(s.heap_len[e, h]):
            r = s.heap[e, h, place]["item"]
            i = new_idx[r]
            key = s.heap[e, h, r]["key"]
            if finish:
                key = float(d.req[m, i]["joined_clock"] + output_tokens[i] - d.req[m, i]["emitted_tokens"])
            push(d.heap[m, h], d.heap_len[m], h, i, key)


@helper
def copy_prefix(prefix, e, idx, room, target, m):
    """The prefix cache, which ``target`` has room for; requests to come share nothing."""
    if len(prefix) == 0:
        return
    n = idx.shape[0]
    target.env[m] = prefix.env[e]
    for i in range(prefix.ids.shape[1]):
        target.ids[m, i] = prefix.ids[e, i]
    for i in range(prefix.segment.shape[1]):
        target.segment[m, i] = prefix.segment[e, i]
    for pool in range(prefix.pool.shape[1]):
        target.pool[m, pool] = prefix.pool[e, pool]
        target.idle_len[m, pool] = prefix.idle_len[e, pool]
        for i in range(prefix.slot.shape[2]):
            target.slot[m, pool, i] = prefix.slot[e, pool, i]
            target.idle[m, pool, i] = prefix.idle[e, pool, i]
    for i in range(n):
        target.req[m, i] = prefix.req[e, idx[i]]
    for i in range(n, n + room):
        req = target.req[m, i]
        req["ids_first"], req["ids_count"], req["ids_tokens"], req["ids_blocks"] = 0, 0, 0, 0
        req["held_count"], req["hit_tokens"], req["moving_tokens"] = 0, 0, 0


@kernel
def clear(d, m, i):
    """An empty request slot."""
    req = d.req[m, i]
    req["status"] = Status.FUTURE
    req["sub"], req["hopeless"], req["joining"], req["lane"], req["draft_class"] = 0, 0, 0, 0, 0
    req["think_s"] = 0.0
    req["predicted_tokens"] = 0
    req["parent_idx"], req["first_child_idx"], req["next_sibling_idx"] = NOWHERE, NOWHERE, NOWHERE
    req["target_tokens"], req["prefilled_tokens"], req["emitted_tokens"], req["kv_tokens"] = 0, 0, 0, 0
    req["chunk_tokens"], req["promised_blocks"], req["running_pos"], req["joined_clock"] = 0, 0, 0, 0
    req["admitted_seq"] = 0
    req["first_token_s"], req["last_token_s"], req["finish_s"] = np.nan, 0.0, np.nan
    req["preemptions_count"], req["slo_met"], req["missed_deadline"] = 0, 0, 0
    req["slo_rank"], req["long_gaps_count"], req["long_steps_before"] = 0, 0, 0


@kernel
def count_on_track(s, out):
    """(E,) requests that have begun to decode and kept every limit so far, those that hold memory; into ``out``.

    Mean form: a first token in time, and a mean gap since then that is within the limit.
    """
    for e in range(out.shape[0]):
        now_s = s.env[e]["clock_s"]
        out[e] = 0
        for i in range(s.env[e]["running_count"]):
            r = np.int64(s.lists[e, i]["running"])
            req = s.req[e, r]
            if req["status"] != Status.DECODE and req["status"] != Status.PAUSED:
                continue
            if s.env[e]["slo_form"] == SloForm.TOKEN_DEADLINES:
                out[e] += not req["missed_deadline"]
                continue
            in_time = req["first_token_s"] <= req["arrival_s"] + req["ttft_slo_s"]
            gaps = max(emitted_now(s, e, r) - 1, 1)
            out[e] += in_time and now_s - req["first_token_s"] <= gaps * req["tbt_slo_s"]
