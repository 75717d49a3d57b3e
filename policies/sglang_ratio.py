"""SGLang's admission, first come, first served (sgl-project/sglang: ``new_token_ratio_tracker.py``,
``schedule_policy.py``, ``retract_decode``).

A request starts while free memory covers what all who run may still emit (at most 4096 tokens each) times a ratio, and
its prompt and its own longest output (at most 4096) and a page. The ratio starts at min(0.7 x conservativeness, 1),
falls in 600 decode steps to 0.14 of that, and is set to (emitted + 20 x requests) / longest outputs when requests had
to be retracted. Who has emitted least, of these who has the longest prompt, is retracted first. Prompts go first, in
iterations of their own, in chunks of 8192 tokens.

Differs: one longest output is declared for all (``declared``); requests are retracted until the next step fits, not 20
steps; no prefix counts as cached.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from l3env.choices import Victim
from l3env.knobs import Knobs
from l3env.machine.tables import Tables
from l3env.policies.by_count import PEEK_COUNT, ByCount, built_tokens
from l3env.policies.scored_victims import may_run_over
from l3env.policy.plan import Scored
from l3env.policy.view import View
from l3env.requests.workload import Workload

CHUNK_TOKENS = 8192
CLIPPED_TOKENS = 4096
START, FLOOR, DECAY_STEPS, RETRACT_STEPS = 0.7, 0.14, 600, 20


class SglangRatio(ByCount):
    """SGLang's default: room for a share of what all may still emit, larger after requests were retracted."""

    source = "sgl-project/sglang"
    signals = "declared output limit"

    def __init__(self, max_output_tokens: int | None = None, conservativeness: float = 1.0, **knobs: Any) -> None:
        base = Knobs(prefill_budget_tokens=CHUNK_TOKENS, prefill_first=True, headroom_frac=0.0)
        super().__init__("sglang-ratio", replace(base, victim=Victim.LOWEST_SCORE), max_output_tokens, **knobs)
        self._start = min(START * conservativeness, 1.0)

    def prepare(self, system: Tables, training: Workload | None) -> None:
        super().prepare(system, training)
        self._page_tokens = system.block_tokens
        self.ratio, self._retracted_count = self._start, 0

    def decide(self, view: View) -> Knobs | Scored:
        self._follow(view)
        knobs: Knobs = super().decide(view)
        if not may_run_over(view, knobs):
            return knobs
        rows = view.running
        least = rows["emitted_tokens"] + 1.0 / (1.0 + rows["prompt_tokens"])
        return Scored(knobs, rows["idx"], least / (1.0 + least))

    def _follow(self, view: View) -> None:
        """The ratio after the last iteration."""
        retracted = int(view.totals["preemptions_count"])
        if retracted > self._retracted_count:
            emitted = view.decoding["emitted_tokens"]
            most = max(self._limit_tokens * emitted.size, 1)
            self.ratio = min((emitted.sum() + RETRACT_STEPS * emitted.size) / most, 1.0)
        elif view.last_iteration["decode_tokens"] > 0:
            self.ratio = max(self.ratio - self._start * (1 - FLOOR) / DECAY_STEPS, FLOOR * self._start)
        self._retracted_count = retracted

    def count(self, view: View) -> int:
        rows = view.running
        free = self._memory_tokens - built_tokens(rows).sum()
        free -= self.ratio * np.clip(self._limit_tokens - rows["emitted_tokens"], 0, CLIPPED_TOKENS).sum()
        waiting = view.waiting(PEEK_COUNT)
        left = np.clip(self._limit_tokens - waiting["emitted_tokens"], 0, CLIPPED_TOKENS)
        needs = (waiting["prefill_left_tokens"] + left + self._page_tokens).cumsum()
        return int(np.searchsorted(needs, free, side="right"))
