"""Policies by name: built in, registered, from an installed package, or from a file."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, cast

from l3env.errors import PolicyError
from l3env.policy.protocol import Policy

ENTRY_POINT_GROUP = "l3env.policies"


_registered: dict[str, Callable[[], Policy]] = {}


def register_policy(name: str, factory: Callable[[], Policy]) -> None:
    """Makes a policy known under a name in this process (a package would use the ``l3env.policies`` entry points)."""
    _registered[name] = factory


def policy_names() -> list[str]:
    """All policies known by name."""
    return sorted({*_registered, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def policy_factories() -> dict[str, Callable[[], Policy]]:
    """Name -> factory of every policy known."""
    found = {point.name: cast(Callable[[], Policy], point.load()) for point in entry_points(group=ENTRY_POINT_GROUP)}
    return found | _registered


def make_policy(ref: str) -> Policy:
    """A fresh policy by name, or from a file: ``my_policy.py:ClassName``.

    Raises:
        PolicyError: unknown name, file or class, or something that is no policy.
    """
    if ".py:" in ref:
        factory = _from_file(ref)
    elif ref in _registered:
        factory = _registered[ref]
    else:
        points = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
        if ref not in points:
            close = difflib.get_close_matches(ref, policy_names(), n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise PolicyError(f"unknown policy {ref!r}{hint}; there are: {', '.join(policy_names())}; or file.py:Class")
        factory = points[ref].load()
    policy = factory()
    return check_policy(policy, ref)


def check_policy(policy: Any, ref: str) -> Policy:
    """Raises PolicyError where an object does not keep the protocol, or wants the truth without saying so."""
    needed = ("name", "decision_interval_s", "wants_truth", "prepare", "predictor", "decide", "figures")
    missing = [name for name in needed if not hasattr(policy, name)]
    if missing:
        raise PolicyError(f"{ref}: not a policy: lacks {', '.join(missing)} (derive from l3env.BasePolicy)")
    if policy.wants_truth and not policy.name.startswith("oracle-"):
        raise PolicyError(
            f"{ref}: policy {policy.name!r} wants true output lengths; its name must start with 'oracle-'"
        )
    return cast(Policy, policy)


def _from_file(ref: str) -> Callable[[], Policy]:
    file, _, attribute = ref.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise PolicyError(f"{ref}: no such file {file!r}")
    spec = importlib.util.spec_from_file_location(f"l3env_user_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise PolicyError(f"{ref}: {path} fails to import: {type(error).__name__}: {error}") from error
    factory = getattr(module, attribute, None)
    if factory is None or not callable(factory):
        classes = [name for name, value in vars(module).items() if inspect.isclass(value)]
        raise PolicyError(f"{ref}: {path} has no class {attribute!r}; it has {', '.join(classes) or 'none'}")
    return cast(Callable[[], Policy], factory)
