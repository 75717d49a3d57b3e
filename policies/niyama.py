"""Niyama (arXiv 2503.22562; microsoft/sarathi-serve, branch ``niyama_asplos2026``), for one class of requests: as many
tokens an iteration as the earliest due decode can bear, prompts by deadline and what is left of them, and who can no
longer be in time comes last.

A decode is due a TBT limit a token after its first one, or after its TTFT limit if that is later. The budget is the
largest of 128 to 2552 tokens whose predicted time, times 1.2, is within the slack; the least where there is none; at
most 512 while fewer than 32,000 tokens of KV are free. Prompts go by arrival + TTFT limit + 8 ms a token left. One that
has not begun is relegated if its tokens over the measured rate of prefill (a running mean of weight 0.005, from 8500
tokens/s) end after its deadline. Iterations are predicted by two linear models, up to 512 tokens and above.

Differs: the models are fitted to iterations priced by the engine's formula, in tokens and KV of the decodes; there are
no further tiers of requests; the tokens counted for the rate are those of iterations with prefill.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.choices import Order
from l3env.knobs import Knobs
from l3env.machine.batch import Chunk, Decodes
from l3env.machine.tables import Tables
from l3env.policies.by_count import PEEK_COUNT, kv_place
from l3env.policies.by_key import ByKey, scores_of
from l3env.policy.plan import Scored
from l3env.policy.view import View
from l3env.requests.workload import Workload

BUDGETS = (128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2552)
SMALL_TOKENS, LITTLE_FREE_TOKENS = 512, 32_000
SAFETY, LEFT_S_PER_TOKEN = 1.2, 0.008
RATE_TOKENS_PER_S, RATE_WEIGHT = 8500.0, 0.005


class Niyama(ByKey):
    """Budgets from the slack of decodes, prompts by deadline and work left, late ones relegated."""

    source = "Niyama, arXiv 2503.22562"
    signals = "TTFT and TBT SLO, iteration times"
    decision_interval_s = 0.0

    def __init__(self, left_s_per_token: float = LEFT_S_PER_TOKEN, safety: float = SAFETY, **knobs: Any) -> None:
        super().__init__("niyama", **{"prefill_in_order": True, **knobs})
        self._left_s_per_token, self._safety = left_s_per_token, safety

    def prepare(self, system: Tables, training: Workload | None) -> None:
        super().prepare(system, training)
        self._models = fitted(system)
        self._rate_tokens_per_s = RATE_TOKENS_PER_S
        self._relegated: set[int] = set()

    def key(self, rows: NDArray[np.void]) -> NDArray[Any]:
        return rows["ttft_deadline_s"] + self._left_s_per_token * rows["prefill_left_tokens"]

    def decide(self, view: View) -> Knobs | Scored:
        last = view.last_iteration
        if last["prefill_tokens"] > 0:
            rate = (last["prefill_tokens"] + last["decode_tokens"]) / last["iteration_s"]
            self._rate_tokens_per_s += RATE_WEIGHT * (rate - self._rate_tokens_per_s)
        new = self.newcomers(view)
        if not view.waiting_count and not view.prefilling.size:
            return self.knobs
        rows = np.concatenate([new, view.waiting(PEEK_COUNT, Order.BY_SCORE), view.prefilling])
        scores = self._scores(rows, view.now_s)
        knobs = replace(self.knobs, prefill_budget_tokens=self._budget_tokens(view))
        return Scored(knobs, rows["idx"], scores)

    def _scores(self, rows: NDArray[np.void], now_s: float) -> NDArray[np.float64]:
        """The upper half for those that may be in time, the lower one for the relegated."""
        ends_s = now_s + rows["prefill_left_tokens"] / self._rate_tokens_per_s
        late = (ends_s > rows["ttft_deadline_s"]) & (rows["pool"] < 0) & np.isnan(rows["first_token_s"])
        self._relegated.update(rows["idx"][late].tolist())
        relegated = np.array([idx in self._relegated for idx in rows["idx"].tolist()], bool)
        return 0.5 * scores_of(self.key(rows)) + np.where(relegated, 0.0, 0.5)

    def _budget_tokens(self, view: View) -> int:
        decoding = view.decoding
        if not decoding.size:
            return BUDGETS[-1]
        first_s = np.maximum(decoding["first_token_s"], decoding["ttft_deadline_s"])
        slack_s = float((first_s + decoding["emitted_tokens"] * decoding["tbt_slo_s"]).min()) - view.now_s
        little = view.pools.free_tokens.sum() < LITTLE_FREE_TOKENS
        fitting = [
            budget
            for budget in BUDGETS
            if (budget <= SMALL_TOKENS or not little)
            and self._safety * self.predicted_s(budget, float(decoding["kv_tokens"].sum())) <= slack_s
        ]
        return max(fitting, default=BUDGETS[0])

    def predicted_s(self, tokens: int, kv_tokens: float) -> float:
        """An iteration of so many tokens, whose decodes read so much KV."""
        return float(self._models[int(tokens > SMALL_TOKENS)] @ (tokens, kv_tokens, 1.0))


def fitted(system: Tables) -> list[NDArray[Any]]:
    """Weights of (tokens, KV of the decodes, 1), up to SMALL_TOKENS and above: least squares of relative errors."""
    place = kv_place(system)
    found = []
    for budgets in ([b for b in BUDGETS if b <= SMALL_TOKENS], [b for b in BUDGETS if b > SMALL_TOKENS]):
        rows = []
        for tokens in budgets:
            for decodes in (1, 32, 96):
                for context in (256, 1024, 4096):
                    batch = [Decodes(decodes, float(context), place)], [Chunk(tokens - decodes, 0, place)]
                    rows.append(np.array([tokens, decodes * context, 1.0]) / system.iteration_s(*batch))
        found.append(np.linalg.lstsq(np.array(rows), np.ones(len(rows)), rcond=None)[0])
    return found
