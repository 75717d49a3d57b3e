"""What a result follows from, as SHA-256: a name that stays the same says nothing about what is behind it."""

from __future__ import annotations

import enum
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from l3env.given import given_object
from l3env.jit import PACKAGE, sources
from l3env.machine.specs import named
from l3env.policy.registry import policy_files, policy_module
from l3env.policy.sources import data_files
from l3env.requests.registry import load_trace
from l3env.requests.workload import Workload

NOT_COMPUTED_WITH = ("sources",)  # of a spec: where its values come from


def plain(value: Any) -> Any:
    """As JSON has it; arrays by their bytes."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value) if f.name not in NOT_COMPUTED_WITH}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, enum.Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def sha256(value: Any) -> str:
    """Of a value's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()


def requests_sha256(workload: Workload) -> str:
    """Of a request table, whatever it is called and wherever it comes from."""
    columns = {f.name: getattr(workload, f.name) for f in fields(workload) if f.name not in ("name", "source")}
    return sha256(columns)


def files_sha256(files: Iterable[Path], folder: Path | None = None) -> dict[str, str]:
    """Of each file, by its path from a folder, or from the current one."""
    return {os.path.relpath(file, folder): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def inputs_sha256(systems: Iterable[str], models: Iterable[str], traces: Iterable[str]) -> str:
    """Of what systems, models and traces stand for now."""
    specs = [[named("system", each) for each in systems], [named("model", each) for each in models]]
    return sha256([*specs, [requests_sha256(load_trace(each)) for each in traces]])


@cache
def sources_sha256(*files: Path) -> str:
    """Of the package's version, and of those of its files that some files are made of, with the data that these name.
    What a process has imported does not change any more."""
    made_of = {source for file in files for source in sources(file) if source.is_relative_to(PACKAGE)}
    own_data = {data for file in files if file in made_of for data in data_files(file)}
    return sha256([version("l3env"), files_sha256(made_of | own_data, PACKAGE)])


def policy_content(ref: str) -> dict[str, str]:
    """What a policy is made of; where that cannot be known, something that is never the same again."""
    if given_object(ref) is not None:
        return {"given": ref} | files_sha256(policy_files(ref))
    module = policy_module(ref)
    if module is None:
        return {"unknown": uuid.uuid4().hex}
    files = policy_files(ref)
    python = [module, *(file for file in files if file.suffix == ".py")]
    return files_sha256(files) | {"l3env": sources_sha256(*python)}
