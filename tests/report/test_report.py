"""Reports of synthetic comparisons whose figures are known."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from rich.console import Console
from scipy import stats

from l3env.knobs import Knobs
from l3env.machine.pair import compile_pair
from l3env.policy.protocol import FixedKnobs
from l3env.report import CONTRACT_COLUMNS, intervals, terminal_table, to_json, write_results
from l3env.report.bootstrap import GOODPUT, GUARDED, block_size
from l3env.report.names import heading, number, policy_labels, short_name
from l3env.report.over_time import BINS_COUNT, bin_means, binned
from l3env.report.over_time import timeline as timeline_figure
from l3env.report.plots import _shares, cdf
from l3env.report.style import looks
from l3env.requests.workload import Workload
from l3env.runs.compare import Comparison
from l3env.runs.driver import run_policy
from l3env.runs.grid import Grid

PICTURES = ("front.png", "goodput.png", "latency_cdf.png", "timeline.png", "utilisation.png")
MAKESPAN_S = 100.0


def request_frame(rng: np.random.Generator, count: int, slowness: float) -> pd.DataFrame:
    output = rng.integers(1, 400, count)
    ttft_s = slowness * rng.exponential(0.5, count)
    tpot_s = np.where(output > 1, rng.uniform(0.02, 0.05, count) * slowness, np.nan)
    e2e_s = ttft_s + np.nan_to_num(tpot_s) * (output - 1)
    arrival_s = np.linspace(0, MAKESPAN_S / 2, count)
    return pd.DataFrame(
        {
            "row": np.arange(count),
            "output_tokens": output,
            "ttft_s": ttft_s,
            "wait_s": np.where(np.arange(count) % 50 == 7, 100.0, ttft_s),
            "ttft_slo_s": 1.0,
            "tpot_s": tpot_s,
            "e2e_s": e2e_s,
            "arrival_s": arrival_s,
            "finish_s": np.minimum(arrival_s + e2e_s, MAKESPAN_S),
            "slo_met": ttft_s < 1.0,
        }
    )


def timeline_frame(rng: np.random.Generator, replicas_count: int, rows_count: int = 50) -> pd.DataFrame:
    parts = [
        pd.DataFrame(
            {
                "replica": replica,
                "end_s": np.linspace(2, MAKESPAN_S, rows_count),
                "duration_s": 1.5,
                "iterations_count": 3,
                "decode_tokens": rng.integers(1, 90, rows_count),
                "waiting_count": rng.integers(0, 50, rows_count),
                "kv_hbm_frac": rng.uniform(0, 1, rows_count),
                "kv_pim_frac": rng.uniform(0, 1, rows_count),
            }
        )
        for replica in range(replicas_count)
    ]
    return pd.concat(parts, ignore_index=True)


def result_row(frame: pd.DataFrame, pim: bool) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(CONTRACT_COLUMNS[6:], 0.25)
    for name in ("ttft", "tpot", "e2e"):
        values = frame[f"{name}_s"].dropna()
        row |= {f"{name}_mean_s": values.mean()}
        row |= {f"{name}_{p}_s": values.quantile(q) for p, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))}
    met = int(frame["slo_met"].sum())
    row |= {"requests_count": np.int64(len(frame)), "finished_count": len(frame), "rejected_count": 0}
    row |= {"preemptions_count": 7, "iterations_count": 1000, "makespan_s": MAKESPAN_S, "output_tokens_per_s": 1234.5}
    row |= {"steady_window_s": MAKESPAN_S}
    row |= {GUARDED: (met - int((frame["wait_s"] > 60).sum())) / MAKESPAN_S}
    row |= {GOODPUT: met / MAKESPAN_S, "slo_attainment_frac": met / len(frame), "gpu_busy_frac": 0.6}
    row |= {"gpu_bubble_frac": 0.25, "pim_busy_frac": 0.4, "pim_bubble_frac": 0.5, "queue_mean_count": 3.0}
    if not pim:
        row |= {"pim_busy_frac": 0.0, "pim_bubble_frac": 0.0, "kv_pim_peak_frac": 0.0, "gpu_bubble_frac": 0.0}
    return row


def grid(policies: tuple[str, ...], model: str, trace: str, loads: tuple[float, ...], seeds_count: int = 1) -> Grid:
    return Grid(policies, ("l3-dgx-a100",), (model,), (trace,), loads, seeds_count=seeds_count)


def comparison(
    policies: tuple[str, ...] = ("fcfs", "l3"),
    loads: tuple[float, ...] = (1.0,),
    seeds_count: int = 1,
    *,
    requests_count: int = 300,
    pim: bool = True,
    utilization: float | None = None,
) -> Comparison:
    config = grid(policies, "qwen-72b", "azure-conv-2023", loads, seeds_count)
    rows, requests, timelines = [], {}, {}
    for load in loads:
        for seed in range(seeds_count):
            for i, policy in enumerate(policies):
                rng = np.random.default_rng([seed, i])
                key = f"{policy}, {load}, {seed}"
                requests[key] = request_frame(rng, requests_count, slowness=load * (1 + i))
                timelines[key] = timeline_frame(rng, 2)
                identity: dict[str, Any] = {"key": key, "policy": policy, "system": config.systems[0]}
                identity |= {"model": config.models[0], "trace": config.traces[0], "stands_in_for": None, "error": None}
                identity |= {"load": load, "utilization": utilization, "seed": seed}
                rows.append(identity | result_row(requests[key], pim))
    return Comparison(config, pd.DataFrame(rows), requests, timelines)


def nothing_finished(policies: tuple[str, ...] = ("fcfs",)) -> Comparison:
    made = comparison(policies, pim=False)
    for frame in made.requests.values():
        frame[["ttft_s", "tpot_s", "e2e_s"]] = np.nan
        frame["slo_met"] = False
    latencies = [name for name in made.results if name.startswith(("ttft", "tbt", "tpot", "e2e"))]
    made.results[latencies] = np.nan
    made.results[[GOODPUT, "slo_attainment_frac", "finished_count"]] = 0
    return made


def table_text(made: Comparison, width: int = 140) -> str:
    console = Console(width=width, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as capture:
        terminal_table(made, console)
    return capture.get()


# JSON


def test_json_is_strict_and_in_contract_order() -> None:
    made = comparison(seeds_count=2)
    made.results.loc[0, "ttft_p99_s"] = np.nan
    made.results.loc[1, "energy_j_per_token"] = np.inf
    found = json.loads(json.dumps(to_json(made), allow_nan=False))
    assert list(found) == ["config", "results", "intervals"]
    assert len(found["results"]) == 4
    for row in found["results"]:
        assert tuple(row)[: len(CONTRACT_COLUMNS)] == CONTRACT_COLUMNS
        assert row["utilization"] is None
        assert isinstance(row["requests_count"], int)
    assert found["results"][0]["ttft_p99_s"] is None
    assert found["results"][1]["energy_j_per_token"] is None
    assert found["results"][0]["queue_mean_count"] == 3.0
    assert Grid.from_json(found["config"]) == made.config
    assert {row["figure"] for row in found["intervals"]} >= {GOODPUT, "ttft_mean_s", "e2e_mean_s"}


def test_contract_has_every_latency() -> None:
    for name in ("ttft", "tbt", "tpot", "e2e"):
        for part in ("mean", "p50", "p90", "p99"):
            assert f"{name}_{part}_s" in CONTRACT_COLUMNS
    assert CONTRACT_COLUMNS[:6] == ("policy", "system", "model", "trace", "load", "seed")
    assert CONTRACT_COLUMNS[-2:] == ("energy_j_per_token", "wall_s")


# intervals


def seeded(values: np.ndarray, figure: str = "output_tokens_per_s") -> pd.DataFrame:
    """Results of policies (rows) x seeds (columns) with one figure set."""
    rows = [
        {"policy": f"p{p}", "load": 1.0, "seed": s, "makespan_s": 1.0, figure: value}
        for p, line in enumerate(values)
        for s, value in enumerate(line)
    ]
    return pd.DataFrame(rows)


def figure_rows(found: pd.DataFrame, figure: str) -> pd.DataFrame:
    return found[found["figure"] == figure].set_index("policy")


@pytest.mark.parametrize(("seeds_count", "skewed"), [(3, False), (5, False), (12, False), (30, True)])
def test_intervals_over_seeds_cover_the_true_mean(seeds_count: int, skewed: bool) -> None:
    rng = np.random.default_rng(1)
    shape = (600, seeds_count)
    values = 50 + (rng.exponential(10, shape) - 10 if skewed else rng.normal(0, 10, shape))
    found = figure_rows(intervals(seeded(values), {}), "output_tokens_per_s")
    covered = ((found["low"] <= 50) & (found["high"] >= 50)).mean()
    assert 0.90 <= covered <= 0.98
    assert (found["resampled"] == "seeds").all()
    assert (found["units_count"] == seeds_count).all()


def test_many_seeds_agree_with_scipy() -> None:
    values = np.random.default_rng(2).normal(100, 5, (1, 200))
    row = figure_rows(intervals(seeded(values), {}), "output_tokens_per_s").iloc[0]
    other = stats.bootstrap((values[0],), np.mean, method="BCa", rng=np.random.default_rng(0)).confidence_interval
    assert row["mean"] == pytest.approx(values.mean())
    assert (row["low"], row["high"]) == pytest.approx((other.low, other.high), abs=0.1)


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_intervals_over_requests_cover_the_true_mean(correlation: float) -> None:
    """Requests in blocks, of an autocorrelated series with mean 5: single requests would cover far less."""
    rng = np.random.default_rng(3)
    rows, requests = [], {}
    count, policies_count = 3000, 200
    noise = rng.normal(0, math.sqrt(1 - correlation**2), (count, policies_count))
    series = np.empty_like(noise)
    series[0] = rng.normal(0, 1, policies_count)
    for i in range(1, count):
        series[i] = correlation * series[i - 1] + noise[i]
    for p in range(policies_count):
        frame = request_frame(rng, count, 1.0)
        frame["ttft_s"] = 5 + series[:, p]
        rows.append({"key": p, "policy": f"p{p}", "load": 1.0, "seed": 0, "makespan_s": 10.0})
        requests[p] = frame
    found = figure_rows(intervals(pd.DataFrame(rows), requests), "ttft_mean_s")
    covered = ((found["low"] <= 5) & (found["high"] >= 5)).mean()
    assert 0.88 <= covered <= 0.99
    assert (found["units_count"] == count // block_size(count)).all()


def test_request_intervals_centre_on_the_results() -> None:
    made = comparison(seeds_count=2)
    found = intervals(made.results, made.requests)
    for figure in (GOODPUT, GUARDED, "slo_attainment_frac"):
        rows = figure_rows(found, figure)
        means = made.results.groupby("policy")[figure].mean()
        assert rows["mean"].to_dict() == pytest.approx(means.to_dict())
        assert (rows["low"] < rows["mean"]).all()
        assert (rows["high"] > rows["mean"]).all()
    assert (found["resampled"] == "requests").all()


def test_paired_differences_are_surer_than_the_intervals() -> None:
    rng = np.random.default_rng(4)
    workload = rng.normal(0, 10, 8)
    values = np.stack([100 + workload, 101 + workload + rng.normal(0, 0.1, 8)])
    rows = figure_rows(intervals(seeded(values), {}), "output_tokens_per_s")
    assert rows.loc["p0", "best_policy"] == rows.loc["p1", "best_policy"] == "p1"
    assert rows.loc["p0", "low"] < rows.loc["p1", "mean"] < rows.loc["p0", "high"]  # alone, they cannot be told apart
    assert rows.loc["p0", "difference_high"] < 0
    assert rows.loc["p0", "difference_mean"] == pytest.approx(values[0].mean() - values[1].mean())
    assert rows.loc["p1", "difference_mean"] == rows.loc["p1", "difference_low"] == 0


def test_less_is_better_for_latencies_and_nothing_for_utilisation() -> None:
    rows = figure_rows(intervals(seeded(np.array([[1.0, 2, 3], [4, 5, 6]]), "ttft_p99_s"), {}), "ttft_p99_s")
    assert set(rows["best_policy"]) == {"p0"}
    assert rows.loc["p1", "difference_mean"] == pytest.approx(3)
    rows = figure_rows(intervals(seeded(np.array([[0.1, 0.2, 0.3]]), "gpu_busy_frac"), {}), "gpu_busy_frac")
    assert rows["best_policy"].isna().all()
    assert rows["low"].iloc[0] >= 0


def test_figures_that_a_seed_lacks() -> None:
    rows = figure_rows(intervals(seeded(np.array([[1.0, np.nan, 3], [np.nan] * 3])), {}), "output_tokens_per_s")
    assert rows.loc["p0", "mean"] == 2
    assert rows.loc["p0", "units_count"] == 2
    assert math.isnan(rows.loc["p1", "mean"])
    assert math.isnan(rows.loc["p1", "low"])


def test_intervals_are_repeatable_and_fast() -> None:
    made = comparison(tuple(f"p{i}" for i in range(10)), requests_count=12_000)
    start = time.perf_counter()
    found = intervals(made.results, made.requests)
    assert time.perf_counter() - start < 1.0
    pd.testing.assert_frame_equal(found, intervals(made.results, made.requests))


@pytest.mark.parametrize(
    ("requests_count", "expected"), [(1, 1), (40, 2), (1000, 50), (5000, 50), (12_000, 120), (10**6, 10_000)]
)
def test_block_size(requests_count: int, expected: int) -> None:
    assert block_size(requests_count) == expected


# table


def test_table_shows_the_figures() -> None:
    made = comparison()
    text = table_text(made)
    lines = text.splitlines()
    assert lines[0] == "l3-dgx-a100 · qwen-72b · azure-conv-2023 · load 1"
    assert "300 requests, 1 seed" in lines[1]
    for policy in ("fcfs", "l3"):
        line = next(line for line in lines if line.startswith(policy + " "))
        row = made.results[made.results["policy"] == policy].iloc[0]
        for shown in (
            number(row[GOODPUT]) + " ±",
            f"{100 * row['slo_attainment_frac']:.1f}",
            "1,234",
            number(row["ttft_p99_s"]),
            "250",  # TBT 0.25 s in ms
            "60.0",
            "40.0",
            " 7 ",
        ):
            assert shown in line, (shown, line)
    assert max(map(len, lines)) <= 140


@pytest.mark.parametrize(
    ("width", "kept", "left_out"),
    [(170, "KV PIM", None), (140, "guarded", "KV HBM"), (100, "SLO", "KV HBM"), (80, "SLO", "J per")],
)
def test_narrow_tables_leave_columns_out(width: int, kept: str, left_out: str | None) -> None:
    text = table_text(comparison(("fcfs", "fill-capacity", "srtf-predicted"), (0.5, 1.0)), width)
    assert kept in text
    assert "srtf-predicted" in text
    assert left_out is None or left_out not in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


def test_table_groups_loads_and_names_utilization() -> None:
    text = table_text(comparison(loads=(0.5, 1.0)))
    assert "2 loads" in text
    assert [line.split()[0] for line in text.splitlines() if " fcfs " in line] == ["0.5", "1"]
    assert "utilization 0.9 (load 1.5)" in table_text(comparison(loads=(1.5,), utilization=0.9))


def test_best_is_highlighted() -> None:
    console = Console(width=140, force_terminal=True, color_system="standard", no_color=False)
    with console.capture() as capture:
        terminal_table(comparison(), console)
    lines = {line.split()[0]: line for line in capture.get().splitlines() if line.startswith(("fcfs", "l3 "))}
    assert lines["fcfs"].count("\x1b[1;32m") >= 4  # goodput, SLO, TTFT, e2e
    assert "\x1b[1;32m" not in lines["l3"]


def test_units_of_the_table_follow_the_values() -> None:
    made = comparison()
    for name in ("ttft", "e2e"):
        made.results[[f"{name}_p50_s", f"{name}_p99_s"]] = [0.0123, 0.4]
    text = table_text(made)
    assert "p99 ms" in text.splitlines()[4]
    assert "400" in text
    made.results[GOODPUT] = 0.001
    assert "req/h" in table_text(made)
    assert "3.60" in table_text(made)


def test_table_of_nothing_finished() -> None:
    line = next(line for line in table_text(nothing_finished()).splitlines() if line.startswith("fcfs"))
    assert " - " in line
    assert "nan" not in line
    assert "±" not in line
    assert "PIM" not in table_text(nothing_finished())


# files and pictures


def assert_picture(path: Path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    pixels = imread(path)
    assert min(pixels.shape[:2]) > 100
    inked = (pixels[..., :3] < 0.99).any(axis=-1)
    assert 0.005 < inked.mean() < 0.9
    assert len(np.unique(pixels[..., 0])) > 10


@pytest.mark.parametrize(
    ("made", "extra"),
    [
        (comparison(), ()),
        (comparison(("only",), seeds_count=3), ()),
        (
            comparison(tuple(f"policy-{i}" for i in range(13)), (0.5, 1.0, 1.5, 2.0), requests_count=60),
            ("load_curve.png",),
        ),
        (comparison(("fcfs", "some/where/mine.py:Mine"), pim=False), ()),
        (nothing_finished(("fcfs", "l3")), ()),
    ],
    ids=["two", "one", "many", "no-pim", "nothing-finished"],
)
def test_written_files(made: Comparison, extra: tuple[str, ...], tmp_path: Path) -> None:
    written = write_results(made, tmp_path / "out")
    names = {path.name for path in written}
    assert names == {"results.csv", "intervals.csv", *PICTURES, *extra}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names  # no .part is left
    for name in (*PICTURES, *extra):
        assert_picture(tmp_path / "out" / name)
    rows = pd.read_csv(tmp_path / "out" / "results.csv")
    assert tuple(rows.columns)[: len(CONTRACT_COLUMNS)] == CONTRACT_COLUMNS
    assert len(rows) == len(made.results)
    assert len(pd.read_csv(tmp_path / "out" / "intervals.csv")) > 0


def test_pictures_without_time_lines_and_requests(tmp_path: Path) -> None:
    made = comparison()
    bare = Comparison(made.config, made.results, {}, {})
    write_results(bare, tmp_path)
    assert_picture(tmp_path / "timeline.png")
    said = [[text.get_text() for text in axes.texts] for axes in timeline_figure(bare).axes]
    assert said == [["not recorded"]] * (3 * made.results["policy"].nunique())
    assert not any(axes.lines for axes in timeline_figure(bare).axes)
    json.dumps(to_json(bare), allow_nan=False)


def test_timeline_draws_what_was_recorded() -> None:
    """A row a policy; its own line is drawn last, over those of the others, and shows its frame's means over bins."""
    made = comparison()
    frames = {policy: made.timelines[f"{policy}, 1.0, 0"] for policy in ("fcfs", "l3")}
    horizon_s = max(float(frame["end_s"].max()) for frame in frames.values())
    panels = np.reshape(timeline_figure(made).axes, (len(frames), 3))
    for (policy, frame), row in zip(frames.items(), panels, strict=True):
        expected = binned(frame, horizon_s)
        assert policy in row[0].get_ylabel()
        drawn = [axes.lines[-1].get_ydata() for axes in row]
        for values, name in zip(drawn, ("kv_hbm_frac", "batch_count", "waiting_count"), strict=True):
            np.testing.assert_array_equal(values, getattr(expected, name))
        assert [len(axes.lines) for axes in row] == [1, len(frames), len(frames)]


def test_timeline_shows_the_highest_load() -> None:
    figure = timeline_figure(comparison(loads=(0.5, 2.0)))
    assert figure.get_suptitle() == "l3-dgx-a100 · qwen-72b · azure-conv-2023 · load 2 · seed 0"


def test_every_policy_looks_different() -> None:
    found = looks(f"p{i}" for i in range(12))
    assert len({look.colour for look in found.values()}) == 12
    assert len({(look.colour, str(look.line)) for look in found.values()}) == 12


# what the pictures show


def test_bin_means_keep_the_integral() -> None:
    edges = np.linspace(0, 10, 6)
    found = bin_means(edges, np.array([1.0, 4.0]), np.array([2.0, 5.0]), np.array([3.0, 1.0]))
    assert found == pytest.approx([1.5, 1.5, 1.0, 1.0, 0.5])
    assert (found * 2).sum() == pytest.approx(3 * 2 + 1 * 5)


def test_binned_joins_replicas() -> None:
    frame = pd.DataFrame(
        {
            "replica": [0, 0, 1, 1],
            "end_s": [5.0, 10.0, 5.0, 10.0],
            "duration_s": [5.0, 5.0, 5.0, 2.5],
            "iterations_count": [1, 2, 1, 1],
            "decode_tokens": [4, 16, 0, 8],
            "waiting_count": [6, 0, 2, 0],
            "kv_hbm_frac": [0.5, 0.0, 0.1, 0.0],
            "kv_pim_frac": [1.0, 0.0, 0.0, 0.0],
        }
    )
    found = binned(frame, 10.0)
    half = BINS_COUNT // 2
    assert found.waiting_count[:half] == pytest.approx(0)
    assert found.waiting_count[half:] == pytest.approx(8)  # summed
    assert found.kv_hbm_frac[half:] == pytest.approx(0.3)  # averaged
    assert found.kv_pim_frac[half:] == pytest.approx(0.5)
    assert found.batch_count[:half] == pytest.approx(2)
    assert found.batch_count[half : half + half // 2] == pytest.approx(4)
    assert found.batch_count[-half // 2 :] == pytest.approx(8)


def test_cdf_counts_requests_that_never_finish() -> None:
    frame = pd.DataFrame(
        {"output_tokens": [1, 5, 5, 5], "ttft_s": [1.0, 2, 3, np.nan], "tpot_s": [np.nan, 1, 2, np.nan]}
    )
    values, shares = cdf([frame], "ttft_s")
    assert values.tolist() == [1, 1, 2, 3]
    assert shares.tolist() == [0, 0.25, 0.5, 0.75]
    assert cdf([frame], "tpot_s")[1].tolist() == pytest.approx([0, 1 / 3, 2 / 3])
    assert cdf([], "ttft_s")[0].size == 0


def test_shares_of_the_makespan() -> None:
    made = comparison(("l3",))
    assert _shares(made.results, "l3", 1.0, "gpu") == pytest.approx((0.6, 0.2, 0.2))
    assert _shares(made.results, "l3", 1.0, "pim") == pytest.approx((0.4, 0.4, 0.2))
    made = comparison(("l3",), pim=False)
    assert _shares(made.results, "l3", 1.0, "gpu") == pytest.approx((0.6, 0.0, 0.4))


# names


def test_policy_labels() -> None:
    assert policy_labels(["fcfs", "a/mine.py:Mine"]) == {"fcfs": "fcfs", "a/mine.py:Mine": "Mine"}
    assert list(policy_labels(["a/x.py:P", "b/y.py:P"]).values()) == ["x:P", "y:P"]
    assert list(policy_labels(["a/x.py:P", "b/x.py:P"]).values()) == ["a/x.py:P", "b/x.py:P"]


def test_names_in_headings() -> None:
    assert short_name("some/folder/box.toml") == "box"
    assert short_name("/data/trace.csv?rate=2") == "trace.csv?rate=2"
    assert len(short_name("x" * 200)) == 60
    assert heading(comparison(loads=(0.5,))).endswith("load 0.5")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.01234, "0.0123"), (1.5, "1.50"), (45.67, "45.7"), (12345.6, "12,346"), (math.nan, "-")],
)
def test_numbers(value: float, shown: str) -> None:
    assert number(value) == shown


# end to end


def test_report_of_a_real_run(tmp_path: Path) -> None:
    tables = compile_pair("l3-dgx-a100", "gpt-89b")
    rng = np.random.default_rng(0)
    workload = Workload.build("w", np.sort(rng.uniform(0, 20, 60)), rng.integers(10, 900, 60), rng.integers(1, 80, 60))
    outcome = run_policy(tables, workload, FixedKnobs("fcfs", Knobs()))
    identity = {"policy": "fcfs", "system": "l3-dgx-a100", "model": "gpt-89b", "trace": "w", "load": 1.0, "seed": 0}
    row = identity | outcome.metrics | {"wall_s": 0.1}
    assert set(CONTRACT_COLUMNS) <= set(row)
    config = grid(("fcfs",), "gpt-89b", "w", (1.0,))
    made = Comparison(config, pd.DataFrame([row | {"key": "a"}]), {"a": outcome.requests}, {"a": outcome.timeline})
    rows = figure_rows(intervals(made.results, made.requests), GOODPUT)
    assert rows["mean"].iloc[0] == pytest.approx(outcome.metrics[GOODPUT])
    json.dumps(to_json(made), allow_nan=False)
    assert "fcfs" in table_text(made)
    for path in write_results(made, tmp_path):
        assert path.stat().st_size > 0
