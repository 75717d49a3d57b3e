"""Andes (arXiv 2404.16283): when memory is scarce, whoever gains most quality of experience a unit of memory is served.

A user expects the first token by the TTFT limit and reads at one speed from then on. Quality is the area under the
tokens delivered, as far as they are expected by then, over the area under those expected. While more than 90 % of
memory is used, every few iterations requests are put in order of what serving them for the next 50 iterations gains
against not serving them, over their KV; those that find no room are preempted. Else it is first come, first served.

Differs: the reading speed is one token a TBT limit unless it is given; an iteration is expected to last as the last
ones did; who is preempted is computed again; the horizon's unit and how often it looks were not verified. Budget and
batch are vLLM's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from l3env.machine.tables import Tables
from l3env.policies.composing import Composing
from l3env.policies.vllm import MAX_BATCHED_TOKENS, MAX_NUM_SEQS
from l3env.policy.plan import Plan
from l3env.policy.view import View
from l3env.requests.workload import Workload

SCARCE_FRAC, HORIZON_COUNT, EVERY_COUNT = 0.9, 50, 5
STEP_WEIGHT, SAMPLES_COUNT = 0.1, 9


class Andes(Composing):
    """Under scarce memory, the most gain in quality of experience for its KV first."""

    source = "Andes, arXiv 2404.16283"
    signals = "TTFT and TBT SLO, tokens so far"
    name = "andes"

    def __init__(
        self,
        reading_tokens_per_s: float | None = None,
        scarce_frac: float = SCARCE_FRAC,
        horizon_count: int = HORIZON_COUNT,
        every_count: int = EVERY_COUNT,
        budget_tokens: int = MAX_BATCHED_TOKENS,
        batch_count: int = MAX_NUM_SEQS,
    ) -> None:
        super().__init__(budget_tokens, batch_count)
        self._reading_tokens_per_s, self._scarce_frac = reading_tokens_per_s, scarce_frac
        self._horizon_count, self._every_count = horizon_count, every_count

    def prepare(self, system: Tables, training: Workload | None) -> None:
        self._iterations_count, self._step_s = 0, 0.0
        self._rank: dict[int, int] = {}

    def decide(self, view: View) -> Plan:
        rows = view.present
        last_s = view.last_iteration["iteration_s"]
        self._step_s += (STEP_WEIGHT if self._step_s else 1.0) * (last_s - self._step_s)
        looks = self._iterations_count % self._every_count == 0 and self._step_s > 0
        self._iterations_count += 1
        waits = rows["pool"] < 0
        if looks:
            self._rank = self._ranks(view, rows, waits) if self._is_scarce(view) else {}
        rank = np.array([self._rank.get(idx, rows.size) for idx in rows["idx"].tolist()])
        order = np.lexsort((rows["arrival_s"], np.where(waits, 0, rows["admitted_seq"]), waits, rank))
        return self.compose(view, rows[order], evicts=looks and bool(self._rank))

    def _ranks(self, view: View, rows: NDArray[np.void], waits: NDArray[np.bool_]) -> dict[int, int]:
        """The place of each by gain over memory, until the next look; of equal ones those that run come first."""
        kv_tokens = np.maximum(rows["kv_tokens"] + rows["prefill_left_tokens"], 1)
        order = np.lexsort((rows["arrival_s"], waits, -self.gains(rows, view.now_s, self._step_s) / kv_tokens))
        return {idx: place for place, idx in enumerate(rows["idx"][order].tolist())}

    def _is_scarce(self, view: View) -> bool:
        pools = view.pools
        return bool(pools.used_blocks.sum() > self._scarce_frac * pools.capacity_blocks.sum())

    def gains(self, rows: NDArray[np.void], now_s: float, step_s: float) -> NDArray[np.float64]:
        """What serving each over the horizon adds to its quality, against not serving it."""
        speed = 1.0 / rows["tbt_slo_s"] if self._reading_tokens_per_s is None else self._reading_tokens_per_s
        ahead_s = np.linspace(0.0, self._horizon_count * step_s, SAMPLES_COUNT)
        reads_s = np.maximum(now_s + ahead_s - rows["ttft_deadline_s"][:, None], 0.0)
        expected = reads_s * np.broadcast_to(speed, rows.shape)[:, None]
        emitted = rows["emitted_tokens"][:, None].astype(float)
        gained = np.minimum(emitted + ahead_s / step_s, expected) - np.minimum(emitted, expected)
        whole = 0.5 * reads_s[:, -1] * expected[:, -1]
        return np.trapezoid(gained, ahead_s, axis=1) / np.maximum(whole, 1e-12)
