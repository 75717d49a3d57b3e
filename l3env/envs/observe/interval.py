"""What happened since the last look at an environment."""

from __future__ import annotations

from l3env.envs.observe.feature import Feature, scales_of, share, squash
from l3env.jit import helper


class Interval(Feature):
    """What happened since the last look, and in the last iteration."""

    gpu_0_share = "T_GPU of phase 0 over the last iteration"
    gpu_1_share = "T_GPU of phase 1 over the last iteration"
    pim_0_share = "T_PIM of phase 0 over the last iteration"
    pim_1_share = "T_PIM of phase 1 over the last iteration"
    gpu_bubble_share = "GPU idle share of iteration time since the last step"
    pim_bubble_share = "PIM idle share of iteration time since the last step"
    prompt_token_share = "prompt tokens over prompt and output tokens since the last step"
    preemptions_count = "preemptions since the last step, scale {scale}", 4.0
    slo_met_share = "of finished and rejected requests, running mean over some 32; 1 where there are none"
    elapsed = "time since the last step over the mean TBT SLO, scale {scale}", 16.0


SCALE = scales_of(Interval)


@helper
def write_interval(s, e, mark, row):
    """The mark moves."""
    env = s.env[e]
    last_s = env["last_iteration_s"]
    row[Interval.gpu_0_share] = share(s.sub[e, 0]["gpu_s"], last_s)
    row[Interval.gpu_1_share] = share(s.sub[e, 1]["gpu_s"], last_s)
    row[Interval.pim_0_share] = share(s.sub[e, 0]["pim_s"], last_s)
    row[Interval.pim_1_share] = share(s.sub[e, 1]["pim_s"], last_s)
    busy_s = env["busy_s"] - mark["busy_s"]
    row[Interval.gpu_bubble_share] = share(busy_s - (env["gpu_busy_s"] - mark["gpu_busy_s"]), busy_s)
    row[Interval.pim_bubble_share] = share(busy_s - (env["pim_busy_s"] - mark["pim_busy_s"]), busy_s)
    prompts = float(env["prefill_tokens"] - mark["prefill_tokens"])
    row[Interval.prompt_token_share] = share(prompts, prompts + env["output_tokens"] - mark["output_tokens"])
    row[Interval.preemptions_count] = squash(
        float(env["preemptions_count"] - mark["preemptions_count"]), SCALE.preemptions_count
    )
    row[Interval.slo_met_share] = env["slo_met_mean"] if env["finished_count"] + env["rejected_count"] > 0 else 1.0
    row[Interval.elapsed] = squash(env["clock_s"] - mark["clock_s"], SCALE.elapsed * mark["tbt_slo_s"])
    mark["clock_s"] = env["clock_s"]
    mark["busy_s"], mark["gpu_busy_s"], mark["pim_busy_s"] = env["busy_s"], env["gpu_busy_s"], env["pim_busy_s"]
    mark["preemptions_count"] = env["preemptions_count"]
    mark["output_tokens"], mark["prefill_tokens"] = env["output_tokens"], env["prefill_tokens"]
