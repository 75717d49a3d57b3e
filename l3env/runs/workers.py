"""Many calls at once over joblib: here, in local processes, or on any backend that joblib knows (Ray: many machines).

Results do not depend on which.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, TypeVar

from joblib import Parallel, cpu_count, delayed, parallel_config
from joblib.externals.loky.process_executor import TerminatedWorkerError

from l3env.errors import L3EnvError
from l3env.given import everything, take
from l3env.threads import at_most

OWN_VARIABLES = "L3ENV_"  # of the environment
WATCH_S = 1.0  # between looks at whether the parent is alive
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Workers:
    """Who does the work.

    Attributes:
        backend: of joblib: ``sequential`` (this process), ``loky`` (local processes), ``threading``, or one registered.
        count: how many at a time; -1: as many as the backend has cores.
    """

    backend: str = "loky"
    count: int = -1


HERE = Workers("sequential", 1)


def each(
    function: Callable[[Item], Result], items: Sequence[Item], workers: Workers = HERE
) -> Iterator[tuple[int, Result | None]]:
    """(place of the item, its result) as they come; None for one that took its process down (out of memory, a crash).

    Which one it was cannot be seen from outside, so those that were under way are called again, one by one.
    """
    if workers.backend == "sequential" or workers.count == 1:
        yield from ((place, function(item)) for place, item in enumerate(items))
        return
    left = dict(enumerate(items))
    under_way = 3 * max(workers.count, cpu_count() if workers.count < 0 else 1)
    while left:
        try:
            for place, result in _spread_out(function, left, workers):
                del left[place]
                yield place, result
        except TerminatedWorkerError:
            for place in list(left)[:under_way]:
                yield place, _alone(function, left.pop(place))


def all_of(function: Callable[[Item], Result], items: Sequence[Item], workers: Workers = HERE) -> list[Result]:
    """The results of all items, in their order. Raises L3EnvError where one took its process down."""
    found = dict(each(function, items, workers))
    if died := [place for place, result in found.items() if result is None]:
        raise L3EnvError(f"{len(died)} of {len(items)} calls took their process down: out of memory, or a crash")
    return [found[place] for place in range(len(items))]  # type: ignore[misc]


def _alone(function: Callable[[Item], Result], item: Item) -> Result | None:
    """The result from a process of its own, None where it dies."""
    try:
        return next(_spread_out(function, {0: item}, Workers("loky", 2)))[1]  # one worker would be this process
    except TerminatedWorkerError:
        return None


def _spread_out(
    function: Callable[[Item], Result], items: dict[int, Item], workers: Workers
) -> Iterator[tuple[int, Result]]:
    with parallel_config(backend=workers.backend, n_jobs=workers.count):
        parallel = Parallel(return_as="generator_unordered", batch_size=1, pre_dispatch="2*n_jobs")
        variables = {k: v for k, v in os.environ.items() if k.startswith(OWN_VARIABLES)}
        caller = Caller(os.getpid(), os.getcwd(), variables, everything())
        yield from parallel(delayed(_call)(function, place, item, caller) for place, item in list(items.items()))


class Caller(NamedTuple):
    """What names of the caller's stand for depends on: workers are kept, and may be older than its last ``chdir``."""

    pid: int
    folder: str
    variables: dict[str, str]
    given: dict[str, bytes]

    def joined(self) -> None:
        """Makes a process of the caller's see files as it does, and end with it: a killed command would leave idle
        workers behind; what policies print goes to stderr, since stdout may be for JSON. On other machines nothing of
        that holds."""
        take(self.given)
        if os.getppid() != self.pid:
            return
        _end_with_parent(self.pid)
        sys.stdout = sys.stderr
        os.chdir(self.folder)
        for name in [name for name in os.environ if name.startswith(OWN_VARIABLES)]:
            del os.environ[name]
        os.environ.update(self.variables)


def _call(function: Callable[[Item], Result], place: int, item: Item, caller: Caller) -> tuple[int, Result]:
    """What a worker runs."""
    caller.joined()
    with at_most(1):  # a process a core: the engine's own threads would compete
        return place, function(item)


@cache
def _end_with_parent(parent_pid: int) -> None:
    """Watches, once a process, whether the parent is still there."""

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(WATCH_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
