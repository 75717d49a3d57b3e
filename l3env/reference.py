"""References: how policies, systems, models and traces are named, in one grammar for command line, files and Python.

    BASE[?KEY=VALUE[&KEY=VALUE]...]

BASE is a name, a file, ``file.py:Class`` and so on; who resolves it says what there is. The options after the last
``?`` change it: ``sarathi?prefill_budget_tokens=2048``, ``l3-dgx-a100?gpu.hbm_bytes=40e9``. Values are read as what
they are for: ``40e9`` is a whole number where one is expected. ``%XX`` in a value is the character of that code, as in
URLs: ``%26`` is ``&``, ``%25`` is ``%``, and ``%2C`` is a comma where lists are split at commas. A text that is an
existing file or folder is that, whatever its characters.
"""

from __future__ import annotations

import difflib
import enum
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from l3env.errors import L3EnvError


@dataclass(frozen=True)
class Reference:
    """A reference taken apart.

    Attributes:
        what: what it stands for, as errors say it: "policy", "trace", "system" ...
        text: as it was written.
        options: key -> text of its value, decoded, in order.
        error: what is raised for it.
    """

    what: str
    text: str
    base: str
    options: Mapping[str, str]
    error: type[L3EnvError]

    def wrong(self, problem: str) -> L3EnvError:
        """The error that names this reference."""
        return self.error(f"{self.what} {self.text!r}: {problem}")

    def unknown_key(self, key: str, known: Iterable[str]) -> L3EnvError:
        """The error for a key that there is not, close matches first."""
        names = sorted(known)
        close = difflib.get_close_matches(key, names, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        possible = f"expected one of {', '.join(names)}" if names else "it takes none"
        return self.wrong(f"unknown key {key!r}{hint}; {possible}")

    def read(self, key: str, parser: Callable[[str], Any]) -> Any:
        """The value of an option; ``parser`` raises ValueError with what it expected."""
        try:
            return parser(self.options[key])
        except ValueError as error:
            raise self.wrong(f"key {key!r}: got {self.options[key]!r}; expected {error}") from error

    def values(self, parsers: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
        """All options, each read by the parser of its key. Raises ``error`` for a key without one."""
        found = {}
        for key in self.options:
            if key not in parsers:
                raise self.unknown_key(key, parsers)
            found[key] = self.read(key, parsers[key])
        return found

    def arguments(self, function: Callable[..., Any], more: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The options as keyword arguments of a class or function, read by its type hints.

        Args:
            more: further keys and their hints, for what a ``**`` parameter takes.

        Raises:
            ``error`` for keys that it does not take and for required ones that are missing.
        """
        hints = parameters(function)
        values = self.values({key: parser_of(hint) for key, hint in {**(more or {}), **hints}.items()})
        if missing := [key for key in required(function) if key not in values]:
            raise self.wrong(f"missing {', '.join(missing)}; expected {self.base}?{missing[0]}=VALUE")
        return values


def parse(text: str, what: str = "reference", error: type[L3EnvError] = L3EnvError) -> Reference:
    """Takes a reference apart. Raises ``error`` for an option without a key or value, or given twice."""
    base, _, query = (text, "", "") if "?" not in text or exists(text) else text.rpartition("?")
    whole = Reference(what, text, base, {}, error)
    options: dict[str, str] = {}
    for item in filter(None, query.split("&")):
        key, equals, value = item.partition("=")
        if not equals or not value or not key:
            raise whole.wrong(f"key {key!r} has no value; expected {key or 'KEY'}=VALUE")
        if key in options:
            raise whole.wrong(f"key {key!r} is given twice; expected once")
        options[key] = unquote(value)
    return Reference(what, text, base, options, error)


def exists(text: str) -> bool:
    """Whether there is such a file or folder; False where the text cannot be a path."""
    try:
        return bool(text) and Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """Name -> type hint of the keywords that a class or function takes; the default's type where there is no hint."""
    try:
        hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else _plain(function))
    except (NameError, TypeError, AttributeError):
        hints = {}
    found = {}
    for name, each in inspect.signature(function).parameters.items():
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY):
            typed = each.default is not each.empty and each.default is not None
            found[name] = hints.get(name, type(each.default) if typed else Any)
    return found


def required(function: Callable[..., Any]) -> list[str]:
    """Parameters of a class or function without a default."""
    each = inspect.signature(function).parameters
    return [n for n, p in each.items() if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """What ``functools.partial`` wraps, and a class's constructor."""
    inner = getattr(function, "func", function)
    return inner.__init__ if inspect.isclass(inner) else inner


def parser_of(hint: Any) -> Callable[[str], Any]:
    """The function that reads a text as a value of a type; it raises ValueError with what it expected."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return parser_of(typing.get_args(hint)[0])
    if origin in (typing.Union, types.UnionType):
        return _first_of([parser_of(each) for each in sorted(typing.get_args(hint), key=lambda each: each is str)])
    if origin is typing.Literal:
        return _one_of({str(each): each for each in typing.get_args(hint)})
    if inspect.isclass(hint) and issubclass(hint, enum.Enum):
        return _one_of({each.name: each for each in hint} | {str(each.value): each for each in hint})
    if hint in PARSERS:
        return PARSERS[hint]
    return _not_in_a_text


def whole_number(text: str) -> int:
    """An integer, also as 40e9. Raises ValueError."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        raise ValueError("a whole number") from None
    if not math.isfinite(value) or value != int(value):
        raise ValueError("a whole number")
    return int(value)


def number(text: str) -> float:
    """A finite number. Raises ValueError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError("a finite number")
    return value


def truth(text: str) -> bool:
    """``true`` or ``false``. Raises ValueError."""
    if text.lower() not in ("true", "false"):
        raise ValueError("true or false")
    return text.lower() == "true"


def nothing(text: str) -> None:
    """``none``. Raises ValueError."""
    if text.lower() != "none":
        raise ValueError("none")


def anything(text: str) -> Any:
    """What a text looks like: a number, true, false, none, else the text itself."""
    return _first_of([whole_number, number, truth, nothing, str])(text)


PARSERS: dict[Any, Callable[[str], Any]] = {
    int: whole_number,
    float: number,
    bool: truth,
    str: str,
    Path: Path,
    type(None): nothing,
    Any: anything,
}


def _one_of(values: Mapping[str, Any]) -> Callable[[str], Any]:
    """Reads one of several names; case, and ``-`` for ``_``, do not matter."""
    known = {name.lower().replace("-", "_"): value for name, value in values.items()}

    def parse_name(text: str) -> Any:
        key = text.lower().replace("-", "_")
        if key not in known:
            names = [name for name in values if not name.lstrip("-").isdigit()] or list(values)
            raise ValueError(f"one of {', '.join(names)}")
        return known[key]

    return parse_name


def _first_of(parsers: list[Callable[[str], Any]]) -> Callable[[str], Any]:
    def parse_one(text: str) -> Any:
        wanted = []
        for parser in parsers:
            try:
                return parser(text)
            except ValueError as error:
                wanted.append(str(error))
        raise ValueError(" or ".join(dict.fromkeys(wanted)))

    return parse_one


def _not_in_a_text(text: str) -> Any:
    raise ValueError("what cannot be written in a reference; give it in Python")
