"""What a planner imagines: output lengths of requests that are there, and requests to come.

Both are drawn from requests that are known: earlier ones, and those of this run that have arrived. Of the latter, the
lengths of the finished are known, those of the others are drawn, given what each has emitted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from l3env.policy.view import View
from l3env.requests.workload import Workload

BINS = 8  # of prompt length
RECENT = 512  # arrivals of this run that stretches are cut from, the latest ones
REPLAYED = 2048  # arrivals of this run that are replayed, the latest ones
PRIOR_REQUESTS = 50  # weight of the earlier requests' rate of arrival


class Lengths:
    """Output lengths of known requests, by prompt length: what a request with so many tokens out may come to."""

    def __init__(self, prompt_tokens: NDArray[np.int64], output_tokens: NDArray[np.int64]) -> None:
        self.edges = np.unique(np.quantile(prompt_tokens, np.linspace(0, 1, BINS + 1)[1:-1]))
        place = np.searchsorted(self.edges, prompt_tokens, side="right")
        self.outputs = [np.sort(output_tokens[place == b]) for b in range(self.edges.size + 1)]
        everything = np.sort(output_tokens)
        self.outputs = [each if each.size else everything for each in self.outputs]

    def draw(
        self, prompt_tokens: NDArray[np.int64], emitted_tokens: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.int64]:
        """(N,) lengths longer than what was emitted; past the longest seen, half as long again at most."""
        drawn = np.empty(prompt_tokens.size, dtype=np.int64)
        place = np.searchsorted(self.edges, prompt_tokens, side="right")
        u = rng.random(prompt_tokens.size)
        for b in np.unique(place):
            mask = place == b
            known, emitted = self.outputs[b], emitted_tokens[mask]
            shorter = np.searchsorted(known, emitted, side="right")
            pick = shorter + (u[mask] * (known.size - shorter)).astype(np.int64)
            beyond = emitted + 1 + (u[mask] * emitted / 2).astype(np.int64)
            drawn[mask] = np.where(shorter < known.size, known[np.minimum(pick, known.size - 1)], beyond)
        return np.maximum(drawn, emitted_tokens + 1)


class Known:
    """At one decision: the present, this run's arrivals so far, and the earlier requests.

    Args:
        earlier: those learned from, of all replicas.
        replicas_count: requests go to replicas in turn, so of ``earlier`` one in so many is one replica's.
    """

    def __init__(self, view: View, earlier: Workload, replicas_count: int) -> None:
        self.now_s, self.earlier, self.replicas_count = view.now_s, earlier, replicas_count
        present, finished = view.present, view.finished
        self.prompts, self.emitted = present["prompt_tokens"], present["emitted_tokens"]
        prompts = np.concatenate([earlier.prompt_tokens, finished["prompt_tokens"]])
        outputs = np.concatenate([earlier.output_tokens, finished["output_tokens"]])
        self.lengths = Lengths(prompts, outputs)
        arrivals_s = np.concatenate([finished["arrival_s"], present["arrival_s"]])
        self._order = np.argsort(arrivals_s, kind="stable")[-REPLAYED:]
        self._all_arrivals_s = arrivals_s[self._order]
        self._all_prompts = np.concatenate([finished["prompt_tokens"], self.prompts])[self._order]
        self._arrivals_s, self._prompts = self._all_arrivals_s[-RECENT:], self._all_prompts[-RECENT:]
        self._finished_outputs = finished["output_tokens"]
        gap_s = (earlier.arrival_s[-1] - earlier.arrival_s[0]) / max(len(earlier) - 1, 1) * replicas_count
        recent_s = self.now_s - (self._arrivals_s[0] if self._arrivals_s.size == RECENT else 0.0)
        self.gap_s = float((PRIOR_REQUESTS * gap_s + recent_s) / (PRIOR_REQUESTS + self._arrivals_s.size))
        self._earlier_gap_s = float(gap_s)

    @property
    def recent_count(self) -> int:
        """How many of this run's arrivals stretches may be cut from."""
        return int(self._arrivals_s.size)

    def draw_lengths(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """One for each request of the present."""
        return self.lengths.draw(self.prompts, self.emitted, rng)

    def replay(self, present_tokens: NDArray[np.int64]) -> Workload:
        """This run's arrivals once more, the clock moved so that they start at 0."""
        outputs = np.concatenate([self._finished_outputs, present_tokens])[self._order]
        return Workload.build("replay", self._all_arrivals_s - self._all_arrivals_s[0], self._all_prompts, outputs)

    def arrivals(
        self, count: int, recent: bool, present_tokens: NDArray[np.int64], rng: np.random.Generator
    ) -> Workload | None:
        """``count`` requests to come: a stretch of this run's recent arrivals, or of the earlier ones.

        A stretch keeps its requests' order and gaps; at the end it goes on from the start. One of earlier requests is
        brought to the rate at which requests came of late.

        Args:
            present_tokens: lengths of the present as drawn for this scenario.
        """
        if recent:
            outputs = np.concatenate([self._finished_outputs, present_tokens])[self._order[-RECENT:]]
            return self._stretch(self._arrivals_s, self._prompts, outputs, 1, count, 1.0, rng)
        if len(self.earlier) < 2 or self._earlier_gap_s <= 0:
            return None
        earlier = self.earlier
        columns = earlier.arrival_s, earlier.prompt_tokens, earlier.output_tokens
        return self._stretch(*columns, self.replicas_count, count, self.gap_s / self._earlier_gap_s, rng)

    def _stretch(
        self,
        arrival_s: NDArray[np.float64],
        prompts: NDArray[np.int64],
        outputs: NDArray[np.int64],
        every: int,
        count: int,
        stretch: float,
        rng: np.random.Generator,
    ) -> Workload:
        rows = (int(rng.integers(arrival_s.size)) + every * np.arange(count + 1)) % arrival_s.size
        gaps_s = np.diff(arrival_s[rows]) * stretch
        gaps_s = np.where(gaps_s >= 0, gaps_s, self.gap_s)  # around the end
        return Workload.build("imagined", self.now_s + np.cumsum(gaps_s), prompts[rows[1:]], outputs[rows[1:]])
