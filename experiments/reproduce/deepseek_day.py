"""DeepSeek's published mean of a day's prefill, step by step from saturation: unequal prompts, then a load that swings.

What is published, computed and assumed stands in each row's note. OI is the open-infra overview (day 6, February 2025).
"""

from __future__ import annotations

from itertools import islice

import numpy as np

from l3env.experiments.gpu.validation import plain
from l3env.experiments.reproduce import deepseek_traffic as traffic
from l3env.experiments.reproduce.common import Row, row
from l3env.experiments.reproduce.deepseek_prefill import (
    BATCH_TOKENS,
    FEBRUARY_UTILISATION_FRAC,
    FIGURE,
    HIT_FRAC,
    INPUT_TOKENS,
    NODE_GPUS,
    PROMPT_TOKENS,
    SERVED_PROMPT_TOKENS,
    Batch,
    compiled,
)
from l3env.machine import price
from l3env.machine.arrays import fc_grid_tokens
from l3env.machine.batch import Chunk
from l3env.machine.costs.experts import beside_s
from l3env.machine.specs import ModelSpec
from l3env.machine.tables import Tables
from l3env.units import GB

DAY_TOKENS_PER_S, NEW_TOKENS_PER_S = 73_700, 32_200  # of a node on average, OI: with cached tokens and without
MOST_NODES, MEAN_NODES = 278, 226.75  # OI, prefill and decode together
UNIT_GPUS, UNIT_NODES = 32, 4
UNITS = round(INPUT_TOKENS / 86_400 / DAY_TOKENS_PER_S / UNIT_NODES)  # of prefill: 24
ITERATIONS, PROMPTS = 96, 40_000  # of a unit; of which as many as these iterations need are used
LOAD, HOURS = "deepseek-r1, prompt tokens", "1"

LENGTHS = {
    "equal prompts": (traffic.equal_prompts, "prompts of 4,383 tokens, as the day's totals imply for equal requests"),
    "prompts and hits as in a chat service": (
        traffic.chat_prompts,
        "new and cached tokens as they occur together in Mooncake's (Kimi's) trace, at the day's means: assumed of "
        "DeepSeek, which publishes only the means",
    ),
    "prompts as in an R1 service": (
        traffic.reasoning_prompts,
        "prompts as in ServeGen's DeepSeek-R1 service, at the day's mean and cut at 64 K; 56.3 % of each cached: "
        "assumed, since the trace has no hits",
    ),
}
# balancer: units it deals over, the longest piece of a prompt, whether all GPUs get the mean, what that is
BALANCERS = {
    "dealt within a unit": (1, BATCH_TOKENS, False, "longest first over 32 GPUs, whole up to 16 K new tokens"),
    "dealt within a unit in pieces of 4 K": (1, PROMPT_TOKENS, False, "longest first over 32 GPUs"),
    "dealt over 24 units": (
        UNITS,
        BATCH_TOKENS,
        False,
        "like prompts to the same unit, then longest first over its 32 GPUs, whole up to 16 K new tokens",
    ),
    "perfect balance": (1, BATCH_TOKENS, True, "the bound of any balancer"),
}


def attention_s(tables: Tables, batch: Batch) -> np.ndarray:
    """(N,) core attention of each prompt."""
    return np.array([plain(price.prefill_work_s)(tables.arrays, 0, *prompt) for prompt in batch])


def unit_s(tables: Tables, shares: list[Batch], *, even: bool = False) -> float:
    """An iteration of a unit, a batch for each GPU.

    Every layer waits for the slowest GPU before its experts, and for the one that sends most tokens; experts compute
    and receive what all have sent. With ``even`` every GPU has the mean of all.
    """
    arrays, coef, grid = tables.arrays, tables.arrays.coef[0], fc_grid_tokens()
    tokens = np.array([sum(new for new, _ in share) for share in shares], dtype=float)
    alone = [tables.iteration(chunks=[Chunk(new, history) for new, history in share]).phases[0] for share in shares]
    own_s = np.array([each.attention_s + each.back_s for each in alone]) - np.interp(tokens, grid, arrays.experts_s[0])
    experts = tables.system.experts
    assert experts is not None
    mean = tokens.mean()
    sent = mean if even else max(mean, tokens.max() / (1 + experts.imbalance_frac))  # the fullest receives as much
    experts_s, comm_s = (
        float(np.interp(at, grid, t[0])) for at, t in ((mean, arrays.experts_s), (sent, arrays.comm_s))
    )
    other_s = float(own_s.mean() if even else own_s.max())
    return float(beside_s(other_s + experts_s, experts_s, comm_s, coef["dispatch_frac"], coef["comm_sm_frac"]))


def node_tokens_per_s(tables: Tables, prompts: Batch, units: int, chunk_tokens: int, *, even: bool = False) -> float:
    """New tokens of a node per second at saturation."""
    tokens, time_s = 0.0, 0.0
    for pool in islice(traffic.batches(prompts, units * UNIT_GPUS * BATCH_TOKENS, chunk_tokens), ITERATIONS // units):
        costs = np.column_stack([attention_s(tables, pool), [float(new) for new, _ in pool]])
        for unit in traffic.alike(costs[:, 0], costs[:, 1], units):
            shares = [[pool[unit[item]] for item in gpu] for gpu in traffic.deal(costs[unit], UNIT_GPUS)]
            time_s += unit_s(tables, shares, even=even)
        tokens += costs[:, 1].sum()
    return tokens / time_s * NODE_GPUS / UNIT_GPUS


def rows(model: ModelSpec) -> list[Row]:
    """The load, the means of the day, and what is read from disk meanwhile."""
    tables = compiled(model, experts__network__utilisation_frac=FEBRUARY_UTILISATION_FRAC)
    out = load()
    served_frac = traffic.stored()["load"][LOAD]["served_frac"][HOURS]
    means = (1 - HIT_FRAC) * SERVED_PROMPT_TOKENS, HIT_FRAC * SERVED_PROMPT_TOKENS
    for lengths, (draw, what) in LENGTHS.items():
        prompts = draw(PROMPTS, *means)
        for balancer, (units, chunk_tokens, even, how) in BALANCERS.items():
            if draw is traffic.equal_prompts and balancer != "dealt within a unit":
                continue  # as good as the same
            full = node_tokens_per_s(tables, prompts, units, chunk_tokens, even=even)
            note = f"computed: {full:,.0f} at saturation x {served_frac:.3f} of the load; {what}; {how}"
            case = f"OI's day, {lengths}, {balancer}"
            out.append(
                row(FIGURE, case, "input tokens/s a node, cached left out", NEW_TOKENS_PER_S, full * served_frac, note)
            )
    return out + disk(model)


def load() -> list[Row]:
    """How a load that swings is served, and whether it swings as DeepSeek's does."""
    found = traffic.stored()["load"]
    mine = found[LOAD]
    others = ", ".join(f"{each['served_frac'][HOURS]:.2f} ({name})" for name, each in found.items() if name != LOAD)
    hours = ", ".join(f"{frac:.2f} ({each} h)" for each, frac in mine["served_frac"].items() if each != HOURS)
    note = (
        "computed from ServeGen's DeepSeek-R1 service in windows of 600 s; assumed: nodes for each hour's fullest "
        f"window; other intervals {hours}; other loads {others}"
    )
    case = "OI's day, load"
    nodes = "published of prefill and decode; ours the same load, nodes for each hour's fullest window"
    return [
        row(FIGURE, case, "mean load over capacity", None, mine["served_frac"][HOURS], note),
        row(
            FIGURE,
            "OI's day, nodes over the day",
            "mean over most",
            MEAN_NODES / MOST_NODES,
            mine["capacity_frac"][HOURS],
            nodes,
        ),
    ]


def disk(model: ModelSpec) -> list[Row]:
    """Cached KV comes from disks over the network (3FS)."""
    read = HIT_FRAC * DAY_TOKENS_PER_S * model.kv_bytes_per_token / GB
    note = "cached tokens of the day's mean x 70,272 bytes; a client of 3FS reads up to 43 GB/s: not a limit"
    return [row(FIGURE, "OI's day, cached KV from disk", "GB/s a node", None, read, note)]
