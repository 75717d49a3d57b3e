"""The waiting queue: arrivals, and who is next under each order."""

from __future__ import annotations

import numpy as np

from l3env.choices import ORDERS_COUNT, Order, Status
from l3env.engine.kernels.heap import push, rekey, remove
from l3env.engine.kernels.prefix import blocks_of
from l3env.engine.state import (
    ARRIVAL_HEAP,
    FINISHED_WEIGHT,
    LONG_WEIGHT,
    NOWHERE,
    PROMPT_BINS,
    SHORT_WEIGHT,
    SLACK_HEAP,
    Score,
)
from l3env.jit import helper, inner

# the key of a request that gives way is scaled by a power of two: exact, so that the order among them stays, and larger
# than any time or token count
HOPELESS_SCALE = 2.0**600
SMALLEST_KEY = 1e-100  # a key of 0 could not be scaled


@inner
def latest_start_s(req, e, r):
    """When prefill must start, alone on the machine, for the first token to be in time."""
    return req[e, r]["arrival_s"] + req[e, r]["ttft_slo_s"] - req[e, r]["ttft_alone_s"]


@inner
def hopeless_from_s(req, e, r):
    """The time after which a waiting request's TTFT deadline cannot be met: never where it was, always if missed."""
    first_s = req[e, r]["first_token_s"]
    if np.isnan(first_s):
        return latest_start_s(req, e, r)
    return -np.inf if first_s > req[e, r]["arrival_s"] + req[e, r]["ttft_slo_s"] else np.inf


@inner
def has_overdue(s, e):
    """Is there a waiting request that has become hopeless and is not known to be?"""
    heap = s.heap[e, SLACK_HEAP]
    return s.heap_len[e, SLACK_HEAP] > 0 and heap[heap[0]["item"]]["key"] < s.env[e]["clock_s"]


@inner
def lose_score(scorer, s, e, r):
    """Where a scorer schedules, who has become hopeless gets the lowest score, 0."""
    if len(scorer) == 0:
        return
    if scorer[e, Score.ON] != 0:
        s.req[e, r]["score"] = 0.0
        if s.heap[e, Order.BY_SCORE, r]["pos"] != NOWHERE and s.env[e]["heaps_built"] >> Order.BY_SCORE & 1:
            rekey(s.heap[e, Order.BY_SCORE], s.heap_len[e, Order.BY_SCORE], r, 0.0)


@inner
def least_score(scorer, e):
    """Waiting requests with lower scores are held back while anything runs."""
    if len(scorer) == 0:
        return 0.0
    return scorer[e, Score.FLOOR]


@helper
def notice_hopeless(s, e):
    """Waiting requests that have become hopeless step back in the orders that heed it (once: it cannot heal)."""
    while has_overdue(s, e):
        r = np.int64(s.heap[e, SLACK_HEAP, 0]["item"])
        remove(s.heap[e, SLACK_HEAP], s.heap_len[e], SLACK_HEAP, r)
        s.req[e, r]["hopeless"] = 1
        lose_score(s.scorer, s, e, r)
        for order in range(ORDERS_COUNT):
            if heeds_hopeless(order) and s.env[e]["heaps_built"] >> order & 1:
                rekey(s.heap[e, order], s.heap_len[e, order], r, give_way(s.heap[e, order, r]["key"]))


@inner
def order_key(req, e, r, order):
    """Sort key of a waiting request, small first, hopelessness left out."""
    if order == Order.SHORTEST_PROMPT_HOPELESS_LAST:
        return float(req[e, r]["prompt_tokens"])
    if order == Order.EARLIEST_DEADLINE_HOPELESS_LAST:
        return req[e, r]["arrival_s"] + req[e, r]["ttft_slo_s"]
    if order == Order.NEWEST_FIRST:
        return -req[e, r]["arrival_s"]
    if order == Order.SHORTEST_PREDICTED_HOPELESS_LAST:
        left = max(req[e, r]["predicted_tokens"] - req[e, r]["emitted_tokens"], 1)
        return float(req[e, r]["target_tokens"] + left)
    if order == Order.BY_SCORE:
        return -req[e, r]["score"]
    return req[e, r]["arrival_s"]


@inner
def heeds_hopeless(order):
    return order != Order.FCFS and order != Order.NEWEST_FIRST and order != Order.BY_SCORE


@inner
def give_way(key):
    """The key of a request found hopeless, from its own key (>= 0 in every order that heeds it)."""
    return max(key, SMALLEST_KEY) * HOPELESS_SCALE


@inner
def waiting_key(req, e, r, order):
    """Sort key of a waiting request, hopelessness included."""
    key = order_key(req, e, r, order)
    return give_way(key) if req[e, r]["hopeless"] and heeds_hopeless(order) else key


@inner
def octave(tokens):
    """The bin of a prompt length: floor(log2(tokens)), the last bin open."""
    place = 0
    while tokens > 1 and place < PROMPT_BINS - 1:
        tokens >>= 1
        place += 1
    return place


@inner
def count_waiting(s, e, r, sign):
    """Adds a request to what is known of the queue as a whole, or takes it out."""
    req, env = s.req, s.env[e]
    env["waiting_count"] += sign
    env["waiting_tokens"] += sign * req[e, r]["target_tokens"]
    env["waiting_predicted_tokens"] += sign * req[e, r]["predicted_tokens"]
    env["waiting_arrival_s"] += sign * req[e, r]["arrival_s"]
    if env["waiting_count"] == 0:
        env["waiting_arrival_s"] = 0.0  # no rounding is carried on
    s.prompts[e, octave(req[e, r]["target_tokens"])] += sign


@helper
def enqueue(s, e, r):
    """Puts a request into the queue, in every order that is in use."""
    req, env = s.req, s.env[e]
    req[e, r]["status"] = Status.WAITING
    count_waiting(s, e, r, 1)
    latest_s = hopeless_from_s(req, e, r)
    req[e, r]["hopeless"] = latest_s < env["clock_s"]  # what a hit made early enough all the same is so no longer
    if req[e, r]["hopeless"]:
        lose_score(s.scorer, s, e, r)
    for order in range(ORDERS_COUNT):
        if env["heaps_built"] >> order & 1:
            push(s.heap[e, order], s.heap_len[e], order, r, waiting_key(req, e, r, order))
    if not req[e, r]["hopeless"]:
        push(s.heap[e, SLACK_HEAP], s.heap_len[e], SLACK_HEAP, r, latest_s)


@helper
def dequeue(s, e, r):
    """Takes a request out of the queue."""
    count_waiting(s, e, r, -1)
    for order in range(ORDERS_COUNT):
        if s.env[e]["heaps_built"] >> order & 1:
            remove(s.heap[e, order], s.heap_len[e], order, r)
    remove(s.heap[e, SLACK_HEAP], s.heap_len[e], SLACK_HEAP, r)


@helper
def build_order(s, e, order):
    """Fills an order's heap with the requests that wait now; from here on it is kept up to date."""
    req, env = s.req, s.env[e]
    env["heaps_built"] |= 1 << order
    waiting = 0
    for r in range(env["requests_count"]):
        if waiting == env["waiting_count"]:
            break
        if req[e, r]["status"] == Status.WAITING:
            waiting += 1
            push(s.heap[e, order], s.heap_len[e], order, r, waiting_key(req, e, r, order))


@inner
def next_waiting(s, e, order):
    """The request to admit next, or -1 where none waits or all are held back."""
    if s.env[e]["waiting_count"] == 0:
        return NOWHERE
    if not s.env[e]["heaps_built"] >> order & 1:
        build_order(s, e, order)
    r = s.heap[e, order, 0]["item"]
    if order == Order.BY_SCORE and s.req[e, r]["score"] < least_score(s.scorer, e) and s.env[e]["running_count"] > 0:
        return NOWHERE
    return r


@inner
def running_mean(mean, value, count, weight):
    """The mean with one more value, the ``count``-th: plain at first, exponentially weighted from 1 / weight on."""
    return mean + max(weight, 1.0 / count) * (value - mean)


@inner
def note_arrival(s, e, r):
    """What a scheduler learns from an arrival: the gap since the last one, and the prompt."""
    req, env = s.req, s.env[e]
    count = env["arrived_count"]
    arrival_s = req[e, r]["arrival_s"]
    if count > 1:
        gap_s = arrival_s - env["last_arrival_s"]
        env["gap_short_s"] = running_mean(env["gap_short_s"], gap_s, count - 1, SHORT_WEIGHT)
        env["gap_short_s2"] = running_mean(env["gap_short_s2"], gap_s * gap_s, count - 1, SHORT_WEIGHT)
        env["gap_long_s"] = running_mean(env["gap_long_s"], gap_s, count - 1, LONG_WEIGHT)
        env["gap_long_s2"] = running_mean(env["gap_long_s2"], gap_s * gap_s, count - 1, LONG_WEIGHT)
    env["last_arrival_s"] = arrival_s
    env["prompt_mean_tokens"] = running_mean(
        env["prompt_mean_tokens"], float(req[e, r]["prompt_tokens"]), count, LONG_WEIGHT
    )


@inner
def note_end(s, e, met):
    """A request has finished, was rejected or has left; ``met`` is 1 where its SLO was."""
    env = s.env[e]
    count = env["finished_count"] + env["rejected_count"] + env["left_count"]
    env["slo_met_mean"] = running_mean(env["slo_met_mean"], met, count, FINISHED_WEIGHT)


@helper
def arrive(t, s, e, r):
    """A request enters the system: into the queue, or rejected where it is too long for the model or for every pool."""
    req, env = s.req, s.env[e]
    env["arrived_count"] += 1
    note_arrival(s, e, r)
    req[e, r]["target_tokens"] = req[e, r]["prompt_tokens"]
    table = env["table_idx"]
    need_tokens = np.int64(req[e, r]["prompt_tokens"]) + s.truth[e, r] - 1
    need_blocks = blocks_of(s.prefix, e, r, need_tokens, t.coef[table]["block_tokens"])
    if need_tokens < t.coef[table]["served_tokens"]:
        for pool in range(t.coef[table]["pools_count"]):
            if need_blocks <= t.pool_blocks[table, pool]:
                if env["patience_s"] > 0.0:
                    s.lists[e, env["entered_count"]]["entered"] = r
                    env["entered_count"] += 1
                enqueue(s, e, r)
                return
    else:
        env["rejected_context_count"] += 1
    req[e, r]["status"] = Status.REJECTED
    env["rejected_count"] += 1
    note_end(s, e, 0.0)
    release_children(s, e, r)


@helper
def release_children(s, e, r):
    """Requests that waited for this one arrive after their think time."""
    req = s.req
    child = req[e, r]["first_child_idx"]
    while child != NOWHERE:
        arrival_s = max(req[e, child]["arrival_s"], s.env[e]["clock_s"] + req[e, child]["think_s"])
        req[e, child]["arrival_s"] = arrival_s
        push(s.heap[e, ARRIVAL_HEAP], s.heap_len[e], ARRIVAL_HEAP, child, arrival_s)
        child = req[e, child]["next_sibling_idx"]


@inner
def next_arrival_s(s, e):
    """When the next arrival can be seen, infinity where none is known."""
    req, env = s.req, s.env[e]
    root = env["next_root_idx"]
    when_s = np.inf
    if root < env["requests_count"]:
        when_s = req[e, root]["arrival_s"]
    if s.heap_len[e, ARRIVAL_HEAP] > 0:
        when_s = min(when_s, s.heap[e, ARRIVAL_HEAP, s.heap[e, ARRIVAL_HEAP, 0]["item"]]["key"])
    return when_s + env["frontend_s"]


@inner
def seen_s(env):
    """Up to when who schedules knows what happened."""
    return env["seen_s"] if env["ahead"] else env["clock_s"]


@helper
def absorb_arrivals(t, s, e):
    """Everything that is seen to have arrived enters the system, in order of arrival."""
    req, env = s.req, s.env[e]
    now_s = seen_s(env)
    while next_arrival_s(s, e) <= now_s:
        root = env["next_root_idx"]
        r = root
        from_heap = root >= env["requests_count"]
        if s.heap_len[e, ARRIVAL_HEAP] > 0:
            top = s.heap[e, ARRIVAL_HEAP, 0]["item"]
            if from_heap or req[e, top]["arrival_s"] < req[e, root]["arrival_s"]:
                r, from_heap = top, True
        if from_heap:
            remove(s.heap[e, ARRIVAL_HEAP], s.heap_len[e], ARRIVAL_HEAP, r)
        else:
            advance_root(s, e, root + 1)
        arrive(t, s, e, r)


@inner
def advance_root(s, e, start):
    """Points at the next request, from ``start`` on, that depends on no other."""
    req, env = s.req, s.env[e]
    while start < env["requests_count"] and req[e, start]["parent_idx"] != NOWHERE:
        start += 1
    env["next_root_idx"] = start
