"""Studies: a grid as a dataset, resumed and spread without changing a bit; capacity; cost."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from l3env import Knobs, Workload, compare, compile_pair, load
from l3env.errors import L3EnvError
from l3env.policy.protocol import BasePolicy, FixedKnobs
from l3env.policy.registry import register_policy
from l3env.policy.view import View
from l3env.runs.capacity import Bracket, bracket, capacities, interval
from l3env.runs.cell import Cell
from l3env.runs.compare import run_grid
from l3env.runs.cost import Prices, cost_figures
from l3env.runs.driver import run_policy
from l3env.runs.grid import Grid
from l3env.runs.workers import Workers
from l3env.traces.canonical import save

TRACE = "profile:azure-conv-2023?n=60"
TEXT = """
policies: [fcfs, sarathi]
systems: [l3-dgx-a100, gpu-dgx-a100]
models: llama-3-8b
traces: "profile:azure-conv-2023?n=60"
loads: [0.5, 2]
seeds: 2
"""


def study_file(folder: Path, text: str = TEXT) -> Path:
    path = folder / "study.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def dataset(folder: Path) -> dict[str, object]:
    """Every frame of a study, and its rows but for where and how long each ran, by path."""
    found: dict[str, object] = {}
    for path in (path for path in folder.rglob("*") if path.is_file() and path.parent != folder):
        name = str(path.relative_to(folder))
        found[name] = path.read_bytes() if path.suffix == ".parquet" else json.loads(path.read_text())
        if isinstance(found[name], dict):
            found[name] |= {"wall_s": 0, "host": ""}
    return found


def test_a_study_is_the_grid_of_its_lists(tmp_path: Path) -> None:
    config = Grid.from_yaml(study_file(tmp_path))
    cells = list(config.cells())
    assert len(cells) == 2 * 2 * 1 * 1 * 2 * 2
    assert len({cell.key for cell in cells}) == len(cells)
    assert {(c.policy, c.system, c.load, c.seed) for c in cells} == {
        (p, s, load, seed)
        for p in ("fcfs", "sarathi")
        for s in config.systems
        for load in (0.5, 2.0)
        for seed in (0, 1)
    }
    assert Grid.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_cells_of_similar_names_have_files_of_their_own() -> None:
    names = ("x" * 60 + "/a?n=1", "y" * 60 + "/a?n=1", "a?n=1", "a_n=1")
    config = Grid(("fcfs",), ("gpu-dgx-a100",), ("llama-3-8b",), names, (1.0,))
    keys = [cell.key for cell in config.cells()]
    assert len(set(keys)) == 4
    assert all(len(key) < 240 and "/" not in key for key in keys)


def test_a_study_gives_what_compare_gives(tmp_path: Path) -> None:
    config = Grid(("fcfs", "edf"), ("l3-dgx-a100",), ("llama-3-8b",), (TRACE,), (), (0.7,), 2)
    study = run_grid(config, out=tmp_path)
    found = study.results
    wanted = compare(["fcfs", "edf"], "l3-dgx-a100", "llama-3-8b", TRACE, utilization=0.7, seeds=2)
    columns = [name for name in wanted.results if name != "wall_s"]
    assert found["error"].isna().all()
    pd.testing.assert_frame_equal(found[columns], wanted.results[columns], check_exact=True)
    assert found.groupby("seed")["requests_sha256"].nunique().tolist() == [1, 1]  # the same for every policy
    assert found["requests_sha256"].nunique() == 2
    first = found.iloc[0]
    pd.testing.assert_frame_equal(study.requests[first["key"]], wanted.requests[first["key"]])
    pd.testing.assert_frame_equal(study.timelines[first["key"]], wanted.timelines[first["key"]])


def test_a_failed_cell_is_recorded_and_stops_nothing(tmp_path: Path) -> None:
    """GPT-175B does not fit on a quarter of the node; a policy of the user's breaks."""

    class Broken(BasePolicy):
        name = "broken"

        def decide(self, view: View) -> Knobs:
            raise ZeroDivisionError("mine")

    register_policy("broken", Broken)
    small = tmp_path / "small.toml"
    text = (Path(__file__).parents[2] / "l3env/presets/system/gpu-dgx-a100.toml").read_text(encoding="utf-8")
    small.write_text(text.replace("gpus_count = 8", "gpus_count = 2"), encoding="utf-8")
    assert load(f"system:{small}").gpus_count == 2
    config = Grid(("fcfs", "broken"), (str(small), "gpu-dgx-a100"), ("gpt-175b",), (TRACE,), (1.0,))
    results = run_grid(config, out=tmp_path / "out").results.set_index(["policy", "system"])
    assert results["error"].isna().sum() == 1
    assert "SpecError" in results.loc[("fcfs", str(small)), "error"]
    assert results.loc[("broken", "gpu-dgx-a100"), "error"].endswith("got ZeroDivisionError: mine")
    assert results.loc[("fcfs", "gpu-dgx-a100"), "finished_count"] == 60
    texts = [json.loads(path.read_text())["traceback"] for path in (tmp_path / "out" / "cells").iterdir()]
    (text,) = filter(None, texts)  # bad input needs none
    assert "in decide" in text
    register_policy("broken", lambda: FixedKnobs("broken", Knobs()))  # mended
    again = run_grid(config, out=tmp_path / "out")
    assert again.results["error"].isna().sum() == 2
    assert again.taken_count == 1  # what failed is run again


def test_a_run_that_takes_its_process_down_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import os\n\nfrom l3env import BasePolicy\n\n\nclass Deadly(BasePolicy):\n"
        "    name = 'deadly'\n\n    def decide(self, view):\n        os._exit(1)\n",
        encoding="utf-8",
    )
    deadly = f"{tmp_path}/mine.py:Deadly"
    config = Grid(("fcfs", deadly, "edf"), ("gpu-dgx-a100",), ("llama-3-8b",), (TRACE,), (1.0,))
    results = run_grid(config, out=tmp_path / "out", workers=Workers("loky", 2)).results
    assert len(results) == 3
    failed = results["error"].notna()
    assert (failed == (results["policy"] == deadly)).all()
    assert results.loc[failed, "error"].str.startswith("WorkerDied").all()


def children(pid: int) -> list[int]:
    """Processes whose parent is ``pid``; none where the system does not say."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


def alive(pid: int) -> bool:
    """Is it there, and not only waiting to be collected?"""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_killed_sweep_resumes_to_the_same_dataset(tmp_path: Path) -> None:
    """SIGKILL when half of the cells are there, from outside, with two workers; against one undisturbed process."""
    path = study_file(tmp_path, TEXT.replace("n=60", "n=900"))
    command = [sys.executable, "-m", "l3env.cli", "sweep", str(path), "-j", "2", "--out"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([*command, str(killed)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(killed.glob("cells/*.json"))) < 8 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in workers)  # nothing is left behind
    half = len(list(killed.glob("cells/*.json")))
    assert 8 <= half < 16
    (killed / "requests" / ".torn.part").write_bytes(b"half a file")
    config = Grid.from_yaml(path)
    seen: list[int] = []
    run_grid(config, out=killed, progress=lambda done, total, what: seen.append(done))
    assert seen == list(range(half, 17))
    run_grid(config, out=whole)
    assert dataset(killed) == dataset(whole)
    assert len(dataset(whole)) == 3 * 16


@pytest.mark.slow
def test_ray_gives_the_same_dataset(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    pytest.importorskip("ray")
    path = study_file(tmp_path)
    run_cli("sweep", str(path), "--backend", "ray", "-j", "2", "--out", str(tmp_path / "ray" / "study"))
    run_cli("sweep", str(path), "--backend", "sequential", "--out", str(tmp_path / "here" / "study"))
    found = dataset(tmp_path / "ray" / "study")
    assert found == dataset(tmp_path / "here" / "study")
    assert len(found) == 3 * 16
    assert {"results.csv", "report.html", "config.json"} <= {path.name for path in (tmp_path / "ray/study").iterdir()}


def test_off_is_off_though_yaml_takes_it_for_a_truth_value(tmp_path: Path) -> None:
    path = study_file(tmp_path, TEXT + "prefix_cache: off\n")
    assert Grid.from_yaml(path) == Grid.from_yaml(study_file(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("policies", "polices"), "unknown key 'polices' (did you mean 'policies'?)"),
        (("loads: [0.5, 2]", ""), "either loads or utilizations"),
        (("[0.5, 2]", "[0.5, -1]"), "expected numbers > 0"),
        (("[0.5, 2]", "[0.5, fast]"), "loads: 'fast'; expected a number"),
        (("[0.5, 2]", "[0.5, 0.5]"), "names something twice"),
        (("seeds: 2", "seeds: many"), "seeds = 'many'; expected a whole number"),
        (("seeds: 2", "seeds: 0"), "expected at least 1"),
        (("seeds: 2", "slo: {ttft: 3}"), "expected ttft_scale"),
        (("models: llama-3-8b", ""), "no models"),
        (("policies: [", "policies: [["), "cannot be read as YAML"),
    ],
)
def test_study_files_are_checked(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = study_file(tmp_path, TEXT.replace(*change))
    with pytest.raises(L3EnvError) as caught:
        Grid.from_yaml(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("fcfs", "fcsf"), "unknown policy 'fcsf' (did you mean 'fcfs'?)"),
        (("llama-3-8b", "llama-4"), "unknown model 'llama-4'"),
        (("profile:azure", "profile:azur"), "azur-conv-2023"),
    ],
)
def test_names_are_checked_before_anything_runs(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    config = Grid.from_yaml(study_file(tmp_path, TEXT.replace(*change)))
    with pytest.raises(L3EnvError) as caught:
        run_grid(config, out=tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def heed_interrupts() -> None:
    """Tests that a shell runs in the background ignore SIGINT, and so would what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupted_sweep_says_so_and_goes_on(tmp_path: Path) -> None:
    """Of 1,600 cells a few are done when it is told to stop: however busy the machine, it is not through by then."""
    path = study_file(tmp_path, TEXT.replace("n=60", "n=2000").replace("seeds: 2", "seeds: 200"))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "l3env.cli", "sweep", str(path), "-j", "2", "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts)
    deadline = time.monotonic() + 120
    while len(list(out.glob("cells/*.json"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; what was finished is kept" in shown
    assert "Traceback" not in shown
    assert 3 <= len(list(out.glob("cells/*.json"))) < 1600


# capacity


@pytest.mark.parametrize("true", [0.013, 0.5, 1.0, 7.3, 400.0])
def test_the_bracket_holds_a_known_threshold(true: float) -> None:
    asked: list[float] = []
    found = bracket(lambda load: bool(asked.append(load)) or load <= true, 0.7, 0.02)
    assert found.low <= true <= found.high <= 1.02 * found.low
    assert found.runs_count == len(asked) < 25


def test_brackets_without_an_end() -> None:
    assert math.isinf(bracket(lambda load: True, 1.0, 0.02).high)
    assert bracket(lambda load: False, 1.0, 0.02).low == 0
    assert interval([Bracket(0.0, 1e-3, 9), Bracket(1.0, 1.02, 9)]) == (0.0, 0.0, 1.02)
    assert interval([Bracket(1.0, math.inf, 9), Bracket(1.0, 1.02, 9)])[2] == math.inf


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Log-normal capacities around a known one, five seeds: 95 % of 400 intervals, give or take three deviations."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        draws = 2.0 * np.exp(rng.normal(0, 0.2, 5))
        low, high = interval([bracket(lambda load, c=c: load <= c, 1.0, 0.002) for c in draws])[1:]
        hits += low <= 2.0 <= high
    assert abs(hits / 400 - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 400)


def test_capacity_of_a_queue_by_hand(tmp_path: Path) -> None:
    """Equal prompts, evenly spaced, one at a time, one token each, TTFT limit five services.

    With service time S and gap g < S request k waits k (S - g), so k <= 4 S / (S - g) meet the limit. Half of 200
    requests do (k = 0..99) as long as S - g <= 4 S / 99, which is load S / (S (1 - 4 / 99)) x the rate 1 / S.
    """
    tables = compile_pair("gpu-dgx-a100", "llama-3-8b")
    replicas = tables.replicas_count
    serial = FixedKnobs("serial", Knobs(admit_max_count=1))
    register_policy("serial", lambda: FixedKnobs("serial", Knobs(admit_max_count=1)))
    service_s = run_policy(tables, Workload.build("one", [0.0], [3000], [1]), serial).metrics["ttft_mean_s"]
    gap_s = 10 * service_s  # of one replica at load 1
    count = 200 * replicas
    arrival_s = np.repeat(np.arange(200) * gap_s, replicas)
    path = save(Workload.build("even", arrival_s, np.full(count, 3000), np.ones(count, int)), tmp_path / "even.csv")
    cell = Cell("serial", "gpu-dgx-a100", "llama-3-8b", str(path), utilization=1.0)
    (row,) = capacities([cell], target_frac=0.5, tolerance_frac=0.001)
    wanted = 10 / (1 - 4 / 99)
    assert row["capacity_load_low"] <= wanted <= row["capacity_load_high"]
    assert row["capacity_load"] == pytest.approx(wanted, rel=0.001)


def test_capacity_meets_the_target_just_so(tmp_path: Path) -> None:
    trace = "profile:azure-conv-2023?n=300"
    cells = Grid(("sarathi",), ("l3-dgx-a100",), ("llama-3-8b",), (trace,), (), (1.0,), 3).cells()
    (row,) = capacities(cells, tolerance_frac=0.05)
    tried = [(b["seed"], b["low"], True) for b in row["brackets"]]
    tried += [(b["seed"], b["high"], False) for b in row["brackets"]]
    for seed, level, met in tried:
        found = compare(["sarathi"], "l3-dgx-a100", "llama-3-8b", trace, load=level, seeds=seed + 1).results
        assert (found["slo_attainment_frac"].iloc[-1] >= 0.9) == met
    lows = np.log([b["low"] for b in row["brackets"]])
    reach = stats.t.ppf(0.975, 2) * lows.std(ddof=1) / math.sqrt(3)
    assert row["capacity_load_low"] == pytest.approx(math.exp(lows.mean() - reach))


# cost


PRICES = """
host_dollars_per_hour = 4.0
electricity_dollars_per_kwh = 0.25
[gpu_dollars_per_hour]
a100-80 = 2.0
[pim_dollars_per_gb_hour]
dimm-pim-ddr4-3200 = 0.001
"""


def test_cost_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(PRICES, encoding="utf-8")
    prices, system = Prices.from_toml(path), load("system/l3-dgx-a100")
    gigabytes = system.pim.capacity_bytes / 1e9
    hardware = 4 + 8 * 2 + 0.001 * gigabytes
    assert prices.dollars_per_hour(system) == pytest.approx(hardware)
    found = cost_figures({"output_tokens_per_s": 1000.0, "energy_j_per_token": 2.0}, system, prices)
    assert found["power_w"] == 2000.0
    assert found["dollars_per_hour"] == pytest.approx(hardware + 2 * 0.25)  # 2 kW
    assert found["tokens_per_dollar"] == pytest.approx(3.6e6 / (hardware + 0.5))
    assert found["dollars_per_million_tokens"] * found["tokens_per_dollar"] == pytest.approx(1e6)
    assert found["tokens_per_joule"] == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("a100-80 =", "a100 ="), "[gpu_dollars_per_hour] has no price for 'a100-80'; there are: a100"),
        (("= 2.0", "= -2.0"), "a100-80 = -2.0; expected a price >= 0"),
        (("host_dollars", "hots_dollars"), "unknown key 'hots_dollars_per_hour'"),
    ],
)
def test_prices_are_checked(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "prices.toml"
    path.write_text(PRICES.replace(*change), encoding="utf-8")
    with pytest.raises(L3EnvError) as caught:
        Prices.from_toml(path).dollars_per_hour(load("system/l3-dgx-a100"))
    assert message in str(caught.value)


def test_cli_capacity_and_cost(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text(PRICES, encoding="utf-8")
    study = study_file(tmp_path, TEXT.replace("[0.5, 2]", "0.5").replace("seeds: 2", "seeds: 1"))
    out = tmp_path / "out"
    printed = json.loads(run_cli("sweep", str(study), "--out", str(out), "-j", "1", "--json").stdout)
    assert [row["error"] for row in printed["results"]] == [None] * 4
    table = pd.read_csv(out / "results.csv")
    for row, line in zip(printed["results"], table.to_dict("records"), strict=True):
        assert all(line[name] == value for name, value in row.items() if value is not None)
    assert (out / "report.html").stat().st_size > 1e6
    rows = json.loads(run_cli("cost", str(out), "--prices", str(prices), "--json").stdout)
    by_hand = cost_figures(printed["results"][0], load("system/l3-dgx-a100"), Prices.from_toml(prices))
    assert rows[0]["tokens_per_dollar"] == pytest.approx(by_hand["tokens_per_dollar"])
    args = ("--model", "llama-3-8b", "--trace", TRACE, "--policies", "fcfs", "--seeds", "2", "-j", "1")
    (row,) = json.loads(run_cli("capacity", *args, "--prices", str(prices), "--json").stdout)
    assert row["capacity_load_low"] < row["capacity_load"] < row["capacity_load_high"]
    assert row["tokens_per_joule"] * row["energy_j_per_token"] == pytest.approx(1)
