"""The entry point: finds commands by name; user errors become one line, an interrupt is quiet."""

from __future__ import annotations

import importlib.metadata
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from l3env import __version__
from l3env.cli.shared import fail, note, say
from l3env.errors import L3EnvError

GROUP = "l3env.commands"
INTERRUPTED = 130
COUNTS = ("L3ENV_THREADS", "NUMBA_NUM_THREADS", "LOKY_MAX_CPU_COUNT")
FOLDERS = ("L3ENV_CACHE_DIR", "L3ENV_TRACE_DIR", "XDG_CACHE_HOME")


class Commands(Mapping[str, Any]):
    """Commands by name, each imported when it is first asked for: a function, or a Typer application of several."""

    def __init__(self) -> None:
        self.points = {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}

    def __getitem__(self, name: str) -> Any:
        return _command(self.points[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)


class Group(TyperGroup):
    """A group of the commands there are."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings | {"commands": Commands()})


app = typer.Typer(cls=Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def l3env(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Scheduling of LLM serving on heterogeneous memory: compare policies on real traces."""


def main() -> None:
    """Runs the command line."""
    warnings.showwarning = _show_warning
    try:
        _check_variables()
        app()
    except L3EnvError as error:
        fail(str(error))
    except OSError as error:  # a full disk, a folder that was taken away, ...
        fail(f"{error.filename or 'file'}: {error.strerror or error}")
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer has caught the KeyboardInterrupt
            say("interrupted; what was finished is kept")
        raise


def _check_variables() -> None:
    """Raises L3EnvError for variables of the environment that cannot be read; libraries would end in a traceback."""
    for name in COUNTS:
        text = os.environ.get(name, "")
        if text and (not text.isdecimal() or int(text) < 1):
            raise L3EnvError(f"{name} = {text!r}; expected a whole number >= 1")
    for name in FOLDERS:
        text = os.environ.get(name, "")
        if Path(text).is_file():
            raise L3EnvError(f"{name} = {text!r}; expected a folder, not a file")


def _command(point: importlib.metadata.EntryPoint) -> Any:
    """What an entry point names, or, where it cannot be imported, a command that says so."""
    try:
        found = point.load()
    except (ImportError, AttributeError) as error:
        found = _broken(point, error)
    if isinstance(found, typer.Typer):
        command: Any = typer.main.get_group(found)
    else:
        alone = typer.Typer(add_completion=False)
        alone.command()(found)
        command = typer.main.get_command(alone)
    command.name = point.name
    return command


def _broken(point: importlib.metadata.EntryPoint, error: Exception) -> Any:
    text = f"Cannot be loaded from {point.value!r}: {error}."

    def command() -> None:
        raise L3EnvError(f"command {point.name!r}: {text[0].lower()}{text[1:]}")

    command.__doc__ = escape(text)  # help is read as markup
    return command


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    note(str(message))
