"""How commands join: by name, from any package, imported when they are asked for."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import l3env
from l3env.cli import app
from l3env.cli.options import option, options_of, tuple_of
from l3env.cli.shared import numbers
from l3env.errors import L3EnvError

runner = CliRunner()


@pytest.fixture
def another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution on the path, as pip would install it: a function, a group, two commands that cannot be loaded."""
    (tmp_path / "theirs.py").write_text(
        "import typer\n"
        "group = typer.Typer(help='Two of them.')\n"
        "@group.command()\ndef one(): print('one')\n"
        "@group.command()\ndef two(): print('two')\n"
        "def greet(name: str):\n    'Says hello.'\n    print('hello', name)\n"
    )
    (tmp_path / "needy.py").write_text("raise ImportError('pip install theirs[train]')\n")
    about = tmp_path / "theirs-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[l3env.commands]\ngreet = theirs:greet\ntheirs = theirs:group\nlost = theirs.nowhere:command\n"
        "needy = needy:go\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("another_package")
def test_a_package_adds_commands_by_declaring_them() -> None:
    assert runner.invoke(app, ["greet", "you"]).stdout == "hello you\n"
    assert runner.invoke(app, ["theirs", "two"]).stdout == "two\n"
    shown = runner.invoke(app, ["--help"]).output
    assert all(text in shown for text in ("greet", "Says hello.", "theirs", "Two of them.", "compare"))


@pytest.mark.usefixtures("another_package")
def test_one_that_cannot_be_imported_spoils_neither_the_list_nor_the_others() -> None:
    shown = runner.invoke(app, ["--help"]).output
    assert "Cannot be loaded" in shown
    assert "theirs[train]" in "".join(shown.replace("│", "").split())
    found = runner.invoke(app, ["lost"])
    assert isinstance(found.exception, L3EnvError)
    assert "'lost'" in str(found.exception)
    assert "theirs.nowhere" in str(found.exception)


def test_a_misspelt_command_is_told_the_right_one() -> None:
    assert "Did you mean 'compare'" in " ".join(runner.invoke(app, ["compere"]).output.split())


def test_version() -> None:
    assert runner.invoke(app, ["--version"]).stdout == f"{l3env.__version__}\n"


def test_a_command_alone_is_imported() -> None:
    code = (
        "import sys; from l3env.cli import app; app(['systems', '--json'], standalone_mode=False); "
        "rooms = {name for name in sys.modules if name.startswith(('l3env.experiments', 'l3env.traces'))}; "
        "sys.exit(str(rooms) if rooms else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_brackets_in_an_error_are_shown_as_they_are(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "l3env.cli", "traces", "stats", str(tmp_path / "t[red][/].csv")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "t[red][/].csv" in done.stderr.replace("\n", "")


@dataclass(frozen=True)
class Settings:
    rates: tuple[float, ...] = option((0.5, 1.0), "Several rates.", "--rate", lambda *given: tuple(numbers(*given)))
    places: tuple[str, ...] = option(("here",), "Given several times.", "--place", tuple_of)
    most_count: int = option(3, "A number.")
    inner: str = "no option"


def test_options_of_a_command_follow_from_a_dataclass() -> None:
    given: dict[str, Any] = {}

    @options_of(Settings)
    def command(out: Path, *, quick: bool = False, **chosen: Any) -> None:
        given.update(chosen, out=out, quick=quick)

    alone = typer.Typer()
    alone.command()(command)
    assert runner.invoke(alone, ["x"]).exit_code == 0
    defaults = Settings()
    assert given == {
        "rates": defaults.rates,
        "places": defaults.places,
        "most_count": 3,
        "out": Path("x"),
        "quick": False,
    }
    runner.invoke(alone, ["y", "--quick", "--rate", "2,3", "--place", "a", "--place", "b", "--most-count", "5"])
    assert given == {"rates": (2.0, 3.0), "places": ("a", "b"), "most_count": 5, "out": Path("y"), "quick": True}
    wrong = runner.invoke(alone, ["x", "--rate", "fast"])
    assert "--rate 'fast'" in str(wrong.exception)
    shown = runner.invoke(alone, ["--help"]).output
    assert "--inner" not in shown
    assert "Several rates." in shown


def test_the_command_line_starts_without_the_engine() -> None:
    """Names of the package are imported when they are asked for; all that it says it has can be."""
    code = (
        "import sys, l3env.cli; heavy = {'numba', 'pandas', 'scipy', 'pyarrow'} & sys.modules.keys(); "
        "import l3env; missing = [name for name in l3env.__all__ if not hasattr(l3env, name)]; "
        "sys.exit(str((heavy, missing)) if heavy or missing or hasattr(l3env, 'nosuch') else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
