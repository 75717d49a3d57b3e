"""A grid of cells: policies, systems, models, traces, loads and seeds, from Python, YAML or a ``config.json``."""

from __future__ import annotations

import difflib
import itertools
import json
import math
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from l3env.engine.engine import Slo, patience_of
from l3env.engine.segments import eviction_rule
from l3env.errors import L3EnvError
from l3env.files import read_yaml
from l3env.given import given_object, reference
from l3env.machine.specs import named
from l3env.machine.tables import DEFAULT_BLOCK_TOKENS
from l3env.policy.registry import make_policy
from l3env.requests.registry import load_trace
from l3env.requests.workload import Workload
from l3env.runs.cell import Cell

TEXT_LISTS = ("policies", "systems", "models", "traces")
NUMBER_LISTS = ("loads", "utilizations")


@dataclass(frozen=True)
class Grid:
    """Everything that repeats a comparison or a study.

    Attributes:
        policies: references (names, ``file.py:Class``), policy classes or objects.
        systems, models: references (names, TOML files) or specs; every model runs on every system.
        traces: trace specs, or workloads.
        loads: arrival rates, times each trace's own; or
        utilizations: times what the reference policy serves at saturation on that machine.
        seeds_count: seed 0 is the trace itself, further ones are resampled from it.
        training, prefix_cache, patience_s: see ``Cell``.
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
    training: str | None = None
    prefix_cache: str = "off"
    patience_s: float | None = None

    def __post_init__(self) -> None:
        for name in TEXT_LISTS:
            object.__setattr__(self, name, tuple(map(reference, getattr(self, name))))
        for name in (*TEXT_LISTS, *NUMBER_LISTS):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise L3EnvError(f"{name} names something twice: {', '.join(map(str, values))}")
            if name in TEXT_LISTS and not values:
                raise L3EnvError(f"no {name}; expected at least one")
        if bool(self.loads) == bool(self.utilizations):
            raise L3EnvError("expected either loads or utilizations")
        if not all(0 < value < math.inf for value in (*self.loads, *self.utilizations)):
            raise L3EnvError(f"loads = {self.loads or self.utilizations}; expected numbers > 0")
        if self.seeds_count < 1:
            raise L3EnvError(f"seeds = {self.seeds_count}; expected at least 1")
        eviction_rule(self.prefix_cache)
        patience_of(self.patience_s)

    @classmethod
    def from_yaml(cls, path: Path) -> Grid:
        """Reads a study file. Lists may be single values; ``seeds`` is a count.

        Raises:
            L3EnvError: the file cannot be read, or a key of it is unknown, missing or of the wrong type.
        """
        raw = read_yaml(path)
        if not isinstance(raw, dict):
            raise L3EnvError(f"{path}: expected keys such as policies, systems, models, traces, loads, seeds")
        raw = {str(key): value for key, value in raw.items()}
        if "seeds" in raw:
            raw["seeds_count"] = raw.pop("seeds")
        if raw.get("prefix_cache") is False:
            raw["prefix_cache"] = "off"  # which YAML takes for a truth value
        try:
            return cls.from_json(raw)
        except L3EnvError as error:
            raise L3EnvError(f"{path}: {error}") from None

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Grid:
        """The inverse of ``to_json``; a list of one may be a value.

        Raises:
            L3EnvError: what is unknown, missing or of the wrong type.
        """
        known = [f.name for f in fields(cls)]
        for key in raw:
            if key not in known:
                close = difflib.get_close_matches(key, [*known, "seeds"], n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else f"; expected one of {', '.join(known)}"
                raise L3EnvError(f"unknown key {key!r}{hint}")
        values: dict[str, Any] = {key: value for key, value in raw.items() if value is not None}
        for name in TEXT_LISTS:
            values[name] = _list(name, values.get(name, ()), str)
        for name in NUMBER_LISTS:
            values[name] = tuple(float(value) for value in _list(name, values.get(name, ()), (int, float)))
        for name in ("seeds_count", "tp", "block_tokens"):
            if not isinstance(values.get(name, 1), int) or isinstance(values.get(name), bool):
                raise L3EnvError(f"{name.removesuffix('_count')} = {values[name]!r}; expected a whole number")
        if not isinstance(values.get("patience_s", 1.0), int | float) or isinstance(values.get("patience_s"), bool):
            raise L3EnvError(f"patience_s = {values['patience_s']!r}; expected a number of seconds")
        try:
            values["slo"] = Slo(**values.get("slo", {}))
        except TypeError as error:
            raise L3EnvError(f"slo: {error}; expected ttft_scale, tbt_scale, ttft_s, tbt_s, form") from None
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Plain values; equal studies give equal ones."""
        return json.loads(json.dumps(asdict(self)))

    def check(self) -> None:
        """Raises L3EnvError for a policy, system, model or trace that cannot be loaded, before anything runs."""
        for ref in self.policies:
            try:
                make_policy(ref)
            except L3EnvError:
                raise
            except Exception:  # its cells say so, and others go on
                continue
        for kind, refs in (("system", self.systems), ("model", self.models)):
            for ref in refs:
                named(kind, ref)
        for trace in self.traces:
            if self.seeds_count > 1 and given_object(trace) is not None:
                raise L3EnvError(
                    f"seeds = {self.seeds_count}: requests given as an object are not resampled; expected 1"
                )
            workload = load_trace(trace)
            self._note_prefix_ids(workload)
            self._note_closed_loop(workload)
            self._note_long_requests(workload)
        if self.training is not None:
            load_trace(self.training)

    def _note_closed_loop(self, workload: Workload) -> None:
        roots = int((workload.parent_idx < 0).sum())
        if self.utilizations and roots < len(workload):
            text = (
                f"{len(workload) - roots:,} requests wait for others to finish: what comes depends on what is served; "
            )
            text += f"utilization is that of the {roots:,} that do not, each bringing its followers"
            warnings.warn(f"trace {workload.name}: {text}", stacklevel=4)

    def _note_long_requests(self, workload: Workload) -> None:
        for ref in self.models:
            served_tokens = named("model", ref).served_tokens
            count = int((workload.prompt_tokens + workload.output_tokens > served_tokens).sum())
            if count:
                text = (
                    f"{count:,} of {len(workload):,} requests are longer than the {served_tokens:,} tokens that {ref} "
                )
                text += f"serves, and are rejected; {ref}?max_model_len=TOKENS sets another limit"
                warnings.warn(f"trace {workload.name}: {text}", stacklevel=4)

    def _note_prefix_ids(self, workload: Workload) -> None:
        if workload.prefix_ids.size and self.prefix_cache == "off":
            text = "has prefix ids, and the prefix cache is off; with lru, equal beginnings of prompts share their KV"
        elif not workload.prefix_ids.size and self.prefix_cache != "off":
            text = f"has no prefix ids, so prefix cache {self.prefix_cache} has no effect"
        else:
            return
        warnings.warn(f"trace {workload.name} {text}", stacklevel=4)

    def cells(self) -> list[Cell]:
        """Every run, those on the same requests one after the other."""
        levels = [(load, None) for load in self.loads] + [(None, level) for level in self.utilizations]
        same: dict[str, Any] = {"slo": self.slo, "prefix_cache": self.prefix_cache, "training": self.training}
        same |= {"tp": self.tp, "block_tokens": self.block_tokens, "patience_s": self.patience_s}
        return [
            Cell(policy, system, model, trace, load, level, seed, **same)
            for trace, seed, system, model, (load, level), policy in itertools.product(
                self.traces, range(self.seeds_count), self.systems, self.models, levels, self.policies
            )
        ]

    @property
    def one_machine(self) -> bool:
        """One system, one model, one trace."""
        return len(self.systems) == len(self.models) == len(self.traces) == 1

    def with_policies_of(self, other: Grid) -> Grid:
        """This grid with the policies of another one before its own, where it differs in nothing else."""
        policies = tuple(dict.fromkeys((*other.policies, *self.policies)))
        return replace(self, policies=policies) if replace(other, policies=self.policies) == self else self


def _list(name: str, value: Any, kind: type | tuple[type, ...]) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    for each in values:
        if not isinstance(each, kind) or isinstance(each, bool):
            raise L3EnvError(f"{name}: {each!r}; expected {'a name' if kind is str else 'a number'}")
    return values
