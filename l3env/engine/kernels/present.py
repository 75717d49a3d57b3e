"""The present of a machine that somebody else drives, put into an environment so that a View can show it."""

from __future__ import annotations

import numpy as np

from l3env.choices import Status
from l3env.engine.kernels.memory import join_decode
from l3env.engine.kernels.prefix import blocks_of
from l3env.engine.kernels.queue import enqueue, note_arrival, note_end, notice_hopeless, running_mean
from l3env.engine.kernels.scorer import set_scores_and_length
from l3env.engine.state import FINISHED_WEIGHT, NOWHERE, SUB_BATCHES
from l3env.jit import helper, kernel
from l3env.machine.arrays import HBM


@helper
def empty(s, e):
    """Nobody is present; what was counted since the start stays."""
    env = s.env[e]
    for sub in range(SUB_BATCHES):
        s.sub[e, sub]["decoding"] = 0
        s.sub[e, sub]["members"] = 0
        for lane in range(s.lane.shape[2]):
            s.lane[e, sub, lane]["count"] = 0.0
            s.lane[e, sub, lane]["kv"] = 0.0
            s.lane[e, sub, lane]["pending"] = 0.0
        for draft in range(s.group.shape[2]):
            group = s.group[e, sub, draft]
            group["clock"], group["age_sum"], group["age_sum2"], group["kv_sum"], group["kv_sum2"] = 0, 0, 0, 0, 0
            group["predicted_sum"], group["late_count"], group["tbt_slo_s"], group["due_s"] = 0, 0, 0.0, 0.0
            for pool in range(s.phase.shape[2]):
                for phase in range(s.phase.shape[4]):
                    s.phase[e, sub, pool, draft, phase] = 0
    for h in range(s.heap_len.shape[1]):
        s.heap_len[e, h] = 0
        for r in range(s.heap.shape[2]):
            s.heap[e, h, r]["pos"] = NOWHERE
    for i in range(s.prompts.shape[1]):
        s.prompts[e, i] = 0
    env["heaps_built"], env["running_count"], env["prefill_count"], env["joining_count"] = 0, 0, 0, 0
    env["waiting_count"], env["waiting_tokens"], env["waiting_predicted_tokens"] = 0, 0, 0
    env["waiting_arrival_s"], env["prefill_left_tokens"] = 0.0, 0


@helper
def count_news(s, e, arrived, finished_tokens, finished_met):
    """What a scheduler learns from arrivals and finishes since the last time."""
    env = s.env[e]
    for i in range(arrived.shape[0]):
        env["arrived_count"] += 1
        note_arrival(s, e, arrived[i])
    for i in range(finished_tokens.shape[0]):
        env["finished_count"] += 1
        note_end(s, e, finished_met[i])
        env["output_mean_tokens"] = running_mean(
            env["output_mean_tokens"], float(finished_tokens[i]), env["finished_count"], FINISHED_WEIGHT
        )


@helper
def place(t, s, e, r):
    """A request that holds memory: under way where something of its prompt is left, decoding else."""
    req, env = s.req, s.env[e]
    req[e, r]["lane"], req[e, r]["sub"], req[e, r]["joining"] = 0, 0, 0
    req[e, r]["running_pos"] = env["running_count"]
    s.lists[e, env["running_count"]]["running"] = r
    env["running_count"] += 1
    s.sub[e, 0]["members"] += 1
    block = t.coef[env["table_idx"]]["block_tokens"]
    left = max(req[e, r]["predicted_tokens"] - req[e, r]["emitted_tokens"], 1)
    req[e, r]["promised_blocks"] = blocks_of(s.prefix, e, r, np.int64(req[e, r]["target_tokens"] + left - 1), block)
    s.pool[e, HBM]["promised"] += req[e, r]["promised_blocks"]
    if req[e, r]["prefilled_tokens"] < req[e, r]["target_tokens"]:
        req[e, r]["status"] = Status.PREFILL
        s.lists[e, env["prefill_count"]]["prefill"] = r
        env["prefill_count"] += 1
        s.lane[e, 0, 0]["pending"] += req[e, r]["target_tokens"]
        env["prefill_left_tokens"] += req[e, r]["target_tokens"] - req[e, r]["prefilled_tokens"]
        return
    s.truth[e, r] = 1 << 30  # unknown
    join_decode(t, s, e, r, 0)


@kernel
def show(t, s, e, waiting, running, used_blocks, arrived, finished_tokens, finished_met):
    """Fills an environment with those present; the caller has written what is known of each and the clock.

    Args:
        waiting, running: their slots; the running ones in order of admission.
        arrived, finished_tokens, finished_met: slots of new arrivals; outputs of those that finished since the last
            time, and 1 or 0 for SLOs that were met.
    """
    empty(s, e)
    count_news(s, e, arrived, finished_tokens, finished_met)
    s.pool[e, HBM]["promised"] = 0
    s.pool[e, HBM]["used"] = used_blocks
    s.pool[e, HBM]["peak"] = max(s.pool[e, HBM]["peak"], used_blocks)
    for i in range(waiting.shape[0]):
        enqueue(s, e, waiting[i])
    for i in range(running.shape[0]):
        place(t, s, e, running[i])
    notice_hopeless(s, e)


@kernel
def decide(t, s, k, e):
    """What a scorer says of those present: their scores, and the knobs that follow from them, into ``k``."""
    set_scores_and_length(s.scorer, t, s, k, e)
