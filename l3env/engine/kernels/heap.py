"""Binary min-heaps of requests with positions, so that any request can be removed. Ties go to the lower index."""

from __future__ import annotations

import numpy as np

from l3env.engine.state import NOWHERE
from l3env.jit import helper, inner


@inner
def before(heap, a, b):
    """Does request a come before request b?"""
    return heap[a]["key"] < heap[b]["key"] or (heap[a]["key"] == heap[b]["key"] and a < b)


@inner
def put(heap, place, request):
    heap[place]["item"] = request
    heap[request]["pos"] = place


@helper
def sift_up(heap, place):
    moved = heap[place]["item"]
    while place > 0:
        parent = (place - 1) >> 1
        if not before(heap, moved, heap[parent]["item"]):
            break
        put(heap, place, heap[parent]["item"])
        place = parent
    put(heap, place, moved)


@helper
def sift_down(heap, length, place):
    moved = heap[place]["item"]
    while True:
        child = 2 * place + 1
        if child >= length:
            break
        if child + 1 < length and before(heap, heap[child + 1]["item"], heap[child]["item"]):
            child += 1
        if not before(heap, heap[child]["item"], moved):
            break
        put(heap, place, heap[child]["item"])
        place = child
    put(heap, place, moved)


@inner
def push(heap, lengths, which, request, key):
    """Adds a request that is not in the heap. ``lengths[which]`` is the heap's length."""
    _push(heap, lengths, np.int64(which), np.int64(request), key)  # one type of index: compiled once


@helper
def _push(heap, lengths, which, request, key):
    heap[request]["key"] = key
    place = lengths[which]
    put(heap, place, request)
    lengths[which] = place + 1
    sift_up(heap, place)


@inner
def remove(heap, lengths, which, request):
    """Removes a request if it is in the heap."""
    _remove(heap, lengths, np.int64(which), np.int64(request))


@helper
def _remove(heap, lengths, which, request):
    place = np.int64(heap[request]["pos"])
    if place == NOWHERE:
        return
    heap[request]["pos"] = NOWHERE
    length = lengths[which] - 1
    lengths[which] = length
    if place == length:
        return
    last = heap[length]["item"]
    put(heap, place, last)
    sift_up(heap, place)
    sift_down(heap, length, np.int64(heap[last]["pos"]))


@helper
def rekey(heap, length, request, key):
    """Gives a request in the heap a key that is not smaller than its present one."""
    heap[request]["key"] = key
    sift_down(heap, length, np.int64(heap[request]["pos"]))


@helper
def first_items(heap, length, out, frontier):
    """The first ``len(out)`` items in order into ``out``; returns how many there are. The heap stays as it is.

    Walks from the root with a frontier of places (``frontier`` has room for len(out) + 1), so the length of the heap
    does not matter.
    """
    frontier[0] = 0
    open_count, found = (1 if length > 0 else 0), 0
    while open_count > 0 and found < out.shape[0]:
        best = 0
        for i in range(1, open_count):
            if before(heap, heap[frontier[i]]["item"], heap[frontier[best]]["item"]):
                best = i
        place = frontier[best]
        open_count -= 1
        frontier[best] = frontier[open_count]
        out[found] = heap[place]["item"]
        found += 1
        for child in range(2 * place + 1, min(2 * place + 3, length)):
            frontier[open_count] = child
            open_count += 1
    return found
