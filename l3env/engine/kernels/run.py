"""Entry points: many iterations under knobs, or one under a plan, for one environment or all of them."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from l3env.choices import SubBatching
from l3env.engine.kernels.heap import push
from l3env.engine.kernels.iteration import execute
from l3env.engine.kernels.memory import catch_up
from l3env.engine.kernels.patience import let_leave, next_leave_s
from l3env.engine.kernels.prefix import change_eviction
from l3env.engine.kernels.queue import (
    absorb_arrivals,
    advance_root,
    has_overdue,
    next_arrival_s,
    notice_hopeless,
    seen_s,
)
from l3env.engine.kernels.schedule import schedule
from l3env.engine.kernels.scorer import set_scores_and_length
from l3env.engine.state import ARRIVAL_HEAP, NOWHERE
from l3env.jit import inner, kernel


class Stop(IntEnum):
    """Why a run came back."""

    RUNNING = 0  # a limit was reached; there is more to do
    DONE = 1  # all requests have finished, were rejected or have left
    STALLED = 2  # requests wait or are paused, nothing runs, nothing will arrive


class Until(IntEnum):
    """Where a run under knobs ends, if not before."""

    END = 0
    ITERATIONS = 1  # after ``limit`` iterations
    TIME = 2  # at the end of the iteration that reaches ``limit`` seconds
    EVENT = 3  # after an iteration with an arrival, a finish or a preemption, or at ``limit`` seconds


@inner
def ready(t, s, e):
    """Lets arrivals in, and out who has no patience left; where nothing is present, jumps to the next arrival. Who has
    become hopeless steps back.

    False at the end of all work.
    """
    env = s.env[e]
    if env["patience_s"] > 0.0:
        let_leave(t, s, e)
    if next_arrival_s(s, e) <= seen_s(env):
        absorb_arrivals(t, s, e)
        if env["patience_s"] > 0.0:  # some may have come and gone in one long iteration
            let_leave(t, s, e)
    while env["running_count"] == 0 and env["waiting_count"] == 0:
        when_s = next_arrival_s(s, e)
        if when_s == np.inf:
            env["stop"] = Stop.DONE
            return False
        env["clock_s"] = max(when_s, env["clock_s"])
        catch_up(s, e)
        absorb_arrivals(t, s, e)
    if has_overdue(s, e):
        notice_hopeless(s, e)
    return True


@inner
def skip_idle(t, s, e):
    """Nothing was runnable: waits for what is not known yet, or until one comes or leaves; False where none will."""
    env = s.env[e]
    if env["ahead"] and env["seen_s"] < env["clock_s"]:
        catch_up(s, e)
        return True
    when_s = min(next_arrival_s(s, e), next_leave_s(s, e))
    if when_s == np.inf:
        env["stop"] = Stop.STALLED
        return False
    env["seen_s"] = when_s
    env["queue_s"] += (when_s - env["clock_s"]) * env["waiting_count"]
    env["present_s"] += (when_s - env["clock_s"]) * (env["waiting_count"] + env["running_count"])
    env["clock_s"] = when_s
    return True


@inner
def events(s, e):
    env = s.env[e]
    return env["arrived_count"] + env["finished_count"] + env["preemptions_count"] + env["left_count"]


@inner
def arrives(s, e):
    """Has a request arrived that is not let in yet? Whoever decides at events decides before it is scheduled."""
    return next_arrival_s(s, e) <= seen_s(s.env[e])


@inner
def run_one(t, s, k, e, until, limit):
    """Iterations of one environment under its knobs."""
    env = s.env[e]
    if env["stop"] == Stop.DONE:
        return
    env["stop"] = Stop.RUNNING
    change_eviction(s.prefix, e, k[e]["eviction"])
    done = 0
    before = events(s, e)
    while ready(t, s, e):
        set_scores_and_length(s.scorer, t, s, k, e)
        decode, planned = schedule(t, s, k, e)
        if decode or planned > 0:
            mode = k[e]["sub_batching"] if t.coef[env["table_idx"]]["has_pim"] else np.int64(SubBatching.OFF)
            execute(t, s, e, decode, mode)
            done += 1
        elif not skip_idle(t, s, e):
            return
        if until == Until.ITERATIONS:
            if done >= limit:
                break
        elif until == Until.TIME:
            if env["clock_s"] >= limit:
                break
        elif until == Until.EVENT and (env["clock_s"] >= limit or events(s, e) != before or arrives(s, e)):
            break
    if env["running_count"] == 0 and env["waiting_count"] == 0 and next_arrival_s(s, e) == np.inf:
        env["stop"] = Stop.DONE


@kernel
def run(t, s, k, first, last, until, limits):
    """Runs environments first..last - 1, each to its own limit; ``env["stop"]`` says why each came back."""
    for e in range(first, last):
        run_one(t, s, k, e, until, limits[e])


@kernel
def open_environment(t, s, e):
    """After the request table is in place: children are linked, the clock stands at 0, what arrives at 0 is there."""
    env, req = s.env[e], s.req
    for r in range(env["requests_count"] - 1, -1, -1):
        parent = req[e, r]["parent_idx"]
        if parent != NOWHERE:
            req[e, r]["next_sibling_idx"] = req[e, parent]["first_child_idx"]
            req[e, parent]["first_child_idx"] = r
    advance_root(s, e, 0)
    absorb_arrivals(t, s, e)


@kernel
def expect(s, e, first, last):
    """Requests that were added to the table will arrive at their times."""
    for r in range(first, last):
        push(s.heap[e, ARRIVAL_HEAP], s.heap_len[e], ARRIVAL_HEAP, r, s.req[e, r]["arrival_s"])
    advance_root(s, e, s.env[e]["next_root_idx"])
