"""Requests one by one for an agent: rows of what is visible, and the scores that it gives back."""

from __future__ import annotations

import numpy as np

from l3env.choices import Status
from l3env.engine.kernels.heap import first_items
from l3env.engine.kernels.memory import emitted_now, kv_now
from l3env.engine.kernels.queue import build_order, latest_start_s
from l3env.engine.state import NOWHERE
from l3env.envs.observe.features import squash
from l3env.envs.observe.step import set_knob
from l3env.jit import helper, inner, kernel

ROW_FEATURES = 13


@inner
def around_half(value):
    """(-inf, inf) -> (0, 1), 0 at one half."""
    return 0.5 + 0.5 * value / (abs(value) + 1.0)


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
    """One request, in the order of observe.REQUEST_FEATURES."""
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
    row[0] = 1.0
    row[1] = 0.0 if waits else 1.0
    row[2] = 1.0 if status == Status.PREFILL else 0.0
    row[3] = 1.0 if not waits and req["lane"] == 0 else 0.0
    row[4] = squash(max(now_s - req["arrival_s"], 0.0), req["ttft_slo_s"])
    if started:
        due_s = req["first_token_s"] + emitted * req["tbt_slo_s"]
        row[5] = around_half((due_s - now_s) / (16.0 * req["tbt_slo_s"]))
        row[6] = 1.0 if req["first_token_s"] > deadline_s else 0.0
    else:
        row[5] = around_half((latest_start_s(s.req, e, r) - now_s) / req["ttft_slo_s"])
        row[6] = 1.0 if now_s > latest_start_s(s.req, e, r) else 0.0
    row[7] = squash(left_tokens * mark["prefill_token_s"], env["ttft_slo_s"])
    row[8] = squash(float(kv), 2048.0)
    row[9] = squash(float(kv), mark["free_tokens"])
    row[10] = squash(float(emitted), 256.0)
    row[11] = squash(float(max(req["predicted_tokens"] - emitted, 0)), 256.0)
    row[12] = squash(float(req["preemptions_count"]), 2.0)


@kernel
def write_requests(t, s, marks, order, first, last, seen, frontier, rows):
    """What is visible in environments first..last - 1: K waiting, then K running requests.

    Args:
        marks: of the observer, after ``write_features``.
        order: by which the waiting ones come.
        seen: (E, 2 K) their indices, -1 where there is none; filled.
        frontier: (E, K + 2) room to work in.
        rows: (E, 2 K, ROW_FEATURES) filled, zeros where there is none.
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
                for k in range(ROW_FEATURES):
                    rows[e, i, k] = 0.0
            else:
                write_request(t, s, e, seen[e, i], marks[e], rows[e, i])


@kernel
def set_beside(k, first, last, columns, levels, counts, actions):
    """Sets the knobs behind the scores in environments first..last - 1.

    Args:
        columns: (knobs,) which of ``batch.ACTION``; levels: (knobs, most) their values; counts: (knobs,) how many.
        actions: (E, 2 K + knobs) from -1, a knob's first level, to 1, its last.
    """
    scores = actions.shape[1] - columns.shape[0]
    for e in range(first, last):
        for i in range(columns.shape[0]):
            place = np.int64((actions[e, scores + i] + 1.0) * 0.5 * counts[i])
            set_knob(k, e, columns[i], levels[i, min(place, counts[i] - 1)])
