"""From plain values to a spec, with msgspec: every unknown, missing and absurd key is named in one error."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from l3env.errors import SpecError
from l3env.machine.specs.devices import DramSpec, GpuSpec, LinkSpec, PimSpec
from l3env.machine.specs.serving_engine import EngineSpec, MemorySpec
from l3env.machine.specs.system import ExpertParallelSpec, SystemSpec
from l3env.machine.specs.transformer import LatentSpec, ModelSpec, MoeSpec

KINDS: dict[str, type] = {
    "gpu": GpuSpec,
    "link": LinkSpec,
    "dram": DramSpec,
    "pim": PimSpec,
    "model": ModelSpec,
    "engine": EngineSpec,
    "system": SystemSpec,
    "memory": MemorySpec,  # the last four are tables of an engine, a model or a system, without presets of their own
    "mla": LatentSpec,
    "moe": MoeSpec,
    "experts": ExpertParallelSpec,
}
WORDS = {"array": "a list of whole numbers", "object": "a table of texts", "bool": "true or false", "str": "text"}
EXACT = 2**53  # whole numbers up to here are exact as floats, too
BOUND = re.compile(r"(?P<sign>[<>]=?) (?P<value>\S+)$")  # of msgspec's message


@dataclass(frozen=True)
class SpecField:
    """One field of a kind.

    Attributes:
        hint: its type, with the bounds that msgspec checks.
        part: the kind of the spec that it holds, None for a plain value.
        optional: may be None.
        what: the text beside its type.
    """

    name: str
    hint: Any
    part: str | None
    optional: bool
    required: bool
    what: str


@functools.cache
def fields_of(kind: str) -> dict[str, SpecField]:
    """The fields of a kind by name, in order."""
    cls = KINDS[kind]
    hints = typing.get_type_hints(cls, include_extras=True)
    found = {}
    for each in dataclasses.fields(cls):
        hint = hints[each.name]
        extras = getattr(hint, "__metadata__", ())
        inner = typing.get_args(hint)[0] if extras else hint
        choices = typing.get_args(inner) or (inner,)
        part = next((name for name, other in KINDS.items() if other in choices), None)
        required = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        what = next((text for text in extras if isinstance(text, str)), "")
        found[each.name] = SpecField(each.name, hint, part, type(None) in choices, required, what)
    return found


def close_key(key: str, known: typing.Iterable[str]) -> str:
    """A hint at the key that was meant, empty where none is close."""
    close = difflib.get_close_matches(key, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


@dataclass
class Checker:
    """Builds specs and collects what is wrong.

    Attributes:
        load: the spec of a kind by its reference.
        names: the presets of a kind.
        problems: found so far, each with the path of its key.
    """

    load: Callable[[str, str], Any]
    names: Callable[[str], list[str]]
    problems: list[str]

    def build(self, kind: str, raw: Mapping[str, Any], prefix: str = "") -> Any:
        """The spec of plain values; its parts may be references or tables. None where there are problems."""
        fields = fields_of(kind)
        for key in sorted(raw.keys() - fields.keys()):
            self.problems.append(f"unknown key {prefix}{key}{close_key(key, fields)}")
        values: dict[str, Any] = {}
        for name, each in fields.items():
            if name not in raw or (raw[name] is None and each.optional):
                if each.required:
                    self.problems.append(f"missing key {prefix}{name}")
            elif each.part is not None:
                values[name] = self._part(each.part, raw[name], prefix + name)
            else:
                values[name] = self._plain(each, raw[name], prefix + name)
        if self.problems:
            return None
        spec = KINDS[kind](**values)
        if hasattr(spec, "contradictions"):
            self.problems.extend(prefix + problem for problem in spec.contradictions())
        return spec

    def _part(self, kind: str, value: Any, key: str) -> Any:
        if isinstance(value, Mapping):
            return self.build(kind, value, f"{key}.")
        if isinstance(value, KINDS[kind]):
            return value
        if not isinstance(value, str) or value.partition("/")[0] in KINDS.keys() - {kind}:
            such = [f" or the name of a {kind}, such as '{kind}/{name}'" for name in self.names(kind)[:1]]
            self.problems.append(f"{key} = {value!r}: expected a table{''.join(such)}")
            return None
        try:
            return self.load(kind, value)
        except SpecError as error:
            self.problems.append(f"{key}: {error}")
            return None

    def _plain(self, each: SpecField, value: Any, key: str) -> Any:
        if isinstance(value, float) and value.is_integer() and _is_whole(each.hint):
            value = int(value)  # 2e12 in a file
        try:
            if isinstance(value, float) and not math.isfinite(value):
                raise msgspec.ValidationError("Expected `float`, got no finite one")
            if isinstance(value, int) and abs(value) > EXACT:
                raise msgspec.ValidationError(f"Expected `int` <= {EXACT}")
            converted = msgspec.convert(value, each.hint)
        except msgspec.ValidationError as error:
            self.problems.append(f"{key} = {value!r}: expected {_expected(each, value, str(error))}")
            return None
        return dict(converted) if isinstance(converted, Mapping) else converted


def _is_whole(hint: Any) -> bool:
    """Is it an integer, whatever its bounds?"""
    return hint is int or typing.get_args(hint)[:1] == (int,)


def _expected(each: SpecField, value: Any, message: str) -> str:
    """What a field takes, in our words."""
    if (bound := BOUND.search(message)) is not None:
        return f"{bound['sign']} {float(bound['value']):g}"
    if message.startswith("Invalid enum value"):
        return "one of " + ", ".join(typing.get_args(each.hint))
    wanted = message.removeprefix("Expected `").split("`")[0].removesuffix(" | null")
    if wanted in WORDS:
        return WORDS[wanted]
    whole = _is_whole(each.hint) and isinstance(value, float) and math.isfinite(value)
    return "a whole number" if whole else "a finite number"
