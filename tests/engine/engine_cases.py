"""Small random machines, workloads and knobs for the engine's tests: presets with memory for a few requests only."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from hypothesis import strategies as st

from l3env.choices import Budget, Eviction, Order, PimForm, Victim
from l3env.engine.engine import Engine, Slo
from l3env.knobs import UNLIMITED, Knobs
from l3env.machine import specs
from l3env.machine.tables import Tables, compile_tables
from l3env.requests.workload import Workload

# MHA (one lane) and GQA (a lane per rank, a pool per channel) on every kind of system
PAIRS = (
    ("gpu-dgx-a100", "llama-2-7b"),
    ("gpu-dgx-a100", "qwen-72b"),
    ("l3-dgx-a100", "llama-2-7b"),
    ("l3-dgx-a100", "llama-3-8b"),
    ("l3-dgx-a100", "gpt-175b"),
    ("l3-dgx-a100", "qwen-72b"),
    ("hbm-pim-dgx-a100", "llama-2-7b"),
    ("hbm-pim-ext-dgx-a100", "llama-3-8b"),
    ("rank-pim-dgx-a100", "llama-3-8b"),
    ("cpu-offload-dgx-a100", "llama-2-7b"),
    ("l3-dgx-h200", "deepseek-v3"),  # a latent that may lie decompressed, and a token guessed in each step
    ("l3-h800-ep144-decode", "deepseek-v3"),  # and an all-to-all that computing hides
    ("l3-h800-ep32-prefill", "deepseek-v3"),  # in phases, on some of the multiprocessors
)


# a prefix cache beside two forms of KV in the same memory is refused; guesses without them stay
SHARED_PAIRS = [*(pair for pair in PAIRS if pair[1] != "deepseek-v3"), ("gpu-dgx-h200", "deepseek-v3")]


@cache
def compiled(system: str, model: str) -> Tables:
    return compile_tables(specs.load(f"system/{system}"), specs.load(f"model/{model}"))


def with_arrays(tables: Tables, **changes) -> Tables:
    """The same pair with some arrays replaced."""
    return dataclasses.replace(tables, arrays=tables.arrays._replace(**changes))


def with_coef(tables: Tables, **changes) -> Tables:
    """The same pair with some coefficients replaced."""
    coef = tables.arrays.coef.copy()
    for name, value in changes.items():
        coef[name] = value
    return with_arrays(tables, coef=coef)


def with_memory(tables: Tables, block_tokens: int, pool_blocks) -> Tables:
    """The same pair with other block and pool sizes."""
    blocks = np.array([pool_blocks], dtype=np.int64)
    return with_arrays(with_coef(tables, block_tokens=block_tokens), pool_blocks=blocks)


@dataclass(frozen=True, repr=False)
class Case:
    """A machine and what it is to serve."""

    tables: Tables
    workload: Workload
    predicted_tokens: np.ndarray
    slo: Slo
    acceptance_frac: np.ndarray | None = None  # of guessed tokens, where the model guesses
    eviction: Eviction = Eviction.OFF

    def __repr__(self) -> str:
        coef, w = self.tables.arrays.coef, self.workload
        return (
            f"Case({self.tables.system.name}, {self.tables.model.name}, block={coef['block_tokens'][0]}, "
            f"pools={self.tables.arrays.pool_blocks[0].tolist()}, arrival={w.arrival_s.tolist()}, "
            f"prompt={w.prompt_tokens.tolist()}, output={w.output_tokens.tolist()}, parent={w.parent_idx.tolist()}, "
            f"think={w.think_s.tolist()}, predicted={self.predicted_tokens.tolist()}, {self.slo}, "
            f"{self.eviction.name}, ids={w.prefix_ids.tolist()}, offsets={w.prefix_offsets.tolist()}, "
            f"prefix_block={w.prefix_block_tokens})"
        )

    def _repr_pretty_(self, printer, cycle) -> None:  # what Hypothesis prints
        printer.text(repr(self))

    def engine(self, *, record: bool = True) -> Engine:
        engine = Engine(self.tables, 1, len(self.workload), record=record, prefix_cache=self.eviction)
        engine.reset(
            0,
            self.workload,
            slo=self.slo,
            predicted_tokens=self.predicted_tokens,
            acceptance_frac=self.acceptance_frac,
        )
        return engine


@st.composite
def workloads(draw, max_requests: int = 40, max_output: int = 60) -> Workload:
    """Arrivals from all at once to sparse, some requests waiting for others."""
    count = min(draw(st.sampled_from([1, 2, 3, 4, 6, 9, 13, 20, 30, 40])), max_requests)
    seed = draw(st.integers(0, 2**32 - 1))
    spread_s = draw(st.sampled_from([0.05, 0.3, 1.0, 3.0, 30.0, 1000.0]))
    children = draw(st.sampled_from([0.0, 0.0, 0.3, 0.9]))
    rng = np.random.default_rng(seed)
    arrival = np.sort(rng.random(count)) * spread_s
    if draw(st.booleans()):
        arrival[: count // 2] = 0.0  # present from the start
    longest = draw(st.sampled_from([10, 40, 120, 400]))
    parent = np.array([rng.integers(0, i) if i and rng.random() < children else -1 for i in range(count)])
    return Workload.build(
        "random",
        arrival,
        rng.integers(1, longest + 1, count),
        np.where(rng.random(count) < 0.1, 1, rng.integers(1, max_output + 1, count)),
        parent_idx=parent,
        think_s=np.where(parent >= 0, rng.random(count) * draw(st.sampled_from([0.0, 0.5, 50.0])), 0.0),
        recorded_floor=draw(st.booleans()),
    )


@st.composite
def shared_prompts(draw, **sizes) -> Workload:
    """The same with prefix ids: prompts follow the branches of a tree; a last block in part has an id, or has none."""
    workload = draw(workloads(**sizes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.sampled_from([1, 3, 4, 16, 32]))
    branches = draw(st.sampled_from([1, 2, 3]))
    with_ids = draw(st.sampled_from([1.0, 1.0, 0.6]))
    whole_only = draw(st.booleans())
    rows = []
    for prompt in workload.prompt_tokens.tolist():
        count = prompt // size if whole_only else -(-prompt // size)
        forks = rng.integers(0, branches, count) * (rng.random(count) < 0.3)  # mostly the same turn as others
        rows.append(forks.tolist() if rng.random() < with_ids else [])
    ids = [fork for row in rows for fork in row]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return dataclasses.replace(
        workload, prefix_ids=np.array(ids, dtype=np.int64), prefix_offsets=offsets, prefix_block_tokens=size
    )


@st.composite
def machines(draw, longest_tokens: int, pairs=PAIRS) -> Tables:
    """A preset whose pools hold from less than one to a few of the longest requests, in blocks of 1 to 32 tokens."""
    tables = compiled(*draw(st.sampled_from(pairs)))
    block = draw(st.sampled_from([1, 2, 3, 5, 8, 16, 32]))
    tokens = longest_tokens * draw(st.sampled_from([1.0, 1.05, 1.3, 1.7, 2.5, 4.0, 20.0]))
    pools = tables.arrays.pool_blocks.shape[1]
    parts = draw(st.lists(st.sampled_from([1.0, 1.0, 1.1, 0.7, 1.5]), min_size=pools, max_size=pools))
    sizes = [max(math.ceil(tokens * part / block), 1) for part in parts]
    if tables.arrays.pool_blocks[0, 0] == 0:
        sizes[0] = 0  # no KV in HBM on this system
    decompressed = int(tables.arrays.coef["decompressed_pool"][0])
    if decompressed:  # decompressed KV in the memory of the pools before it
        share = draw(st.sampled_from([1.0, 1.3, 2.5]))  # never less: what fits decompressed also fits as stored
        sizes[decompressed] = int(min(sizes[1:decompressed]) / share)
        tables = with_coef(tables, decompressed_share=share)
    return with_memory(tables, block, sizes)


@st.composite
def cases(draw, pairs=PAIRS, shared: bool = False, **sizes) -> Case:
    workload = draw(shared_prompts(**sizes) if shared else workloads(**sizes))
    tables = draw(
        machines(int((workload.prompt_tokens + workload.output_tokens).max()), SHARED_PAIRS if shared else pairs)
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["none", "noisy", "truth"]))
    truth = workload.output_tokens
    noisy = np.maximum((truth * rng.uniform(0.3, 2.0, truth.size)).astype(np.int64), 1)
    predicted = {"none": np.ones_like(truth), "noisy": noisy, "truth": truth}[kind]
    # at exactly 1 the last bit of a sum would decide what is late
    scale = draw(st.sampled_from([1.001, 1.5, 5.0, 100.0]))
    absolute = draw(st.sampled_from([None, None, 0.05, 2.0]))
    acceptance_frac = rng.choice([0.0, 0.3, 0.5, 0.85, 1.0], truth.size)
    eviction = draw(st.sampled_from(list(Eviction)[1:])) if shared else Eviction.OFF
    return Case(tables, workload, predicted, Slo(scale, scale, absolute, absolute), acceptance_frac, eviction)


def knobs(*, align: bool = True, headroom=(0.0, 0.01, 0.1, 0.5, 1.0)) -> st.SearchStrategy[Knobs]:
    """All that can be set; the budgets that follow the machine's speed only where asked for."""
    budgets = [Budget.UNLIMITED, 1, 7, 32, 100, 512]
    budgets += [Budget.ALIGN, Budget.ALIGN_WHEN_FULL] if align else []
    return st.builds(
        Knobs,
        admit_max_count=st.sampled_from([UNLIMITED, UNLIMITED, 0, 1, 3]),
        prefill_budget_tokens=st.sampled_from(budgets),
        budget_counts_decodes=st.booleans(),
        prefill_first=st.booleans(),
        hbm_share_frac=st.sampled_from([0.0, 0.0, 0.1, 0.5, 0.9, 1.0]),
        order=st.sampled_from(list(Order)),
        headroom_frac=st.sampled_from(headroom),
        reserve_predicted=st.booleans(),
        sub_batching=st.sampled_from([True, True, False]),
        victim=st.sampled_from(list(Victim)),
        pim_form=st.sampled_from(list(PimForm)),
        multi_token=st.booleans(),
        prefill_in_order=st.booleans(),
    )
