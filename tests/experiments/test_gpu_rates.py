"""Published rates: which rows count, and the steady state against a run stepped by hand."""

import json

import pandas as pd
import pytest
from typer.testing import CliRunner

from l3env.cli import app
from l3env.errors import ProfileError
from l3env.experiments.gpu import rates
from l3env.machine.batch import Chunk, Decodes

ROW = dict.fromkeys(rates.NEEDED, 1) | {
    "system": "h200_sxm",
    "backend": "vllm",
    "mode": "agg",
    "model": "meta-llama/Llama-3.1-8B",
    "gemm_quant_mode": "fp8",
    "precision": "fp8",
    "isl": 1000,
    "osl": 100,
    "concurrency": 8,
    "ttft_ms": 100.0,
    "tpot_ms": 10.0,
}


def stepped_s(tables, requests, prompt, output):
    """Mean gap between tokens where requests follow another, a prompt whole in a step beside the others' tokens."""
    done = [i * output // requests for i in range(requests)]
    gaps, waiting = [], []
    for _ in range(20 * output):
        running = [i for i in range(requests) if i not in waiting]
        length = prompt + sum(done[i] for i in running) / len(running)
        chunks = [Chunk(prompt)] if waiting else []
        step_s = tables.iteration_s([Decodes(len(running), length)], chunks)
        gaps += [step_s] * len(running)
        if waiting:
            done[waiting.pop(0)] = 1
        for i in running:
            done[i] += 1
            if done[i] >= output:
                waiting.append(i)
    late = gaps[len(gaps) // 2 :]
    return sum(late) / len(late)


@pytest.mark.parametrize(("requests", "prompt", "output"), [(1, 500, 100), (8, 900, 90), (32, 2000, 400)])
def test_a_steady_state_is_that_of_a_run_stepped_by_hand(requests, prompt, output):
    tables = rates.machine("h100_sxm", "llama-3-8b", "nan", 1)
    if requests == 1:
        expected = tables.iteration_s([Decodes(1, prompt + output / 2)])
    else:
        expected = stepped_s(tables, requests, prompt, output)
    assert rates.tpot_s(tables, requests, prompt, output, prefills=True) == pytest.approx(expected, rel=0.03)


def test_requests_that_find_no_kv_wait():
    tables = rates.machine("h100_sxm", "llama-3-70b", "fp8", 1)
    fitting = tables.hbm_tokens // 9000
    crowded = rates.tpot_s(tables, 10 * fitting, 8000, 1000, prefills=False)
    assert crowded == tables.iteration_s([Decodes(fitting, 8500)])


def table(tmp_path, *changes):
    path = tmp_path / "rates.csv"
    pd.DataFrame([ROW | change for change in changes]).to_csv(path, index=False)
    return path


def test_rows_of_one_configuration_count_once_and_others_are_left_out(tmp_path):
    disagg = {"mode": "disagg", "tp_size": None}
    path = table(
        tmp_path,
        *({"tpot_ms": ms} for ms in (5.0, 6.0, 50.0)),
        {"system": "gb300"},
        {"precision": "fp4"},
        {"ttft_ms": 90_000.0, "concurrency": 512},
        {"tp_size": None},
        {"attention_dp_size": 8},
        {"tp_size": 16},
        disagg | {"decode_num_workers": None},
        disagg | {"decode_num_workers": 4, "tpot_ms": 5.0},
    )
    result = CliRunner().invoke(app, ["validate", "rates", str(path), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["left_out"] == {
        "no preset": 1,
        "FP4 weights: not modelled": 1,
        "overload": 1,
        "parallelism not stated": 2,
        "attention data-parallel or pipelined: no system of that kind": 1,
        "more GPUs than a host": 1,
    }
    figures = found["tpot"]["h200"]["llama-3-8b"]
    tables = rates.machine("h200_sxm", "llama-3-8b", "fp8", 1)
    apart = tables.iteration_s([Decodes(2, 945)]) / 5e-3
    assert figures["n"] == 2
    assert figures["ratio"]["vllm disagg"] == {"n": 1, "median": pytest.approx(apart, abs=1e-4)}
    together = rates.tpot_s(tables, 8, 900, 90, prefills=True) / 6e-3
    assert figures["ratio"]["vllm agg"] == {"n": 1, "median": pytest.approx(together, abs=1e-4)}


def test_a_table_without_its_columns_is_refused(tmp_path):
    path = tmp_path / "rates.csv"
    pd.DataFrame([ROW]).drop(columns=["osl"]).to_csv(path, index=False)
    with pytest.raises(ProfileError, match="missing column osl"):
        rates.read_rates(path)
    with pytest.raises(ProfileError, match="cannot be read"):
        rates.read_rates(tmp_path / "none.csv")
