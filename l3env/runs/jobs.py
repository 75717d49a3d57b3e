"""Runs jobs, here or on many workers; those whose results a folder has are taken from it."""

from __future__ import annotations

import platform
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from l3env.errors import L3EnvError
from l3env.runs.store import Done, Job, Store
from l3env.runs.workers import HERE, Workers, each

Progress = Callable[[int, int, str], None]  # (jobs done, jobs in all, what has just ended)


@dataclass(frozen=True)
class Ended:
    """Results in the order of the jobs, and how many of them were there already."""

    done: list[Done]
    taken_count: int

    def of_all(self) -> list[Done]:
        """The results, where all of them are needed. Raises L3EnvError where one failed."""
        failed = [done for done in self.done if done.error is not None]
        if failed:
            raise L3EnvError(f"{len(failed)} of {len(self.done)} runs failed, the first: {failed[0].error}")
        return self.done


def attempt(job: Job) -> Done:
    """Whatever goes wrong becomes part of the result."""
    start_s = time.perf_counter()
    try:
        figures, frames = job.work()
        done = Done(job.row, figures, frames=frames)
    except Exception as error:
        bad_input = isinstance(error.__cause__ or error, L3EnvError)
        text = "" if bad_input else traceback.format_exc()
        done = Done(job.row, error=f"{type(error).__name__}: {error}", traceback=text)
    return replace(done, wall_s=time.perf_counter() - start_s, host=platform.node())


def run_jobs(
    jobs: Sequence[Job],
    store: Store | None = None,
    *,
    workers: Workers = HERE,
    progress: Progress | None = None,
) -> Ended:
    """Runs what the store does not have; what ends is kept at once, what failed is run again the next time.

    Raises:
        L3EnvError: two jobs of one name.
    """
    if len({job.name for job in jobs}) < len(jobs):
        raise L3EnvError(f"asked for twice: {', '.join(name for name in _twice([job.name for job in jobs]))}")
    results: dict[str, Done] = {}
    if store is not None:
        results = {job.name: found for job in jobs if (found := store.find(job)) is not None}
    missing = [job for job in jobs if job.name not in results]
    taken_count = len(results)
    if progress is not None:
        progress(taken_count, len(jobs), "")
    for place, ended in each(attempt, missing, workers):
        job = missing[place]
        done = ended or Done(job.row, error="WorkerDied: the run took its process down: out of memory, or a crash")
        if store is not None:
            store.write(job, done)
            done = replace(done, frames={})
        results[job.name] = done
        if progress is not None:
            progress(len(results), len(jobs), job.name)
    return Ended([results[job.name] for job in jobs], taken_count)


def _twice(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})
