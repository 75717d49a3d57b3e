"""Specs by reference: a preset or a TOML file, what it is based on, and what the reference changes in it.

A TOML file holds the fields of one dataclass. ``base`` names a preset or another file whose values it takes where it
gives none; a part (the GPU of a system) is a table, or a reference; a table without a ``base`` of its own changes the
part that the file's base has. Names of files are relative to the file that they stand in. ``[sources]`` says where each
value comes from.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from l3env.errors import SpecError
from l3env.files import is_file, read_toml
from l3env.given import given_object
from l3env.machine.specs.check import KINDS, Checker, fields_of
from l3env.machine.specs.huggingface import PREFIX as HUGGING_FACE
from l3env.machine.specs.huggingface import config_path, read_config
from l3env.reference import Reference, parse, parser_of

PRESET_DIR = Path(__file__).parents[2] / "presets"
HERE = Path()


def names(kind: str) -> list[str]:
    """Names of the presets of one kind, sorted."""
    return sorted(path.stem for path in (PRESET_DIR / kind).glob("*.toml"))


def load(ref: str, **overrides: Any) -> Any:
    """The spec of a reference that says its kind: ``kind/name`` (a preset) or ``kind:path.toml`` (a user's file).

    Args:
        ref: e.g. ``"system/l3-dgx-a100"``, ``"gpu/h200?hbm_bytes=100e9"``, ``"system:my-node.toml"``,
            ``"model:hf:folder/config.json"``.
        overrides: fields to replace, nested ones with ``__``:
            ``load("system/l3-dgx-a100", gpu__hbm_bytes=76 * 2**30)``.

    Raises:
        SpecError: unknown kind or name, or keys that are unknown, missing or absurd (all named at once).
    """
    kind = "model" if ref.startswith(HUGGING_FACE) else _kind_of(ref)
    reader = _Reader()
    raw = reader.read(kind, ref)
    for key, value in overrides.items():
        reader.change(kind, raw, key.split("__"), value, ref)
    return _build(kind, raw, _where(kind, ref))


def named(kind: str, ref: Any) -> Any:
    """The spec of a reference where a spec of one kind is expected: a name, a TOML file, with ``?key=value`` changes.

    A spec is taken as it is. Raises SpecError.
    """
    if isinstance(ref, KINDS[kind]):
        return ref
    if isinstance(ref, str) and isinstance(found := given_object(ref), KINDS[kind]):
        return found
    if not isinstance(ref, str | Path):
        raise SpecError(f"{kind} = {ref!r}: expected a name, a TOML file or a {KINDS[kind].__name__}")
    return _build(kind, _Reader().read(kind, str(ref)), _where(kind, str(ref)))


def files(kind: str, ref: str) -> tuple[Path, ...]:
    """The files that a reference's spec is read from: itself, its bases, its parts and theirs. Raises SpecError."""
    reader = _Reader()
    reader.visit(kind, reader.read(kind, ref))
    return tuple(dict.fromkeys(reader.files))


def from_mapping(kind: str, raw: Mapping[str, Any], where: str) -> Any:
    """Builds the dataclass of ``kind`` from plain values; parts may be references or tables. Raises SpecError."""
    return _build(kind, _Reader().table(kind, raw, HERE), where)


def _build(kind: str, raw: Mapping[str, Any], where: str) -> Any:
    checker = Checker(named, names, [])
    spec = checker.build(kind, raw)
    if checker.problems:
        raise SpecError(f"{where}: " + "; ".join(checker.problems))
    return spec


def _where(kind: str, ref: str) -> str:
    """A reference as errors begin: a file without its kind."""
    return ref.removeprefix(f"{kind}:")


def _kind_of(ref: str) -> str:
    base = parse(ref, "spec", SpecError).base
    kind = base.partition(":")[0] if ":" in base else base.partition("/")[0]
    if kind not in KINDS:
        raise SpecError(f"{base!r}: unknown kind {kind!r}; expected one of {', '.join(KINDS)}")
    return kind


def _locate(kind: str, base: str, folder: Path) -> Path:
    """The file of a name or file, with or without its kind before it."""
    file = base.removeprefix(f"{kind}:")
    if base.startswith(f"{kind}:") or base.endswith(".toml"):
        path = folder / Path(file).expanduser()
        if not is_file(path):
            raise SpecError(f"{str(path)!r}: no such file")
        return path
    name = base.removeprefix(f"{kind}/")
    path = PRESET_DIR / kind / f"{name}.toml"
    if "/" in name or not is_file(path):
        close = difflib.get_close_matches(name, names(kind), n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise SpecError(f"unknown {kind} {name!r}{hint}; there are: {', '.join(names(kind))}")
    return path


@dataclass
class _Reader:
    """Reads references into plain values; parts that are references stay as they are, for whoever builds them.

    Attributes:
        files: those read so far.
    """

    files: list[Path] = field(default_factory=list)

    def read(self, kind: str, ref: str, folder: Path = HERE, trail: tuple[Path, ...] = ()) -> dict[str, Any]:
        """The values of a reference, its bases' below its own. ``trail`` are the files that led here."""
        reference = parse(ref, kind, SpecError)
        if kind == "model" and (base := reference.base.removeprefix("model:")).startswith(HUGGING_FACE):
            path = config_path(folder, base)
            raw = read_config(path)
            self.files.append(path)
        else:
            path = _locate(kind, reference.base, folder)
            if path.resolve() in trail:
                chain = " -> ".join(each.name for each in (*trail[trail.index(path.resolve()) :], path))
                raise SpecError(f"{path}: base: {chain} goes in a circle")
            self.files.append(path)
            raw = self.table(kind, read_toml(path, SpecError), path.parent, (*trail, path.resolve()))
        for key in reference.options:
            self._change_by_text(kind, raw, reference, key)
        return raw

    def table(self, kind: str, raw: Mapping[str, Any], folder: Path, trail: tuple[Path, ...] = ()) -> dict[str, Any]:
        """The values of a table as it is written in a folder: with those of its base, and names of files from here."""
        parts = {name: each.part for name, each in fields_of(kind).items() if each.part is not None}
        own: dict[str, Any] = {}
        for key, value in raw.items():
            if key in parts and isinstance(value, Mapping):
                own[key] = self.table(parts[key], value, folder)
            elif isinstance(value, str) and value.partition("?")[0].endswith(".toml"):
                own[key] = _from_here(value, folder)
            elif key != "base":
                own[key] = value
        if "base" not in raw:
            return own
        if not isinstance(raw["base"], str):
            raise SpecError(f"base = {raw['base']!r}: expected the name of a {kind}, or a TOML file")
        below = self.read(kind, raw["base"], folder, trail)
        for key, value in own.items():
            changes = key in parts and isinstance(value, Mapping) and "base" not in raw[key]
            if changes and isinstance(below.get(key), str):
                below[key] = self.read(parts[key], below[key])
            if changes and isinstance(below.get(key), Mapping):
                own[key] = _merged(below[key], value)
        return _merged(below, own)

    def change(self, kind: str, raw: dict[str, Any], keys: list[str], value: Any, where: str) -> None:
        """Sets one value, of a part where there are several keys; its source is no longer the one given for it."""
        table = raw
        for depth, key in enumerate(keys[:-1]):
            part = fields_of(kind)[key].part if key in fields_of(kind) else None
            inner = table.get(key)
            if isinstance(inner, str) and part is not None:
                inner = self.read(part, inner)
            if not isinstance(inner, dict) or part is None:
                what = f"there is no {key}" if inner is None and part is not None else f"{key!r} is not a table"
                raise SpecError(f"{where}: override {'.'.join(keys)}: {what}{'' if depth == 0 else ' there'}")
            table[key] = dict(inner)
            table, kind = table[key], part
        table[keys[-1]] = value
        if keys[-1] in table.get("sources", ()):
            table["sources"] = {name: text for name, text in table["sources"].items() if name != keys[-1]}

    def _change_by_text(self, kind: str, raw: dict[str, Any], reference: Reference, key: str) -> None:
        """Sets the value of an option, read as what its field holds."""
        inner, *names_left = key.split(".")
        path, known = [], fields_of(kind)
        while names_left and inner in known and (part := known[inner].part) is not None:
            path.append(inner)
            known, (inner, *names_left) = fields_of(part), names_left
        if names_left or inner not in known or inner == "sources":
            before = "".join(f"{each}." for each in path)
            raise reference.unknown_key(key, [before + name for name in known if name != "sources"])
        target = known[inner]
        hint = (None | str if target.optional else str) if target.part else target.hint
        self.change(kind, raw, [*path, inner], reference.read(key, parser_of(hint)), reference.text)

    def visit(self, kind: str, raw: Mapping[str, Any]) -> None:
        """Reads the parts that are references, too."""
        for name, each in fields_of(kind).items():
            if each.part is None:
                if isinstance(raw.get(name), str) and raw[name].endswith(".toml"):
                    self.files.append(Path(raw[name]))
            elif isinstance(raw.get(name), str):
                self.visit(each.part, self.read(each.part, raw[name]))
            elif isinstance(raw.get(name), Mapping):
                self.visit(each.part, raw[name])


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The values of both, those above first; sources go with the values that they are of."""
    sources = {key: text for key, text in below.get("sources", {}).items() if key not in above}
    merged = {**below, **above}
    if "sources" in above and not isinstance(above["sources"], Mapping):
        return merged
    return merged | ({"sources": sources | above.get("sources", {})} if sources or "sources" in merged else {})


def _from_here(ref: str, folder: Path) -> str:
    """A reference to a file that stands in a file of ``folder``, as it is written from the current folder."""
    base, mark, query = ref.partition("?")
    kind, colon, file = base.rpartition(":")
    return f"{kind}{colon}{folder / Path(file).expanduser()}{mark}{query}"
