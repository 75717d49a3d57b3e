"""What a folder holds is found again by content: what has not changed is not run again, what has is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from l3env import compare, load_trace
from l3env.errors import L3EnvError
from l3env.machine import specs
from l3env.policy.registry import policy_files, policy_module, register_policy
from l3env.runs.compare import Comparison, read_comparison, run_grid
from l3env.runs.content import policy_content, sha256, sources_sha256
from l3env.runs.grid import Grid
from l3env.runs.workers import Workers
from l3env.traces.canonical import save

POLICY = """
import json
from pathlib import Path

import numbers_of
from l3env import BasePolicy, Knobs


class Mine(BasePolicy):
    name = "mine"

    def __init__(self):
        self.share = json.loads((Path(__file__).parent / "weights.json").read_text())

    def decide(self, view):
        return Knobs(prefill_budget_tokens=numbers_of.BUDGET * self.share)


class Broken(BasePolicy):
    name = "broken"

    def decide(self, view):
        raise ZeroDivisionError("mine")
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the user's, the current one: a policy with a helper and weights, a system, a trace."""
    (tmp_path / "mine.py").write_text(POLICY)
    (tmp_path / "numbers_of.py").write_text("BUDGET = 64\n")
    (tmp_path / "weights.json").write_text("8")
    (tmp_path / "unrelated.py").write_text("X = 1\n")
    (tmp_path / "system.toml").write_text((specs.PRESET_DIR / "system/gpu-dgx-a100.toml").read_text())
    save(load_trace("profile:azure-conv-2023?n=40"), tmp_path / "trace.csv")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*policies: str, system: str = "gpu-dgx-a100", **asked: object) -> Comparison:
    return compare(
        policies or ("mine.py:Mine", "fcfs"), system, "llama-3-8b", "trace.csv", load=30.0, out="out", **asked
    )


def edited(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def slower_trace(folder: Path) -> None:
    save(load_trace("profile:azure-conv-2023?n=40&output_scale=2"), folder / "trace.csv")


EDITS: dict[str, tuple[Callable[[Path], None], int]] = {  # what is done, and how many of the two cells stay
    "policy": (lambda folder: edited(folder / "mine.py", "numbers_of.BUDGET", "numbers_of.BUDGET // 2"), 1),
    "helper": (lambda folder: edited(folder / "numbers_of.py", "64", "32"), 1),
    "weights": (lambda folder: (folder / "weights.json").write_text("2"), 1),
    "trace": (slower_trace, 0),
    "nothing": (lambda folder: None, 2),
    "unrelated": (lambda folder: edited(folder / "unrelated.py", "1", "2"), 2),
    "touched": (lambda folder: os.utime(folder / "mine.py", (0, 0)), 2),
}


@pytest.mark.parametrize("what", EDITS)
def test_an_edit_gives_the_new_result_and_leaves_the_others(place: Path, what: str) -> None:
    """Against the same command in another folder, which has nothing to take."""
    before = run()
    assert before.taken_count == 0
    edit, stay = EDITS[what]
    edit(place)
    after = run()
    assert after.taken_count == stay
    wanted = compare(("mine.py:Mine", "fcfs"), "gpu-dgx-a100", "llama-3-8b", "trace.csv", load=30.0).results
    columns = [name for name in wanted if name != "wall_s"]
    pd.testing.assert_frame_equal(after.results[columns], wanted[columns], check_dtype=False)
    changed = before.results["e2e_mean_s"] != after.results["e2e_mean_s"]
    assert changed.tolist() == {0: [True, True], 1: [True, False], 2: [False, False]}[stay]
    assert run().taken_count == 2


def test_an_edited_system_is_another_machine(place: Path) -> None:
    before = run(system="system.toml")
    edited(place / "system.toml", "gpus_count = 8", "gpus_count = 4")
    after = run(system="system.toml")
    assert after.taken_count == 0
    assert (after.results["e2e_mean_s"] != before.results["e2e_mean_s"]).all()
    edited(place / "system.toml", "[sources]", "# a word\n[sources]")
    assert run(system="system.toml").taken_count == 2  # the same machine


def test_utilization_is_searched_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("fcfs",), "gpu-dgx-a100", "llama-3-8b", "trace.csv"
    first = compare(*asked, utilization=0.5, out="out").results["load"].item()
    monkeypatch.setattr("l3env.runs.plan.load_at_capacity", None)
    again = compare(*asked, utilization=0.5, out="out")
    assert (again.taken_count, again.results["load"].item()) == (1, first)


def test_a_policy_can_be_added_and_the_folder_shows_all(place: Path) -> None:
    run("fcfs")
    added = run("edf")
    assert added.results["policy"].tolist() == ["edf"]
    assert read_comparison("out").results["policy"].tolist() == ["fcfs", "edf"]
    assert run("edf", "fcfs").taken_count == 2
    other = compare(["fcfs"], "gpu-dgx-a100", "llama-3-8b", "trace.csv", load=20.0, out="out")
    assert other.taken_count == 0
    assert read_comparison("out").results["load"].tolist() == [20.0]  # what was asked for last
    assert run("edf", "fcfs").taken_count == 2  # the others are still there
    assert run("edf", fresh=True).taken_count == 0
    assert run("edf", "fcfs").taken_count == 1  # forgotten


def test_a_folder_of_something_else_is_left_alone(place: Path) -> None:
    (place / "out").mkdir()
    (place / "out" / "config.json").write_text('{"algo": "ppo"}')
    with pytest.raises(L3EnvError, match="holds something else"):
        run("fcfs")
    assert (place / "out" / "config.json").read_text() == '{"algo": "ppo"}'


def test_one_failing_policy_does_not_lose_the_others(place: Path) -> None:
    found = run("mine.py:Broken", "fcfs")
    assert found.done["policy"].tolist() == ["fcfs"]
    (error,) = found.failed["error"]
    assert error.startswith("PolicyError: policy 'broken': decide fails\n  mine.py:")
    assert error.endswith("got ZeroDivisionError: mine")
    assert found.failed[["slo_form", "slo_ttft_scale", "slo_ttft_s"]].to_numpy().tolist() == [["mean-tbt", 5.0, None]]
    assert run("mine.py:Broken", "fcfs").taken_count == 1
    with pytest.raises(L3EnvError, match="does not fit"):  # nothing at all can be run
        compare(["fcfs"], "gpu-dgx-a100", "gpt-175b", "trace.csv", tp=1)


def test_an_interrupted_comparison_goes_on(place: Path) -> None:
    def stop(done: int, total: int, what: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("fcfs", "edf", progress=stop)
    assert read_comparison("out").results["policy"].tolist() == ["fcfs"]
    kept = read_comparison("out").results["wall_s"].item()
    found = run("fcfs", "edf")
    assert found.taken_count == 1
    assert found.results["wall_s"].iloc[0] == kept
    for key, frame in compare(("fcfs", "edf"), "gpu-dgx-a100", "llama-3-8b", "trace.csv", load=30.0).requests.items():
        pd.testing.assert_frame_equal(found.requests[key], frame)
    assert not list(place.rglob("*.part"))


def test_a_row_that_was_torn_is_run_again(place: Path) -> None:
    run("fcfs")
    (row,) = (place / "out" / "cells").iterdir()
    row.write_text(row.read_text()[:100])
    assert run("fcfs").taken_count == 0
    assert run("fcfs").taken_count == 1


def test_several_commands_write_to_one_folder(place: Path) -> None:
    """Two processes with the same four cells and one with another: all whole, nothing lost."""
    code = (
        "import sys; from l3env import compare; "
        "compare(sys.argv[1].split(','), 'gpu-dgx-a100', 'llama-3-8b', 'trace.csv', load=30.0, seeds=2, out='out')"
    )
    names = ("fcfs,edf", "fcfs,edf", "sjf-prompt,edf")
    running = [subprocess.Popen([sys.executable, "-c", code, each]) for each in names]
    assert [process.wait() for process in running] == [0, 0, 0]
    grid = Grid(("fcfs", "edf", "sjf-prompt"), ("gpu-dgx-a100",), ("llama-3-8b",), ("trace.csv",), (30.0,), (), 2)
    found = run_grid(grid, out="out", workers=Workers("loky", 2))
    assert found.taken_count == 6
    assert all(len(found.requests[key]) == 40 for key in found.results["key"])
    assert not list(place.rglob("*.part"))


def test_workers_change_nothing(place: Path) -> None:
    grid = Grid(("mine.py:Mine", "fcfs"), ("gpu-dgx-a100",), ("llama-3-8b",), ("trace.csv",), (30.0,))
    here = run_grid(grid).results.drop(columns="wall_s")
    for backend in ("loky", "threading"):
        there = run_grid(grid, workers=Workers(backend, 2)).results.drop(columns="wall_s")
        pd.testing.assert_frame_equal(there, here)


def test_what_cannot_be_known_is_run_again(place: Path) -> None:
    """A policy that was put together in this process: its source does not say all."""
    from l3env import FixedKnobs, Knobs

    most = 3
    register_policy("made-here", lambda: FixedKnobs("made-here", Knobs(admit_max_count=most)))
    assert policy_module("made-here") is None
    assert [run("made-here").taken_count for _ in range(2)] == [0, 0]


def test_options_that_contradict_each_other(place: Path) -> None:
    with pytest.raises(L3EnvError, match="expected one of them"):
        compare(["fcfs"], "gpu-dgx-a100", "llama-3-8b", "trace.csv", load=1.0, utilization=0.9)


def test_a_stand_in_is_called_so(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where the profile was asked for; in a splice, too."""
    monkeypatch.setenv("L3ENV_TRACE_DIR", str(place))
    monkeypatch.setenv("L3ENV_CACHE_DIR", str(place))
    monkeypatch.setattr("l3env.traces.catalog.CHECKOUT", place / "nowhere" / "at")
    splice = "splice:burstgpt-1,profile:azure-conv-2023?every=20&window=0:200"
    traces = {"burstgpt-1?n=20": "burstgpt-1", "profile:burstgpt-1?n=20": None, splice: "burstgpt-1"}
    grid = Grid(("fcfs",), ("gpu-dgx-a100",), ("llama-3-8b",), tuple(traces), (1.0,))
    with pytest.warns(UserWarning, match="stands in"):
        results = run_grid(grid).results
    assert results.set_index("trace")["stands_in_for"].dropna().to_dict() == {t: n for t, n in traces.items() if n}


# which files a policy is made of


def test_files_of_a_policy(place: Path) -> None:
    found = {path.name for path in policy_files("mine.py:Mine")}
    assert found == {"mine.py", "numbers_of.py", "weights.json"}


def test_what_ships_is_told_apart_by_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit in a policy that ships, or in its weights, changes it alone; one in the engine changes all."""
    names = ("edf", "sarathi", "request-score", "best-constant-global", "learned-ppo")
    before = {name: policy_content(name) for name in names}
    assert before == {name: policy_content(name) for name in names}
    read = Path.read_bytes
    for file, changed in {
        "edf.py": {"edf"},
        "request-score.json": {"request-score"},
        "best-constant-global.json": {"best-constant-global"},
        "learned-ppo.npz": {"learned-ppo"},
        "network.py": {"learned-ppo"},
        "run.py": set(names),
    }.items():
        sources_sha256.cache_clear()
        monkeypatch.setattr(Path, "read_bytes", lambda self, f=file: read(self) + b"#" * (self.name == f))
        assert {name for name in names if policy_content(name) != before[name]} == changed, file
    sources_sha256.cache_clear()


def test_a_hash_is_that_of_plain_json() -> None:
    """Worked out by hand: keys sorted, arrays by type, shape and bytes."""
    text = json.dumps({"a": [1, None], "b": 0.5}, sort_keys=True)
    import hashlib

    assert sha256({"b": np.float64(0.5), "a": (np.int64(1), None)}) == hashlib.sha256(text.encode()).hexdigest()
    same, other = np.arange(4), np.arange(4.0)
    assert sha256(same) == sha256(same.copy()) != sha256(other)
    assert sha256(same) != sha256(same.reshape(2, 2))
    assert re.fullmatch("[0-9a-f]{64}", sha256(same))
