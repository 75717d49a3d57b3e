"""Presets load, cite their sources and give the published numbers; bad specs are named in one error."""

import dataclasses
import json
from pathlib import Path

import pytest

from l3env.choices import PimForm, Side
from l3env.errors import SpecError
from l3env.machine import specs
from l3env.machine.pair import compile_pair
from l3env.units import GIB, TERA

PRESETS = [(kind, name) for kind in specs.KINDS for name in specs.names(kind)]
MODELS = (
    "opt-66b",
    "gpt-89b",
    "gpt-175b",
    "qwen-72b",
    "llama-2-7b",
    "llama-3-8b",
    "llama-3-70b",
    "deepseek-prover-v1.5-7b",
)
A100_SYSTEMS = ("gpu", "hbm-pim", "hbm-pim-ext", "rank-pim", "cpu-offload", "l3")
TCK_S = 0.63e-9


def gpu_fields(**changes):
    """The fields of a valid GPU as a user would write them; a value of None drops the key."""
    raw = {f.name: getattr(specs.load("gpu/a100-80"), f.name) for f in dataclasses.fields(specs.GpuSpec)}
    return {key: value for key, value in {**raw, **changes}.items() if value is not None}


def gpu_error(**changes):
    with pytest.raises(SpecError) as caught:
        specs.from_mapping("gpu", gpu_fields(**changes), where="mine.toml")
    return str(caught.value)


@pytest.mark.parametrize(("kind", "name"), PRESETS)
def test_preset_loads_and_every_value_has_a_source(kind, name):
    spec = specs.load(f"{kind}/{name}")
    assert isinstance(spec, specs.KINDS[kind])
    assert spec.name == name
    # defaults that leave a term out need no source
    optional = dataclasses.fields(spec) if kind in ("gpu", "link", "model", "system", "engine") else ()
    neutral = {f.name for f in optional if f.default == getattr(spec, f.name)}
    values = {f.name for f in dataclasses.fields(spec)} - {"name", "sources", "memory"}
    absent = {key for key in values if getattr(spec, key) is None}
    assert values - absent - neutral <= set(spec.sources) <= values - absent
    assert all(len(text) > 3 for text in spec.sources.values())
    for key in ("mla", "moe", "experts", "memory"):  # tables of their own
        inner = getattr(spec, key, None)
        if inner is not None:
            assert set(inner.sources) == {f.name for f in dataclasses.fields(inner)} - {"sources"}


def test_the_named_systems_and_models_are_there():
    assert set(MODELS) <= set(specs.names("model"))
    assert {f"{prefix}-dgx-a100" for prefix in A100_SYSTEMS} <= set(specs.names("system"))
    others = {f"{prefix}-dgx-{gpu}" for prefix in ("gpu", "l3", "cpu-offload") for gpu in ("h100", "h200")}
    assert others <= set(specs.names("system"))


@pytest.mark.parametrize(
    ("name", "kv_bytes_per_token"),
    [("gpt-175b", 4_718_592), ("opt-66b", 2_359_296), ("qwen-72b", 327_680), ("deepseek-prover-v1.5-7b", 491_520)],
)
def test_kv_bytes_per_token_as_published(name, kv_bytes_per_token):
    assert specs.load(f"model/{name}").kv_bytes_per_token == kv_bytes_per_token


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("opt-66b", 66e9),
        ("gpt-89b", 89e9),
        ("gpt-175b", 175e9),
        ("qwen-72b", 72.71e9),
        ("llama-2-7b", 6_738_415_616),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("deepseek-prover-v1.5-7b", 6.91e9),
    ],
)
def test_parameter_counts_as_published(name, published):
    tolerance = 0.03 if published % 1e9 == 0 else 1e-3  # a name is rounded, a count is not
    assert specs.load(f"model/{name}").parameters_count == pytest.approx(published, rel=tolerance)


@pytest.mark.parametrize(("name", "parallel"), [("opt-66b", 2), ("qwen-72b", 4), ("gpt-175b", 8)])
def test_deployments_of_the_paper(name, parallel):
    model = specs.load(f"model/{name}")
    assert model.tensor_parallel_count == parallel
    assert model.head_size * model.heads_count == model.hidden_size


def test_gqa_group():
    assert specs.load("model/qwen-72b").gqa_group_count == 8
    assert specs.load("model/gpt-175b").gqa_group_count == 1


def test_dimm_pim_from_its_dram_timings():
    pim = specs.load("pim/dimm-pim-ddr4-3200")
    ranks = pim.channels_count * pim.ranks_per_channel_count
    ccd_l, rp, rcd, refi, rfc, row_bytes = 8, 22, 22, 12480, 560, 1024
    bank_bytes_per_s = 8 / (ccd_l * TCK_S)
    internal = bank_bytes_per_s * pim.banks_per_chip_count * pim.chips_per_rank_count * ranks
    row_read = row_bytes / 8 * ccd_l
    assert ranks == 64
    assert pim.internal_bytes_per_s == pytest.approx(internal, rel=1e-9)
    assert pim.internal_bytes_per_s == pytest.approx(13.0 * TERA, rel=1e-3)
    assert pim.channel_bytes_per_s == pytest.approx(8 * 2 / TCK_S, rel=1e-9)
    assert pim.channels_count * pim.channel_bytes_per_s == pytest.approx(406e9, rel=1e-3)
    utilisation = row_read / (row_read + rp + rcd) * (1 - rfc / refi)
    assert pim.internal_utilisation_frac == pytest.approx(utilisation, rel=1e-5)
    assert pim.static_power_w == pytest.approx(ranks * pim.chips_per_rank_count * (10.7e-3 + 62.4e-3))


@pytest.mark.parametrize(
    ("name", "internal_bytes_per_s", "capacity_bytes"),
    [
        ("rank-pim-ddr4-3200", 1.6e12, 2048 * GIB),
        ("host-cpu-ddr4-3200", 406e9, 2048 * GIB),
        ("hbm-pim-a100", 260.8e12, 640 * GIB),
        ("hbm-pim-ext-a100", 130.4e12, 320 * GIB),
    ],
)
def test_other_memories_as_published(name, internal_bytes_per_s, capacity_bytes):
    pim = specs.load(f"pim/{name}")
    assert pim.internal_bytes_per_s == pytest.approx(internal_bytes_per_s, rel=0.02)
    assert pim.capacity_bytes == capacity_bytes


def test_aggregate_hbm_of_a_dgx_a100():
    system = specs.load("system/l3-dgx-a100")
    assert system.gpus_count * system.gpu.hbm_bytes == 640 * GIB
    assert system.gpus_count * system.gpu.hbm_bytes_per_s == pytest.approx(16.3e12, rel=1e-2)
    assert system.pim.kind == "dimm-bank"
    assert system.pim_link.bytes_per_s * system.pim_link.utilisation_frac == pytest.approx(25e9, rel=1e-3)


def test_hbm_pim_keeps_kv_in_its_only_pool():
    system = specs.load("system/hbm-pim-dgx-a100")
    assert system.pim.holds_weights
    assert not system.hbm_kv
    assert system.pim_link is None
    assert system.pim.capacity_bytes == system.gpus_count * system.gpu.hbm_bytes


def test_every_problem_is_named_in_one_error():
    message = gpu_error(hbm_byte=1, power_w=None, hbm_bytes=-1, compute_utilisation_frac=1.5, mac_j=float("nan"))
    assert message.startswith("mine.toml: ")
    for part in (
        "unknown key hbm_byte (did you mean hbm_bytes?)",
        "missing key power_w",
        "hbm_bytes = -1: expected > 0",
        "compute_utilisation_frac = 1.5: expected <= 1",
        "mac_j = nan: expected a finite number",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hbm_bytes", "80 GB"),
        ("hbm_bytes", True),
        ("hbm_bytes", 1e20),
        ("idle_power_w", -1),
        ("name", 3),
        ("sources", "data sheet"),
    ],
)
def test_absurd_values_are_named(key, value):
    assert f"{key} = {value!r}: expected" in gpu_error(**{key: value})


def test_nested_problems_carry_the_path_of_their_key():
    raw = {
        "name": "mine",
        "gpu": gpu_fields(hbm_bytes=0),
        "gpus_count": 1.5,
        "gpu_link": ["nvlink3"],
        "pim": "pim/dimm-pim-ddr3",
        "max_batched_tokens": 1,
    }
    with pytest.raises(SpecError) as caught:
        specs.from_mapping("system", raw, where="mine.toml")
    message = str(caught.value)
    assert "gpu.hbm_bytes = 0: expected > 0" in message
    assert "gpus_count = 1.5: expected a whole number" in message
    assert "gpu_link = ['nvlink3']: expected a table or the name of a link" in message
    assert "pim: unknown pim 'dimm-pim-ddr3' (did you mean 'dimm-pim-ddr4-3200'?)" in message


def test_a_name_of_another_kind_is_refused():
    with pytest.raises(SpecError, match="gpu = 'link/nvlink3': expected a table or the name of a gpu"):
        specs.load("system/gpu-dgx-a100", gpu="link/nvlink3")


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("system/l3-dgx-a10", "unknown system 'l3-dgx-a10' \\(did you mean 'l3-dgx-a100'\\?\\); there are: "),
        ("model/zzz", "unknown model 'zzz'; there are: .*gpt-175b"),
        ("gpus/a100-80", "unknown kind 'gpus'; expected one of gpu, link"),
        ("system:nowhere.toml", "no such file"),
        ("system/" + "x" * 300, "unknown system 'xxx"),
        ("system:" + "x" * 300 + ".toml", "no such file"),
        ("model:hf:" + "x" * 300, "no such file; expected hf:FOLDER"),
    ],
)
def test_unknown_names(ref, message):
    with pytest.raises(SpecError, match=message):
        specs.load(ref)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", "x", "hidden_size = 'x': expected a whole number from 1"),
        ("num_attention_heads", 0, "num_attention_heads = 0: expected a whole number from 1"),
        ("sliding_window", [1], r"sliding_window = \[1\]: expected a whole number from 1"),
        ("quantization_config", "fp8", "quantization_config = 'fp8': expected quant_method 'fp8'"),
        ("torch_dtype", ["bfloat16"], r"torch_dtype = \['bfloat16'\]: expected one of bfloat16"),
        ("max_position_embeddings", True, "max_position_embeddings = True: expected a whole number"),
    ],
)
def test_a_config_with_a_value_of_another_kind(tmp_path, key, value, message):
    config = {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 4096,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(SpecError, match=message):
        specs.named("model", f"hf:{tmp_path}")


def test_a_whole_number_too_large_to_be_exact():
    with pytest.raises(SpecError, match=r"gpus_count = 10000.*: expected <= 9.0072e\+15"):
        specs.load("system/gpu-dgx-a100", gpus_count=10**400)


def test_values_that_contradict_each_other():
    with pytest.raises(SpecError, match="heads_count = 72: expected a multiple of kv_heads_count = 7"):
        specs.load("model/opt-66b", kv_heads_count=7)
    with pytest.raises(SpecError, match="kind = 'dimm': expected one of dimm-bank"):
        specs.load("pim/dimm-pim-ddr4-3200", kind="dimm")
    with pytest.raises(SpecError, match="hbm_kv = false without pim"):
        specs.load("system/gpu-dgx-a100", hbm_kv=False)
    with pytest.raises(SpecError, match="missing key pim_link: dimm-bank is reached over a link"):
        specs.load("system/l3-dgx-a100", pim_link=None)


def test_overrides_replace_nested_fields_and_leave_the_preset_alone():
    changed = specs.load("system/l3-dgx-a100", gpu__hbm_bytes=76 * GIB, pim__channels_count=8, gpus_count=4)
    assert (changed.gpu.hbm_bytes, changed.pim.channels_count, changed.gpus_count) == (76 * GIB, 8, 4)
    plain = specs.load("system/l3-dgx-a100")
    assert (plain.gpu.hbm_bytes, plain.pim.channels_count, plain.gpus_count) == (80 * GIB, 16, 8)
    assert changed.gpu_link == plain.gpu_link


def test_overrides_replace_a_whole_nested_spec():
    assert specs.load("system/l3-dgx-a100", gpu="gpu/h200").gpu == specs.load("gpu/h200")
    assert specs.load("system/l3-dgx-a100", gpu=specs.load("gpu/h200")).gpu == specs.load("gpu/h200")
    assert specs.load("system/l3-dgx-a100", pim=None, pim_link=None).pim is None


@pytest.mark.parametrize("override", [{"gpu__hbm_byte": 1}, {"hbm__bytes": 1}, {"gpus_count__x": 1}])
def test_overrides_of_what_is_not_there(override):
    with pytest.raises(SpecError, match=r"unknown key gpu\.hbm_byte|override hbm\.bytes|override gpus_count\.x"):
        specs.load("system/l3-dgx-a100", **override)


def test_a_users_file(tmp_path: Path):
    file = tmp_path / "my-node.toml"
    file.write_text(
        """
        name = "my-node"
        gpu = "gpu/h200"
        gpus_count = 2
        gpu_link = "link/nvlink4"
        max_batched_tokens = 4096
        pim = "pim/dimm-pim-ddr4-3200"
        [pim_link]
        name = "my-link"
        bytes_per_s = 100e9
        utilisation_frac = 0.9
        latency_s = 2e-6
        j_per_byte = 0
        """,
        encoding="utf-8",
    )
    system = specs.load(f"system:{file}", gpus_count=4)
    assert (system.name, system.gpus_count, system.hbm_kv) == ("my-node", 4, True)
    assert (system.gpu.name, system.pim_link.name, system.pim_link.bytes_per_s) == ("h200", "my-link", 100e9)


def test_a_users_file_that_is_wrong_is_named(tmp_path: Path):
    file = tmp_path / "my-gpu.toml"
    file.write_text('name = "my-gpu"\nhbm_gb = 80\n', encoding="utf-8")
    with pytest.raises(SpecError, match=r"my-gpu\.toml: unknown key hbm_gb.*missing key fp16_flop_per_s"):
        specs.load(f"gpu:{file}")
    file.write_text("name = \n", encoding="utf-8")
    with pytest.raises(SpecError, match=r"my-gpu\.toml: cannot be read as TOML"):
        specs.load(f"gpu:{file}")


def test_specs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        specs.load("gpu/a100-80").hbm_bytes = 1


def test_pools_say_what_they_are() -> None:
    """Capacities add up to what the tables hold in all; roles follow from the specs, not from the position."""
    l3 = compile_pair("l3-dgx-a100", "qwen-72b")
    names = [pool.name for pool in l3.pools]
    assert names == ["HBM", *(f"PIM {channel}" for channel in range(len(names) - 1))]
    assert [pool.side for pool in l3.pools] == [Side.GPU] + [Side.PIM] * (len(names) - 1)
    assert sum(pool.blocks_count for pool in l3.pools[1:]) * l3.block_tokens == l3.pim_tokens
    assert sum(pool.lanes_count for pool in l3.pools) == l3.arrays.lane_pool.shape[1]
    assert {pool.link for pool in l3.pools[1:]} == {"pcie4-x16"}
    latent = compile_pair("l3-dgx-h200", "deepseek-v3").pools
    assert [pool.form for pool in latent] == [PimForm.STORED] * (len(latent) - 1) + [PimForm.DECOMPRESSED]
    (hbm, host) = compile_pair("cpu-offload-dgx-a100", "opt-66b").pools
    assert (hbm.side, host.side, host.name) == (Side.GPU, Side.HOST, "host")
    (_, beside) = compile_pair("hbm-pim-dgx-a100", "llama-2-7b").pools
    assert (beside.side, beside.link) == (Side.PIM, None)
