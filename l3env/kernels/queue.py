"""The waiting queue: arrivals, and who is next under each order."""

from __future__ import annotations

import numpy as np

from l3env.jit import helper, inner
from l3env.kernels.heap import push, rekey, remove
from l3env.kernels.prefix import footprint_blocks
from l3env.state import ARRIVAL_HEAP, NOWHERE, ORDERS_COUNT, Order, Status

# the key of a request that gives way is scaled by a power of two: exact, so that the order among them stays, and larger
# than any time or token count
HOPELESS_SCALE = 2.0**600
SMALLEST_KEY = 1e-100  # a key of 0 could not be scaled


@inner
def latest_start_s(req, e, r):
    """When prefill must start, alone on the machine, for the first token to be in time."""
    return req[e, r]["arrival_s"] + req[e, r]["ttft_slo_s"] - req[e, r]["ttft_alone_s"]


@inner
def is_hopeless(req, e, r, now_s):
    """Can the TTFT deadline no longer be met (or has it been missed)?"""
    first_s = req[e, r]["first_token_s"]
    if np.isnan(first_s):
        return now_s > latest_start_s(req, e, r)
    return first_s > req[e, r]["arrival_s"] + req[e, r]["ttft_slo_s"]


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
    return req[e, r]["arrival_s"]


@inner
def heeds_hopeless(order):
    return order != Order.FCFS and order != Order.NEWEST_FIRST


@inner
def give_way(key):
    """The key of a request found hopeless, from its own key (>= 0 in every order that heeds it)."""
    return max(key, SMALLEST_KEY) * HOPELESS_SCALE


@inner
def waiting_key(req, e, r, order):
    """Sort key of a waiting request, hopelessness included."""
    key = order_key(req, e, r, order)
    return give_way(key) if req[e, r]["hopeless"] and heeds_hopeless(order) else key


@helper
def enqueue(s, e, r):
    """Puts a request into the queue, in every order that is in use."""
    req, env = s.req, s.env[e]
    req[e, r]["status"] = Status.WAITING
    env["waiting_count"] += 1
    env["waiting_tokens"] += req[e, r]["target_tokens"]
    for order in range(ORDERS_COUNT):
        if env["heaps_built"] >> order & 1:
            push(s.heap[e, order], s.heap_len[e], order, r, waiting_key(req, e, r, order))


@helper
def dequeue(s, e, r):
    """Takes a request out of the queue."""
    s.env[e]["waiting_count"] -= 1
    s.env[e]["waiting_tokens"] -= s.req[e, r]["target_tokens"]
    for order in range(ORDERS_COUNT):
        if s.env[e]["heaps_built"] >> order & 1:
            remove(s.heap[e, order], s.heap_len[e], order, r)


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
    """The request to admit next, or -1. Requests found hopeless on the way step back (once: it cannot heal)."""
    req, env = s.req, s.env[e]
    if env["waiting_count"] == 0:
        return NOWHERE
    if not env["heaps_built"] >> order & 1:
        build_order(s, e, order)
    now_s = env["clock_s"]
    if heeds_hopeless(order):
        while True:
            r = s.heap[e, order, 0]["item"]
            if req[e, r]["hopeless"] or not is_hopeless(req, e, r, now_s):
                break
            req[e, r]["hopeless"] = 1
            for each in range(ORDERS_COUNT):
                if heeds_hopeless(each) and env["heaps_built"] >> each & 1:
                    rekey(s.heap[e, each], s.heap_len[e, each], r, give_way(s.heap[e, each, r]["key"]))
    return s.heap[e, order, 0]["item"]


@helper
def arrive(t, s, e, r):
    """A request enters the system: into the queue, or rejected where it can never fit."""
    req, env = s.req, s.env[e]
    env["arrived_count"] += 1
    req[e, r]["target_tokens"] = req[e, r]["prompt_tokens"]
    table = env["table_idx"]
    need_blocks = footprint_blocks(t, s, e, r, np.int64(req[e, r]["prompt_tokens"]) + s.truth[e, r] - 1)
    for pool in range(t.coef[table]["pools_count"]):
        if need_blocks <= t.pool_blocks[table, pool]:
            enqueue(s, e, r)
            return
    req[e, r]["status"] = Status.REJECTED
    env["rejected_count"] += 1
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
    """Time of the next arrival, infinity where none is known."""
    req, env = s.req, s.env[e]
    root = env["next_root_idx"]
    when_s = np.inf
    if root < env["requests_count"]:
        when_s = req[e, root]["arrival_s"]
    if s.heap_len[e, ARRIVAL_HEAP] > 0:
        when_s = min(when_s, s.heap[e, ARRIVAL_HEAP, s.heap[e, ARRIVAL_HEAP, 0]["item"]]["key"])
    return when_s


@helper
def absorb_arrivals(t, s, e):
    """Everything that has arrived by now enters the system, in order of arrival."""
    req, env = s.req, s.env[e]
    now_s = env["clock_s"]
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
