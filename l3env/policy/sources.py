"""Source files behind a policy: its own module, the modules beside it that it imports, and they import, and the data
files that these name. What a policy reads besides is not seen."""

from __future__ import annotations

import ast
import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import l3env.errors

FILE_NAME = re.compile(r"[\w./-][\w./ -]{0,199}")
HOUSE = Path(l3env.errors.__file__).resolve().parent


def source_files(made_by: Any) -> tuple[Path, ...]:
    """The files of a class or function, in order of discovery; none for what is l3env's own, or was typed in."""
    module = sys.modules.get(getattr(made_by, "__module__", None) or "")
    file = getattr(module, "__file__", None)
    if module is None or file is None or module.__name__.partition(".")[0] == HOUSE.name:
        return ()
    path = Path(file).resolve()
    depth = module.__name__.count(".") + (path.name == "__init__.py") if module.__package__ else 0
    root = path.parents[depth]
    if depth == 0 and root.name in ("site-packages", "dist-packages"):
        return (path,)
    return tuple(imported(path, root, root / module.__name__.partition(".")[0] if depth else root))


def imported(path: Path, root: Path, within: Path) -> list[Path]:
    """A file and those of a folder that it imports, directly or not, l3env's own left out.

    Args:
        root: where the names of modules begin.
    """
    found, left = [path], [path]
    while left:
        for each in _imports(left.pop(), root):
            if each not in found and within in each.parents and HOUSE not in each.parents:
                found.append(each)
                left.append(each)
    return found


def _imports(path: Path, root: Path) -> Iterator[Path]:
    """Files of the import statements of one file."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield from _files(root, name.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            folder = path.parents[node.level - 1] if node.level else root
            parts = node.module.split(".") if node.module else []
            yield from _files(folder, parts)
            for name in node.names:
                yield from _files(folder, [*parts, name.name])


def _files(folder: Path, parts: list[str]) -> Iterator[Path]:
    """The modules of a dotted name under a folder, those of the packages it lies in included."""
    for depth in range(1, len(parts) + 1):
        place = folder.joinpath(*parts[:depth])
        for file in (place.with_name(place.name + ".py"), place / "__init__.py"):
            if file.is_file():
                yield file


def data_files(path: Path) -> list[Path]:
    """Files that a module's string literals name, from its folder or from folders in it that they name, too."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return []
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    texts = sorted({text for text in constants if isinstance(text, str) and FILE_NAME.fullmatch(text)})
    places = [path.parent, *(path.parent / text for text in texts if (path.parent / text).is_dir())]
    named = [place / text for text in texts if Path(text).suffix for place in places]
    return [file for file in named if file.is_file()]


@contextlib.contextmanager
def importable(folder: Path, *, first: bool) -> Iterator[None]:
    """Modules in a folder can be imported meanwhile: last of all, or first and then forgotten, so that another folder's
    may have the same names."""
    entry, before, kept = str(folder), set(sys.modules), sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # byte code is found by seconds and size, so a quick edit would not be seen
    sys.path.insert(0 if first else len(sys.path), entry)
    try:
        yield
    finally:
        sys.dont_write_bytecode = kept
        sys.path.remove(entry)
        for name in set(sys.modules) - before if first else ():
            file = getattr(sys.modules[name], "__file__", None)
            if file and folder in Path(file).resolve().parents:
                del sys.modules[name]
