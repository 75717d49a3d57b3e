"""Measured runs of real engines: reading them, and what is said of a simulated one beside."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from l3env.errors import ProfileError
from l3env.experiments.gpu.serving_check import figures, simulate
from l3env.experiments.gpu.serving_run import read_run

RUNS = Path(os.environ.get("L3ENV_PROFILE_DIR", Path(__file__).parents[3] / "shared" / "profiles")) / "serving"
SYSTEM = "gpu-dgx-h100?gpus_count=1"
CLIENT = "id,arrival_s,sent_s,prompt_tokens,output_tokens,first_token_s,last_token_s\n"


def test_times_on_the_clients_clock(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    path.write_text(CLIENT + "1,7.5,7.6,20,1,8.0,8.0\n0,5.0,5.1,10,3,5.5,6.5\n")
    run = read_run(path)
    assert run.workload.arrival_s.tolist() == [0.0, 2.5]
    assert run.workload.prompt_tokens.tolist() == [10, 20]
    assert run.ttft_s.tolist() == [0.5, 0.5]
    assert run.e2e_s.tolist() == [1.5, 0.5]
    assert run.tpot_s[0] == 0.5
    assert np.isnan(run.tpot_s[1])
    assert run.makespan_s == 3.0


def test_several_runs_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    rows = "a,0,10,3,100,50,200\nb,1,10,3,100,,300\nb,3,10,1,40,,40\n"
    path.write_text("run_id,arrival_s,prompt_tokens,output_tokens,ttft_ms,tpot_ms,e2e_ms\n" + rows)
    run = read_run(path, "b")
    assert run.workload.arrival_s.tolist() == [0.0, 2.0]
    np.testing.assert_allclose(run.e2e_s, [0.3, 0.04])
    np.testing.assert_allclose(run.tpot_s[:1], [0.1])
    with pytest.raises(ProfileError, match="run None; expected one of a, b"):
        read_run(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("id,prompt_tokens,output_tokens,first_token_s,last_token_s\n", "missing column arrival_s"),
        ("arrival_s,prompt_tokens,output_tokens\n0,1,1\n", "no latencies"),
        (CLIENT + "0,5,5,10,3,4.5,6.5\n", "request 0 in order of arrival"),
    ],
)
def test_bad_tables_are_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    path.write_text(text)
    with pytest.raises(ProfileError, match=said):
        read_run(path)


def test_a_run_against_itself_is_all_ones(tmp_path: Path) -> None:
    """What the simulator says, written down as if it was measured."""
    path = tmp_path / "run.csv"
    count = 30
    arrival = np.arange(count) / 5
    rows = [f"{i},{at},{at},{200 + 10 * i},{20 + i},{at + 1},{at + 2}" for i, at in enumerate(arrival)]
    path.write_text(CLIENT + "\n".join(rows) + "\n")
    outcome = simulate(read_run(path), SYSTEM, "llama-3-8b", engine="vllm-0.22", tp=1)
    frame = outcome.requests
    rows = [
        f"{i},{at},{at},{200 + 10 * i},{20 + i},{float(frame.first_token_s[i])!r},{float(frame.finish_s[i])!r}"
        for i, at in enumerate(arrival)
    ]
    path.write_text(CLIENT + "\n".join(rows) + "\n")
    run = read_run(path)
    found = figures(simulate(run, SYSTEM, "llama-3-8b", engine="vllm-0.22", tp=1), run)
    for name, value in found.items():
        if name.endswith("_ratio"):
            assert value == pytest.approx(1.0, rel=1e-9), name
        if name.endswith("_abs"):
            assert value == pytest.approx(0.0, abs=1e-9), name


def test_limits_and_blocks_can_be_given(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    path = tmp_path / "run.csv"
    rows = [f"{i},0,0,300,200,1,2" for i in range(20)]
    path.write_text(CLIENT + "\n".join(rows) + "\n")
    args = ("validate", "engine", str(path), "--engine", "vllm-0.22", "--system", SYSTEM, "--model", "llama-3-8b")
    tight = json.loads(run_cli(*args, "--tp", "1", "--kv-blocks", "200", "--json").stdout)
    few = json.loads(run_cli(*args, "--tp", "1", "--seqs", "2", "--budget", "512", "--json").stdout)
    assert tight["preemptions_count"] > 0
    assert few["preemptions_count"] == 0
    assert few["ttft_mean_ratio"] > tight["ttft_mean_ratio"]
    picture = tmp_path / "run.png"
    run_cli(*args, "--tp", "1", "--plot", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")


GOALS = {"tpot_mean_ratio": 0.05, "e2e_mean_ratio": 0.05, "ttft_mean_ratio": 0.1, "makespan_ratio": 0.01}


@pytest.mark.skipif(not RUNS.is_dir(), reason="measured serving runs are not at hand (L3ENV_PROFILE_DIR)")
@pytest.mark.parametrize("name", ["llama-3-8b.azure4", "llama-3-8b.azure10", "llama-3-8b.reason6", "llama-2-7b.azure4"])
def test_real_vllm_on_an_h100(name: str) -> None:
    run = read_run(RUNS / "vllm-0.22-h100" / f"{name}.requests.csv.gz")
    found = figures(simulate(run, SYSTEM, name.partition(".")[0], engine="vllm-0.22", tp=1), run)
    for figure, most in GOALS.items():
        assert found[figure] == pytest.approx(1.0, abs=most), (figure, found)
