"""Devices, models and systems as frozen dataclasses, from presets, a user's TOML files, or a model's config.json.

``load("system/l3-dgx-a100")`` reads ``presets/system/l3-dgx-a100.toml``; ``named("system", ref)`` takes what the
command line takes. Unknown, missing and absurd keys are named together in one SpecError.
"""

from l3env.machine.specs.check import KINDS
from l3env.machine.specs.devices import DramSpec, GpuSpec, LinkSpec, PimSpec
from l3env.machine.specs.load import PRESET_DIR, files, from_mapping, load, named, names
from l3env.machine.specs.schema import json_schema
from l3env.machine.specs.serving_engine import EngineSpec, MemorySpec
from l3env.machine.specs.system import ExpertParallelSpec, SystemSpec
from l3env.machine.specs.transformer import AttentionForm, LatentSpec, ModelSpec, MoeSpec

__all__ = [
    "KINDS",
    "PRESET_DIR",
    "AttentionForm",
    "DramSpec",
    "EngineSpec",
    "ExpertParallelSpec",
    "GpuSpec",
    "LatentSpec",
    "LinkSpec",
    "MemorySpec",
    "ModelSpec",
    "MoeSpec",
    "PimSpec",
    "SystemSpec",
    "files",
    "from_mapping",
    "json_schema",
    "load",
    "named",
    "names",
]
