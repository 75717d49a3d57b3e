"""Tables of operators: what is read, left out and predicted, and that a fit finds what made them."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from l3env.cli import app
from l3env.experiments.gpu import fit, operators, predict, refit
from l3env.experiments.gpu.operators import Operation
from l3env.experiments.gpu.validation import ProfileError
from l3env.machine import specs

H100 = specs.load("gpu/h100")


def gemm_rows(dtype="bfloat16"):
    grid = [(m, n, k) for m in (1, 64, 256, 1024, 4096) for n in (512, 4096, 8192) for k in (1024, 4096, 8192)]
    return pd.DataFrame(grid, columns=["m", "n", "k"]).assign(gemm_dtype=dtype, latency_ms=1.0, suspect="")


def attention_rows(step=0, isl=1):
    heads = [(32, 8), (8, 1), (16, 16)]
    grid = [(b, h, kv) for b in (1, 8, 64) for h, kv in heads]
    rows = pd.DataFrame(grid, columns=["batch_size", "num_heads", "num_key_value_heads"])
    same = {"head_dim": 128, "kv_cache_dtype": "bfloat16", "window_size": 0, "kernel_source": "vllm_flash_attn_fa3"}
    return rows.assign(isl=isl, step=step, latency_ms=1.0, suspect="", **same)


def exactly(name, rows):
    """Rows that take what the preset predicts."""
    seconds = predict.predict_s(H100, Operation("h100", "vllm-0.24.0", name, rows))
    return rows.assign(latency_ms=seconds * 1e3)


@pytest.fixture
def folder(tmp_path):
    gemm = exactly("gemm_bfloat16", gemm_rows())
    gemm.loc[0, ["latency_ms", "suspect"]] = 99.0, "F"
    gemm.to_csv(tmp_path / "h100_sxm_vllm-0.24.0_gemm.csv.gz", index=False)
    context = exactly("context_attention", attention_rows(isl=2048))
    wide = context.head(1).assign(head_dim=512, kernel_source="vllm_flash_attn_fa4")
    pd.concat([context, wide]).to_csv(tmp_path / "h100_sxm_vllm-0.24.0_context_attention.csv", index=False)
    older = exactly("generation_attention", attention_rows(step=4095))
    older.to_csv(tmp_path / "h100_sxm_vllm-0.24.0_generation_attention.csv", index=False)
    older.assign(latency_ms=2 * older["latency_ms"]).to_csv(
        tmp_path / "h100_sxm_vllm-0.9.0_generation_attention.csv", index=False
    )
    (tmp_path / "notes.txt").write_text("no table", encoding="utf-8")
    return tmp_path


def test_a_folder_is_held_against_the_presets(folder):
    result = CliRunner().invoke(app, ["validate", "gpu", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["h100"]
    assert found["gemm_bfloat16"] == {
        "n": 44,
        "median": 0.0,
        "p90": 0.0,
        "worst": 0.0,
        "suspect": 1,
        "unmodelled": 0,
    }
    assert (found["context_attention"]["n"], found["context_attention"]["unmodelled"]) == (9, 1)
    assert found["generation_attention"]["worst"] < 1e-5


def test_a_folder_without_tables_is_refused(tmp_path):
    with pytest.raises(ProfileError, match="no tables"):
        operators.files(tmp_path)
    (tmp_path / "h100_sxm_vllm-1.0_gemm.csv").write_text("m,n,k\n1,2,3\n", encoding="utf-8")
    with pytest.raises(ProfileError, match="missing column latency_ms"):
        operators.read(operators.files(tmp_path)[0])


def test_shapes_are_held_out_whole():
    operation = Operation("h100", "vllm-0.24.0", "gemm_bfloat16", gemm_rows())
    held = pd.Series(refit.held_out(operation)).groupby([operation.rows["n"], operation.rows["k"]])
    assert (held.nunique() == 1).all()
    assert 0 < held.first().mean() < 1


def test_a_fit_to_a_folder_finds_what_made_it_and_writes_presets(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("presets")
    operations = fit.read_folder(folder)["h100"]
    start = dataclasses.replace(H100, decode_launch_s=3e-6, decode_utilisation_frac=0.5)
    found = refit.fit_group(start, refit.DECODE, operations)
    generation = next(each for each in operations if each.name == "generation_attention")
    assert np.abs(predict.predict_s(found, generation) / generation.seconds - 1).max() < 0.02
    fit.write(out, "h100", found, dict(H100.sources), {})
    assert specs.load(f"gpu:{out / 'gpu' / 'h100.toml'}") == found


def test_routing_of_equal_tokens_and_of_a_power_law():
    from l3env.experiments.gpu.expert_rows import routed

    even = routed(256, 8, 128, 4, "balanced")
    assert (even.hit, even.pairs) == (32, 512)
    skewed = routed(256, 8, 128, 4, "power_law_1.2")
    assert skewed.pairs > even.pairs
    assert skewed.stepped >= skewed.pairs
