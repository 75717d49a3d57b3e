"""Apt-Serve (arXiv 2504.07494; eddiegaoo/Apt-Serve) without its cache of hidden states: each iteration is for prompts
or for decodes, whichever have waited longer in all.

A request is worth the time since its last token, or since its arrival; once that is over its limit, almost nothing.
Prompts go where the waiting are worth as much in all as the running and one of them fits, the greatest worth a block
first. Else all decode, and where memory runs over the least worth a block is computed again.

Differs: memory holds KV only; prompts are processed whole; there is one limit for first and further tokens, and what is
left of a worth over it was not verified.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from l3env.choices import Status
from l3env.knobs import UNLIMITED
from l3env.machine.tables import Tables
from l3env.policies.composing import compose
from l3env.policy.plan import Plan
from l3env.policy.protocol import BasePolicy, Role
from l3env.policy.view import View
from l3env.requests.workload import Workload

LIMIT_S, OVER_FRAC = 1.0, 1e-3


class AptServe(BasePolicy):
    """Prompts or decodes, by who has waited longer; the greatest worth a block first."""

    role = Role.PUBLISHED
    source = "Apt-Serve, arXiv 2504.07494"
    name = "apt-serve"

    def __init__(self, limit_s: float = LIMIT_S, over_frac: float = OVER_FRAC) -> None:
        self._limit_s, self._over_frac = limit_s, over_frac

    def prepare(self, system: Tables, training: Workload | None) -> None:
        self._last: dict[int, tuple[int, float]] = {}

    def decide(self, view: View) -> Plan:
        rows = view.present
        worth = self._worth(rows, view.now_s)
        blocks = -(-(rows["kv_tokens"] + rows["prefill_left_tokens"] + 1) // view.pools.block_tokens)
        order = np.argsort(-worth / blocks, kind="stable")
        ranked, waits = rows[order], rows["status"] == Status.WAITING
        waiting = ranked[ranked["status"] == Status.WAITING]
        if waiting.size and worth[waits].sum() >= worth[~waits].sum():
            plan = compose(view, waiting, UNLIMITED, UNLIMITED)
            if plan.admit:
                return replace(plan, decode=False)
        return compose(view, ranked[ranked["status"] != Status.WAITING], UNLIMITED, UNLIMITED)

    def _worth(self, rows: NDArray[np.void], now_s: float) -> NDArray[np.float64]:
        """Seconds since the last token or the arrival; hardly any once over the limit."""
        before, self._last = self._last, {}
        columns = (rows[name].tolist() for name in ("idx", "emitted_tokens", "arrival_s"))
        for idx, emitted, arrival_s in zip(*columns, strict=True):
            known = before.get(idx, (0, arrival_s))
            self._last[idx] = known if known[0] == emitted else (emitted, now_s)
        since_s = now_s - np.array([when_s for _, when_s in self._last.values()])
        return np.where(since_s <= self._limit_s, since_s, self._over_frac * since_s)
