"""Comparisons: common random numbers, capacity and utilization, results on disk, the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import l3env
from l3env import FixedKnobs, Knobs, Workload
from l3env.engine.state import GAP_BINS, GAP_LOW_S, GAP_RATIO
from l3env.errors import L3EnvError
from l3env.runs.compare import Comparison, compare
from l3env.runs.driver import run_policy
from l3env.runs.grid import Grid
from l3env.runs.metrics import gap_quantile_s
from l3env.runs.saturation import capacity_requests_per_s

TRACE = "profile:azure-conv-2023?n=150"
PAIR = ("l3-dgx-a100", "gpt-175b")


def key_of(comparison: Comparison, policy: str, load: float, seed: int = 0) -> str:
    rows = comparison.results.query("policy == @policy and load == @load and seed == @seed")
    return str(rows["key"].item())


def test_every_policy_gets_the_same_requests() -> None:
    comparison = compare(["fcfs", "edf"], *PAIR, TRACE, load=0.4, seeds=2)
    columns = ["arrival_s", "prompt_tokens", "output_tokens"]
    for seed in (0, 1):
        first, second = (comparison.requests[key_of(comparison, n, 0.4, seed)][columns] for n in ("fcfs", "edf"))
        pd.testing.assert_frame_equal(first, second)
    zero, one = (comparison.requests[key_of(comparison, "fcfs", 0.4, seed)]["arrival_s"] for seed in (0, 1))
    assert not np.allclose(zero, one)


def test_load_scales_arrivals() -> None:
    comparison = compare(["fcfs"], *PAIR, TRACE, load=[0.25, 0.5])
    slow, fast = (comparison.requests[key_of(comparison, "fcfs", load)]["arrival_s"] for load in (0.25, 0.5))
    np.testing.assert_allclose(slow, 2 * fast)


def test_capacity_of_a_machine_that_serves_one_iteration_at_a_time() -> None:
    """One request at a time, one token each: capacity = 1 / (prefill of that prompt)."""
    tables = l3env.compile_pair("gpu-dgx-a100", "llama-3-8b", tp=8)
    workload = Workload.build("same", np.arange(100.0), np.full(100, 3000), np.ones(100))
    serial = FixedKnobs("serial", Knobs(admit_max_count=1))
    prefill_s = run_policy(tables, workload.head(1), serial).metrics["ttft_mean_s"]
    assert capacity_requests_per_s(tables, workload, serial) == pytest.approx(1 / prefill_s, rel=1e-9)


def test_utilization_is_a_load_relative_to_capacity() -> None:
    comparison = compare(["l3"], *PAIR, TRACE, utilization=[0.5, 1.0])
    loads = comparison.results["load"].to_numpy()
    assert loads[1] == pytest.approx(2 * loads[0])
    tables = l3env.compile_pair(*PAIR)
    workload = l3env.load_trace(TRACE)
    assert loads[1] * workload.rate_per_s == pytest.approx(capacity_requests_per_s(tables, workload))
    with pytest.raises(L3EnvError, match="utilization has no meaning"):
        compare(["l3"], *PAIR, "openr1?n=20", utilization=0.9)


def test_metrics_follow_from_the_requests() -> None:
    """The figures of a row, recomputed from its requests."""
    comparison = compare(["sarathi"], *PAIR, TRACE, load=0.4)
    row, requests = comparison.results.iloc[0], comparison.requests[key_of(comparison, "sarathi", 0.4)]
    assert row["makespan_s"] == pytest.approx(requests["finish_s"].max() - requests["arrival_s"].min())
    assert row["output_tokens_count"] == requests["output_tokens"].sum()
    end_s = max(requests["arrival_s"].max(), np.quantile(requests["finish_s"], 0.9, method="inverted_cdf"))
    inside = requests["finish_s"] <= end_s
    assert row["steady_window_s"] == pytest.approx(end_s - requests["arrival_s"].min())
    assert row["requests_per_s"] == pytest.approx(inside.sum() / row["steady_window_s"])
    whole = requests["output_tokens"][inside].sum(), requests["output_tokens"][requests["first_token_s"] <= end_s].sum()
    assert whole[0] <= row["output_tokens_per_s"] * row["steady_window_s"] <= whole[1]
    assert row["ttft_p99_s"] == pytest.approx(np.quantile(requests["ttft_s"], 0.99))
    met = (requests["ttft_s"] <= requests["ttft_slo_s"]) & ~(requests["tpot_s"] > requests["tbt_slo_s"])
    assert row["slo_attainment_frac"] == pytest.approx(met.mean())
    assert row["goodput_requests_per_s"] == pytest.approx((met & inside).sum() / row["steady_window_s"])
    weights = requests["output_tokens"] - 1
    assert row["tbt_mean_s"] == pytest.approx(np.nansum(requests["tpot_s"] * weights) / weights.sum())
    assert row["gpu_busy_frac"] <= 1
    assert row["pim_busy_frac"] <= 1


def test_gap_quantiles_against_numpy() -> None:
    gaps = np.random.default_rng(0).lognormal(-3, 1, 20000)
    place = (np.log(gaps / GAP_LOW_S) / np.log(GAP_RATIO)).astype(int)
    histogram = np.bincount(place, minlength=GAP_BINS)
    for quantile in (0.5, 0.9, 0.99):
        assert gap_quantile_s(histogram, quantile) == pytest.approx(np.quantile(gaps, quantile), rel=0.01)
    assert np.isnan(gap_quantile_s(np.zeros(GAP_BINS, np.int64), 0.5))


def test_config_round_trip() -> None:
    grid = Grid(("fcfs", "edf"), (PAIR[0],), (PAIR[1],), (TRACE,), (0.5, 1.0), (), 3, 4)
    assert Grid.from_json(json.loads(json.dumps(grid.to_json()))) == grid
    with pytest.raises(L3EnvError, match="polices"):
        Grid.from_json({**grid.to_json(), "polices": []})


def test_cli_compare_prints_the_contract(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    args = (
        "compare",
        "--system",
        PAIR[0],
        "--model",
        PAIR[1],
        "--trace",
        TRACE,
        "--policies",
        "fcfs,l3",
        "--load",
        "0.4",
    )
    done = run_cli(*args, "--seeds", "2", "--out", str(tmp_path / "run"), "--json")
    printed = json.loads(done.stdout)
    assert set(printed) >= {"config", "results"}
    assert [(row["policy"], row["seed"]) for row in printed["results"]] == [
        ("fcfs", 0),
        ("l3", 0),
        ("fcfs", 1),
        ("l3", 1),
    ]
    names = "policy system model trace load seed requests_count finished_count rejected_count preemptions_count "
    names += (
        "iterations_count makespan_s output_tokens_per_s requests_per_s goodput_requests_per_s slo_attainment_frac "
    )
    names += "gpu_busy_frac pim_busy_frac gpu_bubble_frac pim_bubble_frac batch_mean_count kv_hbm_peak_frac "
    names += "kv_pim_peak_frac energy_j_per_token wall_s"
    wanted = names.split() + [
        f"{m}_{q}_s" for m in ("ttft", "tbt", "tpot", "e2e") for q in ("mean", "p50", "p90", "p99")
    ]
    for row in printed["results"]:
        assert set(wanted) <= set(row)
    again = run_cli("compare", "--config", str(tmp_path / "run" / "config.json"), "--json")
    repeated = json.loads(again.stdout)["results"]
    for one, two in zip(printed["results"], repeated, strict=True):
        assert {k: v for k, v in one.items() if k != "wall_s"} == {k: v for k, v in two.items() if k != "wall_s"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("compare", "--policies", "fcsf"), "unknown policy 'fcsf' (did you mean 'fcfs'?)"),
        (("compare", "--system", "l3-dgx"), "unknown system 'l3-dgx'"),
        (("compare", "--model", "gpt4"), "unknown model 'gpt4'"),
        (("compare", "--trace", "azur-conv"), "azur-conv"),
        (("compare", "--load", "fast"), "--load 'fast'"),
        (("compare", "--load", "1", "--utilization", "0.9"), "--load and --utilization contradict each other"),
        (("compare", "--ttft-s", "1", "--ttft-scale", "5"), "--ttft-s and --ttft-scale contradict each other"),
        (("compare", "--config", "c.json", "--policies", "edf"), "--config and --policies contradict each other"),
        (("compare", "--load", "-1"), "expected numbers > 0"),
        (("compare", "--model", "gpt-175b", "--tp", "1"), "does not fit"),
        (("compare", "--config", "none.json"), "none.json: cannot be read"),
        (("traces", "stats", "nowhere.csv"), "nowhere.csv"),
    ],
)
def test_cli_errors_are_one_line(args: tuple[str, ...], message: str, run_cli: Callable[..., Any]) -> None:
    done = run_cli(*args, ok=False)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("what", ["systems", "models", "policies"])
def test_cli_lists_are_json(what: str, run_cli: Callable[..., Any]) -> None:
    rows = json.loads(run_cli(what, "--json").stdout)
    assert len(rows) >= 8
    assert run_cli(what).stdout.count("\n") >= len(rows)


def test_cli_traces(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    assert {"azure-conv-2023", "openr1"} <= {
        row["name"] for row in json.loads(run_cli("traces", "list", "--json").stdout)
    }
    target = tmp_path / "mine.csv"
    run_cli("traces", "convert", TRACE, str(target))
    figures = json.loads(run_cli("traces", "stats", str(target), "--json").stdout)
    assert figures["requests_count"] == 150


def test_importing_l3env_leaves_the_extras_alone() -> None:
    code = "import sys, l3env; print({'torch', 'stable_baselines3', 'matplotlib', 'ray'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
