"""Every trace by name: real traces of the manifest, files, synthetic workloads and profiles behind one ``resolve``.

A real trace is looked for in ``L3ENV_TRACE_DIR``, then in ``../shared/traces`` beside a source checkout, then in the
user's cache (``L3ENV_CACHE_DIR``, else ``$XDG_CACHE_HOME/l3env``, else ``~/.cache/l3env``; folder ``traces``).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from l3env.errors import TraceError
from l3env.files import read_toml
from l3env.reference import exists, parse
from l3env.requests.registry import TraceFormat, formats, suggests
from l3env.requests.workload import Workload
from l3env.traces import (
    azure,
    bailian,
    burstgpt,
    canonical,
    kv_cache_tester,
    llmservingsim,
    mooncake,
    profile,
    servegen,
    serving_runs,
    spec,
    splice,
    synthetic,
    tracelab,
    vidur,
    vllm_bench,
)
from l3env.traces.containers import look
from l3env.traces.prover import log as prover_log
from l3env.traces.reading import first_line, is_tar
from l3env.traces.window import parse_window


class StandInWarning(UserWarning):
    """A real trace is not here, and an embedded profile is used in its place."""


MANIFEST = Path(__file__).parent / "manifest.toml"
CHECKOUT = Path(__file__).resolve().parent.parent
BUILT_IN = (
    *(canonical, azure, mooncake, burstgpt, vidur, kv_cache_tester, servegen, prover_log),
    *(bailian, tracelab, llmservingsim, vllm_bench, serving_runs),
)
PROFILE_PREFIX = "profile:"


@dataclass(frozen=True)
class Entry:
    """One real trace of the manifest; its comments say what each field means."""

    name: str
    what: str
    format: str
    files: tuple[str, ...]
    url: str
    licence: str
    requests: int
    bytes: int
    stored_sha256: str
    part: str = ""
    multi: bool = False
    options: Mapping[str, str] = field(default_factory=dict)
    url_sha256: str = ""
    url_prefix_bytes: int = 0
    url_prefix_sha256: str = ""


@dataclass(frozen=True)
class Maker:
    """What a spec's name or path stands for: a function of the seed and of the options that are its own."""

    make: Callable[..., Workload]  # make(seed=..., **own options)
    options: Mapping[str, Callable[[str], Any]]
    about: Mapping[str, Any]  # added to the workload's source


@cache
def read_manifest(path: Path = MANIFEST) -> dict[str, Entry]:
    """The entries of a manifest by name. Raises TraceError for a missing or unknown key."""
    tables = read_toml(path, TraceError)
    known = {item.name for item in fields(Entry)} - {"name"}
    entries = {}
    for name, table in tables.items():
        if unknown := sorted(set(table) - known):
            raise TraceError(f"{path}: [{name}]: unknown key {', '.join(unknown)}; expected {', '.join(sorted(known))}")
        try:
            entries[name] = Entry(name=name, **{**table, "files": tuple(table.get("files", ()))})
        except TypeError as error:
            raise TraceError(f"{path}: [{name}]: {error}") from error
    return entries


def cache_dir() -> Path:
    """Where fetched traces lie; laid out as a trace folder."""
    if own := os.environ.get("L3ENV_CACHE_DIR"):
        return Path(own).expanduser() / "traces"
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "l3env" / "traces"


def trace_dirs() -> list[Path]:
    """Folders searched for a real trace, in this order."""
    own = os.environ.get("L3ENV_TRACE_DIR")
    return [*([Path(own).expanduser()] if own else []), CHECKOUT.parent / "shared" / "traces", cache_dir()]


def locate(entry: Entry) -> Path | None:
    """The first copy of a real trace, or None."""
    places = (folder / file for folder in trace_dirs() for file in entry.files)
    return next((place for place in places if place.exists()), None)


def known_formats() -> dict[str, TraceFormat]:
    """Installed formats by name; the built-in ones also where the package is not installed."""
    return {**{module.FORMAT.name: module.FORMAT for module in BUILT_IN}, **formats()}


def names() -> list[str]:
    """Every name that ``resolve`` knows."""
    return [*read_manifest(), *synthetic.WORKLOADS, *(PROFILE_PREFIX + name for name in profile.names())]


@suggests(names)
def resolve(text: str, seed: int = 0) -> Workload | None:
    """The workload of a spec, or None where its name is unknown and no such file exists.

    Seed 0 is the trace as it is. Other seeds draw generated workloads anew, and resample the fixed rows of a trace
    (``traces.resample``) after the window is cut. ``?seed=`` in the spec wins. Raises TraceError for what is wrong.
    """
    base = parse(text, "trace", TraceError).base
    maker = _find(base, text)
    if maker is None:
        return None
    values = {} if base == text else spec.parse_options(text, maker.options)
    seed = values.get("seed", seed)
    own = {key: values.pop(key) for key in tuple(values) if key in maker.options}
    if "lengths" in own:
        own["lengths"] = _lengths(text, own["lengths"])
    workload = maker.make(seed=seed, **own)
    about = {**workload.source, **maker.about, "spec": text, "seed": seed}
    workload = replace(workload, name=_shown_name(base, text), source=about)
    workload = spec.apply(workload, values, seed)
    workload.check()
    return workload


def _shown_name(base: str, text: str) -> str:
    """The spec, a path shortened to its file name, a stand-in called what it is."""
    if base in read_manifest() and locate(read_manifest()[base]) is None:
        return PROFILE_PREFIX + text
    return text if base in names() or base.startswith(splice.PREFIX) else Path(base).name + text.removeprefix(base)


def _lengths(text: str, other: str) -> Workload:
    workload = resolve(other, 0)
    if workload is None:
        raise TraceError(f"trace {text!r}: lengths={other}: no such trace and no such file")
    return workload


def _find(base: str, text: str) -> Maker | None:
    if base in synthetic.WORKLOADS:
        return Maker(
            lambda **own: synthetic.generate(base, **own),
            {"n": spec.parse_count, "max_output": spec.parse_count},
            {},
        )
    if base.startswith(PROFILE_PREFIX):
        name = base.removeprefix(PROFILE_PREFIX)
        if name not in profile.names():
            return None
        return Maker(lambda **own: profile.generate(name, **own), {"n": spec.parse_count, "window": parse_window}, {})
    if base.startswith(splice.PREFIX):
        return _splice(base)
    if entry := read_manifest().get(base):
        return _named(entry)
    if not exists(base):
        return None
    path = Path(base).expanduser()
    options = parse(text, "trace", TraceError).options
    trace_format = find_format(path, options.get("format"), options)
    maker = _of_file(path, trace_format, {}, {})
    return replace(maker, options={**maker.options, "format": str})


def _splice(base: str) -> Maker:
    names = [unquote(name) for name in base.removeprefix(splice.PREFIX).split(",") if name]

    def part(name: str, seed: int) -> Workload:
        workload = resolve(name, seed)
        if workload is None:
            raise TraceError(f"trace {base!r}: {name}: no such trace and no such file")
        return workload

    options = {"every": spec.parse_positive, "rates": splice.parse_rates, "window": parse_window}
    return Maker(lambda **own: splice.splice(names, part, **own), options, {})


def _named(entry: Entry) -> Maker:
    path = locate(entry)
    about = {"trace": entry.name, "url": entry.url, "licence": entry.licence, "what": entry.what}
    if path is not None:
        if entry.part and path.name == Path(entry.files[-1]).name:
            about["part"] = entry.part
        return _of_file(path, known_formats()[entry.format], entry.options, about)
    instead = f"`l3env traces fetch {entry.name}`" if not entry.multi else f"get its files from {entry.url}"
    missing = f"trace {entry.name!r} is not on this machine (looked for {entry.files[-1]} in "
    missing += f"{', '.join(map(str, trace_dirs()))}); for the real one set L3ENV_TRACE_DIR to its folder or {instead}"
    if entry.name not in profile.names():
        raise TraceError(missing)
    warnings.warn(f"{missing}. Its embedded profile, fitted statistics, stands in.", StandInWarning, stacklevel=2)
    return Maker(
        lambda **own: profile.generate(entry.name, **own),
        {"n": spec.parse_count, "window": parse_window},
        {"stands_in_for": entry.name},
    )


def _of_file(path: Path, trace_format: TraceFormat, fixed: Mapping[str, Any], about: Mapping[str, Any]) -> Maker:
    options = {key: parser for key, parser in trace_format.options.items() if key not in (*fixed, "seed")}

    def make(*, seed: int, **own: Any) -> Workload:
        own.pop("format", None)  # chose trace_format
        if "seed" in trace_format.options:
            own["seed"] = seed
        return trace_format.load(path, **fixed, **own)

    return Maker(make, options, about)


def find_format(path: Path, name: str | None = None, options: Collection[str] = ()) -> TraceFormat:
    """The format called ``name``, or the one that matches the file; for other tables the canonical one.

    ``options`` that name columns (``arrival=``) make any table canonical, unless the format that matches has them too.
    Raises TraceError where none or several match.
    """
    known = known_formats()
    if name is not None:
        if name not in known:
            raise TraceError(f"{path}: format {name!r}; expected one of {', '.join(sorted(known))}")
        return known[name]
    found = [trace_format for trace_format in known.values() if trace_format.matches(path)]
    columns = set(options) & canonical.NAMES.keys()
    seen_as = look(path)
    if seen_as.is_own or (columns and seen_as.kind and not any(columns <= each.options.keys() for each in found)):
        return known[canonical.FORMAT.name]
    if not found and seen_as.kind:
        return known[canonical.FORMAT.name]
    if len(found) == 1:
        return found[0]
    if found:
        several = ", ".join(trace_format.name for trace_format in found)
        raise TraceError(f"{path}: looks like {several}; expected ?format= with one of them")
    seen = "" if path.is_dir() or is_tar(path) else f" (it begins {first_line(path)[:80]!r})"
    listed = "; ".join(f"{trace_format.name}: {trace_format.description}" for trace_format in known.values())
    raise TraceError(f"{path}: no known trace format{seen}; expected one of {listed}")


def listing() -> list[dict[str, Any]]:
    """One row a name, for people: name, what, requests (None where it depends on options), licence, where, profile."""
    profiles = profile.names()
    rows: list[dict[str, Any]] = [
        {
            "name": entry.name,
            "what": entry.what,
            "requests": _requests(entry, locate(entry)),
            "licence": entry.licence,
            "where": str(locate(entry) or "not here"),
            "profile": entry.name in profiles,
        }
        for entry in read_manifest().values()
    ]
    for name, (_, _, what) in synthetic.WORKLOADS.items():
        rows.append(_generated(name, what, synthetic.DEFAULT_COUNT))
    for name in profiles:
        what = f"fitted statistics of {name}, no rows of it"
        rows.append(_generated(PROFILE_PREFIX + name, what, profile.read(name).default_requests))
    return rows


def _requests(entry: Entry, path: Path | None) -> int | None:
    """How many requests the name gives; None where it depends on options, or where the whole of a part is here."""
    whole = entry.part and path is not None and path.name != Path(entry.files[-1]).name
    return None if whole else entry.requests or None


def _generated(name: str, what: str, requests: int) -> dict[str, Any]:
    row = {"name": name, "what": what, "requests": requests, "licence": "Apache-2.0"}
    return {**row, "where": "generated", "profile": name.startswith(PROFILE_PREFIX)}
