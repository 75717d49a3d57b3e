"""FastServe's skip-join multi-level feedback queue (arXiv 2305.05920; LLMServe/FastServe): whoever has run long gives
way, with no need of lengths.

Level i has a quantum of 10 ms x 2^i. A request joins the first level whose quantum covers its prefill alone. Each
iteration serves the levels from the top, up to a batch and a budget of tokens; one that has used up its level's quantum
goes down a level, to the front. Every 1000 iterations whoever has not run for 3 s goes to the top.

Differs: the paper swaps the KV of low levels to the host and prefetches it; here who gives way pauses and keeps its
memory, and where memory runs over the last in order is computed again. Prompts may be cut to the budget.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from l3env.machine.tables import Tables
from l3env.policies.composing import Composing, served_by
from l3env.policy.plan import Plan
from l3env.policy.view import View
from l3env.requests.workload import Workload

QUANTUM_S, GROWTH = 0.01, 2.0
BATCH_COUNT, BUDGET_TOKENS = 16, 2048  # of the authors' artifact
RESCUE_EVERY_COUNT, STARVED_S = 1000, 3.0


class Standing:
    """Where a request stands in the queues."""

    def __init__(self, level: int, place: int, now_s: float) -> None:
        self.level, self.place, self.used_s, self.last_ran_s = level, place, 0.0, now_s


class FastServe(Composing):
    """Levels of doubling quanta, joined by prefill time; who has run long pauses."""

    source = "FastServe, arXiv 2305.05920"
    signals = "prefill time alone"
    name = "fastserve"

    def __init__(
        self,
        quantum_s: float = QUANTUM_S,
        batch_count: int = BATCH_COUNT,
        budget_tokens: int = BUDGET_TOKENS,
        rescue_every_count: int = RESCUE_EVERY_COUNT,
        starved_s: float = STARVED_S,
    ) -> None:
        super().__init__(budget_tokens, batch_count)
        self._quantum_s, self._rescue_every_count, self._starved_s = quantum_s, rescue_every_count, starved_s

    def prepare(self, system: Tables, training: Workload | None) -> None:
        self._standing: dict[int, Standing] = {}
        self._ran: list[int] = []
        self._iterations_count = self._fronts_count = self._backs_count = 0

    def level_of(self, prefill_s: float) -> int:
        """The first level whose quantum covers a prefill."""
        return max(math.ceil(math.log(prefill_s / self._quantum_s, GROWTH)), 0)

    def decide(self, view: View) -> Plan:
        rows = view.present
        self._charge(view.last_iteration["iteration_s"], view.now_s)
        self._join(rows, view.now_s)
        standing = [self._standing[idx] for idx in rows["idx"].tolist()]
        order = sorted(range(rows.size), key=lambda i: (standing[i].level, standing[i].place))
        plan = self.compose(view, rows[order])
        self._ran = served_by(view, plan)
        return plan

    def _charge(self, iteration_s: float, now_s: float) -> None:
        """The last iteration counts for those that it served; who has used up its quantum goes down."""
        for idx in self._ran:
            one = self._standing[idx]
            one.used_s += iteration_s
            one.last_ran_s = now_s
            if one.used_s > self._quantum_s * GROWTH**one.level:
                self._fronts_count += 1
                one.level, one.used_s, one.place = one.level + 1, 0.0, -self._fronts_count
        self._iterations_count += 1

    def _join(self, rows: NDArray[np.void], now_s: float) -> None:
        """Newcomers get their level; now and then the starved go to the top."""
        before, self._standing = self._standing, {}
        for idx, alone_s in zip(rows["idx"].tolist(), rows["ttft_alone_s"].tolist(), strict=True):
            if idx not in before:
                self._backs_count += 1
                before[idx] = Standing(self.level_of(alone_s), self._backs_count, now_s)
            self._standing[idx] = before[idx]
        if self._iterations_count % self._rescue_every_count == 0:
            for one in self._standing.values():
                if now_s - one.last_ran_s >= self._starved_s:
                    self._backs_count += 1
                    one.level, one.used_s, one.place = 0, 0.0, self._backs_count
