"""The one way kernels are compiled: numba, cached on disk under a hash of their sources.

numba's own cache looks only at the file of the function it caches, so an edit in a callee elsewhere would leave stale
machine code behind; a cache folder named after all that kernels are made of cannot: the modules that use this one, and
the modules of the package that those import (their constants and array layouts). ``NUMBA_DISABLE_JIT=1`` runs kernels
as Python.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numba

F = TypeVar("F", bound=Callable[..., object])

# no wrappers for being called from Python: they would cost more compile time than the functions
CALLED_FROM_KERNELS = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
PACKAGE = Path(__file__).parent
IMPORT = re.compile(r"^from l3env\.([a-z0-9_.]+) import", re.MULTILINE)


def cache_root() -> Path:
    """``L3ENV_CACHE_DIR``, or ``l3env`` in the user's cache folder."""
    own = os.environ.get("L3ENV_CACHE_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "l3env"


def _sources() -> list[Path]:
    """The files that compiled code is made of: those that import this module, and what they import from the package."""
    imports = {path: set(IMPORT.findall(path.read_text("utf-8"))) for path in PACKAGE.glob("**/*.py")}
    compiled = {path: names for path, names in imports.items() if "jit" in names}
    used = {PACKAGE.joinpath(*name.split(".")).with_suffix(".py") for names in compiled.values() for name in names}
    return sorted(path for path in compiled.keys() | used if path.exists())


def _source_hash() -> str:
    digest = hashlib.sha256(f"{numba.__version__} {sys.version}".encode())
    for path in _sources():
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


CACHE_DIR = cache_root() / "kernels" / _source_hash()


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
    numba.config.CACHE_DIR = str(CACHE_DIR)
    try:
        # _nrt=False: kernels allocate nothing, so numba need not count references to the arrays passed around, which
        # cost 60 times more than the arithmetic
        return numba.njit(error_model="numpy", _nrt=False, **options)(function)
    finally:
        numba.config.CACHE_DIR = before


def is_compiled() -> bool:
    """Has this version of the sources been compiled and cached here before?"""
    return bool(numba.config.DISABLE_JIT) or any(CACHE_DIR.glob("**/*.nbi"))
