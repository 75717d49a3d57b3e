"""Policies that give scores, for tests: what they give follows from what any View shows, not from indices."""

from __future__ import annotations

from typing import Any

import numpy as np

from l3env.choices import Order, Victim
from l3env.knobs import Knobs
from l3env.policy.plan import Scored
from l3env.policy.protocol import BasePolicy
from l3env.policy.view import View


class Scores(BasePolicy):
    """Scores by the last digits of prompts, anew before each iteration; some are held back."""

    def __init__(self, low: float = -0.2, **knobs: Any) -> None:
        self.name, self.low = "scores", low
        by_score: dict[str, Any] = {"order": Order.BY_SCORE, "victim": Victim.LOWEST_SCORE, "headroom_frac": 0.0}
        self.knobs = Knobs(**{"prefill_budget_tokens": 512, "budget_counts_decodes": True, **by_score, **knobs})

    def decide(self, view: View) -> Scored:
        rows = np.concatenate([view.waiting(10_000), view.running])
        scores = self.low + (1 - self.low) * ((rows["prompt_tokens"] * 7919 + rows["emitted_tokens"] // 64) % 97) / 97
        return Scored(self.knobs, rows["idx"], scores)
