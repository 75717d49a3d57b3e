"""Computes the observation of an agent; names and ranges are in ``observe.FEATURES``."""

from __future__ import annotations

from l3env.jit import inner, kernel
from l3env.kernels.memory import pim_blocks_used
from l3env.kernels.price import fc_batch_s, tbt_alone_s
from l3env.kernels.queue import next_waiting
from l3env.kernels.schedule import decoding_count, stored_lanes
from l3env.state import NOWHERE, Order


@inner
def squash(value, scale):
    """[0, inf) -> [0, 1)."""
    return value / (value + scale)


@kernel
def write_features(t, s, marks, first, last, out):
    """Features of environments first..last - 1 into ``out`` (E, F), ordered as observe.FEATURES; moves the marks."""
    for e in range(first, last):
        env, mark, row = s.env[e], marks[e], out[e]
        table = env["table_idx"]
        coef = t.coef[table]
        now_s = env["clock_s"]
        i = 0
        row[i] = squash(float(env["waiting_count"]), 64.0)
        row[i + 1] = squash(float(env["waiting_tokens"]), 65536.0)
        head = next_waiting(s, e, Order.FCFS)
        row[i + 2], row[i + 3], row[i + 4] = 0.0, 0.0, 1.0
        if head != NOWHERE:
            req = s.req[e, head]
            used = max(now_s - req["arrival_s"], 0.0) / req["ttft_slo_s"]
            row[i + 2] = squash(used, 1.0)
            row[i + 3] = squash(float(req["prompt_tokens"]), 4096.0)
            row[i + 4] = min(max(1.0 - used - req["ttft_alone_s"] / req["ttft_slo_s"], 0.0), 1.0)
        i = 5
        left = 0
        for j in range(env["prefill_count"]):
            r = s.lists[e, j]["prefill"]
            left += s.req[e, r]["target_tokens"] - s.req[e, r]["prefilled_tokens"]
        decoding_0, decoding_1 = decoding_count(s, e, 0), decoding_count(s, e, 1)
        row[i] = squash(float(env["prefill_count"]), 8.0)
        row[i + 1] = squash(float(left), 16384.0)
        row[i + 2] = squash(float(decoding_0), 64.0)
        row[i + 3] = squash(float(decoding_1), 64.0)
        paused = env["running_count"] - env["prefill_count"] - decoding_0 - decoding_1
        row[i + 4] = squash(float(paused), 16.0)
        i = 10
        pim_used, pim_blocks, fullest, free = 0, 0, 0.0, 0
        for pool in range(coef["pools_count"] if coef["spread_pool"] == 0 else coef["spread_pool"]):
            used_blocks, blocks = s.pool[e, pool]["used"], t.pool_blocks[table, pool]
            free += blocks - used_blocks
            if pool > 0:
                pim_used += used_blocks
                pim_blocks += blocks
                fullest = max(fullest, used_blocks / max(blocks, 1))
        if coef["spread_pool"] > 0:
            free += pim_used - pim_blocks_used(t, s, e)
            pim_used = pim_blocks_used(t, s, e)
        row[i] = s.pool[e, 0]["used"] / max(t.pool_blocks[table, 0], 1)
        row[i + 1] = pim_used / max(pim_blocks, 1)
        row[i + 2] = fullest
        steps = free * coef["block_tokens"] / max(decoding_0 + decoding_1, 1)
        row[i + 3] = squash(steps, 256.0)
        slowest, total = 0.0, 0.0
        for lane in range(1, stored_lanes(t, table)):
            load = s.lane[e, 0, lane]["kv"] + s.lane[e, 1, lane]["kv"]
            slowest = max(slowest, load)
            total += load
        mean = total / max(stored_lanes(t, table) - 1, 1)
        row[i + 4] = squash(slowest / mean - 1.0, 1.0) if mean > 0 else 0.0
        i = 15
        last_s = max(env["last_iteration_s"], 1e-12)
        row[i] = squash(env["last_iteration_s"] / tbt_alone_s(t, table, 1), 4.0)
        row[i + 1] = min(env["last_gpu_0_s"] / last_s, 1.0)
        row[i + 2] = min(env["last_gpu_1_s"] / last_s, 1.0)
        row[i + 3] = min(env["last_pim_0_s"] / last_s, 1.0)
        row[i + 4] = min(env["last_pim_1_s"] / last_s, 1.0)
        i = 20
        busy_s = max(env["busy_s"] - mark["busy_s"], 1e-12)
        row[i] = min(max(1.0 - (env["gpu_busy_s"] - mark["gpu_busy_s"]) / busy_s, 0.0), 1.0)
        row[i + 1] = min(max(1.0 - (env["pim_busy_s"] - mark["pim_busy_s"]) / busy_s, 0.0), 1.0)
        elapsed_s = max(now_s - mark["clock_s"], 1e-9)
        recent = (env["arrived_count"] - mark["arrived_count"]) / elapsed_s
        overall = env["arrived_count"] / max(now_s, 1.0)
        row[i + 2] = squash(recent, 4.0)
        row[i + 3] = squash(overall, 4.0)
        row[i + 4] = squash(recent / max(overall, 1e-9), 1.0)
        i = 25
        finished = env["finished_count"] - mark["finished_count"]
        row[i] = squash(finished / elapsed_s, 4.0)
        row[i + 1] = squash((env["output_tokens"] - mark["output_tokens"]) / elapsed_s, 1024.0)
        row[i + 2] = squash((env["prefill_tokens"] - mark["prefill_tokens"]) / elapsed_s, 8192.0)
        row[i + 3] = squash(float(env["preemptions_count"] - mark["preemptions_count"]), 4.0)
        row[i + 4] = (env["slo_met_count"] - mark["slo_met_count"]) / finished if finished > 0 else 1.0
        i = 30
        fc_one_s = fc_batch_s(t, table, 1)
        row[i] = squash(elapsed_s, 1.0)
        row[i + 1] = float(coef["has_pim"])
        row[i + 2] = squash(float(t.pool_blocks[table, 0] * coef["block_tokens"]), 262144.0)
        row[i + 3] = squash(float(pim_blocks * coef["block_tokens"]), 262144.0)
        row[i + 4] = squash(fc_one_s, 0.02)
        row[i + 5] = squash(fc_batch_s(t, table, 1024) / fc_one_s, 10.0)
        per_lane = pim_blocks * coef["block_tokens"] / max(stored_lanes(t, table) - 1, 1)
        row[i + 6] = squash(per_lane * coef["pim_token_s"], 0.1)
        mark["clock_s"] = now_s
        mark["busy_s"], mark["gpu_busy_s"], mark["pim_busy_s"] = env["busy_s"], env["gpu_busy_s"], env["pim_busy_s"]
        mark["arrived_count"], mark["finished_count"] = env["arrived_count"], env["finished_count"]
        mark["slo_met_count"], mark["preemptions_count"] = env["slo_met_count"], env["preemptions_count"]
        mark["output_tokens"], mark["prefill_tokens"] = env["output_tokens"], env["prefill_tokens"]
