"""The heaps of the queue and of the finish clocks against a plain sorted list."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from l3env.engine.kernels import heap as heaps
from l3env.engine.state import HEAP_DTYPE, NOWHERE
from l3env.jit import kernel

REQUESTS = 12
WHICH = 1  # the heap's number among several, so that a mix-up of lengths shows


@kernel
def push(heap, lengths, which, request, key):
    heaps.push(heap, lengths, which, request, key)


@kernel
def remove(heap, lengths, which, request):
    heaps.remove(heap, lengths, which, request)


@kernel
def rekey(heap, length, request, key):
    heaps.rekey(heap, length, request, key)


def empty_heap(requests=REQUESTS):
    heap = np.zeros(requests, HEAP_DTYPE)
    heap["pos"] = NOWHERE
    return heap, np.zeros(3, np.int64)


def check(heap, lengths, keys):
    """The heap holds exactly ``keys`` (request -> key), its positions agree and no child comes before its parent."""
    assert lengths.tolist() == [0, len(keys), 0]
    items = heap["item"][: len(keys)].tolist()
    assert sorted(items) == sorted(keys)
    for request in range(len(heap)):
        place = int(heap["pos"][request])
        assert (place == NOWHERE) == (request not in keys)
        if request in keys:
            assert items[place] == request
            assert heap["key"][request] == keys[request]
    ranks = [(keys[request], request) for request in items]
    assert all(ranks[(place - 1) // 2] < ranks[place] for place in range(1, len(ranks)))
    if keys:
        assert ranks[0] == min((key, request) for request, key in keys.items())


KEYS = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e15, 1e15), st.just(float("inf")))
STEPS = st.lists(
    st.tuples(st.sampled_from(["push", "remove", "rekey"]), st.integers(0, REQUESTS - 1), KEYS), max_size=60
)


@settings(max_examples=200, deadline=None)
@given(STEPS)
def test_any_sequence_of_pushes_removals_and_rekeys_keeps_the_heap_in_order(steps):
    heap, lengths = empty_heap()
    keys = {}
    for what, request, key in steps:
        if what == "push" and request not in keys:
            push(heap, lengths, WHICH, request, key)
            keys[request] = key
        elif what == "remove":  # removing one that is absent does nothing
            remove(heap, lengths, WHICH, request)
            keys.pop(request, None)
        elif what == "rekey" and request in keys and key >= keys[request]:
            rekey(heap, lengths[WHICH], request, key)
            keys[request] = key
        check(heap, lengths, keys)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 4).map(float), st.floats(0, 1e6)), min_size=1, max_size=80))
def test_taking_the_top_away_again_and_again_sorts_with_ties_to_the_lower_index(keys):
    heap, lengths = empty_heap(len(keys))
    for request in reversed(range(len(keys))):
        push(heap, lengths, WHICH, request, keys[request])
    taken = []
    while lengths[WHICH]:
        top = int(heap["item"][0])
        taken.append(top)
        remove(heap, lengths, WHICH, top)
    assert taken == sorted(range(len(keys)), key=lambda request: (keys[request], request))
    assert (heap["pos"] == NOWHERE).all()
