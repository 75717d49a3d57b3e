"""Clients that leave when they have waited for their first token as long as they would.

All of an environment have the same patience, so they leave in the order in which they arrived: a list of those who
entered the queue, and the place of the first who may still leave, are all that is kept; without patience, nothing. A
client leaves at arrival + patience; who serves learns of it when the iteration under way ends, and a first token that
comes then is late.
"""

from __future__ import annotations

import numpy as np

from l3env.choices import Status
from l3env.engine.kernels.memory import release
from l3env.engine.kernels.queue import dequeue, note_end, release_children
from l3env.engine.kernels.slo import guard_s
from l3env.engine.state import NOWHERE
from l3env.jit import helper, inner


@inner
def leaves_s(s, e, r):
    """When a request's client leaves, if it has no first token by then."""
    return s.req[e, r]["arrival_s"] + s.env[e]["patience_s"]


@helper
def first_to_leave(s, e):
    """Of those who are there without a first token, who arrived first; or -1."""
    env, req = s.env[e], s.req
    while env["patience_idx"] < env["entered_count"]:
        r = np.int64(s.lists[e, env["patience_idx"]]["entered"])
        there = req[e, r]["status"] >= Status.WAITING and req[e, r]["status"] <= Status.PAUSED
        if there and np.isnan(req[e, r]["first_token_s"]):
            return r
        env["patience_idx"] += 1
    return np.int64(NOWHERE)


@inner
def next_leave_s(s, e):
    """When the next client leaves if nothing happens, infinity where none will."""
    if s.env[e]["patience_s"] <= 0.0:
        return np.inf
    r = first_to_leave(s, e)
    return np.inf if r == NOWHERE else leaves_s(s, e, r)


@helper
def leave(t, s, e, r):
    """A client leaves: out of the queue, or its blocks and references are given back; what was done for it is lost."""
    req, env = s.req, s.env[e]
    if req[e, r]["status"] == Status.WAITING:
        dequeue(s, e, r)
    else:
        release(t, s, e, r)
    req[e, r]["status"] = Status.LEFT
    req[e, r]["last_token_s"] = leaves_s(s, e, r)
    env["left_count"] += 1
    if env["patience_s"] > guard_s(req[e, r]["ttft_slo_s"]):
        env["beyond_guard_count"] += 1
    note_end(s, e, 0.0)
    release_children(s, e, r)


@helper
def let_leave(t, s, e):
    """All whose patience is over leave."""
    r = first_to_leave(s, e)
    while r != NOWHERE and leaves_s(s, e, r) <= s.env[e]["clock_s"]:
        leave(t, s, e, r)
        r = first_to_leave(s, e)
