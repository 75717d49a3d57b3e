"""What a study is: a grid of policies, systems, models, traces, loads and seeds, read from a YAML file."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from l3env.engine.engine import Slo
from l3env.errors import L3EnvError
from l3env.machine.specs import named
from l3env.machine.tables import DEFAULT_BLOCK_TOKENS
from l3env.policy.registry import make_policy
from l3env.requests.registry import load_trace

KEY_CHARS = 40  # of each part of a cell's file name
TEXT_LISTS = ("policies", "systems", "models", "traces")
NUMBER_LISTS = ("loads", "utilizations")


@dataclass(frozen=True)
class StudyCell:
    """One run of a study. ``load`` is None where a utilization is asked for: it follows from the machine."""

    policy: str
    system: str
    model: str
    trace: str
    load: float | None
    utilization: float | None
    seed: int

    @property
    def key(self) -> str:
        """File name of the cell's results: readable, and unique by a hash of the whole identity."""
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:8]
        level = f"load{self.load:.6g}" if self.utilization is None else f"utilization{self.utilization:.6g}"
        parts = (self.policy, self.system, self.model, self.trace, level, f"seed{self.seed}", digest)
        return ".".join("".join(c if c.isalnum() or c in "-_." else "_" for c in part)[-KEY_CHARS:] for part in parts)


@dataclass(frozen=True)
class StudyConfig:
    """Everything that repeats a study.

    Attributes:
        policies: names or ``file.py:Class``.
        systems, models: preset names or TOML files; every model runs on every system.
        traces: trace specs.
        loads: arrival rates, times each trace's own; or
        utilizations: times what the reference policy serves at saturation on that machine.
        seeds_count: seed 0 is the trace itself, further ones are resampled from it.
    """

    policies: tuple[str, ...]
    systems: tuple[str, ...]
    models: tuple[str, ...]
    traces: tuple[str, ...]
    loads: tuple[float, ...] = ()
    utilizations: tuple[float, ...] = ()
    seeds_count: int = 1
    tp: int | None = None
    block_tokens: int = DEFAULT_BLOCK_TOKENS
    slo: Slo = field(default_factory=Slo)

    def __post_init__(self) -> None:
        for name in (*TEXT_LISTS, *NUMBER_LISTS):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise L3EnvError(f"study: {name} names something twice: {', '.join(map(str, values))}")
            if name in TEXT_LISTS and not values:
                raise L3EnvError(f"study: no {name}; expected at least one")
        if bool(self.loads) == bool(self.utilizations):
            raise L3EnvError("study: expected either loads or utilizations")
        if not all(0 < value < math.inf for value in (*self.loads, *self.utilizations)):
            raise L3EnvError(f"study: loads = {self.loads or self.utilizations}; expected numbers > 0")
        if self.seeds_count < 1:
            raise L3EnvError(f"study: seeds = {self.seeds_count}; expected at least 1")

    @classmethod
    def from_yaml(cls, path: Path) -> StudyConfig:
        """Reads a study file. Lists may be single values; ``seeds`` is a count.

        Raises:
            L3EnvError: the file cannot be read, or a key of it is unknown, missing or of the wrong type.
        """
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise L3EnvError(f"{path}: cannot be read as YAML: {error}") from None
        if not isinstance(raw, dict):
            raise L3EnvError(f"{path}: expected keys such as policies, systems, models, traces, loads, seeds")
        raw = {str(key): value for key, value in raw.items()}
        if "seeds" in raw:
            raw["seeds_count"] = raw.pop("seeds")
        try:
            return cls.from_json(raw)
        except L3EnvError as error:
            raise L3EnvError(f"{path}: {error}") from None

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> StudyConfig:
        """The inverse of ``to_json``. Raises L3EnvError for what is unknown, missing or of the wrong type."""
        known = [f.name for f in fields(cls)]
        for key in raw:
            if key not in known:
                close = difflib.get_close_matches(key, [*known, "seeds"], n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else f"; expected one of {', '.join(known)}"
                raise L3EnvError(f"study: unknown key {key!r}{hint}")
        values: dict[str, Any] = {key: value for key, value in raw.items() if value is not None}
        for name in TEXT_LISTS:
            values[name] = _list(name, values.get(name, ()), str)
        for name in NUMBER_LISTS:
            values[name] = tuple(float(value) for value in _list(name, values.get(name, ()), (int, float)))
        for name in ("seeds_count", "tp", "block_tokens"):
            if not isinstance(values.get(name, 1), int) or isinstance(values.get(name), bool):
                raise L3EnvError(f"study: {name.removesuffix('_count')} = {values[name]!r}; expected a whole number")
        try:
            values["slo"] = Slo(**values.get("slo", {}))
        except TypeError as error:
            raise L3EnvError(f"study: slo: {error}; expected ttft_scale, tbt_scale, ttft_s, tbt_s") from None
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Plain values; equal studies give equal ones."""
        return json.loads(json.dumps(asdict(self)))

    def check(self) -> None:
        """Raises L3EnvError for a policy, system, model or trace that cannot be loaded, before anything runs."""
        for ref in self.policies:
            make_policy(ref)
        for kind, refs in (("system", self.systems), ("model", self.models)):
            for ref in refs:
                named(kind, ref)
        for trace in self.traces:
            load_trace(trace)

    def cells(self) -> Iterator[StudyCell]:
        """Every run, those on the same requests one after the other."""
        levels = [(load, None) for load in self.loads] + [(None, level) for level in self.utilizations]
        seeds = range(self.seeds_count)
        for trace, seed, system, model, (load, level), policy in itertools.product(
            self.traces, seeds, self.systems, self.models, levels, self.policies
        ):
            yield StudyCell(policy, system, model, trace, load, level, seed)


def _list(name: str, value: Any, kind: type | tuple[type, ...]) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    for each in values:
        if not isinstance(each, kind) or isinstance(each, bool):
            raise L3EnvError(f"study: {name}: {each!r}; expected {'a name' if kind is str else 'a number'}")
    return values
