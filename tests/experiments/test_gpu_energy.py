"""Joules from watts: the engine's formula by hand, the harness's lag, a fit that finds what made the watts."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from l3env.cli import app
from l3env.experiments.gpu import energy_rows, operators, refit
from l3env.experiments.gpu.operators import Operation
from l3env.machine import specs

H200 = specs.load("gpu/h200")
SIZES = [(m, n, k) for m in (1, 64, 512, 4096) for n in (4096, 8192, 16384) for k in (4096, 8192, 12288)]


def gemm(seconds, dtype="bfloat16", name="h200"):
    rows = pd.DataFrame(SIZES, columns=["m", "n", "k"]).assign(gemm_dtype=dtype, latency_ms=seconds * 1e3, suspect="")
    return Operation(name, "vllm-0.22.0", f"gemm_{dtype}", rows)


def by_hand_w(device, m, n, k, seconds, weight_bytes):
    """Watts of a product: busy, per multiply-accumulate, per byte; the power limit."""
    mac_j = device.fp8_mac_j if weight_bytes == 1 else device.mac_j
    moved = k * n * weight_bytes + m * (k + n) * 2
    work_j = m * n * k * mac_j + moved * (device.hbm_j_per_byte + device.cache_j_per_byte)
    return np.minimum(device.busy_power_w + work_j / seconds, device.power_w)


@pytest.mark.parametrize(("dtype", "weight_bytes"), [("bfloat16", 2), ("fp8", 1), ("fp8_block", 1)])
def test_a_product_draws_for_being_busy_for_computing_and_for_bytes(dtype, weight_bytes):
    seconds = np.linspace(1e-4, 1e-3, len(SIZES))
    operation = gemm(seconds, dtype)
    drawn = energy_rows.drawn_w(H200, energy_rows.work_j(H200, operation), seconds)
    expected = by_hand_w(H200, *(np.array(SIZES, float)[:, i] for i in range(3)), seconds, weight_bytes)
    assert drawn == pytest.approx(expected, rel=1e-9)
    assert expected.min() < 690 < 700 == drawn.max()


def attention(**columns):
    same = {"batch_size": 4, "num_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "kv_cache_dtype": "bfloat16"}
    rows = pd.DataFrame([same | {"isl": 1, "step": 0, "window_size": 0} | columns])
    return Operation("h200", "vllm-0.22.0", "attention", rows)


def test_attention_counts_pairs_once_and_kv_once():
    byte_j, kv_bytes = H200.hbm_j_per_byte + H200.cache_j_per_byte, 2 * 8 * 128 * 2
    pair_j = 2 * 32 * 128 * H200.mac_j
    prompt = 4 * (sum(range(1, 1025)) * pair_j + 1024 * kv_bytes * byte_j)
    assert energy_rows.work_j(H200, attention(isl=1024))[0] == pytest.approx(prompt, rel=1e-9)
    step = 4 * 2048 * (pair_j + kv_bytes * byte_j)
    assert energy_rows.work_j(H200, attention(step=2047))[0] == pytest.approx(step, rel=1e-9)
    seen = sum(min(i, 256) for i in range(1, 1025))
    windowed = 4 * (seen * pair_j + 1024 * kv_bytes * byte_j)
    assert energy_rows.work_j(H200, attention(isl=1024, window_size=256))[0] == pytest.approx(windowed, rel=1e-9)


@pytest.mark.parametrize("seconds", [1e-4, 2e-4, 1e-3, 0.03, 0.4])
def test_what_is_shown_is_the_mean_of_means_of_a_second(seconds):
    run = min(max(int(1 / seconds) + 1, 6), 3000) * seconds
    warm = min(6 * seconds, 1.0)
    times = (np.arange(100_000) + 0.5) / 100_000 * run
    expected = np.minimum(warm + times, 1.0).mean()
    assert energy_rows.settled_frac("context", np.array([seconds]))[0] == pytest.approx(expected, rel=1e-4)
    assert energy_rows.settled_frac("gemm", np.array([seconds]))[0] == 1


def test_a_fit_finds_the_energies_that_made_the_watts():
    truth = dataclasses.replace(
        H200, busy_power_w=300.0, mac_j=1.4e-12, fp8_mac_j=0.6e-12, hbm_j_per_byte=5e-11, cache_j_per_byte=0.0
    )
    seconds, parts = np.linspace(2e-4, 2e-3, len(SIZES)), []
    for dtype, weight_bytes in (("bfloat16", 2), ("fp8_block", 1)):
        operation = gemm(seconds, dtype)
        watts = by_hand_w(truth, *(np.array(SIZES, float)[:, i] for i in range(3)), seconds, weight_bytes)
        watts[refit.held_out(operation)] = 1.0  # not looked at
        parts.append(dataclasses.replace(operation, rows=operation.rows.assign(power_w=watts)))
    start = dataclasses.replace(truth, busy_power_w=200.0, mac_j=3e-13, fp8_mac_j=0.0, hbm_j_per_byte=1e-11)
    found, _ = energy_rows.fit_energy(start, parts)
    for name in energy_rows.BOUNDS:
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=0.02), name


def test_validate_prints_errors_of_joules_where_there_are_watts(tmp_path):
    seconds = np.linspace(5e-5, 1e-3, len(SIZES))
    operation = gemm(seconds)
    watts = by_hand_w(H200, *(np.array(SIZES, float)[:, i] for i in range(3)), seconds, 2)
    path = tmp_path / "h200_sxm_vllm-0.22.0_gemm.csv.gz"
    operation.rows.assign(power_w=watts * 1.25).to_csv(path, index=False)
    operation.rows.to_csv(tmp_path / "h100_sxm_vllm-0.22.0_gemm.csv.gz", index=False)
    result = CliRunner().invoke(app, ["validate", "gpu", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    energy = found["h200"]["gemm_bfloat16"]["energy"]
    assert energy["n"] == (seconds >= 1e-4).sum()
    assert energy["median"] == pytest.approx(0.2, abs=1e-4)
    assert energy["worst"] == pytest.approx(0.2, abs=1e-4)
    assert "energy" not in found["h100"]["gemm_bfloat16"]


def test_watts_come_from_the_newest_table_that_has_them(tmp_path):
    rows = gemm(np.full(len(SIZES), 2e-4)).rows
    rows.assign(power_w=500.0).to_csv(tmp_path / "h200_sxm_vllm-0.9.0_gemm.csv", index=False)
    rows.assign(power_w=600.0).to_csv(tmp_path / "h200_sxm_vllm-0.22.0_gemm.csv", index=False)
    rows.to_csv(tmp_path / "h200_sxm_vllm-0.24.0_gemm.csv", index=False)
    (found,) = energy_rows.read_metered(tmp_path, "h200")
    assert (found.version, found.rows["power_w"].unique().tolist()) == ("vllm-0.22.0", [600.0])
    assert len(operators.files(tmp_path)) == 3
