"""What an iteration of the plan that stands in the requests takes: its work is gathered, priced, accounted for.

Names of every kernel: ``t`` are the tables, ``s`` the state, ``k`` the knobs, ``e`` an environment, ``r`` one of its
requests.
"""

from __future__ import annotations

import numpy as np

from l3env.engine.kernels.advance import step_all
from l3env.engine.kernels.drafts import drafting_now
from l3env.engine.kernels.prefix import moving_tokens
from l3env.engine.kernels.record import write_log
from l3env.jit import helper, inner
from l3env.machine.forms import stored_lanes
from l3env.machine.iteration import batch_of, decode_step, no_decode, no_prefill, price, pushed_tokens, with_chunk
from l3env.machine.price import causal_pairs, gpu_busy_j, host_step_s, lane_attention_s


@helper
def execute(t, s, e, decode, mode):
    """One iteration: ``decode`` says whether decoding requests go on, ``mode`` is a SubBatching."""
    first, second, energy_j = gather_prefills(t, s, e)
    steps = gather_decodes(t, s, e) if decode else (no_decode(), no_decode(), no_decode())
    batch = batch_of(first, second, steps, queries_now(s, e))
    iteration = price(t, s.env[e]["table_idx"], batch, mode)
    account(t, s, e, batch, iteration, energy_j)
    step_all(t, s, e, decode, batch.whole.prefill.tokens > 0)
    if s.log.shape[1] > 1:
        write_log(t, s, e)


@inner
def queries_now(s, e):
    """Query tokens of a request in this iteration's decode step: 2 where it verifies a guess."""
    return 1 + drafting_now(s.lane_class, s.env[e])


@inner
def gather_prefills(t, s, e):
    """Planned chunks of sub-batch 0 and of 1, and the energy of their attention."""
    table = s.env[e]["table_idx"]
    coef = t.coef[table]
    first, second, energy_j = no_prefill(), no_prefill(), 0.0
    for i in range(s.env[e]["prefill_count"]):
        r = s.lists[e, i]["prefill"]
        req = s.req[e, r]
        chunk = np.int64(req["chunk_tokens"])
        if chunk == 0:
            continue
        history = np.int64(req["prefilled_tokens"])
        ends = 1 if history + chunk == req["target_tokens"] else 0
        pushed = pushed_tokens(t, table, req["lane"], chunk) + moving_tokens(s.prefix, e, r)
        if req["sub"] == 0:
            first = with_chunk(t, table, first, chunk, history, ends, pushed)
        else:
            second = with_chunk(t, table, second, chunk, history, ends, pushed)
        energy_j += coef["prefill_pair_j"] * causal_pairs(chunk, history)
        energy_j += coef["prefill_kv_j"] * float(history + chunk)
    return first, second, energy_j


@inner
def gather_decodes(t, s, e):
    """The next decode step of sub-batch 0, of 1, and of both as one batch."""
    requests = s.sub[e, 0]["decoding"], s.sub[e, 1]["decoding"]
    return decode_step(t, s.env[e]["table_idx"], s.lane[e], requests, queries_now(s, e))


@inner
def account(t, s, e, batch, iteration, energy_j):
    """Time, energy and tokens of a priced iteration, into the sums and as the last one; ``energy_j`` is what prefill
    attention took."""
    env, coef = s.env[e], t.coef[s.env[e]["table_idx"]]
    (prefill, decode), queries = batch.whole, batch.queries
    first, second = iteration.phases
    batches = (1 if first.tokens > 0 else 0) + (1 if second.tokens > 0 else 0)
    energy_j += coef["fc_batch_j"] * batches + coef["fc_token_j"] * (prefill.tokens + queries * decode.requests)
    gpu_s, work_j = first.gpu_s + second.gpu_s, energy_j + coef["hbm_token_j"] * decode.hbm_kv_tokens
    energy_j += coef["hbm_token_j"] * decode.hbm_kv_tokens + coef["pim_token_j"] * decode.pim_kv_tokens
    moved_j = coef["transfer_request_j"] * decode.moved_requests
    energy_j += coef["decompressed_token_j"] * decode.decompressed_kv_tokens + moved_j
    energy_j += coef["transfer_token_j"] * prefill.pushed_tokens
    energy_j += gpu_busy_j(coef, work_j, gpu_s) - work_j
    duration_s = with_host(env, iteration.duration_s, host_step_s(t, env["table_idx"], *of_host(batch.whole, queries)))
    env["clock_s"] += duration_s
    env["iterations_count"] += 1
    env["busy_s"] += duration_s
    env["gpu_busy_s"] += gpu_s
    env["pim_busy_s"] += first.pim_s + second.pim_s
    env["transfer_s"] += first.moving_s + second.moving_s
    env["transfer_exposed_s"] += first.pim_s + second.pim_s - (first.read_s + second.read_s)
    env["energy_j"] += energy_j
    env["queue_s"] += duration_s * env["waiting_count"]
    env["present_s"] += duration_s * (env["waiting_count"] + env["running_count"])
    env["prefill_tokens"] += prefill.tokens
    env["decode_tokens"] += decode.requests
    lanes = stored_lanes(t.forms, coef)
    if lanes > 1:
        in_pim = decode.requests - decode.hbm_requests
        mean_s = lane_attention_s(t, env["table_idx"], decode.pim_kv_tokens, in_pim, queries) / (lanes - 1)
        env["imbalance_s"] += iteration.slowest_s - mean_s
    env["last_iteration_s"] = duration_s
    env["last_interleaved"] = iteration.interleaved
    env["last_prefill_tokens"], env["last_decode_tokens"] = prefill.tokens, decode.requests
    note_phase(s.sub[e, 0], first)
    note_phase(s.sub[e, 1], second)


@inner
def of_host(whole, queries):
    """(requests, tokens) of a batch."""
    prefill, decode = whole
    return prefill.chunks + decode.requests, prefill.tokens + queries * decode.requests


@inner
def with_host(env, gpu_s, host_s):
    """How long a step takes that was scheduled at ``seen_s``; the next one is scheduled once this one is launched, and
    the one before it has ended."""
    if not env["ahead"]:
        return host_s + gpu_s
    launched_s = env["seen_s"] + host_s
    env["seen_s"] = max(env["clock_s"], launched_s)
    return max(gpu_s, launched_s - env["clock_s"])


@inner
def note_phase(sub, phase):
    """The times of a sub-batch's phase, for who looks at the last iteration."""
    sub["gpu_s"], sub["pim_s"] = phase.gpu_s, phase.pim_s
    sub["prefill_s"], sub["attention_s"] = phase.prefill_s, phase.attention_s
    sub["read_s"], sub["transfer_s"] = phase.read_s, phase.moving_s
