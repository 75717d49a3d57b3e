"""What may be seen: gathers present requests into fresh rows, so that no policy ever holds an engine array."""

from __future__ import annotations

from l3env.choices import Status
from l3env.engine.kernels.heap import first_items
from l3env.engine.kernels.memory import emitted_now, kv_now, pool_of
from l3env.engine.kernels.queue import build_order
from l3env.engine.state import NOWHERE
from l3env.jit import kernel
from l3env.machine.iteration import tbt_alone_s, ttft_alone_s


@kernel
def gather(t, s, e, idx, out):
    """Rows of present requests (``policy.view.ROW_DTYPE``) into ``out``, as of now."""
    req = s.req
    for i in range(idx.shape[0]):
        r = idx[i]
        out[i]["idx"] = r
        out[i]["status"] = req[e, r]["status"]
        out[i]["sub_batch"] = req[e, r]["sub"]
        waits = req[e, r]["status"] == Status.WAITING
        out[i]["pool"] = NOWHERE if waits else pool_of(t, s, e, r)
        out[i]["lane"] = NOWHERE if waits else req[e, r]["lane"]
        out[i]["arrival_s"] = req[e, r]["arrival_s"]
        out[i]["ttft_deadline_s"] = req[e, r]["arrival_s"] + req[e, r]["ttft_slo_s"]
        out[i]["tbt_slo_s"] = req[e, r]["tbt_slo_s"]
        out[i]["ttft_alone_s"] = req[e, r]["ttft_alone_s"]
        out[i]["prompt_tokens"] = req[e, r]["prompt_tokens"]
        out[i]["prefill_left_tokens"] = req[e, r]["target_tokens"] - req[e, r]["prefilled_tokens"]
        if req[e, r]["status"] == Status.DECODE or req[e, r]["status"] == Status.PAUSED:
            out[i]["prefill_left_tokens"] = 0
        out[i]["emitted_tokens"] = emitted_now(s, e, r)
        out[i]["kv_tokens"] = 0 if waits else kv_now(s, e, r)
        out[i]["predicted_tokens"] = req[e, r]["predicted_tokens"]
        out[i]["first_token_s"] = req[e, r]["first_token_s"]
        out[i]["preemptions_count"] = req[e, r]["preemptions_count"]
        out[i]["admitted_seq"] = req[e, r]["admitted_seq"]


@kernel
def peek_queue(t, s, e, order, out, frontier):
    """The first ``len(out)`` waiting requests of an order, in order; returns how many there are.

    ``frontier`` is scratch with room for len(out) + 1; the length of the queue does not matter.
    """
    if s.env[e]["waiting_count"] == 0:
        return 0
    if not s.env[e]["heaps_built"] >> order & 1:
        build_order(s, e, order)
    return first_items(s.heap[e, order], s.heap_len[e, order], out, frontier)


@kernel
def alone_latencies(t, table, prompt_tokens, ttft_s, tbt_s):
    """TTFT of each prompt and time between tokens at its context, on the empty system."""
    for i in range(prompt_tokens.shape[0]):
        ttft_s[i] = ttft_alone_s(t, table, prompt_tokens[i])
        tbt_s[i] = tbt_alone_s(t, table, prompt_tokens[i] + 1)
