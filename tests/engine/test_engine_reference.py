"""The kernels against a second, naive simulator: same times, same counts, request by request.

The kernels never touch a request while it decodes (decode clocks, block phases, heaps); the reference touches every
one at every token. Machines are presets with little memory, so that preemption, rejection and waiting are common.
"""

import dataclasses

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from l3env.choices import Budget, Order, Victim
from l3env.engine.engine import Slo, Stop, Until
from l3env.engine.kernels import look
from l3env.knobs import Knobs
from l3env.requests.workload import Workload
from tests.engine.beside_reference import RTOL, SLOW_OK, STOPS, compare, start
from tests.engine.engine_cases import PAIRS, Case, cases, compiled, knobs, with_memory
from tests.engine.reference_simulator import Prices


def note(reference):
    """For ``--hypothesis-show-statistics``: how much of what is to be tested was there."""
    statuses = {r.status for r in reference.requests}
    for name, found in {
        "preemptions": reference.totals.preemptions > 0,
        "rejections": "rejected" in statuses,
        "stalled": "waiting" in statuses,
    }.items():
        event(f"{name}: {found}")


@settings(SLOW_OK, max_examples=300)
@given(case=cases(), held=knobs())
def test_whole_runs_agree_with_the_reference(case, held):
    engine, reference = start(case)
    held.write(engine.knobs, 0)
    assert engine.run(0) == STOPS[reference.run(held)]
    compare(engine, reference)
    note(reference)


def token_times_s(r):
    return r.first_s + np.cumsum([0.0, *r.gaps_s])


def kept(r, form, ttft_s, tbt_s):
    """Did a finished request keep its SLO, by the definition of each form? None where rounding decides."""
    times_s, n = token_times_s(r), len(r.gaps_s)
    due_s = r.arrival_s + ttft_s + np.arange(n + 1) * tbt_s
    limits = {
        "mean-tbt": [(np.mean(r.gaps_s) if n else 0.0, tbt_s)],
        "p99-gap": [(np.quantile(r.gaps_s, 0.99, method="inverted_cdf") if n else 0.0, tbt_s)],
        "token-deadlines": list(zip(times_s, due_s, strict=True)),
    }[form]
    limits.append((times_s[0] - r.arrival_s, ttft_s))
    if any(abs(got - limit) <= 1e-8 * limit for got, limit in limits):
        return None
    return all(got <= limit for got, limit in limits)


@pytest.mark.parametrize("form", ["mean-tbt", "p99-gap", "token-deadlines"])
@settings(SLOW_OK, max_examples=150)
@given(
    case=cases(max_requests=30, max_output=250),
    choices=st.lists(knobs(), min_size=1, max_size=4),
    scale=st.sampled_from([1.5, 3.0, 8.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_form_of_slo_is_kept_by_the_same_requests(form, case, choices, scale, seed):
    case = dataclasses.replace(case, slo=Slo(20 * scale, scale, form=form))
    engine, reference = start(case)
    rng = np.random.default_rng(seed)
    stop = "running"
    for _ in range(6000):
        if stop != "running":
            break
        chosen = choices[rng.integers(len(choices))]
        chosen.write(engine.knobs, 0)
        stop = reference.step(chosen)
        engine.run(0, Until.ITERATIONS, 1)
    req = engine.state.req[0]
    ended = [r for r in reference.requests if r.finish_s is not None]
    verdicts = [(r, kept(r, form, float(req["ttft_slo_s"][r.idx]), float(req["tbt_slo_s"][r.idx]))) for r in ended]
    for r, verdict in verdicts:
        if verdict is not None:
            assert bool(req["slo_met"][r.idx]) == verdict, r
    for name, found in {"kept": True, "broken": False}.items():
        event(f"{name}: {any(verdict is found for _, verdict in verdicts)}")
    assert engine.state.env["slo_met_count"][0] == req["slo_met"].sum()


@settings(SLOW_OK, max_examples=200)
@given(case=cases(max_requests=25), choices=st.lists(knobs(), min_size=2, max_size=6), seed=st.integers(0, 2**32 - 1))
def test_knobs_that_change_at_every_iteration_agree_with_the_reference(case, choices, seed):
    engine, reference = start(case)
    rng = np.random.default_rng(seed)
    stalls = 0
    for _ in range(4000):
        chosen = choices[rng.integers(len(choices))]
        chosen.write(engine.knobs, 0)
        stop = reference.step(chosen)
        assert engine.run(0, Until.ITERATIONS, 1) == STOPS[stop]
        assert engine.state.env["clock_s"][0] == pytest.approx(reference.now, rel=RTOL, abs=0)
        assert engine.state.env["running_count"][0] == len(reference.running)
        stalls = stalls + 1 if stop == "stalled" else 0
        if stop == "done" or stalls > 20:
            break
    compare(engine, reference)
    note(reference)


@settings(SLOW_OK, max_examples=40)
@given(case=cases(max_requests=30), order=st.sampled_from(list(Order)))
def test_the_queue_is_listed_in_order_with_those_noticed_to_be_late_last(case, order):
    engine, reference = start(case)
    held = Knobs(admit_max_count=1, order=order)
    held.write(engine.knobs, 0)
    for _ in range(8):
        stop = reference.step(held)
        assert engine.run(0, Until.ITERATIONS, 1) == STOPS[stop]
        if stop != "running":
            break
        waiting = int(engine.state.env["waiting_count"][0])
        out, frontier = np.empty(waiting, np.int64), np.empty(waiting + 1, np.int64)
        for each in Order:  # the other orders' heaps are built here, and kept up from now on
            count = look.peek_queue(engine.tables, engine.state, 0, int(each), out, frontier)
            noticed = engine.state.req["hopeless"][0].copy()
            assert count == waiting
            assert out.tolist() == [
                r.idx for r in reference.queue(each, lambda r, noticed=noticed: bool(noticed[r.idx]))
            ]


@pytest.mark.parametrize("order", list(Order))
@pytest.mark.parametrize("pair", [("gpu-dgx-a100", "llama-2-7b"), ("l3-dgx-a100", "llama-3-8b")])
def test_overload_with_close_deadlines_is_served_in_the_same_order(pair, order):
    """Many late requests whose keys differ by milliseconds: among the hopeless the order still counts."""
    rng = np.random.default_rng(5)
    count = 40
    arrival = np.sort(rng.random(count)) * 0.02
    workload = Workload.build(
        "overload",
        arrival,
        rng.integers(100, 400, count),
        rng.integers(2, 40, count),
        parent_idx=[-1] * (count // 2) + list(rng.integers(0, count // 2, count - count // 2)),
        think_s=np.where(np.arange(count) < count // 2, 0.0, rng.random(count) * 0.05),
    )
    tables = compiled(*pair)
    tables = with_memory(tables, 16, [60] * tables.arrays.pool_blocks.shape[1])
    case = Case(tables, workload, workload.output_tokens, Slo(1.5, 1.5))
    engine, reference = start(case)
    held = Knobs(order=order, admit_max_count=1)
    held.write(engine.knobs, 0)
    assert engine.run(0) == STOPS[reference.run(held)]
    compare(engine, reference)


@pytest.mark.parametrize("victim", list(Victim))
@pytest.mark.parametrize("budget", [64, Budget.UNLIMITED, Budget.ALIGN, Budget.ALIGN_WHEN_FULL])
@pytest.mark.parametrize(
    "pair", [("gpu-dgx-a100", "llama-2-7b"), ("l3-dgx-a100", "llama-3-8b"), ("l3-dgx-a100", "gpt-175b")]
)
def test_under_memory_pressure_each_victim_rule_and_budget_agrees_with_the_reference(pair, budget, victim):
    rng = np.random.default_rng(3)
    count = 24
    workload = Workload.build(
        "pressure", np.sort(rng.random(count)) * 0.5, rng.integers(5, 120, count), rng.integers(20, 90, count)
    )
    tables = compiled(*pair)
    tables = with_memory(tables, 4, [90] * tables.arrays.pool_blocks.shape[1])
    case = Case(tables, workload, np.flip(workload.output_tokens), Slo())
    engine, reference = start(case)
    held = Knobs(prefill_budget_tokens=budget, victim=victim, headroom_frac=0.0, hbm_share_frac=0.2)
    held.write(engine.knobs, 0)
    assert engine.run(0) == STOPS[reference.run(held)] == Stop.DONE
    assert reference.totals.preemptions > 10
    compare(engine, reference)


@pytest.mark.parametrize(("spare", "both"), [(0, True), (-1, False)])
def test_reserving_admission_fills_a_pool_to_the_last_predicted_block(spare, both):
    """10 + 6 and 20 + 4 tokens end with 15 and 23 of KV."""
    workload = Workload.build("two", np.zeros(2), [10, 20], [6, 4])
    tables = with_memory(compiled("gpu-dgx-a100", "llama-2-7b"), 1, [15 + 23 + spare])
    case = Case(tables, workload, workload.output_tokens, Slo())
    engine, reference = start(case)
    held = Knobs(reserve_predicted=True, headroom_frac=0.0)
    held.write(engine.knobs, 0)
    engine.run(0, Until.ITERATIONS, 1)
    reference.step(held)
    assert (engine.state.env["running_count"][0] == 2) == both
    compare(engine, reference)
    assert engine.run(0) == STOPS[reference.run(held)] == Stop.DONE
    compare(engine, reference)
    assert reference.totals.preemptions == 0


@pytest.mark.parametrize("pair", PAIRS)
def test_latencies_on_the_empty_system_follow_from_the_published_formulas(pair):
    """What deadlines are made of: checked here, then handed to the reference."""
    tables = compiled(*pair)
    price = Prices(tables)
    prompts = np.array([1, 2, 17, 400, 2048, 2049, 2111, 5000, 32_768, 50_000])
    case = Case(tables, Workload.build("one", 0.0, 1, 1), np.ones(1, np.int64), Slo())
    ttft_s, tbt_s = case.engine().alone_latencies(prompts)
    expected = np.array([price.alone_s(int(prompt)) for prompt in prompts])
    np.testing.assert_allclose(ttft_s, expected[:, 0], rtol=RTOL)
    np.testing.assert_allclose(tbt_s, expected[:, 1], rtol=RTOL)


@pytest.mark.parametrize("pair", [("gpu-dgx-a100", "qwen-72b"), ("l3-dgx-a100", "qwen-72b")])
def test_on_the_real_machine_long_prompts_agree_with_the_reference(pair):
    """Full-size pools, batches beyond the dense part of the FC table."""
    rng = np.random.default_rng(11)
    count = 40
    workload = Workload.build("long", np.zeros(count), rng.integers(500, 9000, count), rng.integers(1, 40, count))
    case = Case(compiled(*pair), workload, workload.output_tokens, Slo())
    for budget in (2500, Budget.UNLIMITED, Budget.ALIGN):
        engine, reference = start(case)
        held = Knobs(prefill_budget_tokens=budget)
        held.write(engine.knobs, 0)
        assert engine.run(0) == STOPS[reference.run(held)] == Stop.DONE
        compare(engine, reference)
