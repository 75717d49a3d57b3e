"""Writes a preset of a GPU or link: the fields of a base preset, some of them measured, a source for every value."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from l3env.machine.specs import GpuSpec, LinkSpec


def preset_text(title: str, device: GpuSpec | LinkSpec, sources: Mapping[str, str]) -> str:
    """TOML of ``device``: all fields but the neutral ones, each with its source."""
    lines = [f"# {title}"]
    cited = []
    for field in dataclasses.fields(device):
        value = getattr(device, field.name)
        if field.name == "sources" or (field.name not in sources and value == field.default):
            continue
        lines.append(f"{field.name} = {_literal(value)}")
        if field.name != "name":
            cited.append(f"{field.name} = {json.dumps(sources[field.name], ensure_ascii=False)}")
    return "\n".join([*lines, "", "[sources]", *cited, ""])


def write_preset(path: Path, title: str, device: GpuSpec | LinkSpec, sources: Mapping[str, str]) -> None:
    path.write_text(preset_text(title, device, sources), encoding="utf-8")


def _literal(value: float | int | str) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (value == int(value) and 1e4 <= value < 1e12):
        return f"{int(value):_}" if abs(int(value)) >= 10_000 else str(int(value))
    text = f"{value:.10g}"
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else text if "." in text else f"{text}.0"
