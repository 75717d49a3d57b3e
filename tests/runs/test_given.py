"""Objects wherever references are taken: policies, classes, specs and workloads made in Python."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import l3env
from l3env import BasePolicy, Knobs, View, Workload
from l3env.envs.serving import ServingEnv
from l3env.errors import L3EnvError
from l3env.given import given_object, label_of, reference
from l3env.policy.registry import make_policy
from l3env.report.names import policy_labels
from l3env.runs.cell import Cell
from l3env.runs.compare import compare
from l3env.runs.workers import Workers


class Budgeted(BasePolicy):
    """Chunked prefill; counts how often it was asked."""

    name = "budgeted"

    def __init__(self, tokens: int = 512) -> None:
        self.tokens, self.asked = tokens, 0

    def decide(self, view: View) -> Knobs:
        self.asked += 1
        assert self.asked <= view.finished_count + 10_000
        return Knobs(prefill_budget_tokens=self.tokens, budget_counts_decodes=True)


def workload(count: int = 30) -> Workload:
    return Workload.build("mine", np.arange(count) / 5, np.full(count, 700), np.full(count, 30))


def test_objects_are_what_references_are() -> None:
    """The same machine, requests and settings, once by name and once as objects: the same figures."""
    system, model = l3env.load("system/gpu-dgx-a100"), l3env.load("model/llama-3-8b")
    named = compare(["sarathi"], "gpu-dgx-a100", "llama-3-8b", workload()).done.iloc[0]
    given = compare([Budgeted(), Budgeted], system, model, workload()).done
    assert given["error"].isna().all()
    for column in ("ttft_mean_s", "tbt_p99_s", "makespan_s", "energy_j_per_token"):
        assert given[column].tolist() == [named[column]] * 2, column
    labels = policy_labels(given["policy"])
    assert next(iter(labels.values())).startswith("budgeted")


def test_each_run_gets_a_fresh_policy_that_holds_what_it_was_made_with() -> None:
    policy = Budgeted(64)
    policy.asked = 3
    name = reference(policy)
    first, second = make_policy(name), make_policy(name)
    assert first is not second
    assert (first.tokens, first.asked) == (64, 3)  # type: ignore[attr-defined]
    assert label_of(name) == "budgeted"
    assert reference(Budgeted(64)) != name
    assert reference(Budgeted(65)) != reference(Budgeted(64))
    assert given_object("sarathi") is None


def test_results_of_objects_are_kept_by_what_they_hold(tmp_path: Path) -> None:
    def run(tokens: int) -> int:
        return compare([Budgeted(tokens)], "gpu-dgx-a100", "llama-3-8b", workload(), out=tmp_path).taken_count

    assert [run(512), run(512), run(256), run(256)] == [0, 1, 0, 1]


def test_workers_are_given_them_too() -> None:
    here, there = (
        compare([Budgeted(512), Budgeted(128)], "gpu-dgx-a100", "llama-3-8b", workload(), workers=workers).done
        for workers in (Workers("sequential", 1), Workers("loky", 2))
    )
    assert here["ttft_mean_s"].tolist() == there["ttft_mean_s"].tolist()


def test_a_cell_and_environments_take_them() -> None:
    system = dataclasses.replace(l3env.load("system/gpu-dgx-a100"), name="mine")
    cell = Cell(Budgeted(), system, "llama-3-8b", workload(), load=1.0)  # type: ignore[arg-type]
    assert cell.system.startswith("mine@")
    env = ServingEnv(system=system, model=l3env.load("model/llama-3-8b"), trace=workload())
    env.reset(seed=0)
    assert env.episode.workload.prompt_tokens.tolist()[:2] == [700, 700]


def test_what_is_no_such_object_is_refused() -> None:
    with pytest.raises(L3EnvError, match="are not resampled"):
        compare(["fcfs"], "gpu-dgx-a100", "llama-3-8b", workload(), seeds=2)
    with pytest.raises(L3EnvError):
        compare([workload()], "gpu-dgx-a100", "llama-3-8b", workload())  # type: ignore[list-item]
