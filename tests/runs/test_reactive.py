"""Workloads that react to the scheduler: the loop, requests added to a running engine, and proof searches."""

from __future__ import annotations

import json
import math
import re
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import l3env
from l3env import BasePolicy, FixedKnobs, Knobs, Plan, View, Workload, run_policy
from l3env.engine.engine import Engine
from l3env.engine.kernels.run import Until
from l3env.errors import PolicyError, TraceError, WorkloadError
from l3env.runs.reactive import Submission, run_reactive
from l3env.traces import catalog
from l3env.traces.prover import log as prover_log
from l3env.traces.prover.search import ProofSearch, SearchSettings, earlier_requests

PAIR = ("l3-dgx-a100", "llama-3-8b")
PLAIN = Knobs(prefill_budget_tokens=512, budget_counts_decodes=True)


class Never(BasePolicy):
    """Admits nothing."""

    name = "never"

    def decide(self, view: View) -> Plan:
        return Plan()


def plain() -> FixedKnobs:
    return FixedKnobs("plain", PLAIN)


class Echo:
    """Sends a fixed request whenever the one before has ended, after a pause: sessions, as a client.

    All prompts of a chain begin alike.
    """

    prefix_block_tokens = 64

    def __init__(self, chains: int, length: int, pause_s: float) -> None:
        rng = np.random.default_rng(1)
        self.prompt = rng.integers(50, 3000, (chains, length))
        self.output = rng.integers(1, 200, (chains, length))
        self.start_s = np.sort(rng.random(chains))
        self.pause_s, self.told = pause_s, []
        self.queue: dict[int, list[tuple[float, int]]] = {}

    def requests_capacity(self, replicas_count: int) -> int:
        return int(self.prompt.size)

    def one(self, tag: int, when_s: float) -> Submission:
        return Submission(when_s, int(self.prompt.flat[tag]), int(self.output.flat[tag]), tag, self.ids(tag))

    def ids(self, tag: int) -> tuple[int, ...]:
        chain = tag // self.prompt.shape[1]
        return tuple(chain * 1000 + i for i in range(int(self.prompt.flat[tag]) // self.prefix_block_tokens))

    def open(self, replicas_count: int) -> list[list[Submission]]:
        length = self.prompt.shape[1]
        first = [[] for _ in range(replicas_count)]
        for chain, start_s in enumerate(self.start_s):
            first[chain % replicas_count].append(self.one(chain * length, float(start_s)))
        return first

    def ended(self, replica: int, tag: int, finish_s: float, finished: bool) -> None:
        self.told.append(finish_s)
        if (tag + 1) % self.prompt.shape[1]:
            heappush(self.queue.setdefault(replica, []), (finish_s + self.pause_s, tag + 1))

    def next_s(self, replica: int) -> float:
        queue = self.queue.get(replica)
        return queue[0][0] if queue else math.inf

    def submit(self, replica: int, until_s: float) -> list[Submission]:
        out, queue = [], self.queue.get(replica, [])
        while queue and queue[0][0] <= until_s:
            when_s, tag = heappop(queue)
            out.append(self.one(tag, when_s))
        return out

    def figures(self) -> dict[str, float]:
        return {"told_count": float(len(self.told))}

    def as_workload(self) -> Workload:
        """The same chains as dependent requests of a table."""
        chains, length = self.prompt.shape
        start = np.repeat(self.start_s, length)
        parent = np.arange(chains * length) - 1
        parent[::length] = -1
        pause = np.where(parent >= 0, self.pause_s, 0.0)
        ids = [self.ids(tag) for tag in range(chains * length)]
        return Workload.build(
            "chains",
            start,
            self.prompt.ravel(),
            self.output.ravel(),
            parent_idx=parent,
            think_s=pause,
            prefix_ids=[i for each in ids for i in each],
            prefix_offsets=np.cumsum([0, *map(len, ids)]),
            prefix_block_tokens=self.prefix_block_tokens,
        )


@pytest.mark.parametrize("pause_s", [0.0, 0.4, 30.0])
@pytest.mark.parametrize("interval_s", [0.0, 0.7, math.inf])
@pytest.mark.parametrize("prefix_cache", ["off", "lru"])
def test_a_client_of_chains_equals_dependent_requests(pause_s: float, interval_s: float, prefix_cache: str) -> None:
    """The engine's own dependent requests, on one replica: every time the same but for rounding."""
    tables = l3env.compile_pair(*PAIR, tp=8)
    assert tables.replicas_count == 1
    client = Echo(12, 5, pause_s)

    def make() -> FixedKnobs:
        policy = plain()
        policy.decision_interval_s = interval_s
        return policy

    table = run_policy(tables, client.as_workload(), make(), prefix_cache=prefix_cache)
    reactive = run_reactive(tables, client, make, prefix_cache=prefix_cache)
    assert (reactive.metrics["prefix_hit_frac"] > 0.3) == (prefix_cache != "off")
    for column in ("arrival_s", "ttft_s", "e2e_s", "prefix_hit_tokens"):
        ours = reactive.requests.sort_values(["prompt_tokens", "output_tokens"])[column].to_numpy()
        theirs = table.requests.sort_values(["prompt_tokens", "output_tokens"])[column].to_numpy()
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)
    assert reactive.metrics["makespan_s"] == pytest.approx(table.metrics["makespan_s"])
    assert reactive.metrics["queue_mean_count"] == pytest.approx(table.metrics["queue_mean_count"])


def test_the_client_hears_of_all_replicas_in_order_of_time() -> None:
    tables = l3env.compile_pair(*PAIR)
    assert tables.replicas_count == 8
    client = Echo(40, 4, 0.1)
    outcome = run_reactive(tables, client, plain)
    assert outcome.metrics["finished_count"] == outcome.metrics["told_count"] == 160
    assert client.told == sorted(client.told)


def test_added_requests_are_served_as_if_they_had_been_there() -> None:
    """Cutting a table in two and adding the second half before it is due changes nothing."""
    tables = l3env.compile_pair(*PAIR, tp=8)
    rng = np.random.default_rng(2)
    whole = Workload.build("whole", np.sort(rng.random(60)) * 20, rng.integers(1, 2000, 60), rng.integers(1, 200, 60))
    one, two = (Engine(tables, 1, 60) for _ in range(2))
    for engine in (one, two):
        PLAIN.write(engine.knobs, 0)
    one.reset(0, whole)
    one.run(0)
    first = whole.head(25)
    two.reset(0, first)
    two.run(0, Until.TIME, float(whole.arrival_s[20]))
    rows = two.append(0, whole.select(np.arange(25, 60)))
    two.run(0)
    assert rows.tolist() == list(range(25, 60))
    for name in ("arrival_s", "first_token_s", "finish_s", "ttft_slo_s", "status"):
        np.testing.assert_array_equal(one.state.req[name], two.state.req[name])
    assert one.state.env["clock_s"][0] == two.state.env["clock_s"][0]


def test_what_cannot_be_added() -> None:
    tables = l3env.compile_pair(*PAIR, tp=8)
    engine = Engine(tables, 1, 4)
    engine.reset(0, Workload.build("a", [1.0, 2.0], [10, 10], [5, 5]))
    with pytest.raises(WorkloadError, match="only root requests"):
        engine.append(0, Workload.build("b", [3.0, 3.0], [10, 10], [5, 5], parent_idx=[-1, 0]))
    with pytest.raises(WorkloadError, match="made for 4 in all"):
        engine.append(0, Workload.build("b", [3.0] * 3, [10] * 3, [5] * 3))


def test_a_policy_that_admits_nothing_is_named() -> None:
    tables = l3env.compile_pair(*PAIR, tp=8)
    with pytest.raises(PolicyError, match="'never': is stuck"):
        run_reactive(tables, Echo(3, 1, 1.0), Never)


SMALL = SearchSettings(theorems_count=24, trees_count=16, jobs_count=4, samples_count=24, verifiers_count=4)
PROVER = ("l3-dgx-a100", "deepseek-prover-v1.5-7b")


def searched(settings: SearchSettings = SMALL, policy: str = "sarathi", **changes: object):
    tables = l3env.compile_pair(*PROVER)
    client = ProofSearch(settings, **changes)
    outcome = run_reactive(
        tables, client, lambda: l3env.make_policy(policy), training=earlier_requests(client), replicas_count=2
    )
    return client, outcome


@pytest.mark.parametrize("mode", ["rmaxts", "single-pass"])
def test_every_search_ends_with_a_proof_or_its_last_sample(mode: str) -> None:
    client, outcome = searched(SearchSettings(**{**vars(SMALL), "mode": mode}))
    log = client.log
    assert len(log) == outcome.metrics["finished_count"] == outcome.metrics["samples_count"]
    for theorem in range(SMALL.theorems_count):
        mine = [row for row in log if row["theorem"] == theorem]
        proofs = [row["verified_s"] for row in mine if row["success"]]
        assert len(mine) == SMALL.samples_count or proofs
        if proofs:  # nothing starts after the first proof
            assert max(row["submitted_s"] for row in mine) <= min(proofs)
        if mode == "single-pass":
            assert {row["depth"] for row in mine} == {0}
    assert outcome.metrics["proofs_count"] == len({row["theorem"] for row in log if row["success"]})
    assert outcome.metrics["search_makespan_s"] == max(row["verified_s"] for row in log)
    assert outcome.metrics["proofs_per_hour"] == pytest.approx(
        outcome.metrics["proofs_count"] / outcome.metrics["search_makespan_s"] * 3600
    )


def test_jobs_and_verifiers_are_never_more_than_there_are() -> None:
    """Counted over the log's intervals; verification is first come, first served."""
    client, _ = searched()
    log = client.log

    def most(starts: list[float], ends: list[float]) -> int:
        steps = sorted([(t, 1) for t in starts] + [(t, -1) for t in ends])  # ends come first where times are equal
        return int(np.cumsum([step for _, step in steps]).max())

    for process in range(SMALL.trees_count):
        mine = [row for row in log if row["process"] == process]
        assert most([r["submitted_s"] for r in mine], [r["verified_s"] for r in mine]) <= SMALL.jobs_count
    free = [0.0] * SMALL.verifiers_count
    for row in sorted(log, key=lambda row: row["generated_s"]):
        start = max(row["generated_s"], min(free))
        assert row["verified_s"] >= start
        free[free.index(min(free))] = row["verified_s"]


def test_prompts_share_what_their_wordings_share() -> None:
    """All prompts of a tree begin with the statement's blocks; no two theorems share any."""
    client, _ = searched()
    seen: dict[int, int] = {}
    for row in client.log:
        for block in row["prefix_ids"]:
            assert seen.setdefault(block, row["theorem"]) == row["theorem"]
        assert len(row["prefix_ids"]) <= row["prompt_tokens"] // 16
    resumed = [row for row in client.log if row["depth"] > 0]
    assert resumed
    roots = {row["theorem"]: row["prefix_ids"] for row in client.log if row["depth"] == 0}
    for row in resumed:
        whole = roots[row["theorem"]]
        assert row["prefix_ids"][: len(whole)] == whole


def test_policies_see_the_same_theorems_and_schedule_differently() -> None:
    (one, a), (two, b) = searched(policy="fcfs"), searched(policy="l3")
    assert a.metrics["makespan_s"] != b.metrics["makespan_s"]
    assert [t["prompt_tokens"] for t in one.log[:16]] == [t["prompt_tokens"] for t in two.log[:16]]
    again, c = searched(policy="fcfs")
    assert a.metrics == c.metrics
    assert one.log == again.log


def test_bad_settings() -> None:
    with pytest.raises(WorkloadError, match="jobs_count = 0"):
        SearchSettings(jobs_count=0)
    with pytest.raises(WorkloadError, match="mode = 'beam'"):
        SearchSettings(mode="beam")


def test_the_log_of_a_search_is_a_trace(tmp_path: Path) -> None:
    """Replayed on the same machine under the same policy and no faster or slower, every time comes out again."""
    settings = SearchSettings(**{**vars(SMALL), "theorems_count": 16})
    client, outcome = searched(settings)
    path = prover_log.write(client.log, tmp_path / "search.jsonl")
    assert catalog.find_format(path).name == "prover-log"
    workload = prover_log.load(path)
    assert len(workload) == len(client.log)
    assert workload.prefix_block_tokens == 16
    rows = sorted(client.log, key=lambda row: row["submitted_s"])
    pauses = workload.think_s[workload.parent_idx >= 0]
    assert (pauses > 0).all()
    assert len(set(workload.session_idx.tolist())) == 16
    for row, parent, think_s in zip(rows, workload.parent_idx, workload.think_s, strict=True):
        if parent >= 0:
            assert rows[parent]["theorem"] == row["theorem"]
            assert rows[parent]["generated_s"] + think_s == pytest.approx(row["submitted_s"])
            assert rows[parent]["verified_s"] == pytest.approx(row["submitted_s"])
    one, policy = Engine(l3env.compile_pair(*PROVER), 1, len(workload)), l3env.make_policy("sarathi")
    mine = workload.select(np.isin(workload.session_idx, [rows_of(rows, 0)]))
    one.reset(0, mine)
    policy.decide(None).write(one.knobs, 0)  # type: ignore[arg-type]
    one.run(0)
    assert one.state.env["finished_count"][0] == len(mine)
    assert outcome.metrics["finished_count"] == len(workload)


def rows_of(rows: list[dict[str, Any]], theorem: int) -> int:
    """The session number of a theorem: its place among the first mentions."""
    return list(dict.fromkeys(row["theorem"] for row in rows)).index(theorem)


GOOD = {
    "theorem": "t",
    "job": 0,
    "submitted_s": 2.0,
    "generated_s": 3.0,
    "prompt_tokens": 40,
    "output_tokens": 5,
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"prompt_tokens": -1}, "row 2, field prompt_tokens: got -1"),
        ({"generated_s": 1.0}, "row 2, field generated_s: got 1.0; expected seconds >= submitted_s"),
        ({"theorem": None}, "row 2, field theorem"),
        ({"prefix_ids": [1, 2, 3]}, "row 2, field prefix_ids: got '3 ids'"),
        ({"submitted_s": 2.5, "generated_s": 9.0}, "row 2, field submitted_s: got 2.5; expected no earlier"),
    ],
)
def test_bad_logs_are_named(tmp_path: Path, change: dict[str, object], expected: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(
        json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "submitted_s": 4.0, "generated_s": 5.0} | change) + "\n"
    )
    with pytest.raises(TraceError, match=re.escape(expected)):
        prover_log.load(path)
