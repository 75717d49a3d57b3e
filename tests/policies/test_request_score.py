"""``request-score`` and the scorer under it: what it computes, what it may know, what it gains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from l3env import FixedKnobs, Knobs, View, run_policy
from l3env.choices import Order, Status
from l3env.engine.engine import Engine, Slo, Until
from l3env.engine.state import Score
from l3env.errors import PlanError, PolicyError
from l3env.experiments.learning import evolve
from l3env.machine.pair import compile_pair
from l3env.policies.request_score import FILE, KNOBS, RequestScore, read_weights, weights_of
from l3env.requests.workload import Workload

GPU = ("gpu-dgx-a100", "qwen-72b")  # two replicas
LARGE = ("gpu-dgx-a100", "gpt-175b")  # one


def mixed(count: int = 60, seed: int = 0, rate_per_s: float = 8.0) -> Workload:
    """Long and short prompts, more than the machine can serve in time."""
    rng = np.random.default_rng(seed)
    prompts = np.where(rng.random(count) < 0.3, rng.integers(6000, 12000, count), rng.integers(50, 600, count))
    arrivals = np.cumsum(rng.exponential(1 / rate_per_s, count))
    return Workload.build("mixed", arrivals, prompts, rng.integers(2, 80, count))


def scored(workload: Workload, weights: np.ndarray, pair: tuple[str, str] = GPU) -> Engine:
    engine = Engine(compile_pair(*pair), 1, len(workload))
    engine.reset(0, workload)
    KNOBS.write(engine.knobs, 0)
    engine.score_with(0, weights)
    return engine


def test_a_short_prompt_overtakes_a_long_one_under_way() -> None:
    """4,096 tokens at 512 an iteration take eight; 100 that arrive during the first one are served in the second."""
    workload = Workload.build("two", [0.0, 1e-6], [4096, 100], [1, 1])
    knobs = {"prefill_budget_tokens": 512, "order": Order.SHORTEST_PROMPT_HOPELESS_LAST}
    ttft_s = {}
    for in_order in (False, True):
        policy = FixedKnobs("x", Knobs(**knobs, prefill_in_order=in_order))  # type: ignore[arg-type]
        ttft_s[in_order] = run_policy(compile_pair(*LARGE), workload, policy).requests["ttft_s"].to_numpy()
    assert ttft_s[False][1] > 0.9 * ttft_s[False][0]
    assert ttft_s[True][1] < 0.35 * ttft_s[True][0]


def test_scores_are_those_of_the_formula() -> None:
    """Every score that the kernel gives, written out from what the View shows."""
    rng = np.random.default_rng(3)
    values = {each.name: float(rng.normal(0, 0.5)) for each in Score if Score.ON < each <= Score.GIVEN_UP}
    w = weights_of(evolve.START | values)
    engine = scored(mixed(), w)
    req, env, found = engine.state.req, engine.state.env, 0
    engine.await_work(0, 1)
    for _ in range(400):
        view = View(engine, 0)
        now_s, tbt_s = view.now_s, float(env["tbt_slo_s"][0])
        rows = [row for row in view.waiting(limit=1000) if not req["hopeless"][0, row["idx"]]] + list(view.prefilling)
        work_s = np.array([r["ttft_alone_s"] * r["prefill_left_tokens"] / r["prompt_tokens"] for r in rows])
        pressure = np.log(1 + work_s.sum() / float(env["ttft_slo_s"][0]))
        free = float(view.pools.free_tokens.sum())
        expected = {}
        for r, work in zip(rows, np.log(work_s / tbt_s), strict=True):
            assert np.isnan(r["first_token_s"]), "nobody is preempted here"
            left_s = r["ttft_deadline_s"] - now_s
            stretch = np.log(min(left_s / np.exp(work) / tbt_s, 64.0)) if left_s > 0 else -np.inf
            if stretch < w[Score.LOST] + w[Score.LOST_PRESSURE] * pressure + w[Score.LOST_WORK] * work:
                expected[int(r["idx"])] = 0.0
                continue
            total = (w[Score.WORK] + w[Score.WORK_PRESSURE] * pressure) * work
            total += (w[Score.STRETCH] + w[Score.STRETCH_PRESSURE] * pressure) * stretch
            total += w[Score.URGENCY] * np.exp(-stretch)
            if r["status"] == Status.PREFILL:
                total += w[Score.BEGUN] + w[Score.PROGRESS] * (1 - r["prefill_left_tokens"] / r["prompt_tokens"])
            else:
                total += w[Score.KV] * r["prompt_tokens"] / (r["prompt_tokens"] + free)
            expected[int(r["idx"])] = 0.5 + 0.5 * total / (1 + abs(total))
        engine.run(0, Until.ITERATIONS, 1)
        still = [idx for idx in expected if np.isnan(req["finish_s"][0, idx])]
        got = {idx: req["score"][0, idx] for idx in still if not req["hopeless"][0, idx]}
        assert got == pytest.approx({idx: expected[idx] for idx in got}, rel=1e-9, abs=1e-12)
        found += len({*got.values()})
        engine.await_work(0, 1)
        if env["finished_count"][0] == 60:
            break
    assert found > 200


def test_the_order_of_requests_does_not_matter() -> None:
    """Those that are lost share a score, and the earlier goes first: at most one is lost here."""
    rng = np.random.default_rng(1)
    count = 8
    prompts, outputs = rng.permutation(np.arange(300, 300 + 200 * count, 200)), rng.integers(2, 60, count)
    rows = rng.permutation(count)
    alone = [Engine(compile_pair(*GPU), 1, count) for _ in range(2)]
    for engine, order in zip(alone, (np.arange(count), rows), strict=True):
        engine.reset(0, Workload.build("c", np.zeros(count), prompts[order], outputs[order]))
        KNOBS.write(engine.knobs, 0)
        engine.score_with(0, RequestScore().weights)
        engine.run(0)
    first, second = (engine.state.req["finish_s"][0] for engine in alone)
    np.testing.assert_allclose(first[rows], second, rtol=1e-12)
    assert alone[0].state.req["hopeless"].sum() <= 1
    assert np.unique(first).size > count / 2


def test_decisions_do_not_depend_on_lengths_to_come() -> None:
    """Until the first request ends, other output lengths change nothing at all."""
    base = mixed(40)
    longer = Workload.build("longer", base.arrival_s, base.prompt_tokens, base.output_tokens + 500)
    engines = [scored(each, RequestScore().weights) for each in (base, longer)]
    while engines[0].state.env["finished_count"][0] == 0:
        before = [engine.state.req["score"][0].copy() for engine in engines]
        np.testing.assert_array_equal(*before)
        assert engines[0].state.env["clock_s"][0] == engines[1].state.env["clock_s"][0]
        for engine in engines:
            engine.run(0, Until.ITERATIONS, 1)
    assert before[0].any()


def test_side_by_side_equals_alone_and_a_reset_ends_it() -> None:
    workloads = [mixed(30, seed) for seed in range(3)]
    weights = [RequestScore().weights, weights_of(evolve.START), weights_of(evolve.START | {"STALL": 0.0})]
    together = Engine(compile_pair(*GPU), 3, 30)
    for e in range(3):
        together.reset(e, workloads[e])
        KNOBS.write(together.knobs, e)
        together.score_with(e, weights[e])
    together.run_to_end()
    for e in range(3):
        alone = scored(workloads[e], weights[e])
        alone.run(0)
        np.testing.assert_array_equal(together.state.req["finish_s"][e], alone.state.req["finish_s"][0])
    knobs = Knobs(prefill_budget_tokens=512)
    together.reset(1, workloads[0])
    knobs.write(together.knobs, 1)
    together.run(1)
    plain = Engine(compile_pair(*GPU), 1, 30)
    plain.reset(0, workloads[0])
    knobs.write(plain.knobs, 0)
    plain.run(0)
    np.testing.assert_array_equal(together.state.req["finish_s"][1], plain.state.req["finish_s"][0])


@pytest.mark.parametrize(
    "pair", [GPU, ("l3-dgx-a100", "gpt-175b"), ("hbm-pim-dgx-a100", "llama-2-7b?max_model_len=100000")]
)
def test_all_requests_are_served(pair: tuple[str, str]) -> None:
    workload = mixed(80, rate_per_s=50.0)
    outcome = run_policy(compile_pair(*pair), workload, RequestScore())
    assert outcome.metrics["finished_count"] == 80


def test_pim_memory_is_for_what_hbm_cannot_hold() -> None:
    """Of three requests of two fifths of the HBM each, the third has to go to PIM, and no other does."""
    tables = compile_pair("l3-dgx-a100", "qwen-72b")
    prompt = int(tables.arrays.pool_blocks[0, 0]) * tables.block_tokens * 2 // 5
    engine = Engine(tables, 1, 3)
    engine.reset(0, Workload.build("three", np.zeros(3), [prompt] * 3, [50] * 3), slo=Slo(ttft_s=1e9, tbt_s=1e9))
    KNOBS.write(engine.knobs, 0)
    engine.score_with(0, weights_of(evolve.START | {"HEADROOM": -20.0}))
    while not (engine.state.req["status"][0] == Status.DECODE).all():
        engine.run(0, Until.ITERATIONS, 1)
    assert sorted(engine.state.req["lane"][0] == 0) == [False, True, True]


def test_more_meet_their_slo_than_in_order_of_arrival() -> None:
    """Long prompts hold up short ones; there is too much work for all."""
    workload = mixed(120)
    fcfs = FixedKnobs("fcfs", Knobs(prefill_budget_tokens=512, budget_counts_decodes=True))
    met = {
        policy.name: run_policy(compile_pair(*GPU), workload, policy).metrics["slo_attainment_frac"]
        for policy in (fcfs, RequestScore())
    }
    assert met["request-score"] > 1.5 * met["fcfs"]


def test_compiled_equals_python() -> None:
    code = (
        "from test_request_score import *\n"
        "engine = scored(mixed(12), RequestScore().weights, ('l3-dgx-a100', 'llama-3-8b'))\n"
        "engine.run(0)\n"
        "print(json.dumps(engine.state.req['finish_s'][0].tolist()))"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    answers = [
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | {"NUMBA_DISABLE_JIT": disabled, "PYTHONPATH": path},
        ).stdout
        for disabled in ("0", "1")
    ]
    assert json.loads(answers[0]) == pytest.approx(json.loads(answers[1]), rel=1e-12, nan_ok=True)


def test_the_search_makes_losses_smaller_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search of two generations in two pieces equals one in one piece; its file runs."""
    task = evolve.Task(evolve.Scenario(*GPU, "mixed", 1.0), 0.0)
    monkeypatch.setattr(evolve, "tasks_of", lambda generation, seed: [task])
    monkeypatch.setattr(evolve, "stretch_of", lambda task: mixed(30))
    evolve.search(tmp_path / "whole", 2, 4, 0, np.inf, 1)
    evolve.search(tmp_path / "parts", 1, 4, 0, np.inf, 1)
    evolve.search(tmp_path / "parts", 2, 4, 0, np.inf, 1)
    files = [tmp_path / name / "request-score.json" for name in ("whole", "parts")]
    np.testing.assert_array_equal(*map(read_weights, files))
    assert RequestScore(files[0], "mine").name == "mine"


def test_losses_prefer_goodput_then_less_time() -> None:
    met = np.array([[0.5, 1.0, 1.0], [0.4, 0.2, 0.2]])
    present_s = np.array([[1.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
    losses = evolve.losses_of(met, present_s)
    assert losses == pytest.approx([-0.75 + 0.75e-4, -0.75 + 1e-4, -0.75 + 0.75e-4])
    assert losses[2] < losses[1]


def test_the_shipped_file_says_how_it_was_made() -> None:
    raw = json.loads(FILE.read_text(encoding="utf-8"))
    assert raw["command"].startswith("python -m l3env.experiments.learning.evolve")
    assert raw["config"]["training_window"] == "0%:60%"
    assert RequestScore().weights[Score.ON] == 1


@pytest.mark.parametrize(
    "text", ["{", '{"weights": {"WORK": "x"}}', '{"weights": {"NO": 1}}', '{"weights": {"WORK": NaN}}', "[]"]
)
def test_a_bad_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(PolicyError):
        RequestScore(tmp_path / "bad.json")


def test_bad_weights_are_refused() -> None:
    engine = Engine(compile_pair(*GPU), 1, 1)
    for bad in (np.zeros(3), np.full(len(Score), np.nan)):
        with pytest.raises(PlanError, match="finite numbers"):
            engine.score_with(0, bad)
