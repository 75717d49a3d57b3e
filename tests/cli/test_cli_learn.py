"""The commands tune, train and evaluate, from their options to JSON and files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from l3env.cli import app
from l3env.errors import L3EnvError
from l3env.policies.best_constant import read_knobs
from l3env.policies.network import load_network

TRACE = "profile:azure-conv-2023?n=300"
runner = CliRunner()


def test_tune(tmp_path: Path) -> None:
    """Two systems at two loads; the file is one that ``best-constant-global`` reads."""
    out = tmp_path / "global.json"
    options = [
        "--system",
        "l3-dgx-a100,gpu-dgx-a100",
        "--model",
        "qwen-72b",
        "--trace",
        TRACE,
        "--utilization",
        "0.7,1.1",
    ]
    result = runner.invoke(app, ["tune", *options, "--requests", "60", "--random", "4", "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [(row["system"], row["utilization"]) for row in found["cells"]] == [
        ("l3-dgx-a100", 0.7),
        ("l3-dgx-a100", 1.1),
        ("gpu-dgx-a100", 0.7),
        ("gpu-dgx-a100", 1.1),
    ]
    assert all(0 < row["goodput_frac"] <= 1 for row in found["cells"])
    assert json.loads(out.read_text()) == found
    read_knobs(out)
    again = runner.invoke(app, ["tune", *options, "--requests", "60", "--random", "4", "--out", str(out), "--json"])
    assert "1 of 1 taken from" in again.stderr
    assert json.loads(again.stdout) == found


def test_train_then_evaluate(tmp_path: Path) -> None:
    own = tmp_path / "own.yml"
    own.write_text("n_steps: 16\nbatch_size: 64\n")
    out = tmp_path / "run"
    command = ["train", "--out", str(out), "--system", "gpu-dgx-a100", "--model", "qwen-72b", "--trace", TRACE]
    command += ["--steps", "128", "--envs", "4", "--hyperparams", str(own), "--eval-episodes", "2", "--json"]
    command += ["--episode-requests", "20", "--interval-s", "5", "--utilization", "0.7,1.1"]
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.output
    assert [row["steps"] for row in json.loads(result.stdout)["evaluations"]] == [0, 128]
    trained = load_network(out / "best_model.npz").config
    assert trained["training"]["systems"] == ["gpu-dgx-a100"]
    assert trained["seed"] == 0
    again = runner.invoke(app, [each for each in command if each != "--json"])
    assert again.exit_code == 0, again.output
    assert (out / "learning_curve.png").exists()
    options = ["--utilization", "0.9", "--seeds", "2", "--baselines", "edf,l3-model,best-constant", "--workers", "1"]
    result = runner.invoke(app, ["evaluate", str(out), *options, "--out", str(tmp_path / "eval"), "--json"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    for name in ("iqm_vs_best_heuristic", "iqm_vs_best_constant"):
        assert figures[f"{name}_low"] <= figures[name] <= figures[f"{name}_high"]
    assert len(figures["cells"]) == 1
    assert figures["cells"][0]["trace"] == TRACE
    assert (tmp_path / "eval" / "policy.png").exists()
    result = runner.invoke(app, ["evaluate", str(out), *options, "--out", str(tmp_path / "eval"), "--json"])
    assert "8 of 8 taken from" in result.stderr
    assert json.loads(result.stdout) == figures


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "--algo", "sarsa"], "expected one of ppo"),
        (["train", "--trace", f"{TRACE}&window=0%:50%"], "leave window= out"),
        (["train", "--init", "none.npz"], "not a policy network"),
        (["evaluate", "nowhere"], "no such file, or a run folder"),
        (["tune", "--utilization", "-1"], "expected numbers > 0"),
    ],
)
def test_user_errors_are_one_line(command: list[str], message: str, tmp_path: Path) -> None:
    more = ["--out", str(tmp_path / "out"), "--episode-requests", "20"] if command[0] == "train" else []
    result = runner.invoke(app, [*command, *more])
    assert isinstance(result.exception, L3EnvError)
    assert message in str(result.exception)
