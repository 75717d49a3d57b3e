"""Objects where a reference is expected: policies, specs, workloads made in Python.

Comparisons and their cells are made of references, so that a file can keep them and another process read them. An
object gets a name, its own and a hash of what it holds, under which this process and its workers find it again.
"""

from __future__ import annotations

import hashlib
import pickle
from typing import Any

import cloudpickle

MARK = "@"
HASH_CHARS = 10

_given: dict[str, bytes] = {}


def reference(value: Any) -> str:
    """The value itself where it is a text (a path, as a text), else a name for it."""
    if isinstance(value, str) or hasattr(value, "__fspath__"):
        return str(value)
    packed = cloudpickle.dumps(value)
    label = getattr(value, "name", None) or getattr(value, "__name__", None) or type(value).__name__
    name = f"{label}{MARK}{hashlib.sha256(packed).hexdigest()[:HASH_CHARS]}"
    _given[name] = packed
    return name


def given_object(name: str) -> Any:
    """A fresh copy of the object that a name stands for; None where there is none."""
    return pickle.loads(_given[name]) if name in _given else None  # packed by this process or the one it works for


def label_of(name: str) -> str:
    """A name without its hash; any other reference as it is."""
    return name.rpartition(MARK)[0] if name in _given else name


def everything() -> dict[str, bytes]:
    """All that was given, for workers."""
    return dict(_given)


def take(packed: dict[str, bytes]) -> None:
    """What another process was given."""
    _given.update(packed)
