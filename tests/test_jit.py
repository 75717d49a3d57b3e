"""Compiled code is kept under all that it is made of."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from l3env import jit
from l3env.engine.kernels import run

FILES = {
    "kernels/top.py": "from l3env.kernels import middle\nfrom l3env.layout import (\n    SIZE,\n    WIDTH,\n)\n",
    "kernels/middle.py": "from l3env.kernels.bottom import f\n",
    "kernels/bottom.py": "import numpy\n",
    "kernels/alone.py": "from l3env.layout import SIZE\n",
    "kernels/__init__.py": "",
    "layout.py": "from l3env.units import GB\n",
    "units.py": "GB = 1e9\n",
    "unrelated.py": "",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Path]]:
    """A package in which a file may be edited; gives the cache folders of its modules with kernels."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(jit, "PACKAGE", tmp_path)

    def folders(edited: str | None = None) -> dict[str, Path]:
        if edited is not None:
            (tmp_path / edited).write_text(FILES[edited] + "# edited\n")
        jit.imported.cache_clear()
        jit.cache_folder.cache_clear()
        return {
            name: jit.cache_folder(tmp_path / "kernels" / f"{name}.py") for name in ("top", "middle", "bottom", "alone")
        }

    yield folders
    jit.imported.cache_clear()
    jit.cache_folder.cache_clear()


@pytest.mark.parametrize(
    ("edited", "anew"),
    [
        ("kernels/top.py", {"top"}),
        ("kernels/middle.py", {"top", "middle"}),
        ("kernels/bottom.py", {"top", "middle", "bottom"}),
        ("layout.py", {"top", "alone"}),
        ("units.py", {"top", "alone"}),  # through the layout
        ("unrelated.py", set()),
    ],
)
def test_an_edit_compiles_anew_what_it_can_reach(
    package: Callable[..., dict[str, Path]], edited: str, anew: set[str]
) -> None:
    before, after = package(), package(edited)
    assert {name for name in before if before[name] != after[name]} == anew


def test_sources_hold_every_module_that_python_loads() -> None:
    """Found in the text, against what an import really brings."""
    loaded = reached(run)
    found = {path.relative_to(jit.PACKAGE).with_suffix("") for path in jit.sources(Path(run.__file__))}
    assert loaded <= {".".join(("l3env", *path.parts)) for path in found}


def reached(start: types.ModuleType) -> set[str]:
    """Modules of the package whose functions or constants a module can see, directly or not, by its namespace."""
    seen, left = set(), [start]
    while left:
        module = left.pop()
        if module.__name__ in seen:
            continue
        seen.add(module.__name__)
        for value in vars(module).values():
            home = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
            if isinstance(home, str) and home.startswith("l3env."):
                left.append(sys.modules[home])
    return seen
