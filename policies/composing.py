"""What policies share that put an iteration together themselves: requests are served in an order, as far as tokens,
batch and memory go, and who is not served waits.

A plan says how many tokens of a prompt are processed as it starts; where part of it is cached, at most those that are
left are.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from l3env.choices import Status
from l3env.machine.arrays import FIRST_PIM, HBM
from l3env.policies.vllm import MAX_BATCHED_TOKENS, MAX_NUM_SEQS
from l3env.policy.plan import Plan
from l3env.policy.protocol import BasePolicy, Role
from l3env.policy.view import View


class Composing(BasePolicy):
    """A policy of the literature that puts each iteration together, within a budget of tokens and a batch; vLLM's
    unless its source has its own."""

    role = Role.PUBLISHED

    def __init__(self, budget_tokens: int = MAX_BATCHED_TOKENS, batch_count: int = MAX_NUM_SEQS) -> None:
        self._budget_tokens, self._batch_count = budget_tokens, batch_count

    def compose(self, view: View, ranked: NDArray[np.void], *, evicts: bool = False) -> Plan:
        """``compose`` within them."""
        return compose(view, ranked, self._budget_tokens, self._batch_count, evicts=evicts)


def served_by(view: View, plan: Plan) -> list[int]:
    """Those that an iteration serves: whoever decodes on or again, and the prompts."""
    going = set(view.decoding["idx"].tolist()) - {*plan.pause, *plan.preempt}
    return [*going, *plan.resume, *(plan.prefill or ())]


def compose(view: View, ranked: NDArray[np.void], budget_tokens: int, most_count: int, *, evicts: bool = False) -> Plan:
    """An iteration that serves requests in the order given.

    A decoding request takes one token of the budget, a prompt what is left of it. A decoding request that is not
    served pauses and keeps its memory. Where one lacks a block to grow, the last of the order that holds memory in its
    pool is preempted, itself where nobody comes after it.

    Args:
        ranked: all present requests, as ROW_DTYPE rows.
        most_count: requests served, at most.
        evicts: a waiting request without room takes that of those after it, and starts in the next iteration.
    """
    batch = Batch(view, ranked, budget_tokens)
    for i in range(ranked.size):
        if len(batch.served) == most_count or batch.left_tokens <= 0:
            break
        if i not in batch.gone:
            batch.serve(i, evicts)
    return batch.plan()


class Batch:
    """An iteration in the making. Requests are named by their place in the order; blocks and tokens are counted as they
    are given, so that the plan is legal."""

    def __init__(self, view: View, ranked: NDArray[np.void], budget_tokens: int) -> None:
        pools, system = view.pools, view.system
        names = ("idx", "status", "pool", "kv_tokens", "prefill_left_tokens")
        self._idx, self._status, self._pool, self._kv, self._left = (ranked[name].tolist() for name in names)
        self._block_tokens, self._by_chunk = pools.block_tokens, system.system.serving.blocks_by_chunk
        self._guesses = bool(system.arrays.coef["drafts_count"][0] > 0)
        self._capacity = pools.capacity_blocks.tolist()
        self._free = (pools.capacity_blocks - pools.used_blocks).tolist()
        own = int(system.arrays.coef["decompressed_pool"][0])  # its memory is that of the other pools
        self._pim = range(FIRST_PIM, own or len(self._free))
        self._holding = [i for i, status in enumerate(self._status) if status != Status.WAITING]
        self._evicted = False
        self._admit: dict[int, int] = {}
        self._chunks: dict[int, int] = {}
        self.left_tokens = budget_tokens
        self.served: set[int] = set()
        self.gone: set[int] = set()

    def serve(self, i: int, evicts: bool) -> None:
        """A step of one that decodes, a chunk of one that prefills, a start of one that waits; where there is room."""
        if self._status[i] == Status.WAITING:
            self._start(i, evicts)
        elif self._status[i] == Status.PREFILL:
            self._chunk(i)
        elif self._grow(i):
            self.left_tokens -= 1
            self.served.add(i)

    def evict(self, i: int) -> None:
        """One that holds memory is preempted. Nobody starts any more: what is free is seen in the next iteration."""
        self.gone.add(i)
        self._evicted = True
        self._free[self._pool[i]] += self._held(i)

    def plan(self) -> Plan:
        here = [i for i in self._holding if i not in self.gone]
        return Plan(
            admit=self._admit,
            prefill=self._chunks,
            preempt=[self._idx[i] for i in self.gone],
            pause=[self._idx[i] for i in here if self._status[i] == Status.DECODE and i not in self.served],
            resume=[self._idx[i] for i in here if self._status[i] == Status.PAUSED and i in self.served],
        )

    def _held(self, i: int) -> int:
        whole = self._status[i] == Status.PREFILL and not self._by_chunk
        return -(-(self._kv[i] + (self._left[i] if whole else 0)) // self._block_tokens)

    def _chunk(self, i: int) -> None:
        self._chunks[self._idx[i]] = min(self._left[i], self.left_tokens)
        self.left_tokens -= self._chunks[self._idx[i]]
        self.served.add(i)

    def _grow(self, i: int) -> bool:
        pool, over = self._pool[i], self._kv[i] % self._block_tokens
        if over != 0 and not (self._guesses and over == self._block_tokens - 1):
            return True
        while self._free[pool] < 1:
            after = self._after(i, pool)
            self.evict(next(after, i))
            if i in self.gone:
                return False
        self._free[pool] -= 1
        return True

    def _after(self, i: int, pool: int) -> Iterator[int]:
        """Those that hold memory in a pool and come after one, the last first."""
        for j in reversed(self._holding):
            if j <= i:
                return
            if self._pool[j] == pool and j not in self.gone and j not in self.served:
                yield j

    def _start(self, i: int, evicts: bool) -> None:
        need = -(-self._left[i] // self._block_tokens)
        pool = max((p for p in self._pim if self._capacity[p] >= need), key=lambda p: self._free[p], default=HBM)
        if self._evicted:
            return
        if self._free[pool] >= need:
            self._free[pool] -= need
            self._admit[self._idx[i]] = pool
            self._chunk(i)
        elif evicts:
            victims, free = [], self._free[pool]
            for j in self._after(i, pool):
                victims.append(j)
                free += self._held(j)
                if free >= need:
                    for victim in victims:
                        self.evict(victim)
                    return
