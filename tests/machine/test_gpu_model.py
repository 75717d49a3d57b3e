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
from l3env.experiments.gpu.preset import write_preset
from l3env.experiments.gpu.validation import (
    DATA_DIR,
    Point,
    kv_bytes,
    load_model,
    plain,
    predict_ms,
    prefill_attention_s,
    read_profile,
)
from l3env.experiments.gpu.validation import statistics as error_statistics
from l3env.machine import price, specs
from l3env.machine.costs import gpu as costs
from l3env.machine.tables import compile_tables

TOKENS = np.arange(1, 4097)
FITTED = ("a100-80", "h100", "h200")
HELD_OUT = ("gpt-175b", "gpt-89b", "llama-2-7b", "qwen-72b")  # experiments/gpu/fit.py fits to the other models
HEADER = "op,model,tp,tokens,batch,kv_len,ms\n"
GOOD_ROW = "fc_layer,llama-3-8b,1,128,1,0,0.13\n"
DECODE = plain(price.hbm_attention_s)


@pytest.fixture(scope="module")
def measured():
    return gpu_raw.read_raw(DATA_DIR / "h200.csv.gz")


@pytest.fixture(scope="module")
def held_out(measured):
    return [p for p in gpu_raw.points(measured) if p.model in HELD_OUT]


def errors(device, points):
    return error_statistics(predict_ms(device, points), np.array([p.ms for p in points]))


# -- neutral parameters


@pytest.mark.parametrize("name", ["a100-80-ideal", "h100-ideal", "h200-ideal", "b200"])
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
    link = specs.load("link/nvlink3")
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
        assert DECODE(arrays, 0, kv, requests) == max(kv_s, pair_s) * kv + query_s * requests


def test_systems_switch_to_the_ideal_gpu_in_one_line():
    system = specs.load("system/l3-dgx-a100", gpu="gpu/a100-80-ideal")
    assert system.gpu == specs.load("gpu/a100-80-ideal")
    assert system.gpu.sm_count == 0
    assert specs.load("system/l3-dgx-a100").gpu.sm_count == 108


# -- fitted parameters


def test_linear_operations_of_models_held_out(held_out):
    found = errors(specs.load("gpu/h200"), [p for p in held_out if p.op == "fc_layer"])
    assert found["n"] > 200
    assert found["median"] <= 0.06
    assert found["p90"] <= 0.15


def test_attention_of_models_held_out(held_out):
    device = specs.load("gpu/h200")
    decode = [p for p in held_out if p.op == "decode_attn" and kv_bytes(p, load_model(p.model)) >= 8 * 2**20]
    prefill = [p for p in held_out if p.op == "prefill_attn"]
    assert min(len(decode), len(prefill)) > 150
    assert errors(device, decode)["median"] <= 0.08
    assert errors(device, prefill)["median"] <= 0.12


def test_whole_stacks_of_layers(measured):
    rows = gpu_raw.stacks(measured)
    error = np.abs(gpu_raw.predict_stacks_ms(specs.load("gpu/h200"), rows) / rows["ms"].to_numpy() - 1)
    assert len(rows) > 20
    assert error.max() <= 0.10


def test_the_plain_roofline_is_worse(held_out):
    fc = [p for p in held_out if p.op == "fc_layer"]
    assert errors(specs.load("gpu/h200-ideal"), fc)["median"] > 2 * errors(specs.load("gpu/h200"), fc)["median"]


def test_reported_parameters_are_those_of_the_presets():
    report = json.loads((DATA_DIR / "gpu_fit.json").read_text(encoding="utf-8"))
    for name in FITTED:
        device = specs.load(f"gpu/{name}")
        assert {key: getattr(device, key) for key in report["gpus"][name]["parameters"]} == report["gpus"][name][
            "parameters"
        ]
        assert report["gpus"][name]["residuals_held_out"]["fc_layer"]["median"] <= 0.06
        assert report["gpus"][name]["residuals_held_out"]["fc_layer"]["p90"] <= 0.15
    for name, fit in report["links"].items():
        link = specs.load(f"link/{name}")
        assert (link.latency_s, link.utilisation_frac) == (fit["latency_s"], fit["utilisation_frac"])


def test_a_fit_finds_the_parameters_of_made_up_times():
    truth = dataclasses.replace(
        specs.load("gpu/h200"), tile_wave_frac=0.4, linear_launch_s=5e-6, memory_utilisation_frac=0.6
    )
    model = specs.load("model/llama-3-8b")
    grid = [(t, k, n) for t in (1, 8, 64, 150, 300, 700, 2000, 8192) for k, n in costs.linear_shapes(model, 1)]
    tokens, k, n = (np.array(column, dtype=float) for column in zip(*grid, strict=True))
    data = gpu_fit.Linear(tokens, k, n, costs.linear_s(model, truth, tokens, k, n))
    found = gpu_fit.fit_linear(specs.load("gpu/h200"), model, data)
    assert found.memory_utilisation_frac == pytest.approx(0.6, rel=0.02)
    assert found.linear_launch_s == pytest.approx(5e-6, rel=0.1)
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


def test_a_started_wave_of_decode_blocks_takes_its_share():
    device, model = specs.load("gpu/a100-80"), specs.load("model/llama-3-70b")
    arrays = compile_tables(specs.load("system/gpu-dgx-a100"), model, tp=2).arrays
    per_request, launch_s = arrays.coef["hbm_request_s"][0], arrays.coef["hbm_fixed_s"][0]

    def read_s(requests):  # 4 KV heads a GPU over 108 multiprocessors: 27 requests fill a wave
        return DECODE(arrays, 0, requests * 1000.0, float(requests)) - requests * per_request - launch_s

    token_s = arrays.coef["hbm_token_s"][0]
    assert read_s(27) == pytest.approx(27_000 * token_s)
    assert read_s(28) == pytest.approx((1 + device.decode_tail_frac) * 27_000 * token_s)
    assert read_s(54) == pytest.approx(54_000 * token_s)


def test_chunks_of_a_batch_share_their_launches():
    tables = compile_pair("gpu-dgx-h200", "llama-3-8b")
    launch_s = tables.model.layers_count * tables.system.gpu.prefill_launch_s
    join_s = tables.model.layers_count * tables.system.gpu.prefill_history_launch_s
    one_s = prefill_attention_s(tables.arrays, 1, 128, 1920)
    assert prefill_attention_s(tables.arrays, 8, 128, 1920) == pytest.approx(8 * one_s - 7 * (launch_s + join_s))
    whole_s = prefill_attention_s(tables.arrays, 1, 512, 0)
    assert prefill_attention_s(tables.arrays, 3, 512, 0) == pytest.approx(3 * whole_s - 2 * launch_s)


def test_small_prefill_is_launches_and_a_history_is_no_cheaper_than_its_memory():
    tables = compile_pair("gpu-dgx-h200", "llama-3-8b", tp=1)
    launch_s = tables.model.layers_count * tables.system.gpu.prefill_launch_s
    assert launch_s < prefill_attention_s(tables.arrays, 1, 1, 0) < 1.1 * launch_s
    assert prefill_attention_s(tables.arrays, 1, 1, 8000) > 8000 * tables.arrays.coef["prefill_kv_s"][0]


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
    with pytest.raises(SpecError, match="decode_tail_frac > 0: needs sm_count"):
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
