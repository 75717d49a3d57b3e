"""The one way kernels are compiled: numba, cached on disk under a hash of their sources.

numba's own cache looks only at the file of the function it caches, so an edit in a callee elsewhere would leave stale
machine code behind. Here the kernels of each file have a cache folder named after all that they can be made of: the
file, the files of the package that it imports (functions, constants, array layouts), and what those import in turn. So
an edit compiles anew whatever it can reach, and nothing else. ``NUMBA_DISABLE_JIT=1`` runs kernels as Python.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

import llvmlite
import numba
from numba.core import event
from numba.core.errors import NumbaExperimentalFeatureWarning

# lanes of the engine may go where lanes of a described batch go: their first fields are the same
warnings.filterwarnings("ignore", ".*has been considered a subtype", NumbaExperimentalFeatureWarning)

F = TypeVar("F", bound=Callable[..., object])

# no wrappers for being called from Python: they would cost more compile time than the functions
CALLED_FROM_KERNELS = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
PACKAGE = Path(__file__).parent
IMPORT = re.compile(r"^ *from (l3env[\w.]*) import (\([^)]*\)|.*)$", re.MULTILINE)
COMPILING = "numba:compile"
COMPILER = f"{numba.__version__} {llvmlite.__version__} {sys.version}"


def cache_root() -> Path:
    """``L3ENV_CACHE_DIR``, or ``l3env`` in the user's cache folder."""
    own = os.environ.get("L3ENV_CACHE_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "l3env"


@cache
def imported(path: Path) -> frozenset[Path]:
    """The files of the package that a file imports from."""
    found: set[Path] = set()
    for module, names in IMPORT.findall(path.read_text("utf-8")):
        base = PACKAGE.joinpath(*module.split(".")[1:])
        inner = [base / name for name in re.findall(r"\w+", names)] if base.is_dir() else []
        places = [file for each in (base, *inner) for file in (each.with_suffix(".py"), each / "__init__.py")]
        found.update(file for file in places if file.is_file())
    return frozenset(found)


def sources(path: Path) -> list[Path]:
    """A file and all of the package that it imports, directly or not."""
    found: set[Path] = set()
    left = [path]
    while left:
        if (file := left.pop()) not in found:
            found.add(file)
            left += imported(file)
    return sorted(found)


@cache
def cache_folder(path: Path) -> Path:
    """Where the compiled kernels of a file are kept, as all its sources are now."""
    digest = hashlib.sha256(COMPILER.encode())
    for source in sources(path):
        digest.update(str(source).encode() + source.read_bytes())
    return cache_root() / "kernels" / f"{path.stem}-{digest.hexdigest()[:16]}"


def kernel(function: F) -> F:
    """Compiles an entry point: cached on disk, and without the interpreter's lock, so that threads run side by side."""
    return _compile(function, cache=True, nogil=True)


def inner(function: F) -> F:
    """Compiles a small function that is always inlined into its caller."""
    return _compile(function, forceinline=True, **CALLED_FROM_KERNELS)


def helper(function: F) -> F:
    """Compiles a function called by kernels, not inlined: rare or large."""
    return _compile(function, **CALLED_FROM_KERNELS)


def rare(function: F) -> F:
    """Compiles a function that most runs never call: as it is, never inlined into what all runs call."""
    return _compile(function, _dbg_optnone=True, **CALLED_FROM_KERNELS)


def _compile(function: F, **options: bool) -> F:
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(cache_folder(Path(function.__code__.co_filename)))
    try:
        # _nrt=False: kernels allocate nothing, so numba need not count references to the arrays passed around, which
        # cost 60 times more than the arithmetic
        return numba.njit(error_model="numpy", _nrt=False, **options)(function)
    finally:
        numba.config.CACHE_DIR = before


class _Teller(event.Listener):
    """Calls a function when the first kernel is compiled; those that come from the cache are none."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell

    def on_start(self, _: event.Event) -> None:
        event.unregister(COMPILING, self)
        _tellers.remove(self)
        self._tell()

    def on_end(self, _: event.Event) -> None:
        """Nothing."""


_tellers: list[_Teller] = []


def tell_when_compiling(tell: Callable[[], None]) -> None:
    """Calls ``tell``, in place of what was asked for before, once this process compiles something."""
    while _tellers:
        event.unregister(COMPILING, _tellers.pop())
    _tellers.append(_Teller(tell))
    event.register(COMPILING, _tellers[0])


def is_compiled() -> bool:
    """Has the engine's loop, as its sources are now, been compiled and kept here before?"""
    loop = PACKAGE / "engine" / "kernels" / "run.py"
    return bool(numba.config.DISABLE_JIT) or any(cache_folder(loop).glob("**/*.nbi"))
