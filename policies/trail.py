"""TRAIL (arXiv 2410.01035): shortest predicted remaining output first, whoever runs; a request may be preempted only
while it has emitted less than a share of its first prediction, and is computed again then.

The authors refine the prediction after every token from a layer's embedding. Here it is the mean of what was left in
earlier requests with similar prompts that had emitted as much, which needs no embedding and sharpens with the tokens in
its own way. ``preemptible_frac`` is the paper's C; its default was not verified. Budget and batch are vLLM's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from l3env.machine.tables import Tables
from l3env.policies.composing import Composing
from l3env.policies.srtf_predicted import needed
from l3env.policies.vllm import MAX_BATCHED_TOKENS, MAX_NUM_SEQS
from l3env.policy.plan import Plan
from l3env.policy.view import View
from l3env.requests.workload import Workload

PREEMPTIBLE_FRAC = 0.8
REQUESTS_PER_BIN, MOST_BINS = 50, 20


class Trail(Composing):
    """The shortest predicted rest first; who is far enough is no longer preempted."""

    source = "TRAIL, arXiv 2410.01035"
    signals = "predicted rest"
    name = "trail"

    def __init__(
        self,
        preemptible_frac: float = PREEMPTIBLE_FRAC,
        budget_tokens: int = MAX_BATCHED_TOKENS,
        batch_count: int = MAX_NUM_SEQS,
    ) -> None:
        super().__init__(budget_tokens, batch_count)
        self._preemptible_frac = preemptible_frac

    def prepare(self, system: Tables, training: Workload | None) -> None:
        earlier = needed(training, self.name)
        self._rest = Rest(earlier.prompt_tokens, earlier.output_tokens)

    def decide(self, view: View) -> Plan:
        rows = view.present
        prompts, emitted = rows["prompt_tokens"], rows["emitted_tokens"]
        left = self._rest.of(prompts, emitted)
        far = emitted >= np.floor(self._preemptible_frac * self._rest.of(prompts, np.zeros_like(emitted)))
        pinned = far & (rows["pool"] >= 0) & (emitted > 0)
        order = np.lexsort((rows["arrival_s"], left, ~pinned))
        return self.compose(view, rows[order], evicts=True)


class Rest:
    """The mean output left, by prompt (bins of equal counts) and by what was emitted, from earlier requests."""

    def __init__(self, prompt_tokens: NDArray[np.int64], output_tokens: NDArray[np.int64]) -> None:
        bins = int(np.clip(prompt_tokens.size // REQUESTS_PER_BIN, 1, MOST_BINS))
        self._edges = np.unique(np.quantile(prompt_tokens, np.linspace(0, 1, bins + 1)[1:-1]))
        place = np.searchsorted(self._edges, prompt_tokens, side="right")
        self._tables = [self._table(output_tokens[place == b], output_tokens) for b in range(self._edges.size + 1)]

    @staticmethod
    def _table(outputs: NDArray[np.int64], every: NDArray[np.int64]) -> NDArray[np.float64]:
        """Mean left after 0, 1, 2 ... tokens; of all requests where the bin has none as long."""
        lengths = np.sort(outputs if outputs.size else every)
        emitted = np.arange(lengths[-1])
        first = np.searchsorted(lengths, emitted, side="right")
        sums = np.append(np.cumsum(lengths[::-1])[::-1], 0)
        return sums[first] / (lengths.size - first) - emitted

    def of(self, prompts: NDArray[np.int64], emitted: NDArray[np.int64]) -> NDArray[np.float64]:
        """Of each; 1 where it has emitted more than any earlier one."""
        place = np.searchsorted(self._edges, prompts, side="right")
        tables = [self._tables[b] for b in place.tolist()]
        pairs = zip(tables, emitted.tolist(), strict=True)
        return np.array([table[e] if e < table.size else 1.0 for table, e in pairs], float)
