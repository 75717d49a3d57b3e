"""vLLM's waiting queue in the orders of l3env, with a gate: who stands first may be told to wait."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from vllm.v1.core.sched.request_queue import FCFSRequestQueue, RequestQueue

from l3env.choices import Order
from l3env.vllm.entries import HEEDS_HOPELESS, entry_of, key_of

Gate = Callable[[Any], bool]
"""May a waiting request start now? Asked of the first one alone, and only while a step is scheduled."""


class GatedQueue(FCFSRequestQueue):
    """vLLM's own queue, which looks empty while its first request may not start."""

    gate: Gate | None = None

    def __bool__(self) -> bool:
        return len(self) > 0 and (self.gate is None or self.gate(self[0]))


class KeyedQueue(RequestQueue):
    """Requests by key, ties to the earlier arrival; those who have become hopeless step back where the order heeds it.

    Removed requests leave stale items in the heap, told by their key and dropped when they come up.
    """

    gate: Gate | None = None

    def __init__(self, order: Order, requests: Iterable[Any] = ()) -> None:
        self.order = order
        self._heeds = order in HEEDS_HOPELESS
        self._heap: list[tuple[float, int, Any]] = []
        self._slack: list[tuple[float, int, Any]] = []
        self._key: dict[Any, float] = {}
        for request in requests:
            self.add_request(request)

    def add_request(self, request: Any) -> None:
        entry = entry_of(request)
        key = key_of(request, self.order)
        self._key[request] = key
        heapq.heappush(self._heap, (key, entry.seq, request))
        if self._heeds and not entry.hopeless:
            heapq.heappush(self._slack, (entry.hopeless_from_s(), entry.seq, request))

    def prepend_request(self, request: Any) -> None:
        """There is no front to an order by key."""
        self.add_request(request)

    def prepend_requests(self, requests: Iterable[Any]) -> None:
        for request in requests:
            self.add_request(request)

    def rekey(self, requests: Iterable[Any]) -> None:
        """Their keys may have changed; those that do not wait are left out."""
        for request in requests:
            if request in self._key:
                self.add_request(request)

    def notice_hopeless(self, now_s: float) -> None:
        """Those whose deadline can no longer be met step back."""
        while self._slack and self._slack[0][0] < now_s:
            request = heapq.heappop(self._slack)[2]
            if request in self._key and not entry_of(request).hopeless:
                entry_of(request).hopeless = True
                self.add_request(request)

    def _tidy(self) -> None:
        heap, keys = self._heap, self._key
        while heap and keys.get(heap[0][2]) != heap[0][0]:
            heapq.heappop(heap)

    def peek_request(self) -> Any:
        self._tidy()
        if not self._heap:
            raise IndexError("peek from an empty queue")
        return self._heap[0][2]

    def pop_request(self) -> Any:
        request = self.peek_request()
        heapq.heappop(self._heap)
        del self._key[request]
        return request

    def remove_request(self, request: Any) -> None:
        del self._key[request]

    def remove_requests(self, requests: Iterable[Any]) -> None:
        for request in requests:
            self._key.pop(request, None)

    def __bool__(self) -> bool:
        return bool(self._key) and (self.gate is None or self.gate(self.peek_request()))

    def __len__(self) -> int:
        return len(self._key)

    def __iter__(self) -> Iterator[Any]:
        """In order."""
        return iter(sorted(self._key, key=lambda request: (self._key[request], entry_of(request).seq)))

    def __contains__(self, request: object) -> bool:
        return request in self._key


def queue_of(order: Order, requests: Iterable[Any]) -> GatedQueue | KeyedQueue:
    """A queue of an order; ``requests`` as they stood before."""
    if order != Order.FCFS:
        return KeyedQueue(order, requests)
    return GatedQueue(sorted(requests, key=lambda request: (entry_of(request).arrival_s, entry_of(request).seq)))
