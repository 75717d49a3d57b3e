"""Clients that leave: by hand on one machine, and what must be conserved under random settings."""

from __future__ import annotations

import numpy as np
import pytest

import l3env
from l3env import Knobs, Workload
from l3env.choices import Order, Status, SubBatching
from l3env.engine.engine import Engine
from l3env.engine.kernels.run import Until
from l3env.engine.segments import eviction_rule
from l3env.engine.state import PrefixArrays
from l3env.envs.serving import ServingEnv
from l3env.envs.vector import ServingVectorEnv
from l3env.errors import L3EnvError, WorkloadError
from l3env.machine.tables import Tables
from l3env.policy.levels import action_of
from l3env.policy.protocol import FixedKnobs
from l3env.policy.registry import make_policy
from l3env.runs.compare import compare
from l3env.runs.driver import run_policy
from l3env.runs.grid import Grid

ONE = FixedKnobs("one", Knobs(running_max_count=1))


@pytest.fixture(scope="module")
def tables() -> Tables:
    return l3env.compile_pair("gpu-dgx-a100", "llama-3-8b", tp=8)


def alone(tables: Tables) -> tuple[float, float]:
    """(TTFT, end-to-end time) of one request of 500 and 4,100 tokens."""
    one = Workload.build("one", [0.0], [500], [4_100])
    row = run_policy(tables, one, make_policy("fcfs")).requests.iloc[0]
    return row["ttft_s"], row["e2e_s"]


def test_by_hand(tables: Tables) -> None:
    """Four at once, one at a time, some 17 s each, and 20 s of patience: two are served, two leave after 20 s. One that
    comes when the machine is free again is served at once."""
    ttft_s, busy_s = alone(tables)
    assert busy_s + ttft_s < 20 < 2 * busy_s
    workload = Workload.build("five", [0.0] * 4 + [2 * busy_s - 0.1], [500] * 5, [4_100] * 5)
    outcome = run_policy(tables, workload, ONE, patience_s=20.0)
    rows, figures = outcome.requests, outcome.metrics
    assert rows["status"].tolist() == ["finished", "finished", "left", "left", "finished"]
    np.testing.assert_allclose(rows["wait_s"], [ttft_s, busy_s + ttft_s, 20.0, 20.0, 0.1 + ttft_s], rtol=1e-9)
    assert rows["finish_s"].max() == pytest.approx(3 * busy_s)
    assert (figures["finished_count"], figures["left_count"], figures["rejected_count"]) == (3, 2, 0)
    assert figures["longest_wait_s"] == 20.0
    assert figures["starved_frac"] == pytest.approx(3 / 5)  # the second, and those who left
    assert figures["beyond_guard_count"] == 0
    assert figures["output_tokens_count"] == 3 * 4_100


def test_patience_beyond_the_guard_costs(tables: Tables) -> None:
    """Five at once: the last would be served after some 68 s, and leaves after 65 s."""
    _, busy_s = alone(tables)
    assert 3 * busy_s + 1 < 65 < 4 * busy_s
    workload = Workload.build("five", [0.0] * 5, [500] * 5, [4_100] * 5)
    figures = run_policy(tables, workload, ONE, patience_s=65.0).metrics
    assert (figures["left_count"], figures["beyond_guard_count"]) == (1, 1)
    engine = Engine(tables, 1, 5)
    engine.reset(0, workload, patience_s=65.0)
    ONE.knobs.write(engine.knobs, 0)
    engine.run(0)
    assert engine.state.env["beyond_guard_count"][0] == engine.beyond_guard_count()[0] == 1


def test_work_on_a_prompt_is_lost(tables: Tables) -> None:
    """A prompt in 16 chunks whose client leaves after half of the time that they take: half of them were processed, the
    blocks are free again, and the iteration that ends after it left is the last."""
    prompt = Workload.build("long", [0.0], [8_000], [10])
    engine = Engine(tables, 1, 1)
    took_s = []
    for patience_s in (None, 1.0):
        engine.reset(0, prompt, patience_s=patience_s if patience_s is None else took_s[0] / 2)
        Knobs(prefill_budget_tokens=500).write(engine.knobs, 0)
        ends_s = []
        while engine.state.env["stop"][0] != 1 and engine.state.req["emitted_tokens"][0, 0] == 0:
            engine.run(0, Until.ITERATIONS, 1)
            if engine.state.env["iterations_count"][0] > len(ends_s):
                ends_s.append(float(engine.state.env["clock_s"][0]))
        took_s.append(ends_s[-1])
        chunks = len(ends_s)
        if patience_s is None:
            assert chunks == 16
            whole_s = ends_s
    env = engine.state.env[0]
    assert chunks == np.searchsorted(whole_s, whole_s[-1] / 2, side="right") + 1
    assert env["prefill_tokens"] == 500 * chunks
    assert (env["left_count"], env["running_count"], env["prefill_left_tokens"], env["output_tokens"]) == (1, 0, 0, 0)
    assert engine.state.pool["used"].sum() == engine.state.pool["promised"].sum() == 0
    assert engine.state.req["status"][0, 0] == Status.LEFT


def shared_workload(rng: np.random.Generator, count: int) -> Workload:
    prompts = rng.integers(64, 3_000, count)
    lengths = prompts // 512
    ids = [int(rng.integers(3)) * 1000 + i for length in lengths for i in range(length)]
    return Workload.build(
        "random",
        np.sort(rng.random(count) * 20),
        prompts,
        rng.integers(1, 300, count),
        prefix_ids=ids,
        prefix_offsets=np.append(0, np.cumsum(lengths)),
        prefix_block_tokens=512,
    )


@pytest.mark.parametrize("cache", ["off", "lru"])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_conserved(seed: int, cache: str) -> None:
    """After every iteration of random settings: each request is in one place, none is there past its patience without a
    first token; in the end nothing is held."""
    rng = np.random.default_rng(seed)
    tables = l3env.compile_pair("l3-dgx-a100", "gpt-175b")
    workload = shared_workload(rng, 120)
    engine = Engine(tables, 1, 120, prefix_cache=eviction_rule(cache))
    patience_s = float(rng.uniform(2.0, 15.0))
    engine.reset(0, workload, patience_s=patience_s)
    knobs = Knobs(
        prefill_budget_tokens=int(rng.choice([256, 2048, -1])),
        order=Order(int(rng.integers(6))),
        sub_batching=SubBatching(int(rng.integers(3))),
        prefill_in_order=bool(rng.integers(2)),
        headroom_frac=0.0,
        running_max_count=int(rng.choice([4, 16, 64])),
    )
    knobs.write(engine.knobs, 0)
    env, req = engine.state.env, engine.state.req[0]
    while env["stop"][0] != 1:
        engine.run(0, Until.ITERATIONS, 1)
        engine.await_work(0, 1)
        counts = np.bincount(req["status"], minlength=8)
        waiting, running = counts[Status.WAITING], counts[[Status.PREFILL, Status.DECODE, Status.PAUSED]].sum()
        ended = counts[Status.FINISHED], counts[Status.REJECTED], counts[Status.LEFT]
        assert (waiting, running) == (env["waiting_count"][0], env["running_count"][0])
        assert ended == tuple(env[f"{name}_count"][0] for name in ("finished", "rejected", "left"))
        assert waiting + running + sum(ended) == env["arrived_count"][0] == 120 - counts[Status.FUTURE]
        there = np.isin(req["status"], (Status.WAITING, Status.PREFILL)) & np.isnan(req["first_token_s"])
        assert (env["clock_s"][0] < req["arrival_s"][there] + patience_s).all()
    left = req["status"] == Status.LEFT
    assert 0 < left.sum() < 120
    assert np.isnan(req["first_token_s"][left]).all()
    assert (req["first_token_s"][~left] - req["arrival_s"][~left] <= patience_s).all()
    assert engine.state.truth[0][~left].sum() == env["output_tokens"][0]
    assert engine.state.pool["used"].sum() == engine.state.pool["promised"].sum() == 0
    assert env["waiting_tokens"][0] == env["prefill_left_tokens"][0] == engine.state.prompts.sum() == 0
    assert engine.state.heap_len[0].sum() == 0
    if isinstance(engine.state.prefix, PrefixArrays):
        assert engine.state.prefix.slot["refs"].sum() == engine.state.prefix.req["held_count"].sum() == 0


def test_sessions_go_on() -> None:
    """A turn whose client left is followed by the next one after its think time, as after one that was refused."""
    tables = l3env.compile_pair("gpu-dgx-a100", "llama-3-8b", tp=8)
    workload = Workload.build(
        "talk", [0.0, 0.0, 0.0], [500] * 3, [4_100, 10, 10], parent_idx=[-1, -1, 1], think_s=[0.0, 0.0, 40.0]
    )
    rows = run_policy(tables, workload, ONE, patience_s=5.0).requests
    assert rows["status"].tolist() == ["finished", "left", "finished"]
    assert 45.0 <= rows["arrival_s"][2] < 45.1  # noticed when the iteration under way ends


def test_one_and_many_environments_are_the_same() -> None:
    options = {"trace": "profile:azure-conv-2023?n=300", "episode_requests": 60, "utilization": 3.0, "patience_s": 2.0}
    single = ServingEnv(**options)
    envs = ServingVectorEnv(2, **options)
    action = action_of(Knobs(prefill_budget_tokens=2048))
    single.reset(seed=5)
    envs.reset(seed=[5, 6])
    ended = np.zeros(2, bool)
    while not ended[0]:
        _, reward, done, _, info = single.step(action)
        _, rewards, ended, _, infos = envs.step(np.stack([action, action]))
        assert (rewards[0], ended[0]) == (reward, done)
    final = infos["final_info"]["metrics"][0]
    assert final["left_count"] > 0
    assert {name: info["metrics"][name] for name in final} == final


def test_a_comparison_says_it(tables: Tables) -> None:
    trace = Workload.build("burst", [0.0] * 8, [500] * 8, [500] * 8)
    policies = [FixedKnobs("two", Knobs(running_max_count=2)), "fcfs"]
    found = compare(policies, "gpu-dgx-a100", "llama-3-8b", trace, patience_s=1.0)
    assert (found.results["patience_s"] == 1.0).all()
    assert found.results["left_count"].tolist() == [0, 0]  # on eight replicas, each alone
    assert Grid.from_json(found.config.to_json()) == found.config
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(L3EnvError, match="patience_s"):
            compare(["fcfs"], "gpu-dgx-a100", "llama-3-8b", trace, patience_s=wrong)
    engine = Engine(tables, 1, 9)
    engine.reset(0, trace, patience_s=1.0)
    with pytest.raises(WorkloadError, match="patience"):
        engine.append(0, trace.select(np.arange(1)))
