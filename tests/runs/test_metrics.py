"""Figures at their limits: stragglers, clocks that begin late, nothing served, replicas without work, closed loops."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

import l3env
from l3env import Knobs, Workload
from l3env.engine.engine import Engine
from l3env.engine.kernels.run import Until
from l3env.engine.kernels.slo import count_beyond_guard
from l3env.machine.tables import Tables, compile_tables
from l3env.policy.protocol import FixedKnobs
from l3env.policy.registry import make_policy
from l3env.runs.compare import compare
from l3env.runs.driver import run_policy
from l3env.runs.metrics import steady_rates, totals, waiting_figures
from l3env.runs.saturation import capacity_requests_per_s, load_at_capacity

RATES = ("output_tokens_per_s", "requests_per_s", "goodput_requests_per_s")


@pytest.fixture(scope="module")
def tables() -> Tables:
    return l3env.compile_pair("gpu-dgx-a100", "llama-3-8b", tp=8)


def columns(arrival: list[float], first: list[float], finish: list[float], tokens: list[int]) -> dict[str, np.ndarray]:
    met = np.ones(len(arrival), np.int8)
    names = ("arrival_s", "first_token_s", "finish_s", "output_tokens", "slo_met")
    return dict(zip(names, map(np.asarray, (arrival, first, finish, tokens, met)), strict=True))


def test_steady_window_by_hand() -> None:
    """Ten arrivals from 5 s to 14 s, each done 0.5 s later, but the last one after 1,000 s."""
    arrival = np.arange(5.0, 15.0)
    finish = arrival + 0.5
    finish[-1] = 1014.0
    found = steady_rates(columns(list(arrival), list(arrival + 0.25), list(finish), [11] * 9 + [1001]))
    assert found["steady_window_s"] == 9.0  # 5 to 14: the last arrival; 9 of 10 are done at 13.5
    assert found["requests_per_s"] == found["goodput_requests_per_s"] == 1.0
    assert found["output_tokens_per_s"] == 99 / 9  # the last one's first token comes at 14.25


def test_window_of_requests_that_come_at_once() -> None:
    """Until 9 in 10 are done; a request under way counts the tokens of its own pace."""
    finish = [*np.arange(1.0, 10.0), 18.0]
    found = steady_rates(columns([0.0] * 10, [0.0] * 10, finish, [5] * 9 + [19]))
    assert found["steady_window_s"] == 9.0
    assert found["requests_per_s"] == 1.0
    assert found["output_tokens_per_s"] == (45 + 1 + 18 * 9 / 18) / 9


def test_one_straggler_does_not_count_as_an_idle_system(tables: Tables) -> None:
    """100 requests at 10/s, the last with 7,000 tokens: those done by the last arrival, after 9.9 s, count."""
    output = np.full(100, 50)
    output[-1] = 7_000
    workload = Workload.build("straggler", np.arange(100) / 10, np.full(100, 500), output)
    outcome = run_policy(tables, workload, make_policy("fcfs"))
    figures, done = outcome.metrics, int((outcome.requests["finish_s"] <= 9.9).sum())
    assert done >= 95
    assert figures["goodput_requests_per_s"] == pytest.approx(done / 9.9, rel=1e-12)
    assert figures["makespan_s"] > 25


@pytest.mark.parametrize("start_s", [0.0, 2124.0, 1e6])
def test_time_begins_at_the_first_arrival(tables: Tables, start_s: float) -> None:
    gaps_s = np.arange(40) / 8  # exact in float64 beside 1e6
    plain, later = (
        run_policy(
            tables, Workload.build("w", at + gaps_s, np.full(40, 300), np.full(40, 20)), make_policy("sarathi")
        ).metrics
        for at in (0.0, start_s)
    )
    for name, value in plain.items():
        assert later[name] == pytest.approx(value, rel=1e-7, nan_ok=True), name


def test_nothing_served_is_no_figure(tables: Tables) -> None:
    """Requests longer than the model's context: rejected with the reason; rates are 0, means are not a number."""
    workload = Workload.build("long", [0.0, 1.0], [9_000, 100], [10, 9_000])
    outcome = run_policy(tables, workload, make_policy("fcfs"))
    figures = outcome.metrics
    assert figures["rejected_count"] == figures["rejected_context_count"] == 2
    assert outcome.requests["rejected_because"].tolist() == ["context_tokens"] * 2
    assert [figures[name] for name in RATES] == [0.0, 0.0, 0.0]
    assert figures["slo_attainment_frac"] == 0.0
    for name in ("energy_j_per_token", "ttft_mean_s", "tbt_p99_s", "e2e_p50_s", "batch_mean_count", "gpu_bubble_frac"):
        assert math.isnan(figures[name]), name


def test_the_longest_request_that_a_model_serves() -> None:
    """8,192 tokens in all are served, one more is not; ``max_model_len`` sets another limit, of memory alone too."""
    workload = Workload.build("edge", [0.0, 0.0], [8_000, 8_000], [192, 193])
    system = l3env.load("system/gpu-dgx-a100")
    rejected = {}
    for limit in (None, 8_193, 4_096):
        model = l3env.load("model/llama-3-8b", max_model_len=limit)
        assert model.served_tokens == (limit or 8_192)
        figures = run_policy(compile_tables(system, model, tp=8), workload, make_policy("fcfs")).metrics
        rejected[limit] = figures["rejected_context_count"]
    assert rejected == {None: 1, 8_193: 0, 4_096: 2}


def test_a_comparison_says_that_requests_are_too_long() -> None:
    trace = "profile:azure-conv-2023?n=40"
    workload = l3env.load_trace(trace)
    count = int((workload.prompt_tokens + workload.output_tokens > 4096).sum())
    assert 0 < count < 40
    with pytest.warns(UserWarning, match=f"{count} of 40 requests are longer than the 4,096 tokens that llama-2-7b"):
        row = compare(["fcfs"], "gpu-dgx-a100", "llama-2-7b", trace, load=1.0).results.iloc[0]
    assert row["rejected_count"] == row["rejected_context_count"] == count


def test_busy_shares_are_of_the_whole_system() -> None:
    """Two requests on eight replicas: six do nothing, and take their power."""
    tables = l3env.compile_pair("gpu-dgx-a100", "llama-3-8b", tp=1)
    assert tables.replicas_count == 8
    figures = [
        run_policy(
            tables, Workload.build("w", np.zeros(count), np.full(count, 400), np.full(count, 50)), make_policy("fcfs")
        ).metrics
        for count in (2, 8)
    ]
    assert figures[0]["gpu_busy_frac"] == pytest.approx(figures[1]["gpu_busy_frac"] / 4)
    assert figures[0]["energy_j_per_token"] > 2 * figures[1]["energy_j_per_token"]


def talks(recorded: bool, think_s: float) -> Workload:
    """Two sessions of three turns; the trace's own clock has a turn each 20 s."""
    arrival = np.array([0.0, 1.0, 20.0, 21.0, 40.0, 41.0])
    return Workload.build(
        "talks",
        arrival,
        np.full(6, 300),
        np.full(6, 30),
        parent_idx=[-1, -1, 0, 1, 2, 3],
        think_s=[0, 0, *[think_s] * 4],
        recorded_floor=recorded,
    )


def test_a_closed_loop_is_closed(tables: Tables) -> None:
    """A turn comes at its parent's finish + think time; recorded times hold it back only where that is asked for."""
    for recorded in (False, True):
        requests = run_policy(tables, talks(recorded, 2.5), make_policy("fcfs")).requests
        arrival, finish = requests["arrival_s"].to_numpy(), requests["finish_s"].to_numpy()
        expected = finish[:4] + 2.5
        floor = talks(recorded, 2.5).arrival_s[2:] if recorded else 0.0
        np.testing.assert_array_equal(arrival[2:], np.maximum(expected, floor))


def test_capacity_does_not_depend_on_think_time(tables: Tables) -> None:
    policy = FixedKnobs("fixed", Knobs())
    capacities = {capacity_requests_per_s(tables, talks(False, think_s), policy) for think_s in (0.0, 2.5, 1e4)}
    assert len(capacities) == 1
    assert capacities.pop() == capacity_requests_per_s(tables, talks(False, 0.0).at_load(7.0), policy)


def test_utilization_of_a_closed_loop_is_that_of_its_open_part(tables: Tables) -> None:
    """Two sessions begin a second apart, each brings three requests: three a second are offered."""
    workload = talks(False, 2.5)
    assert workload.rate_per_s == pytest.approx(3.0)
    assert workload.at_load(2.0).rate_per_s == pytest.approx(6.0)
    assert (workload.at_load(2.0).think_s == workload.think_s).all()
    assert load_at_capacity(tables, workload) * 3 == pytest.approx(capacity_requests_per_s(tables, workload))


def test_rates_of_open_requests_are_as_they_were() -> None:
    rng = np.random.default_rng(0)
    workload = Workload.build("open", np.sort(rng.random(50)), np.ones(50), np.ones(50))
    assert workload.rate_per_s == 49 / workload.span_s
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert workload.select(np.arange(1)).rate_per_s == math.inf


def waited(wait: list[float], ttft_slo: list[float]) -> dict[str, np.ndarray]:
    """Arrivals a second apart from 2 s on."""
    arrival = 2.0 + np.arange(len(wait))
    return {"arrival_s": arrival, "wait_s": np.asarray(wait), "ttft_slo_s": np.asarray(ttft_slo)}


def test_waits_by_hand() -> None:
    """The guard is 60 s for limits up to 6 s, ten times the limit beyond; one was refused on arrival."""
    found = waiting_figures(
        waited([5.0, 61.0, math.nan, 701.0, 700.0, 59.0], [1.0, 1.0, 1.0, 70.0, 70.0, 0.1]),
        {"steady_window_s": 10.0, "goodput_requests_per_s": 0.3},
        met_count=3,
        requests_count=8,
    )
    assert found["longest_wait_s"] == 701.0
    assert found["starved_frac"] == 3 / 8  # 61 s, 701 s and 59 s
    assert found["beyond_guard_count"] == 2  # 61 s and 701 s
    assert found["guarded_goodput_requests_per_s"] == pytest.approx(0.3 - 2 / 10.0)
    assert found["guarded_attainment_frac"] == (3 - 2) / 8


def test_waits_where_nothing_finished() -> None:
    """Two wait until the run's end at 100 s, one of them beyond the guard, over the 98 s since the first arrival."""
    rates = {"steady_window_s": math.nan, "goodput_requests_per_s": 0.0}
    found = waiting_figures(waited([98.0, 97.0], [1.0, 20.0]), rates, met_count=0, requests_count=2)
    assert found["guarded_goodput_requests_per_s"] == pytest.approx(-1 / 98.0)
    refused = waiting_figures(waited([math.nan], [1.0]), rates, met_count=0, requests_count=1)
    assert math.isnan(refused["longest_wait_s"])
    assert refused["starved_frac"] == refused["guarded_goodput_requests_per_s"] == refused["beyond_guard_count"] == 0


def test_one_at_a_time(tables: Tables) -> None:
    """Three requests at once, served one after the other: the third waits for the other two, more than a minute."""
    workload = Workload.build("three", np.zeros(3), np.full(3, 500), np.full(3, 7_600))
    alone = run_policy(tables, workload.select(np.arange(1)), make_policy("fcfs")).requests.iloc[0]
    outcome = run_policy(tables, workload, FixedKnobs("one", Knobs(running_max_count=1)))
    wait_s = alone["ttft_s"] + alone["e2e_s"] * np.arange(3)
    np.testing.assert_allclose(outcome.requests["wait_s"], wait_s, rtol=1e-9)
    assert wait_s[1] < 60 < wait_s[2]
    figures = outcome.metrics
    assert figures["longest_wait_s"] == pytest.approx(wait_s[2], rel=1e-9)
    assert figures["starved_frac"] == pytest.approx(2 / 3)
    assert figures["slo_attainment_frac"] == pytest.approx(1 / 3)
    assert figures["beyond_guard_count"] == 1
    assert figures["guarded_attainment_frac"] == figures["guarded_goodput_requests_per_s"] == 0.0


def test_who_waits_still_counts(tables: Tables) -> None:
    """The same, stopped while the second is served: the third has waited until then, and nothing has happened to it."""
    workload = Workload.build("three", np.zeros(3), np.full(3, 500), np.full(3, 7_600))
    engine = Engine(tables, 1, 3)
    engine.reset(0, workload)
    Knobs(running_max_count=1).write(engine.knobs, 0)
    engine.run(0, Until.TIME, 61.0)
    figures, clock_s = totals(engine, [0]), engine.state.env["clock_s"][0]
    assert 61.0 <= clock_s < 61.1
    assert figures["longest_wait_s"] == clock_s
    assert (figures["finished_count"], figures["beyond_guard_count"]) == (1, 1)
    assert figures["guarded_attainment_frac"] == 0.0
    found = np.zeros(1, np.int64)
    count_beyond_guard(engine.state, found)
    assert found[0] == 1
    assert engine.state.env["beyond_guard_count"][0] == 0
    engine.run(0)
    assert engine.state.env["beyond_guard_count"][0] == totals(engine, [0])["beyond_guard_count"] == 1
