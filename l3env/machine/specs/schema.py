"""JSON schemas of TOML files of specs, for editors: made of the same fields that the checker reads."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import msgspec

from l3env.errors import SpecError
from l3env.machine.specs.check import KINDS, SpecField, fields_of

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def json_schema(kind: str) -> dict[str, Any]:
    """The JSON schema of a TOML file of a kind.

    A file with a ``base`` may leave out what its base has, and so may its tables; without one all values without a
    default are required. What values say against each other is checked when the file is loaded only.

    Raises:
        SpecError: unknown kind.
    """
    if kind not in KINDS:
        raise SpecError(f"unknown kind {kind!r}; expected one of {', '.join(KINDS)}")
    parts = _parts_below(kind)
    tables = {each: _table(each) for each in parts} | {f"whole-{each}": _whole(each) for each in parts}
    return {"$schema": DRAFT, "title": f"l3env {kind}", **_table(kind), **_whole(kind)} | (
        {"$defs": tables} if tables else {}
    )


def _parts_below(kind: str) -> list[str]:
    """The kinds of its parts, and of theirs."""
    own = [each.part for each in fields_of(kind).values() if each.part is not None]
    return list(dict.fromkeys(found for part in own for found in (part, *_parts_below(part))))


def _table(kind: str) -> dict[str, Any]:
    """A table with any of the fields of a kind."""
    base = {"type": "string", "description": f"a {kind} whose values this one takes: a name or a TOML file"}
    defaults = {each.name: each.default for each in dataclasses.fields(KINDS[kind])}
    return {
        "description": (inspect.getdoc(KINDS[kind]) or "").split("\n")[0],
        "type": "object",
        "properties": {"base": base} | {name: _field(each, defaults[name]) for name, each in fields_of(kind).items()},
        "additionalProperties": False,
    }


def _whole(kind: str) -> dict[str, Any]:
    """That a table has a base, or all that it needs."""
    fields = fields_of(kind)
    needs: dict[str, Any] = {"required": [name for name, each in fields.items() if each.required]}
    parts = {
        name: {"if": {"type": "object"}, "then": {"$ref": f"#/$defs/whole-{each.part}"}}
        for name, each in fields.items()
        if each.part is not None
    }
    return {"anyOf": [{"required": ["base"]}, needs | ({"properties": parts} if parts else {})]}


def _field(each: SpecField, default: Any) -> dict[str, Any]:
    """The schema of one value: its type, bounds, choices and text."""
    if each.part is None:
        schema = msgspec.json.schema(each.hint)
    else:
        reference = {"type": "string", "description": f"the name of a {each.part}, or a TOML file"}
        schema = {"anyOf": [reference, {"$ref": f"#/$defs/{each.part}"}]}
    if each.name == "sources":
        schema["description"] = "where each value comes from, by its key"
    if each.what:
        schema["description"] = each.what
    if default is not None and default is not dataclasses.MISSING:
        schema["default"] = default
    return schema
