"""What waits."""

from __future__ import annotations

import numpy as np

from l3env.engine.state import PROMPT_BINS, SLACK_HEAP
from l3env.envs.observe.feature import Feature, scales_of, squash
from l3env.jit import helper


class Waiting(Feature):
    """Requests in the queue."""

    waiting_count = "requests in the queue, scale {scale}", 16.0
    waiting_many = "the same, scale {scale}", 256.0
    waiting_work = "prefill time of the queue at the pace, over the TTFT SLO, scale {scale}", 4.0
    waiting_over_free = "tokens of the queue over free KV tokens, scale 1"
    waiting_age = "mean age of the waiting over the TTFT SLO, scale 1"
    waiting_prompt_p10 = "log2 of the 10th percentile of prompts in the queue, over {scale}", PROMPT_BINS
    waiting_prompt_p50 = "log2 of their median, over {scale}", PROMPT_BINS
    waiting_prompt_p90 = "log2 of their 90th percentile, over {scale}", PROMPT_BINS
    waiting_feasible_share = "share of the waiting whose TTFT deadline can still be met; 1 where none waits"
    least_slack = "time until the first of those cannot meet it, over the TTFT SLO, scale 1; 1 where there is none"
    waiting_predicted = "mean predicted output of the waiting, scale {scale}; 0 without a predictor", 256.0


SCALE = scales_of(Waiting)


@helper
def prompt_octaves(s, e, quantile):
    """log2 of a quantile of the prompts in the queue, even within an octave."""
    goal = quantile * s.env[e]["waiting_count"]
    below = 0.0
    for octave in range(PROMPT_BINS):
        here = float(s.prompts[e, octave])
        if here > 0 and below + here >= goal:
            return octave + (goal - below) / here
        below += here
    return 0.0


@helper
def write_waiting(t, s, e, mark, row):
    env = s.env[e]
    waiting = env["waiting_count"]
    row[:] = 0.0
    row[Waiting.waiting_feasible_share], row[Waiting.least_slack] = 1.0, 1.0
    if waiting == 0:
        return
    feasible = s.heap_len[e, SLACK_HEAP]
    row[Waiting.waiting_count] = squash(float(waiting), SCALE.waiting_count)
    row[Waiting.waiting_many] = squash(float(waiting), SCALE.waiting_many)
    row[Waiting.waiting_work] = squash(
        env["waiting_tokens"] * mark["prefill_token_s"], SCALE.waiting_work * env["ttft_slo_s"]
    )
    row[Waiting.waiting_over_free] = squash(float(env["waiting_tokens"]), mark["free_tokens"])
    row[Waiting.waiting_age] = squash(max(env["clock_s"] - env["waiting_arrival_s"] / waiting, 0.0), env["ttft_slo_s"])
    row[Waiting.waiting_prompt_p10] = prompt_octaves(s, e, 0.1) / SCALE.waiting_prompt_p10
    row[Waiting.waiting_prompt_p50] = prompt_octaves(s, e, 0.5) / SCALE.waiting_prompt_p50
    row[Waiting.waiting_prompt_p90] = prompt_octaves(s, e, 0.9) / SCALE.waiting_prompt_p90
    row[Waiting.waiting_feasible_share] = feasible / waiting
    if feasible > 0:
        slack_s = s.heap[e, SLACK_HEAP, s.heap[e, SLACK_HEAP, 0]["item"]]["key"] - env["clock_s"]
        row[Waiting.least_slack] = squash(max(slack_s, 0.0), env["ttft_slo_s"]) if slack_s < np.inf else 1.0
    row[Waiting.waiting_predicted] = squash(env["waiting_predicted_tokens"] / waiting, SCALE.waiting_predicted)
