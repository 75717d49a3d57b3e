"""Random settings, a new draw every second: the floor for comparisons, and what an untrained agent does."""

from __future__ import annotations

import numpy as np

from l3env.choices import Budget, Order
from l3env.knobs import Knobs
from l3env.machine.tables import Tables
from l3env.policy.protocol import BasePolicy, Role
from l3env.policy.view import View
from l3env.requests.workload import Workload

ORDERS = tuple(order for order in Order if order != Order.BY_SCORE)
BUDGETS = (256, 512, 1024, 2048, 4096, 8192, int(Budget.UNLIMITED), int(Budget.ALIGN))


class RandomKnobs(BasePolicy):
    """Draws every knob uniformly."""

    role = Role.FLOOR
    name = "random"
    decision_interval_s = 1.0

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def prepare(self, system: Tables, training: Workload | None) -> None:
        self._rng = np.random.default_rng(self._seed)

    def decide(self, view: View) -> Knobs:
        rng = self._rng
        return Knobs(
            admit_max_count=int(2 ** rng.integers(0, 8)),
            prefill_budget_tokens=int(rng.choice(BUDGETS)),
            budget_counts_decodes=bool(rng.integers(2)),
            prefill_first=bool(rng.integers(2)),
            hbm_share_frac=float(rng.choice([0.0, 0.1, 0.25, 0.5])),
            order=ORDERS[int(rng.integers(len(ORDERS)))],
            headroom_frac=float(rng.choice([0.0, 0.01, 0.05, 0.1, 0.2])),
            sub_batching=bool(rng.integers(2)),
        )
