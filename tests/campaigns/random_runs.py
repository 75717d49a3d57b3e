"""Random machines, requests and knobs from a seed: what ``engine_cases`` draws with Hypothesis, for long campaigns."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from l3env.choices import Budget, Eviction, Order, PimForm, SubBatching, Victim
from l3env.engine.engine import Engine, Slo
from l3env.knobs import KNOB_DTYPE, UNLIMITED, Knobs
from l3env.machine import specs
from l3env.machine.specs.serving_engine import IDEAL
from l3env.machine.tables import Tables, compile_tables
from l3env.requests.workload import Workload
from tests.engine.engine_cases import PAIRS, SHARED_PAIRS, compiled, with_coef, with_memory

RULES = ("schedules_ahead", "blocks_by_chunk", "waits_after_preemption")
SERVED_PAIRS = [pair for pair in PAIRS if pair[0].startswith("gpu-")] + [("l3-dgx-a100", "llama-3-8b")]
FORMS = ("mean-tbt", "mean-tbt", "token-deadlines")


@cache
def served(system: str, model: str, rules: tuple[bool, ...]) -> Tables:
    """A pair under a serving engine with some of the three rules, and host time that counts."""
    engine = dataclasses.replace(
        IDEAL,
        name="random",
        **dict(zip(RULES, rules, strict=True)),
        frontend_s=0.004,
        step_host_s=0.003,
        step_host_request_s=0.0001,
        captured_tokens=(1, 2, 4, 8, 16, 64),
    )
    return compile_tables(
        dataclasses.replace(specs.load(f"system/{system}"), engine=engine), specs.load(f"model/{model}")
    )


@dataclass
class Scene:
    """A machine and the first requests of an episode; ``more`` draws others that share prefixes with them."""

    tables: Tables
    workload: Workload
    slo: Slo
    eviction: Eviction
    longest: tuple[int, int]
    block: int
    rules: tuple[bool, ...] | None

    def engine(self, capacity: int, num_envs: int = 1, *, record: bool = False) -> Engine:
        """An engine with the scene in its first environment."""
        engine = Engine(self.tables, num_envs, capacity, record=record, prefix_cache=self.eviction)
        for e in range(num_envs):
            engine.reset(e, self.workload, slo=self.slo, predicted_tokens=self.workload.output_tokens)
        return engine

    def more(self, rng: np.random.Generator, count: int, from_s: float) -> Workload:
        """Root requests that arrive about a moment, also before it."""
        arrival = np.sort(from_s + rng.uniform(-0.2, 1.0, count) * rng.choice([0.0, 0.1, 3.0])).clip(0.0)
        return requests(rng, count, arrival, self.longest, self.block if self.eviction else 0)


def requests(
    rng: np.random.Generator,
    count: int,
    arrival_s: NDArray[np.float64],
    longest: tuple[int, int],
    block: int,
    dependent: float = 0.0,
) -> Workload:
    """Requests of random lengths, some waiting for others; with ids that follow the branches of a tree."""
    parent = np.array([rng.integers(0, i) if i and rng.random() < dependent else -1 for i in range(count)])
    prompts = rng.integers(1, longest[0] + 1, count)
    workload = Workload.build(
        "random",
        arrival_s,
        prompts,
        np.where(rng.random(count) < 0.1, 1, rng.integers(1, longest[1] + 1, count)),
        parent_idx=parent,
        think_s=np.where(parent >= 0, rng.random(count) * rng.choice([0.0, 0.5, 20.0]), 0.0),
    )
    if not block:
        return workload
    rows = [
        (rng.integers(0, 3, prompt // block) * (rng.random(prompt // block) < 0.3)).tolist()
        for prompt in prompts.tolist()
    ]
    ids = [fork for row in rows for fork in row]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return dataclasses.replace(
        workload, prefix_ids=np.array(ids, dtype=np.int64), prefix_offsets=offsets, prefix_block_tokens=block
    )


def pools(rng: np.random.Generator, tables: Tables, longest_tokens: int) -> Tables:
    """The machine with pools for less than one to a few of the longest requests, in blocks of 1 to 32 tokens."""
    block = int(rng.choice([1, 2, 3, 5, 8, 16, 32]))
    tokens = longest_tokens * rng.choice([1.0, 1.05, 1.3, 1.7, 2.5, 4.0, 20.0])
    parts = rng.choice([1.0, 1.0, 1.1, 0.7, 1.5], tables.arrays.pool_blocks.shape[1])
    sizes = [max(math.ceil(tokens * part / block), 1) for part in parts.tolist()]
    if tables.arrays.pool_blocks[0, 0] == 0:
        sizes[0] = 0
    if decompressed := int(tables.arrays.coef["decompressed_pool"][0]):
        share = float(rng.choice([1.0, 1.3, 2.5]))
        sizes[decompressed] = int(min(sizes[1:decompressed]) / share)
        tables = with_coef(tables, decompressed_share=share)
    return with_memory(tables, block, sizes)


def scene(rng: np.random.Generator, most: int = 40) -> Scene:
    """A third under a serving engine's rules, a third of the others with a prefix cache."""
    rules, eviction = None, Eviction.OFF
    shared = rng.random() < 1 / 3
    if rng.random() < 1 / 3:
        rules = tuple(bool(flag) for flag in rng.integers(0, 2, 3))
        tables = served(*SERVED_PAIRS[rng.integers(len(SERVED_PAIRS))], rules)
    else:
        pairs = SHARED_PAIRS if shared else PAIRS
        tables = compiled(*pairs[rng.integers(len(pairs))])
    if shared:
        eviction = Eviction(int(rng.integers(1, len(Eviction))))
    longest = (int(rng.choice([10, 40, 120, 400])), int(rng.choice([20, 60, 200])))
    count = int(rng.integers(1, most + 1))
    arrival = np.sort(rng.random(count)) * rng.choice([0.05, 0.3, 1.0, 3.0, 30.0])
    arrival[: count // 2] *= rng.integers(0, 2)
    block = int(rng.choice([1, 3, 4, 16, 32]))
    workload = requests(rng, count, arrival, longest, block if eviction else 0, float(rng.choice([0.0, 0.3, 0.9])))
    scale = float(rng.choice([1.001, 1.5, 5.0, 100.0]))
    slo = Slo(scale, scale, form=str(rng.choice(FORMS)))
    return Scene(pools(rng, tables, sum(longest)), workload, slo, eviction, longest, block, rules)


def knobs(rng: np.random.Generator) -> Knobs:
    """All that can be set."""

    def one(*values):
        return values[rng.integers(len(values))]

    budgets = (Budget.UNLIMITED, 1, 7, 32, 100, 512, Budget.ALIGN, Budget.ALIGN_WHEN_FULL)
    return Knobs(
        admit_max_count=one(UNLIMITED, UNLIMITED, 0, 1, 3),
        running_max_count=one(UNLIMITED, UNLIMITED, 1, 4, 16),
        chunk_max_tokens=one(UNLIMITED, UNLIMITED, 1, 13, 64),
        prefill_budget_tokens=one(*budgets),
        budget_counts_decodes=one(False, True),
        prefill_first=one(False, True),
        hbm_share_frac=one(0.0, 0.0, 0.1, 0.5, 0.9, 1.0),
        order=one(*Order),
        headroom_frac=one(0.0, 0.01, 0.1, 0.5, 1.0),
        reserve_predicted=one(False, True),
        sub_batching=one(*SubBatching),
        victim=one(*Victim),
        pim_form=one(*PimForm),
        multi_token=one(False, True),
        eviction=one(Eviction.OFF, Eviction.OFF, *Eviction),
        prefill_in_order=one(False, False, True),
    )


def rows_of(settings: list[Knobs]) -> NDArray[np.void]:
    """The rows that kernels read."""
    rows = np.zeros(len(settings), KNOB_DTYPE)
    for place, each in enumerate(settings):
        each.write(rows, place)
    return rows
