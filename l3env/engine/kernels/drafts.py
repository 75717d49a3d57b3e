"""Multi-token prediction as the other kernels see it: draft classes, their clocks, and the second token of a step.

Where no model guesses, ``s.lane_class`` is ``()``. The functions begin with ``if len(lane_class) == 0``, which numba
decides by type when it compiles, dropping the other branch: kernels are then compiled as if every step emitted one
token, and anew on first use for a model that guesses.
"""

from __future__ import annotations

import numpy as np

from l3env.engine.state import DRAFT_STEPS, FINISH_HEAP, SUB_BATCHES
from l3env.jit import helper, inner


@inner
def classes_count(lane_class):
    """Draft classes that are kept apart."""
    if len(lane_class) == 0:
        return 1
    return lane_class.shape[3]


@inner
def class_of(lane_class, req):
    """The draft class of a request."""
    if len(lane_class) == 0:
        return 0
    return np.int64(req["draft_class"])


@inner
def drafting_now(lane_class, env):
    """Guessed tokens that this iteration's decode step verifies for each request: 0 or 1."""
    if len(lane_class) == 0:
        return 0
    return env["drafting"]


@inner
def set_drafting(lane_class, t, env, wanted):
    """Whether this iteration's decode step verifies guesses: where it is wanted and the model can."""
    if len(lane_class) > 0:
        env["drafting"] = 1 if wanted and t.coef[env["table_idx"]]["drafts_count"] > 0 else 0


@inner
def second_tokens(lane_class, env, group_drafts, draft):
    """Tokens beside the first that requests of a class emit in this decode step, after so many guesses: 0 or 1.

    Without branches, as all here that loops over pools: what a loop tests in vain doubles its code each time.
    """
    if len(lane_class) == 0:
        return 0
    return env["drafting"] * ((group_drafts + 1) * draft // DRAFT_STEPS - group_drafts * draft // DRAFT_STEPS)


@inner
def count_class(lane_class, e, sub, lane, draft, sign):
    """One more or less of a class decodes in a lane."""
    if len(lane_class) > 0:
        lane_class[e, sub, lane, draft] += sign


@inner
def step_clocks(lane_class, s, e, sub, lanes):
    """A decode step of a sub-batch: tokens, clocks, KV in each lane."""
    if len(lane_class) == 0:
        s.env[e]["output_tokens"] += s.sub[e, sub]["decoding"]
        s.group[e, sub, 0]["clock"] += 1
        for lane in range(lanes):
            s.lane[e, sub, lane]["kv"] += s.lane[e, sub, lane]["count"]
        return
    step_drafted(s, e, sub, lanes)


@helper
def step_drafted(s, e, sub, lanes):
    """``step_clocks`` of requests that emit at rates of their own."""
    for draft in range(s.group.shape[2]):
        emitted = 1 + second_tokens(s.lane_class, s.env[e], s.sub[e, sub]["drafts"], draft)
        members = s.heap_len[e, FINISH_HEAP + sub + SUB_BATCHES * draft]
        s.group[e, sub, draft]["clock"] += emitted
        s.group[e, sub, draft]["emitted"] = emitted
        s.env[e]["output_tokens"] += emitted * members
        if members > 0:
            for lane in range(lanes):
                s.lane[e, sub, lane]["kv"] += emitted * s.lane_class[e, sub, lane, draft]
    s.sub[e, sub]["drafts"] += s.env[e]["drafting"]


@inner
def emitted_last(lane_class, group):
    """Tokens that each request of a group emitted in the last decode step."""
    if len(lane_class) == 0:
        return 1
    return group["emitted"]


@inner
def second_tokens_count(lane_class, s, e):
    """Second tokens of all requests in the decode step that is about to be taken."""
    if len(lane_class) == 0:
        return 0
    count = 0
    for sub in range(SUB_BATCHES):
        for draft in range(s.group.shape[2]):
            members = s.heap_len[e, FINISH_HEAP + sub + SUB_BATCHES * draft]
            count += members * second_tokens(lane_class, s.env[e], s.sub[e, sub]["drafts"], draft)
    return count


@inner
def drop_surplus(lane_class, s, e, r):
    """A request that finishes has no use for a second token after its last one."""
    if len(lane_class) > 0:
        if s.req[e, r]["emitted_tokens"] > s.truth[e, r]:
            s.env[e]["output_tokens"] -= 1
            if s.gap_hist.shape[1] > 1:
                s.gap_hist[e, 0] -= 1


@inner
def copy_classes(lane_class, e, into, m):
    """Copies an environment's counts by class into another's."""
    if len(lane_class) > 0:
        for sub in range(SUB_BATCHES):
            for lane in range(lane_class.shape[2]):
                for draft in range(lane_class.shape[3]):
                    into[m, sub, lane, draft] = lane_class[e, sub, lane, draft]
