"""Arrivals and what they ask for: running means over some 8 (short) and 128 (long) arrivals."""

from __future__ import annotations

from l3env.envs.observe.feature import Feature, scales_of, share, squash
from l3env.jit import helper


class Arrivals(Feature):
    """Arrivals and what they ask for: running means over some 8 (short) and 128 (long) arrivals."""

    prefill_load_short = "arrival rate x mean prompt x pace, scale 1; short"
    prefill_load_long = "the same, long"
    memory_load = "KV tokens held at that rate if requests decode at their TBT SLO, over capacity, scale 1"
    arrival_surge = "short over long arrival rate, scale 1"
    burstiness_short = "squared coefficient of variation of the gaps, scale 1; short"
    burstiness_long = "the same, long"
    since_arrival = "time since the last arrival over the mean gap, scale 1"
    prompt_mean = "mean prompt of arrivals, scale {scale}", 2048.0
    output_mean = "mean output of finished requests, scale {scale}; 0 before there are any", 256.0
    capacity_requests = "KV tokens of the machine over prompt and output mean, scale {scale}", 64.0


SCALE = scales_of(Arrivals)


@helper
def write_arrivals(s, e, mark, row):
    """With x = work over gap, x / (x + 1) is written as work / (work + gap)."""
    env = s.env[e]
    row[:] = 0.0
    prompt, output = env["prompt_mean_tokens"], env["output_mean_tokens"]
    row[Arrivals.arrival_surge] = 0.5
    if env["arrived_count"] > 1:
        short_s, long_s = env["gap_short_s"], env["gap_long_s"]
        work_s = prompt * mark["prefill_token_s"]
        row[Arrivals.prefill_load_short] = squash(work_s, short_s)
        row[Arrivals.prefill_load_long] = squash(work_s, long_s)
        held = output * mark["tbt_slo_s"] * (prompt + output / 2)
        row[Arrivals.memory_load] = share(held, held + long_s * mark["capacity_tokens"])
        row[Arrivals.arrival_surge] = squash(long_s, short_s) if short_s + long_s > 0 else 0.5
        row[Arrivals.burstiness_short] = share(env["gap_short_s2"] - short_s * short_s, env["gap_short_s2"])
        row[Arrivals.burstiness_long] = share(env["gap_long_s2"] - long_s * long_s, env["gap_long_s2"])
        since_s = max(env["clock_s"] - env["last_arrival_s"], 0.0)
        row[Arrivals.since_arrival] = share(since_s, since_s + long_s)
    row[Arrivals.prompt_mean] = squash(prompt, SCALE.prompt_mean)
    row[Arrivals.output_mean] = squash(output, SCALE.output_mean)
    row[Arrivals.capacity_requests] = (
        squash(mark["capacity_tokens"], SCALE.capacity_requests * (prompt + output)) if prompt > 0 else 1.0
    )
