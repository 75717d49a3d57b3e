"""Requests one by one for an agent: rows of what is visible, and the scores that it gives back."""

from __future__ import annotations

import numpy as np

from l3env.choices import Status
from l3env.engine.kernels.heap import first_items
from l3env.engine.kernels.memory import emitted_now, kv_now
from l3env.engine.kernels.queue import build_order, latest_start_s
from l3env.engine.state import NOWHERE
from l3env.envs.observe.feature import Feature, around_half, scales_of, squash
from l3env.jit import helper, kernel


class Request(Feature):
    """What is seen of one request."""

    present = "1; rows without a request are all zeros"
    running = "1 for running requests, 0 for waiting ones"
    prefilling = "1 while its prompt is processed"
    in_hbm = "1 where its KV is in HBM"
    age = "time since its arrival over its TTFT SLO, scale 1"
    slack = (
        "0.5 + 0.5 x / (|x| + 1); before its first token x is the time left to start over its TTFT SLO, then the "
        "tokens it is ahead of the mean TBT of its SLO, over {scale}",
        16.0,
    )
    late = "1 where its first token missed its deadline, or must miss it"
    prefill_work = "time of what is left of its prompt at the pace, over the nominal TTFT SLO, scale 1"
    kv_tokens = "KV it holds, or needs to start, scale {scale}", 2048.0
    kv_over_free = "the same over free KV tokens, scale 1"
    emitted = "tokens it has emitted, scale {scale}", 256.0
    predicted_left = "its predicted output left, scale {scale}; 0 without a predictor", 256.0
    preemptions = "times it was preempted, scale {scale}", 2.0


SCALE = scales_of(Request)

REQUEST_FEATURES: tuple[tuple[str, str], ...] = tuple((each.name, each.text) for each in Request)
"""Name and text of each column of a request's row."""


@helper
def list_waiting(s, e, order, seen, frontier):
    """The first waiting requests of an order into ``seen``; -1 where there are no more."""
    length = s.env[e]["waiting_count"]
    if length > 0 and not s.env[e]["heaps_built"] >> order & 1:
        build_order(s, e, order)
    found = first_items(s.heap[e, order], length, seen, frontier)
    for i in range(found, seen.shape[0]):
        seen[i] = NOWHERE


@helper
def write_request(t, s, e, r, mark, row):
    """One request."""
    req, env = s.req[e, r], s.env[e]
    status, now_s = req["status"], env["clock_s"]
    emitted = emitted_now(s, e, r)
    waits = status == Status.WAITING
    left_tokens = 0
    if waits or status == Status.PREFILL:
        left_tokens = req["target_tokens"] - req["prefilled_tokens"]
    kv = np.int64(req["target_tokens"]) if left_tokens > 0 else kv_now(s, e, r)
    started = not np.isnan(req["first_token_s"])
    deadline_s = req["arrival_s"] + req["ttft_slo_s"]
    row[Request.present] = 1.0
    row[Request.running] = 0.0 if waits else 1.0
    row[Request.prefilling] = 1.0 if status == Status.PREFILL else 0.0
    row[Request.in_hbm] = 1.0 if not waits and req["lane"] == 0 else 0.0
    row[Request.age] = squash(max(now_s - req["arrival_s"], 0.0), req["ttft_slo_s"])
    if started:
        due_s = req["first_token_s"] + emitted * req["tbt_slo_s"]
        row[Request.slack] = around_half((due_s - now_s) / (SCALE.slack * req["tbt_slo_s"]), 1.0)
        row[Request.late] = 1.0 if req["first_token_s"] > deadline_s else 0.0
    else:
        row[Request.slack] = around_half((latest_start_s(s.req, e, r) - now_s) / req["ttft_slo_s"], 1.0)
        row[Request.late] = 1.0 if now_s > latest_start_s(s.req, e, r) else 0.0
    row[Request.prefill_work] = squash(left_tokens * mark["prefill_token_s"], env["ttft_slo_s"])
    row[Request.kv_tokens] = squash(float(kv), SCALE.kv_tokens)
    row[Request.kv_over_free] = squash(float(kv), mark["free_tokens"])
    row[Request.emitted] = squash(float(emitted), SCALE.emitted)
    row[Request.predicted_left] = squash(float(max(req["predicted_tokens"] - emitted, 0)), SCALE.predicted_left)
    row[Request.preemptions] = squash(float(req["preemptions_count"]), SCALE.preemptions)


@kernel
def write_requests(t, s, marks, order, first, last, seen, frontier, rows):
    """What is visible in environments first..last - 1: K waiting, then K running requests.

    Args:
        marks: of the observer, after ``write_features``.
        order: by which the waiting ones come.
        seen: (E, 2 K) their indices, -1 where there is none; filled.
        frontier: (E, K + 2) room to work in.
        rows: (E, 2 K, len(Request)) filled, zeros where there is none.
    """
    for e in range(first, last):
        visible = seen.shape[1] // 2
        list_waiting(s, e, order, seen[e, :visible], frontier[e])
        running = s.env[e]["running_count"]
        for i in range(visible):
            place = running - 1 - i  # the list's end: the newest, but for those who filled gaps
            seen[e, visible + i] = s.lists[e, place]["running"] if place >= 0 else NOWHERE
        for i in range(2 * visible):
            if seen[e, i] == NOWHERE:
                rows[e, i] = 0.0
            else:
                write_request(t, s, e, seen[e, i], marks[e], rows[e, i])


@kernel
def set_beside(words, first, last, columns, levels, counts, actions):
    """Sets the knobs behind the scores in environments first..last - 1.

    Args:
        words: (E, all knobs) what the engine holds, 8 bytes each.
        columns: (knobs,) which of them; levels: (knobs, most) their words; counts: (knobs,) how many levels.
        actions: (E, 2 K + knobs) from -1, a knob's first level, to 1, its last.
    """
    scores = actions.shape[1] - columns.shape[0]
    for e in range(first, last):
        for i in range(columns.shape[0]):
            place = np.int64((actions[e, scores + i] + 1.0) * 0.5 * counts[i])
            words[e, columns[i]] = levels[i, min(place, counts[i] - 1)]
