"""The planner's study: policies with arguments, jobs, the table."""

from __future__ import annotations

import pytest

from l3env.errors import L3EnvError
from l3env.experiments.learning.planner import CONSTANTS, studied_scenarios, table
from l3env.experiments.learning.scenarios import PLANNING, Scenario, judge
from l3env.policies.rmaxts import RMaxTS
from l3env.policy.registry import make_policy


def test_a_policy_takes_arguments() -> None:
    policy = make_policy("rmaxts?simulations=128&intrinsic=false&gamma=1.0")
    assert isinstance(policy, RMaxTS)
    assert (policy.simulations, policy.intrinsic, policy.gamma) == (128, False, 1.0)
    assert make_policy("fcfs?prefill_budget_tokens=100").decide(None).prefill_budget_tokens == 100  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize("ref", ["nobody?x=1", "rmaxts?depth=3", "rmaxts?simulations=many", "rmaxts?simulations"])
def test_bad_arguments_are_one_clear_error(ref: str) -> None:
    with pytest.raises(L3EnvError, match=ref.split("?")[0]):
        make_policy(ref)


def test_with_no_trial_left_for_the_tree_it_is_the_best_constant() -> None:
    """As many simulations as scenarios: only the default runs, and asking it again and again changes nothing."""
    scenario = Scenario("l3-dgx-a100", "gpt-175b", "profile:azure-conv-2023?n=250", 0.9)
    policies = {"rmaxts": "rmaxts?simulations=32", "rmaxts-96": "rmaxts?simulations=96&interval_requests=16"}
    policies |= {name: name for name in (*CONSTANTS, "edf")}
    found = judge([scenario], {name: (ref,) for name, ref in policies.items()})
    planned, more, _, constant, _ = rows = found.rows
    assert planned["slo_attainment_frac"] == constant["slo_attainment_frac"]
    assert planned["makespan_s"] == constant["makespan_s"]
    assert planned["deviations_frac"] == 0
    assert set(PLANNING) <= set(planned)
    assert not set(PLANNING) & set(constant)
    assert planned["decisions_count"] < more["decisions_count"]
    assert "| rmaxts-96 |" in table(rows)


def test_table_divides_cell_by_cell() -> None:
    cells = [("s", "m", "t", 0.7), ("s", "m", "t", 0.9)]
    goodput = {"rmaxts": (0.6, 0.49), "best-constant": (0.5, 0.50), "edf": (0.4, 0.7), "fcfs": (0.3, 0.1)}
    rows = []
    for policy, values in goodput.items():
        for (system, model, trace, utilization), value in zip(cells, values, strict=True):
            row = {"system": system, "model": model, "trace": trace, "utilization": utilization, "policy": policy}
            row |= {
                "guarded_attainment_frac": value,
                "slo_attainment_frac": 1.0,
                "decision_ms": 10.0,
                "simulations_mean_count": 512.0,
            }
            rows.append(row | {"decisions_count": 5.0, "deviations_frac": 0.25})
    lines = table(rows).splitlines()
    assert lines[0] == "2 cells. Goodput: best-constant 0.500, best heuristic 0.550."
    shown = [each.strip() for each in lines[4].split("|")[1:-1]]
    assert shown == ["rmaxts", "0.545", "1.090, 1.090, 0.980, 0", "1.100, 1.100, 0.700, 1", "10", "512", "5", "25%"]
    assert [each.strip() for each in lines[-1].split("|")[5:-1]] == ["0.490", "0.500", "0.700", "0.980", "0.700", "edf"]


def test_studied_scenarios_are_of_the_grid_and_differ() -> None:
    cells = studied_scenarios()
    assert len({cell.key for cell in cells}) == len(cells) == 8
    assert len({cell.system for cell in cells}) == 3
    assert len({cell.model for cell in cells}) == 2
