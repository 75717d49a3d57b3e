"""What policies share that say how many waiting requests may start, and leave the rest to knobs; and the peak of memory
that some of them go by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.knobs import Knobs
from l3env.machine.tables import Tables
from l3env.policies.declared import declared_tokens
from l3env.policy.protocol import BasePolicy, Role
from l3env.policy.view import View
from l3env.requests.workload import Workload

PEEK_COUNT = 64  # waiting requests looked at; no more start in one iteration


class ByCount(BasePolicy):
    """As many waiting requests start, in the queue's order, as ``count`` says; where nothing runs one always does.

    Args:
        max_output_tokens: the longest output that any request declares; None: that of earlier requests (``declared``).
        every_count: iterations from one look at the queue to the next; in between nobody starts.
    """

    role = Role.PUBLISHED

    def __init__(
        self, name: str, knobs: Knobs, max_output_tokens: int | None, every_count: int = 1, **changes: Any
    ) -> None:
        self.name = name
        self._given_tokens = max_output_tokens
        self.knobs = replace(knobs, **changes)
        self._every_count = every_count

    def prepare(self, system: Tables, training: Workload | None) -> None:
        self._limit_tokens = declared_tokens(self._given_tokens, training, self.name)
        self._memory_tokens = kv_tokens(system)
        self._iterations_count = 0
        self._cached: dict[int, Knobs] = {}

    def count(self, view: View) -> int:
        """How many may start."""
        raise NotImplementedError

    def decide(self, view: View) -> Any:
        looks = self._iterations_count % self._every_count == 0
        self._iterations_count += 1
        return self.admitting(self.count(view) if looks and view.waiting_count else 0)

    def admitting(self, count: int) -> Knobs:
        """The knobs with so many to start at most."""
        if count not in self._cached:
            self._cached[count] = replace(self.knobs, admit_max_count=count)
        return self._cached[count]


def kv_place(system: Tables) -> str:
    """Where KV lies with these knobs: on the PIM side where there is one."""
    return "pim" if system.has_pim else "hbm"


def kv_tokens(system: Tables) -> int:
    """Memory for KV there."""
    return system.pim_tokens if system.has_pim else system.hbm_tokens


def peak_tokens(held_tokens: NDArray[Any], left_tokens: NDArray[Any]) -> float:
    """The most KV at any time to come, if each request gets a token an iteration and gives all back at its end.

    With requests in descending order of what they have left, when the k-th ends the first k are there, each grown by as
    much as the k-th had left: the largest of k x left_k + held_1 + ... + held_k. Along the last axis; the highest of
    several rows.
    """
    if not held_tokens.shape[-1]:
        return 0.0
    order = np.argsort(-left_tokens, axis=-1, kind="stable")
    left = np.take_along_axis(left_tokens, order, axis=-1)
    held = np.take_along_axis(np.broadcast_to(held_tokens, left.shape), order, axis=-1)
    return float((left * np.arange(1, left.shape[-1] + 1) + held.cumsum(axis=-1)).max())


def fitting_count(held_tokens: NDArray[Any], left_tokens: NDArray[Any], running_count: int, most_tokens: float) -> int:
    """How many of those after the first ``running_count`` may join them, in order, for the peak to stay below.

    More requests never lower the peak, so it is found by bisection.
    """
    low, high = 0, held_tokens.shape[-1] - running_count
    while low < high:
        middle = (low + high + 1) // 2
        end = running_count + middle
        if peak_tokens(held_tokens[..., :end], left_tokens[..., :end]) < most_tokens:
            low = middle
        else:
            high = middle - 1
    return low


def built_tokens(rows: NDArray[np.void], block_tokens: int = 1) -> NDArray[np.int64]:
    """KV of each request once its prompt is in place: what it holds and what is left of its prefill; with what it may
    waste of its last block."""
    return rows["kv_tokens"] + rows["prefill_left_tokens"] + block_tokens - 1
