"""The search for fixed knobs: scores equal the runner's, the search finds what enumeration finds."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

import l3env.threads
from l3env.choices import Budget, Order, SubBatching
from l3env.engine.engine import Slo
from l3env.errors import PolicyError
from l3env.knobs import Knobs
from l3env.machine import specs
from l3env.machine.pair import compile_pair
from l3env.policies.best_constant import BestConstant, BestConstantGlobal, read_knobs
from l3env.policy.protocol import FixedKnobs
from l3env.policy.registry import make_policy, register_policy
from l3env.requests.registry import load_trace
from l3env.requests.workload import Workload
from l3env.runs.compare import compare
from l3env.runs.driver import run_policy
from l3env.runs.saturation import load_at_capacity
from l3env.search.objective import FIGURES, Objective, earned, relative
from l3env.search.tune import ACTIONS, GRID, Case, serve_each, tune

TRACE = "profile:azure-conv-2023?n=150"
TINY = {
    **{name: (getattr(Knobs(), name),) for name in GRID},
    "prefill_budget_tokens": (256, 2048, Budget.UNLIMITED),
    "order": (Order.FCFS, Order.EARLIEST_DEADLINE_HOPELESS_LAST, Order.SHORTEST_PROMPT_HOPELESS_LAST),
    "sub_batching": tuple(SubBatching),
}


def cell(system: str = "l3-dgx-a100", model: str = "qwen-72b", utilization: float = 1.2) -> Case:
    tables, workload = compile_pair(system, model), load_trace(TRACE)
    return Case(tables, workload.at_load(utilization * load_at_capacity(tables, workload)))


def runner_goodput(which: Case, knobs: Knobs, objective: Objective = Objective.GUARDED) -> float:
    outcome = run_policy(which.tables, which.workload, FixedKnobs("fixed", knobs), slo=which.slo, record=False)
    return outcome.metrics[FIGURES[objective]]


@pytest.mark.parametrize("threads", [1, 2])
def test_scores_are_those_of_the_runner(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On two replicas; batches smaller than the settings change nothing, neither do threads."""
    monkeypatch.setattr(l3env.threads, "_limit", threads)
    which = cell()
    assert which.tables.replicas_count == 2
    settings = [Knobs(), Knobs(prefill_budget_tokens=256), Knobs(order=Order.NEWEST_FIRST, headroom_frac=0.2)]
    met, present_s = serve_each(which, settings)
    for objective in Objective:
        expected = [runner_goodput(which, knobs, objective) for knobs in settings]
        np.testing.assert_array_equal(earned(met, objective).mean(axis=1), expected)
    monkeypatch.setattr("l3env.search.tune.ENGINE_BYTES", 1.0)
    again, present_again_s = serve_each(which, settings)
    np.testing.assert_array_equal(again, met)
    np.testing.assert_array_equal(present_again_s, present_s)
    outcome = run_policy(which.tables, which.workload, FixedKnobs("fixed", settings[0]), record=False)
    # the engine counts a request from the end of the iteration it arrives in
    assert present_s[0] == pytest.approx(outcome.requests["e2e_s"].mean(), rel=0.02)


def test_it_finds_the_best_of_all_settings() -> None:
    """Every one of 27 settings by the runner; the search sees few at random and must reach the same."""
    which = cell(model="gpt-175b", utilization=1.6)
    settings = [Knobs(**dict(zip(TINY, each, strict=True))) for each in itertools.product(*TINY.values())]
    for objective in Objective:
        values = [runner_goodput(which, knobs, objective) for knobs in settings]
        tuned = tune([which], grid=TINY, random_count=9, objective=objective)
        reached = tuned.guarded_frac[0] if objective == Objective.GUARDED else tuned.goodput_frac[0]
        assert reached == runner_goodput(which, tuned.knobs, objective) == max(values)
        assert len(tuned.tried) < 27


def test_who_starves_the_old_ones_does_not_win() -> None:
    """Eight requests of some 17 s each, one at a time: four at once, then one every so often as a place falls free,
    every second of them 6 s early; 5 s are allowed.

    Newest first: of the later ones two are in time and two are not, and of the first four one is and the others wait
    until the end, beyond the guard: 3 met, 3 beyond. First come first served: 1 met, all others wait less than 60 s.
    """
    tables = compile_pair("gpu-dgx-a100", "llama-3-8b", tp=8)
    alone = Workload.build("alone", [0.0], [500], [4_100])
    busy_s = run_policy(tables, alone, make_policy("fcfs")).requests["e2e_s"][0]
    assert 12 < busy_s < 18
    later = busy_s * np.arange(1, 5) - [6.0, 1.0, 6.0, 1.0]
    workload = Workload.build("eight", [0.0] * 4 + later.tolist(), [500] * 8, [4_100] * 8)
    which = Case(tables, workload, Slo(ttft_s=5.0, tbt_s=1.0))
    orders = (Order.FCFS, Order.NEWEST_FIRST)
    settings = [Knobs(order=order, running_max_count=1) for order in orders]
    outcomes, _ = serve_each(which, settings)
    assert outcomes.tolist() == [[1, 0, 0, 0, 0, 0, 0, 0], [1, -1, -1, -1, 0, 1, 0, 1]]
    grid = {**{name: (getattr(settings[0], name),) for name in GRID}, "order": orders, "running_max_count": (1,)}
    guarded = tune([which], grid=grid)
    plain = tune([which], grid=grid, objective=Objective.PLAIN)
    assert (guarded.knobs.order, plain.knobs.order) == orders
    assert (guarded.guarded_frac[0], guarded.goodput_frac[0]) == (1 / 8, 1 / 8)
    assert (plain.guarded_frac[0], plain.goodput_frac[0]) == (0.0, 3 / 8)


def test_relative_values_by_hand() -> None:
    """Of the best where all are positive; where most cost more than the best earns, of what the worst costs."""
    values = np.array([[0.2, -0.8, -0.1], [0.4, 0.2, -0.05]])
    np.testing.assert_allclose(relative(values, axis=0), [[0.5, -1.0, -1.0], [1.0, 0.25, -0.5]])
    np.testing.assert_array_equal(relative(np.zeros((2, 1)), axis=0), 0.0)


def test_what_requests_earn() -> None:
    outcomes = np.array([1, 0, -1, -1], np.int8)
    assert earned(outcomes, Objective.GUARDED).sum() == -1
    assert earned(outcomes, Objective.PLAIN).sum() == 1


def test_what_lies_around_the_best() -> None:
    """Scores of single changes from the best: none is better, and each is the runner's relative to the best."""
    which = cell("gpu-dgx-a100")
    tuned = tune([which], grid=ACTIONS, random_count=8)
    assert set(tuned.around) == set(ACTIONS)
    assert len(tuned.around["sub_batching"]) == 1  # no PIM side: one level is enough
    best = max(values.max() for values in tuned.around.values())
    assert all(values.max() == best for values in tuned.around.values())
    order = ACTIONS["order"].index(Order.FCFS)
    changed = Knobs(**{**tuned.knobs.__dict__, "order": Order.FCFS})
    difference = tuned.around["order"][order] - best
    assert difference == pytest.approx(runner_goodput(which, changed) / tuned.guarded_frac[0] - 1, abs=2e-4)


def test_one_setting_for_several_cells() -> None:
    """It maximises the mean over cells of goodput relative to each cell's best, by enumeration."""
    cells = [cell(), cell("gpu-dgx-a100"), cell(utilization=0.5)]
    settings = [Knobs(**dict(zip(TINY, each, strict=True))) for each in itertools.product(*TINY.values())]
    goodput = np.array([[runner_goodput(which, knobs) for which in cells] for knobs in settings])
    share = (goodput / goodput.max(axis=0)).mean(axis=1)
    tuned = tune(cells, grid=TINY, random_count=60)
    reached = np.array([runner_goodput(which, tuned.knobs) for which in cells])
    np.testing.assert_array_equal(tuned.guarded_frac, reached)
    assert (reached / goodput.max(axis=0)).mean() == pytest.approx(share.max(), abs=1e-4)


def test_the_grid_holds_the_heuristics_with_fixed_knobs() -> None:
    """So ``best-constant`` is at least as good as any of them where it was searched."""
    for name in ("fcfs", "sarathi", "fill-capacity", "edf", "sjf-prompt"):
        policy = make_policy(name)
        if isinstance(policy, FixedKnobs):
            missing = [knob for knob, levels in GRID.items() if getattr(policy.knobs, knob) not in levels]
            assert not missing, (name, missing)
    which = cell()
    tuned = tune([which], random_count=8)
    for name in ("fcfs", "sarathi", "edf", "sjf-prompt", "l3-model"):
        outcome = run_policy(which.tables, which.workload, make_policy(name), record=False)
        assert tuned.guarded_frac[0] >= outcome.metrics["guarded_attainment_frac"], name


def test_best_constant_is_searched_for_the_runs_own_objective() -> None:
    which = cell()
    for slo in (Slo(), Slo(ttft_s=2.0, tbt_s=0.05)):
        policy = BestConstant()
        outcome = run_policy(which.tables, which.workload, policy, slo=slo, training=which.workload, record=False)
        goodput = outcome.metrics["slo_attainment_frac"]
        assert goodput == outcome.metrics["training_slo_attainment_frac"]
        guarded = outcome.metrics["guarded_attainment_frac"]
        assert guarded == outcome.metrics["training_guarded_attainment_frac"]
        assert policy.knobs == tune([Case(which.tables, which.workload, slo)]).knobs
    with pytest.raises(PolicyError, match="needs earlier requests"):
        run_policy(which.tables, which.workload, BestConstant())


def test_a_comparison_trains_at_the_cells_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training requests come at the load of the cell; those of another trace at the same utilization."""
    seen = []

    class Spy(FixedKnobs):
        def __init__(self) -> None:
            super().__init__("spy", Knobs())

        def prepare(self, system: object, training: object) -> None:
            seen.append(training.rate_per_s)  # type: ignore[attr-defined]

    register_policy("spy", Spy)
    base = load_trace(TRACE)
    compare(["spy"], "l3-dgx-a100", "gpt-175b", TRACE, load=(0.5, 2.0))
    assert seen == pytest.approx([0.5 * base.head(30).rate_per_s, 2.0 * base.head(30).rate_per_s])
    seen.clear()
    other = f"{TRACE}&load=3"
    compare(["spy"], "l3-dgx-a100", "gpt-175b", TRACE, utilization=0.9, training=other)
    tables, training = compile_pair("l3-dgx-a100", "gpt-175b"), load_trace(other)
    assert seen == pytest.approx([0.9 * load_at_capacity(tables, training) * training.rate_per_s])


def test_global_constant_file(tmp_path: Path) -> None:
    knobs = Knobs(prefill_budget_tokens=Budget.ALIGN, order=Order.NEWEST_FIRST, sub_batching=SubBatching.ADAPTIVE)
    path = tmp_path / "global.json"
    path.write_text(json.dumps({"knobs": knobs.to_json()}))
    assert read_knobs(path) == knobs
    assert BestConstantGlobal(path).knobs == knobs
    for text, message in (("{", "expected JSON"), ('{"knobs": {"speed": 3}}', "unknown knobs speed")):
        path.write_text(text)
        with pytest.raises(PolicyError, match=message):
            read_knobs(path)
    path.write_text('{"knobs": {"order": "ALPHABETIC"}}')
    with pytest.raises(PolicyError, match="order = 'ALPHABETIC'; expected one of FCFS"):
        read_knobs(path)


def test_the_shipped_global_constant() -> None:
    shipped = json.loads((Path(__file__).parents[2] / "policies/data/best-constant-global.json").read_text())
    assert shipped["command"].startswith("l3env tune")
    assert len(shipped["cells"]) > 1
    assert {row["system"] for row in shipped["cells"]} <= set(specs.names("system"))
    assert isinstance(make_policy("best-constant-global"), BestConstantGlobal)
