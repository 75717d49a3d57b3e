"""Policies by reference: built in, registered, from an installed package, from a file, or what a training run wrote.

What a reference begins with: a name; ``file.py:Class``, or ``file.py`` with one policy in it; ``package.module:Class``;
or something that a resolver of the entry-point group ``l3env.policy_resolvers`` knows, such as the folder of a training
run. Its options are the arguments of the class: ``sarathi?prefill_budget_tokens=2048``. A class whose arguments are
``**knobs`` takes the fields of Knobs.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

import numpy as np

from l3env.errors import L3EnvError, PolicyError
from l3env.files import is_file
from l3env.given import given_object, label_of
from l3env.knobs import Knobs
from l3env.policy.mistakes import HOUSE, class_line, file_of, last_line, not_made, place, raised, short, shown
from l3env.policy.protocol import HOOKS, BasePolicy, Policy, Role
from l3env.policy.sources import data_files, importable, source_files
from l3env.reference import Reference, parameters, parse

ENTRY_POINT_GROUP = "l3env.policies"
RESOLVERS_GROUP = "l3env.policy_resolvers"

Factory = Callable[..., Policy]
PolicyLike = str | Policy | Factory
"""What stands for a policy: a reference, a policy, or a class or function that makes one."""


class PolicyResolver(Protocol):
    """Turns what a reference begins with into a factory, or None where it is nothing of its kind."""

    def __call__(self, base: str) -> Factory | None: ...


_registered: dict[str, Factory] = {}
_loaded: set[Path] = set()  # files of which policies were taken
ASKED = {name: inspect.signature(hook) for name, hook in vars(Policy).items() if name in HOOKS and callable(hook)}
"""How each hook is called."""


def register_policy(name: str, factory: Factory) -> None:
    """Makes a policy known under a name in this process (a package would use the ``l3env.policies`` entry points)."""
    _registered[name] = factory


def policy_names() -> list[str]:
    """All policies known by name."""
    return sorted({*_registered, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def policy_factories() -> dict[str, Factory]:
    """Name -> factory of every policy known."""
    found = {point.name: cast(Factory, point.load()) for point in entry_points(group=ENTRY_POINT_GROUP)}
    return found | _registered


def policies_of(*roles: Role) -> tuple[str, ...]:
    """Names of the policies that have one of the roles, role by role."""
    role_of = {name: getattr(factory, "role", Role.HEURISTIC) for name, factory in sorted(policy_factories().items())}
    return tuple(name for role in roles for name in role_of if role_of[name] == role)


@functools.cache
def reference_policy(has_pim: bool) -> str:
    """The policy whose capacity ``utilization`` refers to, on systems with or without a PIM side.

    Raises PolicyError where none, or more than one, declares that it is.
    """
    factories = policy_factories().items()
    found = [name for name, factory in factories if getattr(factory, "reference_with_pim", None) is has_pim]
    if len(found) != 1:
        raise PolicyError(f"reference_with_pim = {has_pim}: declared by {found}; expected one policy")
    return found[0]


def make_policy(ref: PolicyLike) -> Policy:
    """A fresh policy of a reference or a class; a policy itself is taken as it is.

    Raises:
        PolicyError: unknown name, file, class or argument, or something that is no policy.
    """
    ref = _itself(ref)
    if not isinstance(ref, str):
        if not callable(ref) and not hasattr(ref, "decide"):
            raise PolicyError(
                f"{policy_name(ref)!r} is a {type(ref).__name__}; expected a policy, its class or its reference"
            )
        made = ref() if inspect.isclass(ref) or not hasattr(ref, "decide") else ref
        return check_policy(made, policy_name(ref))
    reference = parse(ref, "policy", PolicyError)
    factory = _factory(reference)
    inner = _inner(factory)
    try:
        with _beside(file_of(inner)):
            policy = factory(**reference.arguments(factory, _more(factory)))
    except (Exception, SystemExit) as error:
        if isinstance(error, L3EnvError) and inner.__module__.partition(".")[0] == HOUSE.name:
            raise
        said = raised(error, "a policy").removeprefix(f"{reference.what} {ref!r}: ")
        raise not_made(ref, "cannot be made", _constructor_line(inner, error), said) from error
    return check_policy(policy, ref)


def _inner(factory: Any) -> Any:
    """What ``functools.partial`` wraps."""
    while isinstance(factory, functools.partial):
        factory = factory.func
    return factory


def _constructor_line(inner: Any, error: BaseException) -> str:
    """The line that failed, else where the constructor begins."""
    code = getattr(vars(inner).get("__init__") if inspect.isclass(inner) else inner, "__code__", None)
    if found := last_line(error, file_of(inner)):
        return found
    return (
        class_line(inner) if code is None else f"{short(Path(code.co_filename))}:{code.co_firstlineno}, {code.co_name}"
    )


def policy_name(ref: PolicyLike) -> str:
    """What results call it: the reference, or the name of the policy."""
    if isinstance(ref, str):
        return label_of(ref)
    return str(getattr(ref, "name", None) or getattr(ref, "__name__", type(ref).__name__))


def _itself(ref: PolicyLike) -> PolicyLike:
    """The object that a name stands for, else the reference."""
    found: PolicyLike | None = given_object(ref) if isinstance(ref, str) else None
    return ref if found is None else found


def policy_files(ref: PolicyLike) -> tuple[Path, ...]:
    """The files that a policy depends on, besides l3env's own sources: its module and what that imports from beside it,
    the data files that these name, and every file among its arguments, such as the weights of a training run.

    Raises:
        PolicyError: it cannot be found.
    """
    ref = _itself(ref)
    if isinstance(ref, str):
        reference = parse(ref, "policy", PolicyError)
        factory = _factory(reference)
        arguments = reference.arguments(factory, _more(factory))
    else:
        factory, arguments = (ref if callable(ref) else type(ref)), {}
    inner = factory
    while isinstance(inner, functools.partial):
        arguments = inner.keywords | arguments
        inner = inner.func
    defaults = {name: each.default for name, each in inspect.signature(factory).parameters.items()}
    named = [value for value in {**defaults, **arguments}.values() if isinstance(value, Path)]
    sources = source_files(inner)
    named += [file for source in sources for file in data_files(source)]
    return tuple(dict.fromkeys([*sources, *(path for path in named if is_file(path))]))


def policy_module(ref: PolicyLike) -> Path | None:
    """The file of a policy's class; None for one that more than its sources and reference make up: an object, or a
    function of this process with values of its own. Raises PolicyError where it cannot be found."""
    ref = _itself(ref)
    factory = _inner(_factory(parse(ref, "policy", PolicyError)) if isinstance(ref, str) else ref)
    if not callable(factory):
        factory = type(factory)
    written = inspect.isclass(factory) or (inspect.isfunction(factory) and factory.__closure__ is None)
    file = getattr(sys.modules.get(factory.__module__), "__file__", None) if written else None
    return None if file is None else Path(file)


def check_policy(policy: Any, ref: str) -> Policy:
    """Raises PolicyError where an object does not keep the protocol, or wants the truth without saying so."""
    missing = [name for name in HOOKS if getattr(policy, name, None) is None]
    if getattr(type(policy), "decide", None) is BasePolicy.decide and "decide" not in getattr(policy, "__dict__", {}):
        missing = ["decide"]
    if missing:
        said = (
            f"expected all that l3env.BasePolicy has; got none of {', '.join(missing)} (derive from l3env.BasePolicy)"
        )
        raise not_made(ref, f"lacks {', '.join(missing)}", class_line(type(policy)), said)
    for hook, asked in ASKED.items():
        _check_signature(policy, hook, asked, ref)
    every_s = policy.decision_interval_s
    if not isinstance(every_s, int | float | np.number) or not every_s >= 0:
        said = f"expected seconds, 0 or more; got {shown(every_s)}"
        raise not_made(ref, "wrong decision_interval_s", class_line(type(policy)), said)
    if not isinstance(policy.name, str):
        said = f"expected a text; got {shown(policy.name)}"
        raise not_made(ref, "wrong name", class_line(type(policy)), said)
    if policy.wants_truth and not policy.name.startswith("oracle-"):
        said = f"it wants true output lengths; its name must start with 'oracle-'; got {policy.name!r}"
        raise not_made(ref, "wrong name", class_line(type(policy)), said)
    return cast(Policy, policy)


def _check_signature(policy: Any, hook: str, asked: inspect.Signature, ref: str) -> None:
    """Raises PolicyError for a hook that cannot be called as it is going to be."""
    names = list(asked.parameters)[1:]
    try:
        signature = inspect.signature(getattr(policy, hook))
        signature.bind(*names)
    except ValueError:  # of a function that is not Python's
        return
    except TypeError:
        found = getattr(policy, hook)
        got = f"{hook}{inspect.signature(found)}" if callable(found) else shown(found)
        said = f"expected {hook}({', '.join(names)}); got {got}"
        raise not_made(ref, f"wrong arguments of {hook}", place(policy, hook), said) from None


def beside(policy: Policy) -> AbstractContextManager[None]:
    """What lies beside a policy's file can be imported by its hooks meanwhile."""
    return _beside(file_of(type(policy)))


def _beside(file: Path | None) -> AbstractContextManager[None]:
    return nullcontext() if file is None or file not in _loaded else importable(file.parent, first=True)


def _factory(reference: Reference) -> Factory:
    """What makes the policies of a reference."""
    base = reference.base
    if not base:
        raise reference.wrong("expected a name, file.py:Class, package.module:Class, or the folder of a training run")
    if base in _registered:
        return _registered[base]
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name == base:
            return cast(Factory, point.load())
    for point in entry_points(group=RESOLVERS_GROUP):
        found = cast(PolicyResolver, point.load())(base)
        if found is not None:
            return found
    file, colon, attribute = base.rpartition(":")
    if base.endswith(".py"):
        return _only_policy(base, _module_of_file(base, Path(base)))
    if not colon:
        close = difflib.get_close_matches(base, policy_names(), n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise PolicyError(
            f"unknown policy {base!r}{hint}; there are: {', '.join(policy_names())}; or file.py:Class, "
            "package.module:Class, the folder of a training run"
        )
    module = _module_of_file(base, Path(file)) if file.endswith(".py") else _module(base, file)
    factory = getattr(module, attribute, None)
    if factory is None or not callable(factory):
        classes = [name for name, value in vars(module).items() if inspect.isclass(value)]
        raise PolicyError(f"{base}: {file} has no class {attribute!r}; it has {', '.join(classes) or 'none'}")
    return cast(Factory, factory)


def _only_policy(ref: str, module: ModuleType) -> Factory:
    """The one class of a module that decides."""
    classes = [
        value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module.__name__
    ]
    found = [each for each in classes if hasattr(each, "decide")]
    if len(found) != 1:
        names = ", ".join(each.__name__ for each in found or classes) or "none"
        problem = "has several policies" if found else "has no class with decide; of classes it has"
        raise PolicyError(f"{ref}: {problem}: {names}; expected {ref}:Class")
    return cast(Factory, found[0])


def _more(factory: Factory) -> dict[str, Any]:
    """Keys that a class takes as ``**knobs``: the fields of Knobs, those out of its signature aside."""
    signature = inspect.signature(factory).parameters.values()
    takes = any(each.kind is each.VAR_KEYWORD and each.name == "knobs" for each in signature)
    own = parameters(factory)
    return {name: hint for name, hint in typing.get_type_hints(Knobs).items() if takes and name not in own}


def _module_of_file(ref: str, path: Path) -> ModuleType:
    """Runs a file as a module of its own; what lies beside it can be imported meanwhile."""
    if not is_file(path):
        raise PolicyError(f"{ref}: no such file {str(path)!r}")
    folder = path.resolve().parent
    unique = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(f"l3env_user_{path.stem}_{unique}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    own = Path(spec.origin or path)
    _loaded.add(own)
    try:
        with importable(folder, first=True):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise _not_imported(ref, own, error) from error
    return module


def _not_imported(ref: str, file: Path, error: BaseException) -> L3EnvError:
    where = last_line(error, file) or short(file)
    return not_made(ref, f"{short(file)} fails to import", where, raised(error, "a file that can be imported"))


def _module(ref: str, name: str) -> ModuleType:
    """A module that is installed, or that lies in the current folder."""
    try:
        with importable(Path.cwd(), first=False):
            return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        where = last_line(error, Path.cwd() / f"{name}.py") or f"module {name}"
        said = raised(error, "a module that can be imported")
        raise not_made(ref, f"module {name!r} fails to import", where, said) from error
