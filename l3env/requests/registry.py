"""Trace formats and trace names, found through entry points; l3env itself imports no loader.

A package adds a file format with an entry point in the group ``l3env.trace_formats`` (an object like ``TraceFormat``)
and names of its own with one in ``l3env.trace_resolvers`` (a function like ``TraceResolver``). The built-in ones are
declared the same way.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from l3env.errors import TraceError
from l3env.given import given_object
from l3env.requests.workload import Workload

FORMATS_GROUP = "l3env.trace_formats"
RESOLVERS_GROUP = "l3env.trace_resolvers"
NAMES_ATTRIBUTE = "trace_names"

_Function = TypeVar("_Function", bound=Callable[..., Any])


class TraceFormat(Protocol):
    """One file format.

    Attributes:
        name: what ``format=NAME`` in a spec calls it.
        description: one line for people.
        options: keyword of ``load`` -> function that reads its value from the text of a spec (``?key=value``). A
            keyword ``seed`` gets the seed of ``load_trace``. A format that draws its rows with it (rather than reading
            fixed ones) says so with ``source["drawn_with_seed"]``, and its rows are not resampled.
    """

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...

    @property
    def options(self) -> Mapping[str, Callable[[str], Any]]: ...

    @property
    def matches(self) -> Callable[[Path], bool]:
        """True where name, first bytes or columns look like this format. Reads little; never raises on other files."""
        ...

    @property
    def load(self) -> Callable[..., Workload]:
        """``load(path, **options)``; raises TraceError naming file, row and field."""
        ...


class TraceResolver(Protocol):
    """Turns a spec into a workload, or None where the spec is none of its names."""

    def __call__(self, spec: str, seed: int) -> Workload | None: ...


def suggests(names: Callable[[], Iterable[str]]) -> Callable[[_Function], _Function]:
    """Decorator for a resolver: ``names()`` lists what it knows, for the close matches of an unknown name."""

    def mark(resolver: _Function) -> _Function:
        setattr(resolver, NAMES_ATTRIBUTE, names)
        return resolver

    return mark


@cache
def formats() -> dict[str, TraceFormat]:
    """Installed trace formats by name. Raises TraceError where two packages claim one name or one cannot be loaded."""
    found: dict[str, TraceFormat] = {}
    for entry in entry_points(group=FORMATS_GROUP):
        trace_format = cast(TraceFormat, _load(entry))
        if trace_format.name in found:
            raise TraceError(f"trace format {trace_format.name!r} is declared twice, the second time by {entry.value}")
        found[trace_format.name] = trace_format
    return found


@cache
def resolvers() -> dict[str, TraceResolver]:
    """Installed trace resolvers by entry-point name, the built-in one last so that others can take precedence."""
    entries = sorted(entry_points(group=RESOLVERS_GROUP), key=lambda entry: (entry.name == "builtin", entry.name))
    return {entry.name: cast(TraceResolver, _load(entry)) for entry in entries}


def load_trace(spec: str | Path, *, seed: int = 0) -> Workload:
    """The workload of ``spec``: a trace, a file, a synthetic workload or a profile, with ``?key=value`` options.

    Seed 0 is the trace as it is; other seeds resample it (or draw anew what is generated). Raises TraceError with the
    close matches where nothing has that name.
    """
    if not isinstance(seed, int) or seed < 0:
        raise TraceError(f"trace seed {seed!r}; expected an integer >= 0")
    text = str(spec)
    found = given_object(text)
    if isinstance(found, Workload):
        if seed:
            raise TraceError(f"workload {found.name}: seed {seed}; requests given as an object are not resampled")
        return found
    known: list[str] = []
    for resolver in resolvers().values():
        workload = resolver(text, seed)
        if workload is not None:
            return workload
        known.extend(getattr(resolver, NAMES_ATTRIBUTE, tuple)())
    raise unknown_trace(text, known)


def unknown_trace(spec: str, known: Iterable[str]) -> TraceError:
    """The error for a spec that nothing resolves, with close matches first, else all names."""
    names = sorted(set(known))
    base = spec.partition("?")[0]
    close = difflib.get_close_matches(base, names, n=4, cutoff=0.5)
    if close:
        hint = "did you mean " + ", ".join(close) + "?"
    elif names:
        hint = "known names: " + ", ".join(names)
    else:
        hint = "no trace resolver is installed (entry-point group " + RESOLVERS_GROUP + ")"
    return TraceError(f"trace {base!r}: no such name and no such file; {hint}")


def _load(entry: EntryPoint) -> object:
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        where = f"entry point {entry.group}: {entry.name} = {entry.value}"
        raise TraceError(f"{where} cannot be loaded: {error}") from error
