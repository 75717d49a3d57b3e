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
from l3env.runs.compare import compare
from l3env.runs.driver import run_policy
from l3env.runs.saturation import load_at_capacity
from l3env.search.tune import ACTIONS, GRID, Case, serve, tune

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


def runner_goodput(which: Case, knobs: Knobs) -> float:
    outcome = run_policy(which.tables, which.workload, FixedKnobs("fixed", knobs), slo=which.slo, record=False)
    return outcome.metrics["slo_attainment_frac"]


@pytest.mark.parametrize("threads", [1, 2])
def test_scores_are_those_of_the_runner(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On two replicas; batches smaller than the settings change nothing, neither do threads."""
    monkeypatch.setattr(l3env.threads, "_limit", threads)
    which = cell()
    assert which.tables.replicas_count == 2
    settings = [Knobs(), Knobs(prefill_budget_tokens=256), Knobs(order=Order.NEWEST_FIRST, headroom_frac=0.2)]
    expected = [runner_goodput(which, knobs) for knobs in settings]
    met, present_s = serve(which, settings)
    np.testing.assert_array_equal(met, expected)
    monkeypatch.setattr("l3env.search.tune.ENGINE_BYTES", 1.0)
    again, present_again_s = serve(which, settings)
    np.testing.assert_array_equal(again, met)
    np.testing.assert_array_equal(present_again_s, present_s)
    outcome = run_policy(which.tables, which.workload, FixedKnobs("fixed", settings[0]), record=False)
    # the engine counts a request from the end of the iteration it arrives in
    assert present_s[0] == pytest.approx(outcome.requests["e2e_s"].mean(), rel=0.02)


def test_it_finds_the_best_of_all_settings() -> None:
    """Every one of 27 settings by the runner; the search sees few at random and must reach the same goodput."""
    which = cell()
    names = list(TINY)
    best = max(
        runner_goodput(which, Knobs(**dict(zip(names, each, strict=True))))
        for each in itertools.product(*TINY.values())
    )
    tuned = tune([which], grid=TINY, random_count=9)
    assert tuned.goodput_frac[0] == best
    assert runner_goodput(which, tuned.knobs) == best
    assert len(tuned.tried) < 27


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
    assert difference == pytest.approx(runner_goodput(which, changed) / tuned.goodput_frac[0] - 1, abs=2e-4)


def test_one_setting_for_several_cells() -> None:
    """It maximises the mean over cells of goodput relative to each cell's best, by enumeration."""
    cells = [cell(), cell("gpu-dgx-a100"), cell(utilization=0.5)]
    settings = [Knobs(**dict(zip(TINY, each, strict=True))) for each in itertools.product(*TINY.values())]
    goodput = np.array([[runner_goodput(which, knobs) for which in cells] for knobs in settings])
    share = (goodput / goodput.max(axis=0)).mean(axis=1)
    tuned = tune(cells, grid=TINY, random_count=60)
    reached = np.array([runner_goodput(which, tuned.knobs) for which in cells])
    np.testing.assert_array_equal(tuned.goodput_frac, reached)
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
        assert tuned.goodput_frac[0] >= outcome.metrics["slo_attainment_frac"], name


def test_best_constant_is_searched_for_the_runs_own_objective() -> None:
    which = cell()
    for slo in (Slo(), Slo(ttft_s=2.0, tbt_s=0.05)):
        policy = BestConstant()
        outcome = run_policy(which.tables, which.workload, policy, slo=slo, training=which.workload, record=False)
        goodput = outcome.metrics["slo_attainment_frac"]
        assert goodput == outcome.metrics["training_slo_attainment_frac"]
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
