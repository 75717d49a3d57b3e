"""Shares a loop over environments out to threads: kernels run without the interpreter's lock, so threads are enough.

The caller works too and takes piece after piece, so a helper that wakes late costs nothing.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from queue import SimpleQueue

from l3env.errors import L3EnvError

PIECES_PER_THREAD = 2
WORTH_S = 3e-4  # a loop that takes less alone is not worth the threads' waking
LOOK_AGAIN_COUNT = 64  # loops shared out between looks at how long one takes alone


def _threads() -> int:
    own = os.environ.get("L3ENV_THREADS", "")
    if own and (not own.isdecimal() or int(own) < 1):
        raise L3EnvError(f"L3ENV_THREADS = {own!r}; expected a whole number >= 1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(own) if own else cores


THREADS = _threads()  # ``L3ENV_THREADS``, or the cores there are

_limit = THREADS

Work = Callable[[int, int], object]


@contextmanager
def at_most(threads: int) -> Iterator[None]:
    """Within it, loops are shared out to no more than so many threads."""
    global _limit
    before, _limit = _limit, threads
    try:
        yield
    finally:
        _limit = before


class Job:
    """Pieces of one loop, each taken by one thread."""

    def __init__(self, work: Work, count: int, pieces: int) -> None:
        edges = [count * i // pieces for i in range(pieces + 1)]
        self.pieces: Iterator[tuple[int, int]] = iter(list(pairwise(edges)))
        self.work = work
        self.ended: SimpleQueue[BaseException | None] = SimpleQueue()

    def help(self) -> None:
        """Works until no piece is left; says how each piece ended."""
        for first, last in self.pieces:  # a list's iterator hands each out once, whoever asks
            try:
                self.work(first, last)
            except BaseException as error:
                self.ended.put(error)
            else:
                self.ended.put(None)


class Crew:
    """Helpers of one process."""

    def __init__(self, helpers: int) -> None:
        self.process = os.getpid()
        self.helpers = helpers
        self.jobs: SimpleQueue[Job] = SimpleQueue()
        for i in range(helpers):
            threading.Thread(target=self._serve, name=f"l3env-{i}", daemon=True).start()

    def _serve(self) -> None:
        while True:
            self.jobs.get().help()


_crews: dict[int, Crew] = {}


def share_out(work: Work, count: int, *, pieces: int | None = None) -> None:
    """Calls ``work(first, last)`` on pieces of range(count), side by side; an error of any piece is raised here."""
    threads = min(_limit, count)
    if threads == 1:
        work(0, count)
        return
    crew = _crews.get(threads)
    if crew is None or crew.process != os.getpid():  # threads do not survive a fork
        crew = _crews[threads] = Crew(threads - 1)
    pieces = min(pieces or PIECES_PER_THREAD * threads, count)
    job = Job(work, count, pieces)
    for _ in range(crew.helpers):
        crew.jobs.put(job)
    job.help()
    errors = [job.ended.get() for _ in range(pieces)]
    for error in errors:
        if error is not None:
            raise error


class Sharer:
    """Shares a loop that runs again and again out to threads, as long as that is worth it."""

    def __init__(self) -> None:
        self._alone_s = 0.0
        self._shared_count = 0

    def __call__(self, work: Work, count: int) -> None:
        """As ``share_out``."""
        if self._alone_s >= WORTH_S and self._shared_count < LOOK_AGAIN_COUNT:
            self._shared_count += 1
            share_out(work, count)
            return
        start_s = time.perf_counter()
        work(0, count)
        self._alone_s = time.perf_counter() - start_s
        self._shared_count = 0
