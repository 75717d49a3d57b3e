"""Prefill of DeepSeek-V3 at saturation against what was published; ``deepseek_day`` goes on to the day's mean.

OI is DeepSeek's open-infra overview (day 6, February 2025); its profile (github.com/deepseek-ai/profile-data) is of the
same month. LMSYS is the reproduction on 96 H100 (blog of 5 May 2025), which also gives the profile's throughput.
RTP-LLM is Alibaba's on H800 (its "DeepSeek Reproduce Tech Report").
"""

from __future__ import annotations

from typing import Any

from l3env import load
from l3env.experiments.reproduce.common import Row, row
from l3env.machine.batch import Chunk
from l3env.machine.costs.experts import DISPATCH_FRAC
from l3env.machine.specs import ModelSpec
from l3env.machine.tables import Tables, compile_tables

FIGURE = "deepseek-v3"
SYSTEM = "system/h800-ep32-prefill"
NODE_GPUS = 8
BATCH_TOKENS = 16_384
PROMPT_TOKENS = 4096

# DeepEP's normal kernels at EP 32 in its README of February 2025: GB/s with what stays in the host counted, which a
# quarter does, of a link of 50
DISPATCH_GB_PER_S, COMBINE_GB_PER_S = 44.0, 47.0
FEBRUARY_UTILISATION_FRAC = 0.75 / 50 / (DISPATCH_FRAC / DISPATCH_GB_PER_S + (1 - DISPATCH_FRAC) / COMBINE_GB_PER_S)

# OI: 608 G input tokens, 56.3 % of them cached, 168 G output tokens, 4,989 KV tokens per output token on average. Of
# equal requests the last is prompt + output / 2
INPUT_TOKENS, OUTPUT_TOKENS, HIT_FRAC, KV_TOKENS = 608e9, 168e9, 0.563, 4989.0
SERVED_PROMPT_TOKENS = KV_TOKENS / (1 + OUTPUT_TOKENS / INPUT_TOKENS / 2)

Batch = list[tuple[int, int]]  # (new tokens, history) of each prompt


def batch_s(tables: Tables, batch: Batch) -> float:
    """An iteration of one GPU that prefills a batch, while all others of its group do the like."""
    return tables.iteration_s(chunks=[Chunk(new, history) for new, history in batch])


def node_tokens_per_s(tables: Tables, batch: Batch) -> float:
    """New tokens of a node per second."""
    return float(NODE_GPUS / tables.tp * sum(new for new, _ in batch) / batch_s(tables, batch))


def whole(prompt_tokens: float, batch_tokens: int = BATCH_TOKENS, hit_frac: float = 0.0) -> Batch:
    """About so many new tokens in equal prompts, a share of each cached."""
    history = round(hit_frac * prompt_tokens)
    new = round(prompt_tokens) - history
    return [(new, history)] * round(batch_tokens / new)


def compiled(model: ModelSpec, **overrides: Any) -> Tables:
    """The prefill unit with some values replaced."""
    return compile_tables(load(SYSTEM, **overrides), model)


def rows(model: ModelSpec) -> list[Row]:
    """All comparisons of prefill."""
    february = {"experts__network__utilisation_frac": FEBRUARY_UTILISATION_FRAC}
    lmsys = {"gpu_link": "link/nvlink4"}  # an H800 is an H100 with a slower NVLink; DeepSeek's kernels on both
    even = {"experts__imbalance_frac": 0.0}
    prompts, half = whole(PROMPT_TOKENS), whole(PROMPT_TOKENS, BATCH_TOKENS // 2)
    then, now = "all-to-all as DeepEP measured it in February 2025", "all-to-all as DeepEP measures it since"
    measured = {"gpu__elementwise_utilisation_frac": load("gpu/h200").elementwise_utilisation_frac}
    kernels = "small kernels at the share of the bandwidth that they reach on an H200"
    own = "imbalance of our router study; theirs is not published"
    profile = "DeepSeek's profile, balanced, 4 K prompts, 16 K tokens a GPU"
    balanced, unbalanced = "LMSYS prefill, 4 nodes of H100, perfect balance", "LMSYS prefill, 4 nodes of H100"
    saturated: list[tuple[str, float, dict[str, Any], Batch, str]] = [
        (profile, 62_700, even | february, prompts, then),
        (profile, 62_700, even | february | measured, prompts, f"{then}; {kernels}"),
        (profile, 62_700, even, prompts, now),
        (balanced, 59_300, even | lmsys, prompts, now),
        (balanced, 59_300, even | lmsys | measured, prompts, f"{now}; {kernels}"),
        (unbalanced, 50_300, lmsys, prompts, f"{now}; {own}"),
        (f"{unbalanced}, prompts of 2 K", 54_543, lmsys, whole(2048), f"{now}; {own}"),
        (f"{unbalanced}, prompts of 1 K", 57_674, lmsys, whole(1024), f"{now}; {own}"),
        ("RTP-LLM prefill, 4 nodes, 2 x 4 K tokens a GPU", 42_600, {}, half, f"{now}; theirs runs over Ethernet"),
    ]
    out = [
        row(FIGURE, case, "input tokens/s a node", paper, node_tokens_per_s(compiled(model, **changed), batch), note)
        for case, paper, changed, batch, note in saturated
    ]
    return out + served(model, compiled(model, **february), then)


def served(model: ModelSpec, tables: Tables, note: str) -> list[Row]:
    """The mix of OI's day as equal prompts on a saturated unit, against the mean over the day."""
    mix = whole(SERVED_PROMPT_TOKENS, hit_frac=HIT_FRAC)
    new_per_s = node_tokens_per_s(tables, mix)
    day = f"the published figure is a day's mean over the nodes in use, the model's is saturated (see OI's day); {note}"
    case = f"OI prefill, prompts of {SERVED_PROMPT_TOKENS:,.0f} tokens, {HIT_FRAC:.1%} cached"
    return [
        row(FIGURE, case, "input tokens/s a node, cached left out", 32_200, new_per_s, day),
        row(FIGURE, case, "input tokens/s a node, cached counted", 73_700, new_per_s / (1 - HIT_FRAC), day),
    ]
