"""Options of a command from the fields of a dataclass: each is written once, where its value lives."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer


def option(default: Any, text: str, flag: str | None = None, read: Callable[[Any, str], Any] | None = None) -> Any:
    """A field that is also an option.

    Args:
        text: its help.
        flag: its name on the command line, by default the field's.
        read: (a text, the flag) -> the field's value; by default the command line gives a value of the field's type.
    """
    return dataclasses.field(default=default, metadata={"text": text, "flag": flag, "read": read})


def tuple_of(given: list[str], _: str) -> tuple[str, ...]:
    """Of an option that is given several times."""
    return tuple(given)


def options_of(config: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a command an option for each field of ``config`` that is one; it receives them as keyword arguments."""
    fields = [field for field in dataclasses.fields(config) if "text" in field.metadata]
    types = typing.get_type_hints(config)

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def run(**given: Any) -> Any:
            for field in fields:
                if field.metadata["read"] is not None:
                    given[field.name] = field.metadata["read"](given[field.name], _flag(field))
            return command(**given)

        own = inspect.signature(command, eval_str=True)
        kept = [each for each in own.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        run.__signature__ = own.replace(  # type: ignore[attr-defined]
            parameters=sorted(
                [*kept, *(_parameter(field, types[field.name]) for field in fields)], key=lambda each: each.kind
            )
        )
        return run

    return decorate


def _flag(field: dataclasses.Field[Any]) -> str:
    return field.metadata["flag"] or "--" + field.name.replace("_", "-")


def _parameter(field: dataclasses.Field[Any], kind: Any) -> inspect.Parameter:
    default, read = field.default, field.metadata["read"]
    if read is tuple_of:
        kind, default = list[str], list(default)  # type: ignore[arg-type]
    elif read is not None:
        kind, default = str, ",".join(map(str, default))  # type: ignore[arg-type]
    shown = Annotated[kind, typer.Option(_flag(field), help=field.metadata["text"])]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=shown)
