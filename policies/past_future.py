"""Past-Future (ASPLOS 2025, arXiv 2507.10150; ModelTC/lightllm, branch ``future_past_router``): LightLLM's
admission by the peak of memory to come, with outputs drawn from those that ended last.

A window holds the last 200 output lengths, at the start half of them the longest there may be. Whoever has emitted d
tokens draws from those longer than d, uniformly, with interpolation; of min(5, 200 / batch + 1) draws the highest peak
counts; 5 % of memory is kept. It assumes that clients' lengths are alike.

Differs: the longest output is an argument or that of earlier requests (``declared``), which begin the window's other
half; one for whom no output in the window is long enough is taken for the longest; the budget of prompt tokens beside
the decodes was not verified; memory comes in blocks, so that each request may waste most of one; on machines with
several pools the peak is that of all together.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.machine.tables import Tables
from l3env.policies.by_count import PEEK_COUNT, ByCount, built_tokens, fitting_count
from l3env.policies.lightllm import CHUNKED, EVERY_COUNT
from l3env.policy.view import View
from l3env.requests.workload import Workload

WINDOW_COUNT, MOST_DRAWS, RESERVED_FRAC = 200, 5, 0.05


class PastFuture(ByCount):
    """Whoever keeps the peak of memory to come, by lengths drawn from the past, below what there is."""

    source = "Past-Future, arXiv 2507.10150"
    signals = "past outputs"

    def __init__(
        self,
        max_output_tokens: int | None = None,
        reserved_frac: float = RESERVED_FRAC,
        every_count: int = EVERY_COUNT,
        seed: int = 0,
        **knobs: Any,
    ) -> None:
        super().__init__("past-future", CHUNKED, max_output_tokens, every_count, **knobs)
        self._reserved_frac, self._seed = reserved_frac, seed

    def prepare(self, system: Tables, training: Workload | None) -> None:
        super().prepare(system, training)
        limit, half = self._limit_tokens, WINDOW_COUNT // 2
        past = np.full(0, limit) if training is None else training.output_tokens[-half:]
        self._window = np.concatenate([np.full(half, limit), past]).astype(np.int64)
        self._room_tokens = (1 - self._reserved_frac) * self._memory_tokens
        self._rng = np.random.default_rng(self._seed)
        self._known: set[int] = set()

    def count(self, view: View) -> int:
        self._look_back(view)
        rows = np.concatenate([view.running, view.waiting(PEEK_COUNT)])
        draws = min(MOST_DRAWS, WINDOW_COUNT // max(view.running_count, 1) + 1)
        emitted, held = rows["emitted_tokens"], built_tokens(rows, view.pools.block_tokens)
        left = np.maximum(drawn(self._rng, self._window, emitted, draws, self._limit_tokens) - emitted, 1.0)
        return fitting_count(held, left, view.running_count, self._room_tokens)

    def _look_back(self, view: View) -> None:
        """Outputs that ended since the last look push out the oldest."""
        if view.finished_count == len(self._known):
            return
        rows = view.finished
        new = [(int(idx), int(tokens)) for idx, tokens in zip(rows["idx"], rows["output_tokens"], strict=True)]
        new = [each for each in new if each[0] not in self._known]
        self._known.update(idx for idx, _ in new)
        self._window = np.append(self._window, [tokens for _, tokens in new])[-WINDOW_COUNT:]


def drawn(
    rng: np.random.Generator, window: NDArray[np.int64], emitted: NDArray[np.int64], draws: int, limit: int
) -> NDArray[np.float64]:
    """(draws, N) output lengths, each from those of the window that are longer than what is emitted."""
    lengths = np.sort(window)
    first = np.searchsorted(lengths, emitted, side="right")
    known = np.minimum(first, lengths.size - 1)
    places = known + rng.random((draws, emitted.size)) * (lengths.size - 1 - known)
    found = np.interp(places, np.arange(lengths.size), lengths)
    return np.where(first < lengths.size, found, limit)
