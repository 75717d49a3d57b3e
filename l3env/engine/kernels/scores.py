"""Scores that whoever decides request by request has given."""

from __future__ import annotations

from l3env.choices import Order, Status
from l3env.engine.kernels.heap import push, remove
from l3env.engine.kernels.queue import waiting_key
from l3env.engine.state import NOWHERE
from l3env.jit import kernel


@kernel
def set_scores(s, first, last, seen, scores):
    """Gives requests of environments first..last - 1 their scores.

    Args:
        seen: (rows, K) which requests, NOWHERE for none: row 0 is environment ``first``'s; scores: (rows, K or more).
    """
    for e in range(first, last):
        for i in range(seen.shape[1]):
            r = seen[e - first, i]
            if r == NOWHERE:
                continue
            s.req[e, r]["score"] = scores[e - first, i]
            if s.req[e, r]["status"] == Status.WAITING and s.env[e]["heaps_built"] >> Order.BY_SCORE & 1:
                remove(s.heap[e, Order.BY_SCORE], s.heap_len[e], Order.BY_SCORE, r)
                key = waiting_key(s.req, e, r, Order.BY_SCORE)
                push(s.heap[e, Order.BY_SCORE], s.heap_len[e], Order.BY_SCORE, r, key)
