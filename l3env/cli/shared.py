"""What all commands share: consoles, progress, JSON.

Results go to stdout, as tables or with ``--json``; progress, notes and errors to stderr. Nothing printed is read as
markup: names and messages are shown as they are.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from l3env.errors import L3EnvError

PIPED_WIDTH = 140  # columns where there is no terminal


def _console(*, stderr: bool) -> Console:
    here = (sys.stderr if stderr else sys.stdout).isatty() or "COLUMNS" in os.environ
    return Console(stderr=stderr, width=None if here else PIPED_WIDTH, markup=False, highlight=False, emoji=False)


out, err = _console(stderr=False), _console(stderr=True)
_for_json: list[IO[str]] = []  # stdout, while everything but JSON goes to stderr


def _print_elsewhere(context: typer.Context, as_json: bool) -> bool:
    """With ``--json``, until the command ends, stdout is for ``print_json`` alone, whatever a policy prints."""
    if as_json:
        _for_json.append(sys.stdout)
        context.call_on_close(_for_json.pop)
        context.with_resource(contextlib.redirect_stdout(sys.stderr))
    return as_json


Json = Annotated[
    bool, typer.Option("--json", callback=_print_elsewhere, help="Print JSON on stdout and nothing else there.")
]
Model = Annotated[str, typer.Option(help="A preset (l3env models) or a TOML file.")]
Trace = Annotated[str, typer.Option(help="A name (l3env traces list), a file, or a spec.")]
Policies = Annotated[str, typer.Option(help="Names with commas between, or file.py:Class.")]
TtftScale = Annotated[float, typer.Option(help="SLO: TTFT, times the request's own uncontended one.")]
TbtScale = Annotated[float, typer.Option(help="SLO: mean time between tokens, likewise.")]
TtftLimit = Annotated[float | None, typer.Option(help="SLO: TTFT in seconds instead.")]
TbtLimit = Annotated[float | None, typer.Option(help="SLO: mean time between tokens in seconds instead.")]
SloForm = Annotated[str, typer.Option(help="SLO on tokens: mean-tbt, p99-gap or token-deadlines.")]
PrefixCache = Annotated[str, typer.Option(help="Share KV of equal prompt beginnings: off, lru, lfu, tree or score.")]
Patience = Annotated[float | None, typer.Option(help="Seconds without a first token until a client leaves.")]
Jobs = Annotated[int, typer.Option("--jobs", "-j", help="Runs at a time; -1: one a core.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Forget what the folder holds.")]
SHOWN_FAILURES = 5
AUTHORS_ERRORS = ("PolicyError", "PlanError")


def print_json(value: Any) -> None:
    """Strict JSON on stdout."""
    print(json.dumps(value, indent=2, allow_nan=False), file=_for_json[-1] if _for_json else None)


def announce_compilation(*, compile_now: bool = False, prefix_cache: str = "off") -> None:
    """From here on, says so when kernels are compiled, whatever the reason: the first use, another version, a variant.

    ``compile_now`` does it here and now, so that several processes do not do it side by side.
    """
    from l3env import jit

    jit.tell_when_compiling(lambda: say("compiling kernels (once per version, about a minute) ..."))
    if compile_now and (prefix_cache != "off" or not jit.is_compiled()):
        from l3env.runs.driver import warm_up

        warm_up(prefix_cache)


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Gives a function (done, total, what) that moves a bar on stderr."""
    columns = (
        TextColumn(title.replace("{", "{{").replace("}", "}}"), markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}", style="dim", markup=False),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("", total=None)

        def move(done: int, total: int, what: str) -> None:
            if progress.tasks[0].total is None:  # what an earlier run has done says nothing about the time left
                progress.reset(task, completed=done, total=total)
            progress.update(task, completed=done, total=total, description=what)

        yield move


def folder_out(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """An option's folder, if it can be written to; it is not made yet. Raises L3EnvError before anything runs."""
    if path is not None:
        _try_folder(path, f"{param.opts[0]} {path}")
    return path


def file_out(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """An option's file, if it can be written. Raises L3EnvError before anything runs."""
    if path is not None:
        said = f"{param.opts[0]} {path}"
        if path.is_dir():
            raise L3EnvError(f"{said}: is a folder; expected a file")
        _try_folder(path.parent, said)
    return path


Results = Annotated[
    Path | None,
    typer.Option(callback=folder_out, help="Folder for results; what it holds unchanged is not run again."),
]


def _try_folder(path: Path, said: str) -> None:
    missing = [each for each in (path, *path.parents) if not each.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        first = next(each for each in (path, *path.parents) if each.exists())
        why = f"{first} is a file" if first.is_file() else f"nothing can be made in {first} ({error.strerror})"
        raise L3EnvError(f"{said}: {why}; expected a folder that can be written to") from None
    finally:
        for each in missing:
            with contextlib.suppress(OSError):
                each.rmdir()


def numbers(text: str, option: str, count: int | None = None) -> list[float]:
    """Comma-separated positive numbers of an option, ``count`` of them where that is given."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise L3EnvError(f"{option} {text!r}; expected a number, or several with commas between") from None
    if not all(0 < value < float("inf") for value in values):
        raise L3EnvError(f"{option} {text!r}; expected numbers > 0")
    if count is not None and len(values) != count:
        raise L3EnvError(f"{option} {text!r}; expected {count} number{'s' if count > 1 else ''}")
    return values


def asked_slo(context: typer.Context) -> Any:
    """The SLO of a command's options. Raises L3EnvError where a limit is given both ways."""
    from l3env.engine.engine import Slo

    exclusive(context, "ttft_s", "ttft_scale")
    exclusive(context, "tbt_s", "tbt_scale")
    asked = context.params
    return Slo(*(asked[name] for name in ("ttft_scale", "tbt_scale", "ttft_s", "tbt_s", "slo_form")))


def names(text: str, option: str) -> tuple[str, ...]:
    """Comma-separated names of an option, at least one."""
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if not found:
        raise L3EnvError(f"{option} {text!r}; expected a name, or several with commas between")
    return found


def repeated_command() -> str:
    """The command as a user would repeat it."""
    return shlex.join(["l3env", *sys.argv[1:]])


def exclusive(context: typer.Context, option: str, *others: str) -> None:
    """Raises L3EnvError where an option and one of the others, which it contradicts, are both given."""
    given = [n for n in (option, *others) if getattr(context.get_parameter_source(n), "name", "") == "COMMANDLINE"]
    if option in given and len(given) > 1:
        shown = [f"--{name.replace('_', '-')}" for name in given]
        raise L3EnvError(f"{shown[0]} and {', '.join(shown[1:])} contradict each other; expected one of them")


def finite(value: Any) -> Any:
    """None for what JSON has no number for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say_taken(taken_count: int, count: int, folder: Path | None) -> None:
    """How many results were there already, if any."""
    if folder is not None and taken_count:
        say(f"{taken_count:,} of {count:,} taken from {folder}")


def say(text: str, label: str = "", style: str = "") -> None:
    """A line on stderr: text as it is, not broken; its label in colour."""
    err.print(Text.assemble((label, style), text), soft_wrap=True)


def note(text: str) -> None:
    """A note on stderr."""
    say(text, "note: ", "yellow")


def fail(text: str) -> NoReturn:
    """Ends with an error of the user's: exit code 2."""
    say(text, "error: ", "bold red")
    sys.exit(2)


def stop_at_mistake(rows: Sequence[Mapping[Any, Any]]) -> None:
    """Where there is but one policy, and none of its runs was possible, the first mistake of its author is all there is
    to say."""
    errors = [row.get("error") for row in rows]
    if rows and len({row["policy"] for row in rows}) == 1 and all(isinstance(error, str) for error in errors):
        kind, _, text = str(errors[0]).partition(": ")
        if kind in AUTHORS_ERRORS:
            fail(text)


def end(failed: Any) -> None:
    """Ends a command with code 1 where runs have failed. ``failed``: their rows."""
    if len(failed):
        raise typer.Exit(1)
