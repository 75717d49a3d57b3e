"""S3 (arXiv 2306.06000): outputs are predicted in buckets, and requests packed into memory by what they will need, the
longest predicted first, each that still fits; one that outgrows what it was allotted is computed again with twice as
much.

The authors' predictor is a fine-tuned DistilBERT; here it is the mean output of earlier requests with similar prompts
(``fit_bins``), rounded up to a bucket. Differs: the size of buckets and the doubling were not verified; iterations are
those of whole prompts and decodes together; where nothing runs the first in order starts, whatever its allotment.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from l3env.knobs import UNLIMITED
from l3env.machine.tables import Tables
from l3env.policies.by_count import kv_tokens
from l3env.policies.composing import Batch
from l3env.policies.srtf_predicted import fit_on
from l3env.policy import LengthPredictor
from l3env.policy.plan import Plan
from l3env.policy.protocol import BasePolicy, Role
from l3env.policy.view import View
from l3env.requests.workload import Workload

BUCKET_TOKENS = 128


class S3(BasePolicy):
    """Requests packed by predicted need, the longest first; who outgrows its room returns with twice as much."""

    role = Role.PUBLISHED
    source = "S3, arXiv 2306.06000"
    signals = "predicted output"
    name = "s3"

    def __init__(self, bucket_tokens: int = BUCKET_TOKENS) -> None:
        self._bucket_tokens = bucket_tokens

    def prepare(self, system: Tables, training: Workload | None) -> None:
        self._predict = fit_on(training, self.name)
        self._memory_tokens = kv_tokens(system)
        self._doublings: dict[int, int] = {}

    def predictor(self) -> LengthPredictor | None:
        return self._predict

    def decide(self, view: View) -> Plan:
        running, waiting = view.running, view.waiting(view.waiting_count)
        over = running["idx"][running["emitted_tokens"] >= self.allotted_tokens(running)]
        for idx in over.tolist():
            self._doublings[idx] = self._doublings.get(idx, 0) + 1
        starting = waiting[[] if over.size else self._packed(view, running, waiting)]
        ranked = np.concatenate([running[np.argsort(running["admitted_seq"])], starting])
        batch = Batch(view, ranked, UNLIMITED)
        for i in np.flatnonzero(np.isin(ranked["idx"], over)).tolist():
            batch.evict(i)
        for i in range(ranked.size):
            if i not in batch.gone:
                batch.serve(i, evicts=False)
        return batch.plan()

    def allotted_tokens(self, rows: NDArray[np.void]) -> NDArray[np.int64]:
        """The output that each has room for: its bucket's, doubled each time that it was too little."""
        buckets = np.maximum(-(-rows["predicted_tokens"] // self._bucket_tokens), 1)
        doublings = np.array([self._doublings.get(idx, 0) for idx in rows["idx"].tolist()], np.int64)
        return buckets * self._bucket_tokens * 2**doublings

    def _packed(self, view: View, running: NDArray[np.void], waiting: NDArray[np.void]) -> list[int]:
        """Places of those that start: first fit, by what they are allotted, the most first."""
        block_tokens = view.pools.block_tokens
        need = [self.allotted_tokens(rows) + rows["prompt_tokens"] for rows in (running, waiting)]
        running_need, waiting_need = (-(-each // block_tokens) * block_tokens for each in need)
        left = self._memory_tokens - int(running_need.sum())
        packed: list[int] = []
        order = np.argsort(-self.allotted_tokens(waiting), kind="stable").tolist()
        for i in order:
            if waiting_need[i] <= left or not (packed or running.size):
                packed.append(i)
                left -= int(waiting_need[i])
        return packed
