"""Whether a request met its SLO, for the forms that look at single tokens, at no cost per token.

P99_GAP. At most one in a hundred of a request's gaps between tokens may exceed its TBT SLO. Members of a sub-batch
share the gaps of its decode steps. The requests' SLOs are ranked at the start; a step is counted in a Fenwick tree at
the number of SLOs that its gap exceeds, so that the steps too long for any one request since it joined follow from two
look-ups (O(log N) a step, a join or a leave).

TOKEN_DEADLINES. Token k is due at arrival + TTFT SLO + k x TBT SLO. A heap holds the decoding requests by when the next
token was due as of the last look at each; later tokens are due later, so until then none can be late, and whoever is
ahead by many tokens is looked at again only after as many.
"""

from __future__ import annotations

import numpy as np

from l3env.choices import SloForm, Status
from l3env.engine.kernels.drafts import class_of, emitted_last
from l3env.engine.kernels.heap import push, remove
from l3env.engine.state import DUE_HEAP, GUARD_S, GUARD_TTFT_SLOS, SUB_BATCHES
from l3env.jit import helper, inner, kernel


@inner
def token_due_s(req, k):
    """When token k (the first is 0) is due."""
    return req["arrival_s"] + req["ttft_slo_s"] + k * req["tbt_slo_s"]


@helper
def exceeded_count(s, e, gap_s):
    """How many requests of the workload have a TBT SLO below a gap."""
    low, high = 0, s.env[e]["requests_count"]
    while low < high:
        middle = (low + high) // 2
        if s.lists[e, middle]["slo_s"] < gap_s:
            low = middle + 1
        else:
            high = middle
    return low


@helper
def steps_too_long(s, e, r):
    """Decode steps of the request's sub-batch so far whose gap exceeds its TBT SLO."""
    tree = s.long_steps[e, s.req[e, r]["sub"]]
    place = s.env[e]["requests_count"] - s.req[e, r]["slo_rank"]
    count = 0
    while place > 0:
        count += tree[place - 1]
        place -= place & -place
    return count


@helper
def note_step_gaps(s, e, now_s):
    """A decode step ends; called before clocks move and while those who joined are still marked."""
    env, req = s.env[e], s.req
    requests = env["requests_count"]
    for sub in range(SUB_BATCHES):
        exceeded = exceeded_count(s, e, now_s - s.sub[e, sub]["last_step_s"])
        if exceeded > 0:
            place = requests - exceeded + 1
            while place <= requests:
                s.long_steps[e, sub, place - 1] += 1
                place += place & -place
    for i in range(env["joining_count"]):
        r = np.int64(s.lists[e, i]["joining"])
        if req[e, r]["status"] == Status.DECODE:
            note_own_gap(s, e, r, now_s)
            req[e, r]["long_steps_before"] = steps_too_long(s, e, r)


@inner
def note_own_gap(s, e, r, now_s):
    """A gap that the request does not share: its first after joining, or one that holds a preemption."""
    if now_s - s.req[e, r]["last_token_s"] > s.req[e, r]["tbt_slo_s"]:
        s.req[e, r]["long_gaps_count"] += 1


@helper
def note_step_deadlines(s, e, now_s):
    """A decode step has ended; called with clocks moved and before requests join."""
    req, heap, lengths = s.req, s.heap[e, DUE_HEAP], s.heap_len[e]
    while lengths[DUE_HEAP] > 0 and heap[heap[0]["item"]]["key"] < now_s:
        r = np.int64(heap[0]["item"])
        group = s.group[e, req[e, r]["sub"], class_of(s.lane_class, req[e, r])]
        emitted = req[e, r]["emitted_tokens"] + group["clock"] - req[e, r]["joined_clock"]
        remove(heap, lengths, DUE_HEAP, r)
        if now_s > token_due_s(req[e, r], emitted - emitted_last(s.lane_class, group)):  # the step's first token
            req[e, r]["missed_deadline"] = 1
        else:
            push(heap, lengths, DUE_HEAP, r, token_due_s(req[e, r], emitted))


@helper
def note_join(s, e, r):
    """A request starts to decode."""
    if s.env[e]["slo_form"] == SloForm.TOKEN_DEADLINES and not s.req[e, r]["missed_deadline"]:
        due_s = token_due_s(s.req[e, r], s.req[e, r]["emitted_tokens"])
        push(s.heap[e, DUE_HEAP], s.heap_len[e], DUE_HEAP, r, due_s)


@helper
def note_leave(s, e, r):
    """A request stops decoding; called before its sub-batch or clock change."""
    if s.env[e]["slo_form"] == SloForm.TOKEN_DEADLINES:
        remove(s.heap[e, DUE_HEAP], s.heap_len[e], DUE_HEAP, r)
    elif not s.req[e, r]["joining"]:
        s.req[e, r]["long_gaps_count"] += steps_too_long(s, e, r) - s.req[e, r]["long_steps_before"]


@helper
def note_prefill_token(s, e, r, now_s):
    """A prefill ends in a token; called before it is counted."""
    if s.env[e]["slo_form"] == SloForm.TOKEN_DEADLINES:
        if now_s > token_due_s(s.req[e, r], s.req[e, r]["emitted_tokens"]):
            s.req[e, r]["missed_deadline"] = 1
    elif s.req[e, r]["emitted_tokens"] > 0:
        note_own_gap(s, e, r, now_s)


@inner
def guard_s(ttft_slo_s):
    """How long a request may wait for its first token before it counts against whoever let it wait."""
    return max(GUARD_S, GUARD_TTFT_SLOS * ttft_slo_s)


@inner
def note_first_token(s, e, r, now_s):
    """A request has its first token."""
    req = s.req[e, r]
    req["first_token_s"] = now_s
    if now_s - req["arrival_s"] > guard_s(req["ttft_slo_s"]):
        s.env[e]["beyond_guard_count"] += 1


@kernel
def count_beyond_guard(s, out):
    """(E,) requests that waited for their first token longer than the guard allows, or do so still; into ``out``."""
    for e in range(out.shape[0]):
        env = s.env[e]
        out[e] = env["beyond_guard_count"]
        for r in range(env["requests_count"]):
            req = s.req[e, r]
            present = req["status"] >= Status.WAITING and req["status"] <= Status.PAUSED
            if present and np.isnan(req["first_token_s"]):
                out[e] += env["clock_s"] - req["arrival_s"] > guard_s(req["ttft_slo_s"])


@inner
def is_met(s, e, r):
    """Did a finished request meet its SLO?"""
    req, gaps = s.req[e, r], s.truth[e, r] - 1
    if req["first_token_s"] - req["arrival_s"] > req["ttft_slo_s"]:
        return False
    form = s.env[e]["slo_form"]
    if form == SloForm.TOKEN_DEADLINES:
        return req["missed_deadline"] == 0
    if form == SloForm.P99_GAP:
        return 100 * np.int64(req["long_gaps_count"]) <= gaps
    return gaps == 0 or (req["finish_s"] - req["first_token_s"]) / gaps <= req["tbt_slo_s"]
