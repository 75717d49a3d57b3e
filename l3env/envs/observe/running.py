"""What runs: prompts under way, and the decoding requests by their sums."""

from __future__ import annotations

from l3env.engine.kernels.drafts import classes_count
from l3env.engine.kernels.memory import decoding_count
from l3env.engine.state import FINISH_HEAP, SUB_BATCHES
from l3env.envs.observe.feature import Feature, around_half, deviation_share, scales_of, share, squash
from l3env.jit import helper


class Running(Feature):
    """What runs."""

    prefilling_count = "requests in prefill, scale {scale}", 8.0
    prefill_left_work = "time of what is left of their prompts at the pace, over the TTFT SLO, scale 1"
    decoding_0_count = "decoding requests of sub-batch 0, scale {scale}", 64.0
    decoding_1_count = "decoding requests of sub-batch 1, scale {scale}", 64.0
    paused_count = "requests paused, scale {scale}", 16.0
    decoded_mean = "mean tokens emitted by the decoding requests, scale {scale}", 256.0
    decoded_spread = "their standard deviation over mean plus standard deviation"
    kv_mean = "mean KV tokens of the decoding requests, scale {scale}", 2048.0
    kv_spread = "their standard deviation over mean plus standard deviation"
    late_share = "share of the decoding requests whose first token missed its deadline"
    ahead = "tokens that they are ahead of the mean TBT of their SLO, on average: 0.5 + 0.5 x / (|x| + {scale})", 16.0
    predicted_left = "their mean predicted output left, scale {scale}; 0 without a predictor", 256.0


SCALE = scales_of(Running)


@helper
def write_running(s, e, mark, row):
    env = s.env[e]
    count_0, count_1 = decoding_count(s, e, 0), decoding_count(s, e, 1)
    count = count_0 + count_1
    row[:] = 0.0
    row[Running.prefilling_count] = squash(float(env["prefill_count"]), SCALE.prefilling_count)
    row[Running.prefill_left_work] = squash(env["prefill_left_tokens"] * mark["prefill_token_s"], env["ttft_slo_s"])
    row[Running.decoding_0_count] = squash(float(count_0), SCALE.decoding_0_count)
    row[Running.decoding_1_count] = squash(float(count_1), SCALE.decoding_1_count)
    row[Running.paused_count] = squash(float(env["running_count"] - env["prefill_count"] - count), SCALE.paused_count)
    row[Running.ahead] = 0.5
    mark["tbt_slo_s"] = env["tbt_slo_s"]
    if count == 0:
        return
    age, age2, kv, kv2, predicted, late, slo_s, due_s = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for sub in range(SUB_BATCHES):
        for draft in range(classes_count(s.lane_class)):
            group = s.group[e, sub, draft]
            members = float(s.heap_len[e, FINISH_HEAP + sub + SUB_BATCHES * draft])
            clock = float(group["clock"])
            age += group["age_sum"] + clock * members
            age2 += group["age_sum2"] + 2 * clock * group["age_sum"] + clock * clock * members
            kv += group["kv_sum"] + clock * members
            kv2 += group["kv_sum2"] + 2 * clock * group["kv_sum"] + clock * clock * members
            predicted += group["predicted_sum"]
            late += group["late_count"]
            slo_s += group["tbt_slo_s"]
            due_s += group["due_s"] + clock * group["tbt_slo_s"]
    mark["tbt_slo_s"] = slo_s / count
    row[Running.decoded_mean] = squash(age / count, SCALE.decoded_mean)
    row[Running.decoded_spread] = deviation_share(age / count, age2 / count)
    row[Running.kv_mean] = squash(kv / count, SCALE.kv_mean)
    row[Running.kv_spread] = deviation_share(kv / count, kv2 / count)
    row[Running.late_share] = share(late, float(count))
    ahead_tokens = (due_s - count * env["clock_s"]) / slo_s
    row[Running.ahead] = around_half(ahead_tokens, SCALE.ahead)
    row[Running.predicted_left] = squash(max(predicted - age, 0.0) / count, SCALE.predicted_left)
