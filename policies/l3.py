"""The L3 scheduler (arXiv 2504.17584, section 6): predict both devices' times and align them.

Its predictors learn from what the run measures: a random forest for prefill attention, one for the batched FC, and a
linear model for the PIM side. An iteration is put together as the paper says:

1. prefills that have begun go on, whole; every sub-batch takes one more waiting request at a time, whole,
   while the PIM side would wait (T_PIM < T_GPU means room for more decoding requests) and memory lasts; N = 1 request
   a round for MHA, 16 for GQA;
2. decoding requests all take part; each new one joins the sub-batch with fewer members;
3. once memory is full and the PIM side would wait, the last prefill of each sub-batch is chunked so that T_GPU comes
   as close as possible to T_PIM.

Sub-batches interleave unless one batch is predicted to be shorter. Until the predictors have seen enough, there is one
whole prefill a sub-batch. Without PIM there is nothing to align, and it schedules as Sarathi-Serve does.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from l3env.choices import Status
from l3env.engine.state import SUB_BATCHES
from l3env.knobs import Knobs
from l3env.machine.arrays import FIRST_PIM, HBM
from l3env.machine.tables import Tables
from l3env.policies.predictors import Errors, OnlineForest, OnlineLinear
from l3env.policies.sarathi import TOKEN_BUDGET
from l3env.policy.plan import Plan
from l3env.policy.protocol import BasePolicy
from l3env.policy.view import View
from l3env.requests.workload import Workload

MHA_ROUND_COUNT, GQA_ROUND_COUNT = 1, 16
MIN_CHUNK_TOKENS = 128  # a prefill that has begun always goes on by this much
KEEP_FREE_FRAC = 0.01
PEEK_COUNT = 64
LOOK_AGAIN_COUNT = 32  # decode-only iterations between looks at whether to interleave
BUS_BOUND_RATIO = 2.0  # T_PIM below this many times the transfers: at first taken for bus-bound


@dataclass
class Phase:
    """One sub-batch of the iteration being planned."""

    decodes_count: int = 0
    slowest_kv_tokens: float = 0.0  # of the slowest rank
    chunks: dict[int, tuple[int, int]] = field(default_factory=dict)  # request -> (tokens, history)

    @property
    def prefill_tokens(self) -> int:
        return sum(chunk for chunk, _ in self.chunks.values())


@dataclass(frozen=True)
class Load:
    """What both devices have to do in one phase, or in the whole of an iteration that runs as one batch."""

    chunks: list[tuple[int, int]]  # (tokens, history) of each prefill
    fc_tokens: int
    slowest_kv_tokens: float
    decodes_count: int
    pushed_tokens: int  # prefilled tokens whose KV goes to the PIM side

    @property
    def pim_features(self) -> tuple[float, ...]:
        return self.slowest_kv_tokens, self.decodes_count, self.pushed_tokens, self.decodes_count > 0


def loads(phases: list[Phase], interleave: bool, slowest_both_kv_tokens: float = 0.0) -> list[Load]:
    """The phases of an iteration: with two sub-batches the FC batch of each holds the other's decodes.

    One batch waits for the rank that is slowest in both together (``slowest_both_kv_tokens``).
    """
    if not interleave:
        chunks = [chunk for phase in phases for chunk in phase.chunks.values()]
        decodes = sum(phase.decodes_count for phase in phases)
        prefill = sum(phase.prefill_tokens for phase in phases)
        return [Load(chunks, prefill + decodes, slowest_both_kv_tokens, decodes, prefill)]
    return [
        Load(
            list(mine.chunks.values()),
            mine.prefill_tokens + other.decodes_count,
            mine.slowest_kv_tokens,
            mine.decodes_count,
            other.prefill_tokens,
        )
        for mine, other in (phases, reversed(phases))
    ]


class L3(BasePolicy):
    """Alignment-predicting, with predictors learned from the run."""

    source = "arXiv 2504.17584"
    name = "l3"

    def prepare(self, system: Tables, training: Workload | None) -> None:
        self._attention = OnlineForest(2)  # (chunk, history)
        self._fc = OnlineForest(1)  # tokens in the batch
        self._ranks = OnlineLinear(4)  # (KV tokens of the slowest rank, requests, pushed tokens, 1)
        self._buses = OnlineLinear(4)  # the same, where transfers take the time
        self._pim_errors = Errors()
        self._planned: list[Load] | None = None
        self._interleave = True
        self._quiet_count = 0
        self._slowest_both_kv_tokens = 0.0
        self._round_count = MHA_ROUND_COUNT if system.model.gqa_group_count == 1 else GQA_ROUND_COUNT

    def decide(self, view: View) -> Knobs | Plan:
        if not view.system.has_pim:
            return Knobs(prefill_budget_tokens=TOKEN_BUDGET, budget_counts_decodes=True)
        self._learn(view.last_iteration)
        if view.waiting_count == 0 and view.prefilling.size == 0:
            return self._go_on(view)
        self._quiet_count = 0
        phases = self._phases(view)
        admitted, full = self._admit(view, phases)
        if full:
            for i in range(SUB_BATCHES):
                self._align(phases, i)
        self._choose_mode(phases)
        prefill = {r: chunk for phase in phases for r, (chunk, _) in phase.chunks.items()}
        places = {r: place for r, (place, _) in admitted.items()}
        subs = {r: i for r, (_, i) in admitted.items()}
        return Plan(admit=places, prefill=prefill, sub_batch=subs, interleave=self._interleave)

    def _go_on(self, view: View) -> Plan:
        """Nothing but decoding: the mode is looked at again every so often."""
        self._planned = None
        if self._quiet_count % LOOK_AGAIN_COUNT == 0:
            self._choose_mode(self._phases(view))
        self._quiet_count += 1
        return Plan(interleave=self._interleave)

    def figures(self) -> dict[str, float]:
        """Median relative errors on iterations not yet learned from."""
        errors = {"prefill_attention": self._attention.errors, "fc": self._fc.errors, "pim": self._pim_errors}
        return {f"l3_{name}_error_p50": each.quantile(0.5) for name, each in errors.items()}

    # --- predictions

    def _attention_s(self, load: Load) -> float:
        return sum(self._attention.predict_s(*chunk) for chunk in load.chunks if chunk[0])

    def _fc_s(self, load: Load) -> float:
        return self._fc.predict_s(load.fc_tokens) if load.fc_tokens else 0.0

    def _pim_s(self, load: Load) -> float:
        """Ranks and buses work at once: T_PIM is the larger of two linear models."""
        if load.decodes_count == 0 and load.pushed_tokens == 0:
            return 0.0
        return max(model.predict_s(*load.pim_features) for model in (self._ranks, self._buses) if model.ready)

    def _gpu_s(self, load: Load) -> float:
        return self._attention_s(load) + self._fc_s(load)

    @property
    def _ready(self) -> bool:
        return self._attention.ready and self._fc.ready and (self._ranks.ready or self._buses.ready)

    def _choose_mode(self, phases: list[Phase]) -> None:
        """Two sub-batches, or one batch where that is predicted to be shorter: weights are then read once."""
        self._interleave = True
        if self._ready:
            one = loads(phases, False, self._slowest_both_kv_tokens)[0]
            one_s = max(self._attention_s(one), self._pim_s(one)) + self._fc_s(one)
            two_s = sum(max(self._gpu_s(load), self._pim_s(load)) for load in loads(phases, interleave=True))
            self._interleave = two_s <= one_s
        self._planned = loads(phases, self._interleave, self._slowest_both_kv_tokens)

    def _learn(self, measured: dict[str, float]) -> None:
        """What the last planned iteration took."""
        for i, load in enumerate(self._planned or ()):
            attention_s = measured[f"attention_{i}_s"]
            if len(load.chunks) == 1:
                self._attention.learn(attention_s, *load.chunks[0])
            self._fc.learn(measured[f"gpu_{i}_s"] - attention_s, load.fc_tokens)
            self._learn_pim(load, measured[f"pim_{i}_s"], measured[f"transfer_{i}_s"])

    def _learn_pim(self, load: Load, pim_s: float, transfer_s: float) -> None:
        """A measurement teaches the one of the two linear models that it comes from."""
        if self._ready:
            self._pim_errors.add(self._pim_s(load), pim_s)
        if self._ranks.ready and self._buses.ready:
            by_buses = self._buses.predict_s(*load.pim_features) > self._ranks.predict_s(*load.pim_features)
        else:
            by_buses = pim_s < BUS_BOUND_RATIO * transfer_s
        (self._buses if by_buses else self._ranks).learn(pim_s, *load.pim_features)

    # --- planning

    def _phases(self, view: View) -> list[Phase]:
        """Both sub-batches with all decoding requests and the prefills that have begun, whole."""
        rows = view.running
        decoding = rows[rows["status"] == Status.DECODE]
        phases = [Phase(), Phase()]
        self._slowest_both_kv_tokens = slowest_lane(decoding)
        for i, phase in enumerate(phases):
            mine = decoding[decoding["sub_batch"] == i]
            phase.decodes_count = int(mine.size)
            phase.slowest_kv_tokens = slowest_lane(mine)
        for row in view.prefilling:
            history = int(row["kv_tokens"])
            phases[int(row["sub_batch"])].chunks[int(row["idx"])] = (int(row["prefill_left_tokens"]), history)
        return phases

    def _admit(self, view: View, phases: list[Phase]) -> tuple[dict[int, tuple[str, int]], bool]:
        """New requests (request -> place and sub-batch), and whether memory ended it."""
        room = Room(view)
        members = [phase.decodes_count + len(phase.chunks) for phase in phases]
        queue = view.waiting(limit=PEEK_COUNT)
        admitted: dict[int, tuple[str, int]] = {}
        place = 0
        while place < queue.size:
            wanted = [i for i in range(SUB_BATCHES) if self._wants_more(phases, i)]
            if not wanted:
                return admitted, False
            for _ in range(self._round_count):
                i = min(wanted, key=lambda sub: members[sub])
                row = queue[place]
                place_of = room.take(int(row["prefill_left_tokens"]))
                if place_of is None:
                    return admitted, True
                admitted[int(row["idx"])] = place_of, i
                phases[i].chunks[int(row["idx"])] = (int(row["prefill_left_tokens"]), 0)
                members[i] += 1
                place += 1
                if place == queue.size or not self._ready:
                    break
        return admitted, False

    def _wants_more(self, phases: list[Phase], i: int) -> bool:
        """One prefill at least while nothing decodes or is known; then more while the PIM side would wait."""
        if not phases[i].chunks and (not self._ready or phases[i].decodes_count == 0):
            return True
        if not self._ready:
            return False
        load = loads(phases, interleave=True)[i]
        return len(phases[i].chunks) < self._round_count and self._pim_s(load) < self._gpu_s(load)

    def _align(self, phases: list[Phase], i: int) -> None:
        """Chunks the last prefill of a sub-batch so that T_GPU does not exceed T_PIM."""
        phase = phases[i]
        if not self._ready or not phase.chunks or phase.decodes_count == 0:
            return
        last = next(reversed(phase.chunks))
        whole, history = phase.chunks[last]
        goal_s = self._pim_s(loads(phases, interleave=True)[i])
        low, high = min(whole, MIN_CHUNK_TOKENS), whole
        while low < high:
            middle = (low + high + 1) // 2
            phase.chunks[last] = (middle, history)
            if self._gpu_s(loads(phases, interleave=True)[i]) <= goal_s:
                low = middle
            else:
                high = middle - 1
        phase.chunks[last] = (low, history)


def slowest_lane(decoding: NDArray[np.void]) -> float:
    """KV tokens that the fullest rank reads in the next step."""
    there = decoding[decoding["pool"] >= FIRST_PIM]
    return float(np.bincount(there["lane"], weights=there["kv_tokens"] + 1).max()) if there.size else 0.0


class Room:
    """Memory for new requests: on the PIM side, and in HBM for those that no PIM pool holds.

    A share of each PIM pool is kept free, and room for what runs to grow; a request that is alone may take it all.
    """

    def __init__(self, view: View) -> None:
        pools = view.pools
        self._block_tokens = pools.block_tokens
        self._whole_tokens = int(pools.capacity_blocks[FIRST_PIM:].max()) * pools.block_tokens
        self._free = pools.free_tokens[FIRST_PIM:].copy()
        self._hbm_free = int(pools.free_tokens[HBM])
        growth = view.running_count * pools.block_tokens
        self._margin = KEEP_FREE_FRAC * self._whole_tokens + (
            growth if self._free.size == 1 else growth / self._free.size * 2
        )
        self._hbm_margin = growth
        self._alone = view.running_count == 0

    def take(self, tokens: int) -> str | None:
        """Where a request with so many tokens of KV goes; None where there is no room."""
        whole = -(-tokens // self._block_tokens) * self._block_tokens
        alone, self._alone = self._alone, False
        if whole > self._whole_tokens:
            need = whole if alone else whole + self._block_tokens + self._hbm_margin
            if need > self._hbm_free:
                return None
            self._hbm_free -= whole + self._block_tokens
            return "hbm"
        best = int(np.argmax(self._free))
        if not alone and tokens + self._block_tokens > self._free[best] - self._margin:
            return None
        self._free[best] -= tokens + self._block_tokens
        return "pim"
