"""JSON schemas of TOML files, held against the presets and the checker by jsonschema."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from l3env.cli import app
from l3env.errors import SpecError
from l3env.machine import specs

PRESETS = [(kind, name) for kind in specs.KINDS for name in specs.names(kind)]


def preset(kind: str, name: str) -> dict[str, Any]:
    return tomllib.loads((specs.PRESET_DIR / kind / f"{name}.toml").read_text())


def is_valid(kind: str, raw: Any) -> bool:
    return Draft202012Validator(specs.json_schema(kind)).is_valid(raw)


def is_taken(kind: str, raw: Any) -> bool:
    """Does the checker take it?"""
    try:
        specs.from_mapping(kind, raw, "mine.toml")
    except SpecError:
        return False
    return True


@pytest.mark.parametrize("kind", specs.KINDS)
def test_every_kind_has_a_schema(kind: str) -> None:
    Draft202012Validator.check_schema(specs.json_schema(kind))


@pytest.mark.parametrize(("kind", "name"), PRESETS)
def test_presets_are_valid(kind: str, name: str) -> None:
    Draft202012Validator(specs.json_schema(kind)).validate(preset(kind, name))


NODE = preset("system", "l3-dgx-a100")
GPU = preset("gpu", "a100-80")


@pytest.mark.parametrize(
    ("kind", "raw", "good"),
    [
        ("system", NODE | {"gpus_count": 4}, True),
        ("system", NODE | {"gpus_count": 0}, False),
        ("system", NODE | {"gpus_count": "4"}, False),
        ("system", NODE | {"gpus_count": 4.5}, False),
        ("system", NODE | {"gpus_count": 4.0}, True),
        ("system", NODE | {"gpu_count": 4}, False),
        ("system", {key: value for key, value in NODE.items() if key != "gpu"}, False),
        ("system", {"base": "l3-dgx-a100", "gpus_count": 4}, True),
        ("system", {"base": "l3-dgx-a100", "gpu": {"hbm_bytes": 40e9}}, True),  # changes the base's GPU
        ("system", {"base": "l3-dgx-a100", "gpu": {"hbm_byte": 40e9}}, False),
        ("system", {"base": 3}, False),
        ("system", NODE | {"gpu": GPU}, True),
        ("system", NODE | {"gpu": {"hbm_bytes": 40e9}}, False),  # not a whole GPU
        ("system", NODE | {"gpu": {"base": "a100-80", "hbm_bytes": 40e9}}, True),
        ("system", NODE | {"gpu": {"base": "a100-80", "hbm_bytes": -1}}, False),
        ("system", NODE | {"gpu": 3}, False),
        ("system", NODE | {"hbm_kv": 1}, False),
        ("gpu", GPU | {"compute_utilisation_frac": 1.2}, False),
        ("gpu", GPU | {"sources": {"power_w": 400}}, False),
        ("pim", preset("pim", "dimm-pim-ddr4-3200") | {"kind": "dimm"}, False),
        ("pim", {"base": "dimm-pim-ddr4-3200", "kind": "dimm-rank"}, True),
        ("model", {"base": "deepseek-v3", "moe": {"route_scale": 2.0}}, True),
        ("model", {"base": "deepseek-v3", "moe": {"route_scale": 0.0}}, False),
    ],
)
def test_a_schema_says_what_the_checker_says(kind: str, raw: dict[str, Any], good: bool) -> None:
    assert is_valid(kind, raw) is is_taken(kind, raw) is good


def test_fields_say_what_they_are() -> None:
    fields = specs.json_schema("pim")["properties"]
    assert fields["io_j_per_byte"] == {"type": "number", "minimum": 0, "description": "a byte through the pins"}
    assert "hbm-pim-ext" in fields["kind"]["enum"]
    assert fields["holds_weights"]["default"] is False


def test_the_command_prints_it() -> None:
    done = CliRunner().invoke(app, ["schema", "system"])
    assert json.loads(done.stdout) == json.loads(json.dumps(specs.json_schema("system")))
    with pytest.raises(SpecError, match=r"unknown kind 'systems'; expected one of gpu, link"):
        CliRunner().invoke(app, ["schema", "systems"], catch_exceptions=False)
