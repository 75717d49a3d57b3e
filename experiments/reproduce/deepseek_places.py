"""Where decode attention should live: tokens per second of each place over context and batch, by running the engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from l3env import FixedKnobs, Knobs, PimForm, SubBatching, Workload, load
from l3env.engine.engine import Engine
from l3env.engine.kernels.run import Until
from l3env.machine.tables import Tables, compile_tables
from l3env.policies.placement import HEADROOM_FRAC, AdaptivePlacement
from l3env.policy.protocol import Policy
from l3env.policy.view import View

MODELS = ("gpt-175b", "qwen-72b", "deepseek-v3")  # MHA, GQA-8, MLA
SYSTEMS = ("l3-dgx-a100", "l3-dgx-h200")
CONTEXTS = (512, 4096, 32_768)
BATCHES = (8, 64, 512)
STEPS = 16
BASE = Knobs(headroom_frac=HEADROOM_FRAC, sub_batching=SubBatching.ADAPTIVE, multi_token=False)


def fixed_places(tables: Tables) -> dict[str, Policy]:
    """Policies that put all KV in one place."""
    pim = replace(BASE, hbm_share_frac=0.0)
    places: dict[str, Policy] = {"hbm": FixedKnobs("hbm", replace(BASE, hbm_share_frac=1.0))}
    places["pim"] = FixedKnobs("pim", pim)
    if tables.model.mla is not None:
        places["pim-decompressed"] = FixedKnobs("pim-decompressed", replace(pim, pim_form=PimForm.DECOMPRESSED))
    return places


def decode_tokens_per_s(tables: Tables, policy: Policy, batch: int, context_tokens: int) -> float:
    """Rate of decode steps once every request that fits is there; 0 where none fits.

    ``batch`` requests of the same prompt for each replica are there from the start.
    """
    workload = Workload.build("equal", np.zeros(batch), np.full(batch, context_tokens), np.full(batch, 40 * STEPS))
    engine = Engine(tables, 1, batch)
    policy.prepare(tables, None)
    engine.reset(0, workload)
    engine.await_work(0, 1)
    env = engine.state.env[0]
    for _ in range(STEPS):  # until nothing prefills any more
        decision = policy.decide(View(engine, 0))
        assert isinstance(decision, Knobs)
        decision.write(engine.knobs, 0)
        engine.run(0, Until.ITERATIONS, 1)
        if env["prefill_count"] == 0 and env["running_count"] > 0 and env["last_prefill_tokens"] == 0:
            break
    started, tokens, prefilled = float(env["clock_s"]), int(env["output_tokens"]), int(env["prefill_tokens"])
    engine.run(0, Until.ITERATIONS, STEPS)
    if env["prefill_tokens"] != prefilled or env["clock_s"] == started:
        return 0.0
    return (int(env["output_tokens"]) - tokens) / (float(env["clock_s"]) - started)


@dataclass(frozen=True)
class Cell:
    """One cell of the table: tokens per second of a replica for each place, and for the policy that chooses."""

    system: str
    model: str
    context_tokens: int
    batch: int
    rates: dict[str, float]
    adaptive: float

    @property
    def best(self) -> str:
        return max(self.rates, key=lambda place: self.rates[place])

    @property
    def adaptive_ratio(self) -> float:
        """Adaptive over the best fixed place."""
        return self.adaptive / self.rates[self.best]


def cells() -> Iterator[Cell]:
    """The table, for one replica of each model."""
    for system, model in product(SYSTEMS, MODELS):
        tables = compile_tables(load(f"system/{system}"), load(f"model/{model}"))
        for context in CONTEXTS:
            for batch in BATCHES:
                places = fixed_places(tables)
                rates = {name: decode_tokens_per_s(tables, each, batch, context) for name, each in places.items()}
                adaptive = decode_tokens_per_s(tables, AdaptivePlacement(), batch, context)
                yield Cell(system, model, context, batch, rates, adaptive)
