"""Workloads that react: what is asked next depends on what has been answered, so arrivals depend on the scheduler.

A *client* stands for all that happens off the GPUs: it is told of every finished request, in the order of time over
all replicas, and submits new ones. Replicas have clocks of their own; the loop always moves the one that is furthest
behind, one event at a time, so that nothing that happens on one can come too late for another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise
from typing import Protocol

import numpy as np

from l3env.choices import Status
from l3env.engine.engine import Engine, Slo
from l3env.engine.kernels.run import Stop
from l3env.engine.segments import eviction_rule
from l3env.machine.tables import Tables
from l3env.policy.mistakes import ask
from l3env.policy.protocol import Policy
from l3env.requests.workload import Workload
from l3env.runs.driver import Driver, predictions, stuck
from l3env.runs.metrics import Outcome, collect


@dataclass(frozen=True)
class Submission:
    """One request. ``tag`` is the client's own, handed back when it has ended; ``prefix_ids`` as in Workload."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    tag: int
    prefix_ids: tuple[int, ...] = ()


class Client(Protocol):
    """What sends requests and waits for their answers. Replicas are numbered from 0.

    Attributes:
        prefix_block_tokens: tokens per prefix id.
    """

    prefix_block_tokens: int

    def requests_capacity(self, replicas_count: int) -> int:
        """The most requests that it will send to one replica."""

    def open(self, replicas_count: int) -> list[list[Submission]]:
        """The first requests of each replica, arrivals ascending."""

    def ended(self, replica: int, tag: int, finish_s: float, finished: bool) -> None:
        """A request has finished, or could never fit. Called in order of time over all replicas."""

    def next_s(self, replica: int) -> float:
        """When it will next submit to a replica, as far as is known now; infinity where it will not."""

    def submit(self, replica: int, until_s: float) -> list[Submission]:
        """What it submits to a replica up to a time, arrivals ascending."""

    def figures(self) -> dict[str, float]:
        """Figures that a run's results should show."""


class _Replica:
    """An environment, its driver, and what it has been sent."""

    def __init__(
        self, engine: Engine, e: int, policy: Policy, first: list[Submission], slo: Slo, block_tokens: int
    ) -> None:
        self.engine, self.e, self.policy, self.block_tokens = engine, e, policy, block_tokens
        self.tags = [each.tag for each in first]
        workload = workload_of(first, block_tokens)
        engine.reset(e, workload, slo=slo, predicted_tokens=predictions(policy, workload))
        self.slo = slo
        self.driver = Driver(engine, e, policy)
        self.open_idx = np.arange(len(first))  # requests not known to have ended
        self.ended_count = 0

        self.env = engine.state.env[e : e + 1]

    @property
    def clock_s(self) -> float:
        return float(self.env["clock_s"][0])

    @property
    def busy(self) -> bool:
        return bool(self.env["stop"][0] != Stop.DONE.value)

    def send(self, submissions: list[Submission]) -> None:
        workload = workload_of(submissions, self.block_tokens)
        predicted = predictions(self.policy, workload)
        rows = self.engine.append(self.e, workload, slo=self.slo, predicted_tokens=predicted)
        self.tags += [each.tag for each in submissions]
        self.open_idx = np.concatenate([self.open_idx, rows])

    def take_ended(self) -> list[tuple[float, int, bool]]:
        """(time, tag, finished) of requests that have ended since the last call."""
        ended_count = int(self.env["finished_count"][0] + self.env["rejected_count"][0])
        if ended_count == self.ended_count:
            return []
        self.ended_count = ended_count
        req = self.engine.state.req[self.e]
        status = req["status"][self.open_idx]
        mask = (status == Status.FINISHED) | (status == Status.REJECTED)
        idx, self.open_idx = self.open_idx[mask], self.open_idx[~mask]
        finished = req["status"][idx] == Status.FINISHED
        when_s = np.where(finished, req["finish_s"][idx], req["arrival_s"][idx])
        return [(float(t), self.tags[i], bool(f)) for t, i, f in zip(when_s, idx, finished, strict=True)]


def workload_of(submissions: list[Submission], block_tokens: int) -> Workload:
    """Submissions as a request table."""
    return Workload.build(
        "reactive",
        [each.arrival_s for each in submissions],
        [each.prompt_tokens for each in submissions],
        [each.output_tokens for each in submissions],
        prefix_ids=[i for each in submissions for i in each.prefix_ids],
        prefix_offsets=np.cumsum([0, *(len(each.prefix_ids) for each in submissions)]),
        prefix_block_tokens=block_tokens,
    )


def run_reactive(
    tables: Tables,
    client: Client,
    make: Callable[[], Policy],
    *,
    slo: Slo | None = None,
    training: Workload | None = None,
    replicas_count: int | None = None,
    record: bool = True,
    prefix_cache: str = "off",
    progress: Callable[[float, int], None] | None = None,
) -> Outcome:
    """Serves a client on the replicas of a system, each under a policy of its own.

    Args:
        make: gives a fresh policy, once a replica.
        training: earlier requests to fit predictors on.
        prefix_cache: as for ``run_policy``; submissions say by their ``prefix_ids`` what they share.
        progress: called now and then with (simulated seconds, requests ended).

    Raises:
        PolicyError: a policy leaves requests waiting for ever.
        PlanError: it returned something illegal.
    """
    first = [each for each in client.open(replicas_count or tables.replicas_count) if each]
    rule = eviction_rule(prefix_cache)
    engine = Engine(tables, len(first), client.requests_capacity(len(first)), record=record, prefix_cache=rule)
    replicas = []
    for e, submissions in enumerate(first):
        policy = make()
        policy.slo = slo or Slo()
        ask(policy, "prepare", tables, training)
        replicas.append(_Replica(engine, e, policy, submissions, slo or Slo(), client.prefix_block_tokens))
    _serve(replicas, client, progress)
    counts = engine.state.env["requests_count"]
    edges = np.concatenate([[0], np.cumsum(counts)])
    outcome = collect(engine, range(len(first)), [np.arange(a, b) for a, b in pairwise(edges)])
    own = [ask(replica.policy, "figures", at_s=replica.clock_s) for replica in replicas]
    outcome.metrics.update({name: float(np.mean([each[name] for each in own])) for name in own[0]})
    outcome.metrics.update(client.figures())
    return outcome


def _serve(replicas: list[_Replica], client: Client, progress: Callable[[float, int], None] | None) -> None:
    """Until neither the replicas nor the client have anything left to do."""
    waiting: list[tuple[float, int, int, bool]] = []  # ended, not yet told to the client
    untold = [0] * len(replicas)
    ended = 0
    bounds = np.zeros(len(replicas))
    for replica in replicas:
        replica.driver.wake()
        _collect(replica, waiting, untold)
    while True:
        for e, replica in enumerate(replicas):
            bounds[e] = replica.clock_s if replica.busy else _idle_until(client, e, waiting, untold)
        now_s = float(bounds.min())
        if now_s == math.inf:
            return
        told = False
        while waiting and waiting[0][0] <= now_s:
            when_s, e, tag, finished = heappop(waiting)
            client.ended(e, tag, when_s, finished)
            untold[e] -= 1
            ended += 1
            told = True
            if progress is not None and ended % 1024 == 0:
                progress(now_s, ended)
        if told:
            continue  # bounds may have moved
        e = int(bounds.argmin())
        replica = replicas[e]
        submissions = client.submit(e, now_s)
        if submissions:
            replica.send(submissions)
            replica.driver.wake()
        elif replica.busy:
            limit_s = client.next_s(e)
            if replica.driver.step(limit_s, events=True) == Stop.STALLED:
                if limit_s == math.inf:
                    raise stuck(replica.engine, e, replica.policy)
                replica.engine.wait(e, limit_s)
        _collect(replica, waiting, untold)


def _collect(replica: _Replica, waiting: list[tuple[float, int, int, bool]], untold: list[int]) -> None:
    for when_s, tag, finished in replica.take_ended():
        heappush(waiting, (when_s, replica.e, tag, finished))
        untold[replica.e] += 1


def _idle_until(client: Client, e: int, waiting: list[tuple[float, int, int, bool]], untold: list[int]) -> float:
    """The earliest time at which anything can happen on a replica with nothing to do."""
    next_s = client.next_s(e)
    if untold[e]:
        next_s = min(next_s, min(when_s for when_s, replica, _, _ in waiting if replica == e))
    return next_s
