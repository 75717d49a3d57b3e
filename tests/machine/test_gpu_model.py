"""The GPU model: neutral parameters are the plain roofline, fitted ones predict what was measured, errors are clear."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from l3env import compile_pair
from l3env.cli import app
from l3env.errors import ProfileError, SpecError
from l3env.experiments.gpu import coefficients as gpu_fit
from l3env.experiments.gpu import raw as gpu_raw
from l3env.experiments.gpu.attention_rows import Arrays, decode_rows_s
from l3env.experiments.gpu.preset import write_preset
from l3env.experiments.gpu.validation import (
    DATA_DIR,
    Point,
    predict_ms,
    prefill_attention_s,
    read_profile,
)
from l3env.experiments.gpu.validation import statistics as error_statistics
from l3env.machine import specs
from l3env.machine.costs import gpu as costs
from l3env.machine.tables import compile_tables

TOKENS = np.arange(1, 4097)
FITTED = ("a100-80", "h100", "h200", "b200")
HEADER = "op,model,tp,tokens,batch,kv_len,ms\n"
GOOD_ROW = "fc_layer,llama-3-8b,1,128,1,0,0.13\n"


@pytest.fixture(scope="module")
def measured():
    return gpu_raw.read_raw(DATA_DIR / "h200.csv.gz")


@pytest.fixture(scope="module")
def probed(measured):
    """This project's own measurements, by another harness than that of the fits."""
    return gpu_raw.points(measured)


def decode_attention_s(arrays, kv_tokens, requests):
    out = np.empty(1)
    columns = np.zeros(1, np.int64), np.array([float(kv_tokens)]), np.array([float(requests)])
    decode_rows_s(Arrays(arrays.coef), *columns, out)
    return out[0]


def errors(device, points):
    return error_statistics(predict_ms(device, points), np.array([p.ms for p in points]))


# -- neutral parameters


@pytest.mark.parametrize("name", ["a100-80-ideal", "h100-ideal", "h200-ideal", "b200-ideal"])
@pytest.mark.parametrize(("model_name", "tp"), [("gpt-175b", 8), ("llama-3-70b", 4), ("qwen-72b", 2)])
def test_neutral_parameters_are_the_plain_roofline_to_the_last_bit(name, model_name, tp):
    device, model = specs.load(f"gpu/{name}"), specs.load(f"model/{model_name}")
    flop_per_s = device.fp16_flop_per_s * device.compute_utilisation_frac
    bytes_per_s = device.hbm_bytes_per_s * device.memory_utilisation_frac
    tokens = TOKENS.astype(float)
    layer = np.zeros_like(tokens)
    for k, n in costs.linear_shapes(model, tp):
        moved = k * n * 2 + tokens * (k + n) * 2
        layer = layer + np.maximum(2 * tokens * k * n / flop_per_s, moved / bytes_per_s)
    link = specs.load("link/nvlink3-ideal")
    reduce = costs.all_reduce_s(link, tp, tokens * model.hidden_size * 2)
    assert np.array_equal(costs.linear_layer_s(model, device, tp, TOKENS), layer)
    assert np.array_equal(costs.fc_s(model, device, link, tp, TOKENS), model.layers_count * (layer + 2 * reduce))

    arrays = compile_tables(specs.load("system/gpu-dgx-h200", gpu=device), model, tp=tp).arrays
    pair_s = model.layers_count * 4 * model.heads_count * model.head_size / tp / flop_per_s
    kv_s = model.kv_bytes_per_token * max(1 / tp, 1 / model.kv_heads_count) / bytes_per_s
    query_s = 2 * model.layers_count * model.heads_count * model.head_size / tp * 2 / bytes_per_s
    for chunk, history in ((1, 0), (7, 1), (512, 0), (333, 4096), (8192, 100_000)):
        pairs = chunk * float(history) + chunk * (chunk + 1.0) / 2
        plain_s = max(pair_s * pairs, kv_s * float(history + chunk) + query_s * chunk)
        assert prefill_attention_s(arrays, 1, chunk, history) == plain_s
    for kv, requests in ((0.0, 0.0), (100.0, 1.0), (123_456.0, 77.0)):
        assert decode_attention_s(arrays, kv, requests) == max(kv_s, pair_s) * kv + query_s * requests


def test_systems_switch_to_the_ideal_gpu_in_one_line():
    system = specs.load("system/l3-dgx-a100", gpu="gpu/a100-80-ideal")
    assert system.gpu == specs.load("gpu/a100-80-ideal")
    assert system.gpu.sm_count == 0
    assert specs.load("system/l3-dgx-a100").gpu.sm_count == 108


# -- fitted parameters


def test_products_as_this_project_measured_them(probed):
    found = errors(specs.load("gpu/h200"), [p for p in probed if p.op == "fc_layer"])
    assert found["n"] > 400
    assert found["median"] <= 0.06
    assert found["p90"] <= 0.15


def test_the_plain_roofline_is_worse(probed):
    fc = [p for p in probed if p.op == "fc_layer"]
    assert errors(specs.load("gpu/h200-ideal"), fc)["median"] > 2 * errors(specs.load("gpu/h200"), fc)["median"]


def test_reported_parameters_are_those_of_the_presets():
    report = json.loads((DATA_DIR / "gpu_fit.json").read_text(encoding="utf-8"))
    assert set(report["gpus"]) == set(FITTED)
    for kind in ("gpus", "links"):
        for name, fit in report[kind].items():
            preset = specs.load(f"{kind[:-1]}/{name}")
            assert {key: getattr(preset, key) for key in fit["parameters"]} == fit["parameters"]


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("operation", ["gemm_bfloat16", "context_attention", "generation_attention"])
def test_reported_errors_of_shapes_held_out(name, operation):
    """The goal is 6 % and 20 %; an A100's products and attention and prompts of some heads miss it a little."""
    report = json.loads((DATA_DIR / "gpu_fit.json").read_text(encoding="utf-8"))
    found = report["gpus"][name]["residuals"][operation]["held_out"]
    assert found["median"] <= 0.07
    assert found["p90"] <= 0.22


def test_a_fit_finds_the_parameters_of_made_up_times():
    truth = dataclasses.replace(
        specs.load("gpu/h200"), sm_bytes_per_s=1e11, linear_launch_s=5e-6, memory_utilisation_frac=0.6
    )
    model = specs.load("model/llama-3-8b")
    grid = [(t, k, n) for t in (1, 8, 64, 150, 300, 700, 2000, 8192) for k, n in costs.linear_shapes(model, 1)]
    tokens, k, n = (np.array(column, dtype=float) for column in zip(*grid, strict=True))
    data = gpu_fit.Linear(tokens, k, n, costs.linear_s(model, truth, tokens, k, n))
    found = gpu_fit.fit_linear(specs.load("gpu/h200"), model, data)
    assert found.memory_utilisation_frac == pytest.approx(0.6, rel=0.04)
    assert found.linear_launch_s == pytest.approx(5e-6, rel=0.15)
    assert np.abs(costs.linear_s(model, found, tokens, k, n) / data.seconds - 1).max() < 0.03


# -- shape of the model


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize(("model_name", "tp"), [("gpt-175b", 8), ("llama-3-8b", 1)])
def test_never_faster_with_more_tokens(name, model_name, tp):
    device, model = specs.load(f"gpu/{name}"), specs.load(f"model/{model_name}")
    assert (np.diff(costs.linear_layer_s(model, device, tp, TOKENS)) >= 0).all()
    assert (np.diff(costs.head_s(model, device, tp, TOKENS)) >= 0).all()
    arrays = compile_tables(specs.load("system/gpu-dgx-h200", gpu=device), model, tp=tp).arrays
    for history in (0, 300, 5000):
        assert (np.diff([prefill_attention_s(arrays, 1, chunk, history) for chunk in range(1, 3000)]) >= 0).all()


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("field", ["fp16_flop_per_s", "hbm_bytes_per_s"])
def test_never_slower_with_more_of_a_resource(name, field):
    device, model = specs.load(f"gpu/{name}"), specs.load("model/llama-3-8b")
    better = dataclasses.replace(device, **{field: 1.5 * getattr(device, field)})
    assert (costs.linear_layer_s(model, better, 1, TOKENS) <= costs.linear_layer_s(model, device, 1, TOKENS)).all()
    assert (
        costs.elementwise_layer_s(model, better, 1, TOKENS) <= costs.elementwise_layer_s(model, device, 1, TOKENS)
    ).all()
    points = [
        Point("prefill_attn", "llama-3-8b", 1, c, 1, c + h, 1.0) for c in (1, 100, 4000) for h in (0, 900, 30_000)
    ]
    points += [Point("decode_attn", "llama-3-8b", 1, 1, b, n, 1.0) for b in (1, 30, 200) for n in (10, 3000)]
    assert (predict_ms(better, points) <= predict_ms(device, points)).all()


def test_decode_tiles_take_their_time_past_the_first_on_each_multiprocessor():
    """4 KV heads a GPU over 108 multiprocessors: 27 requests take one each."""
    device = specs.load("gpu/a100-80", decode_exponent=0)
    tables = compile_tables(specs.load("system/gpu-dgx-a100", gpu=device), specs.load("model/llama-3-70b"), tp=2)
    coef = tables.arrays.coef[0]
    assert coef["hbm_wave_requests"] == 27
    fixed_s = coef["hbm_fixed_s"] + coef["hbm_regroup_s"]
    assert decode_attention_s(tables.arrays, 27, 27) == pytest.approx(
        fixed_s + 27 * (coef["hbm_token_s"] + coef["hbm_request_s"])
    )
    assert decode_attention_s(tables.arrays, 270, 270) == pytest.approx(fixed_s + 243 * coef["hbm_tile_s"])
    assert coef["hbm_tile_s"] == pytest.approx(80 * device.decode_tile_s * 4 / 108)


def test_an_a100_reads_the_kv_of_a_head_that_shares_it_with_none_by_one_multiprocessor():
    tables = compile_pair("gpu-dgx-a100", "llama-2-7b", tp=1)
    one_s = [decode_attention_s(tables.arrays, tokens, 1) for tokens in (8192, 16_384)]
    assert one_s[1] - one_s[0] >= 8192 * tables.arrays.coef["hbm_mean_token_s"][0]
    grouped = compile_pair("gpu-dgx-a100", "llama-3-8b", tp=1)
    assert grouped.arrays.coef["hbm_mean_token_s"][0] == 0


def test_chunks_of_a_batch_share_their_launch_and_wait_for_the_longest_once():
    tables = compile_pair("gpu-dgx-h200", "llama-3-8b")
    launch_s = tables.arrays.coef["prefill_fixed_s"][0]
    one_s = prefill_attention_s(tables.arrays, 1, 128, 1920)
    assert launch_s + (one_s - launch_s) < prefill_attention_s(tables.arrays, 8, 128, 1920) < 8 * one_s - 7 * launch_s


def test_small_prefill_is_launches_and_a_history_is_no_cheaper_than_its_memory():
    tables = compile_pair("gpu-dgx-h200", "llama-3-8b", tp=1)
    launch_s = tables.arrays.coef["prefill_fixed_s"][0]
    assert launch_s < prefill_attention_s(tables.arrays, 1, 1, 0) < 1.5 * launch_s
    assert prefill_attention_s(tables.arrays, 1, 1, 8000) > 8000 * tables.arrays.coef["prefill_kv_s"][0]


@pytest.mark.parametrize(("chunk", "history"), [(512, 4096), (1024, 8192), (2048, 4096), (2048, 32_768)])
def test_chunks_on_histories_reach_the_known_rate_on_an_h100(chunk, history):
    """600 to 650 TFLOP/s with 32 heads of 128 in groups of four (FlashAttention-3 as vLLM 0.22 calls it), one call."""
    tables = compile_pair("gpu-dgx-h100?gpu.prefill_slowdown_frac=0", "llama-3-8b", tp=1)
    flop = 4 * 32 * 128 * chunk * (history + (chunk + 1) / 2) * 32
    assert 450e12 < flop / prefill_attention_s(tables.arrays, 1, chunk, history) < 690e12


def test_one_shot_all_reduces_are_for_small_messages():
    link = specs.load("link/nvlink4")
    small, large = costs.all_reduce_s(link, 8, [8192.0]), costs.all_reduce_s(link, 8, [2.0**28])
    assert 4e-6 < small[0] < 7e-6
    wire_s = 2 * 7 / 8 * 2**28 / (link.bytes_per_s * link.switch_utilisation_frac)
    assert large[0] == pytest.approx(link.latency_s + 6 * link.hop_s + link.two_shot_s + wire_s)
    assert (np.diff(costs.all_reduce_s(link, 4, np.arange(1e3, 1e8, 1e5))) >= 0).all()


def test_times_beyond_the_table_go_on_at_the_mean_slope_of_waves():
    tables = compile_pair("gpu-dgx-h200", "llama-3-70b")
    rows, coef = tables.arrays.fc_s[0], tables.arrays.coef[0]
    exact = costs.fc_s(tables.model, tables.system.gpu, tables.system.gpu_link, tables.tp, [100_000])[0]
    assert rows[-1] + (100_000 - 32_768) * coef["fc_slope_s"] == pytest.approx(exact, rel=0.02)


# -- files and commands


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("op,model,tp,tokens,batch,kv_len\n", "row 1: missing column ms"),
        (HEADER, "no rows"),
        (HEADER + GOOD_ROW + "fc,llama-3-8b,1,128,1,0,0.1\n", "row 3: op = 'fc': expected one of fc_layer"),
        (HEADER + "fc_layer,llama-9,1,128,1,0,0.1\n", "row 2: model = 'llama-9': unknown model"),
        (HEADER + "fc_layer,llama-3-8b,3,128,1,0,0.1\n", "row 2: tp = 3: expected a divisor of the 32 heads"),
        (HEADER + "fc_layer,llama-3-8b,1,1.5,1,0,0.1\n", "row 2: tokens = '1.5': expected a whole number >= 1"),
        (HEADER + "decode_attn,llama-3-8b,1,1,0,9,0.1\n", "row 2: batch = '0': expected a whole number >= 1"),
        (HEADER + "prefill_attn,llama-3-8b,1,64,1,32,0.1\n", "row 2: kv_len = 32: expected at least tokens = 64"),
        (HEADER + "fc_layer,llama-3-8b,1,128,1,0,-1\n", "row 2: ms = '-1': expected a number of milliseconds > 0"),
        (HEADER + "fc_layer,llama-3-8b,1,128,1,0\n", "row 2: ms = '': expected a number of milliseconds > 0"),
    ],
)
def test_a_wrong_profile_names_file_row_and_field(tmp_path, text, message):
    file = tmp_path / "mine.csv"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ProfileError) as caught:
        read_profile(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)


def test_a_profile_that_is_not_there(tmp_path):
    with pytest.raises(ProfileError, match="cannot be read"):
        read_profile(tmp_path / "none.csv")


def test_validate_prints_json_per_operation_and_draws(tmp_path):
    model, device = specs.load("model/llama-3-8b"), specs.load("gpu/h200")
    exact_ms = float(costs.linear_layer_s(model, device, 1, [128])[0]) * 1e3
    file = tmp_path / "mine.csv"
    file.write_text(
        HEADER.replace("ms", "ms,note")
        + f"fc_layer,llama-3-8b,1,128,,,{exact_ms},exact\nfc_layer,llama-3-8b,1,128,,,{exact_ms / 1.25},fast\n"
        + "decode_attn,llama-3-8b,1,,16,1024,0.02,\n",
        encoding="utf-8",
    )
    picture = tmp_path / "picture.png"
    command = ["validate", "gpu", "--gpu", "h200", "--profile", str(file), "--json", "--plot", str(picture)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found) == {"fc_layer", "decode_attn"}
    assert found["fc_layer"] == {"n": 2, "median": 0.125, "p90": 0.225, "worst": 0.25}
    assert set(found["decode_attn"]) == {"n", "median", "p90", "worst"}
    assert picture.stat().st_size > 10_000


def test_a_written_preset_loads_as_it_was(tmp_path):
    device = specs.load("gpu/h200")
    write_preset(tmp_path / "h200.toml", "a title", device, device.sources)
    assert specs.load(f"gpu:{tmp_path / 'h200.toml'}") == device


def test_specs_that_cannot_be(tmp_path):
    with pytest.raises(SpecError, match=r"roofline_exponent = 0\.5: expected 0 or >= 1"):
        specs.load("gpu/h200", roofline_exponent=0.5)
    with pytest.raises(SpecError, match="decode_tile_s > 0: needs sm_count"):
        specs.load("gpu/h200", sm_count=0)


def test_calibrate_refuses_in_one_line_without_a_gpu(tmp_path):
    command = [sys.executable, "-m", "l3env.cli", "calibrate", "--out", str(tmp_path / "x.toml")]
    environment = {"PATH": "", "CUDA_VISIBLE_DEVICES": "", "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 2
    said = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(said) == 1, result.stderr
    assert said[0].startswith("error: ")
    assert "CUDA" in said[0]
    assert not (tmp_path / "x.toml").exists()
