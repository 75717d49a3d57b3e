"""What policies share that queue by a key which stays the same while a request waits: it is scored once, on arrival,
and the engine keeps the order."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.choices import Order
from l3env.knobs import Knobs
from l3env.machine.tables import Tables
from l3env.policies.sarathi import TOKEN_BUDGET
from l3env.policy.plan import Scored
from l3env.policy.protocol import BasePolicy, Role
from l3env.policy.view import View
from l3env.requests.workload import Workload

CHUNKED = Knobs(prefill_budget_tokens=TOKEN_BUDGET, budget_counts_decodes=True)
"""Sarathi-Serve's batching."""


def scores_of(keys: NDArray[Any]) -> NDArray[np.float64]:
    """Scores, from 0 to 1, in the reverse order of keys >= 0."""
    return 1.0 / (1.0 + np.asarray(keys, float))


class ByKey(BasePolicy):
    """Waiting requests start in ascending order of ``key``; those that run are not interrupted."""

    role = Role.PUBLISHED
    decision_interval_s = math.inf
    decides_at_events = True

    def __init__(self, name: str, **knobs: Any) -> None:
        self.name = name
        self.knobs = replace(CHUNKED, **{"order": Order.BY_SCORE, **knobs})

    def prepare(self, system: Tables, training: Workload | None) -> None:
        self._seen_count = 0

    def key(self, rows: NDArray[np.void]) -> NDArray[Any]:
        """>= 0 of each, the smallest first."""
        raise NotImplementedError

    def newcomers(self, view: View) -> NDArray[np.void]:
        """Those who wait and have arrived since the last call, as ROW_DTYPE rows."""
        new_count, self._seen_count = view.arrived_count - self._seen_count, view.arrived_count
        return view.waiting(new_count, Order.NEWEST_FIRST)

    def decide(self, view: View) -> Knobs | Scored:
        rows = self.newcomers(view)
        return Scored(self.knobs, rows["idx"], scores_of(self.key(rows)))
