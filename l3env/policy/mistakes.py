"""What authors of policies get wrong, in three lines: the policy; file and line; when, what was expected, what came."""

from __future__ import annotations

import contextlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import l3env.errors
from l3env.errors import L3EnvError, PlanError, PolicyError

HOUSE = Path(l3env.errors.__file__).parent
NOT_THEIRS = ("site-packages", "dist-packages")
EXPECTED = {  # of each hook
    "prepare": "that it returns",
    "predictor": "None, or a function of prompt tokens that gives one finite number per request",
    "scorer": "None, or an array of weights",
    "decide": "Knobs, Scored or Plan",
    "score_segments": "one finite number per row",
    "figures": "a dict of numbers by name",
}


def wrong_answer(
    policy: Any, hook: str, got: str, at_s: float | None = None, expected: str | None = None
) -> L3EnvError:
    """The error of a hook that returned something else than what was expected."""
    said = f"expected {expected or EXPECTED[hook]}; got {got}"
    return _error(PolicyError, policy_label(policy), f"{hook} gives a wrong answer", place(policy, hook), at_s, said)


def failed(policy: Any, hook: str, error: BaseException, at_s: float | None = None) -> L3EnvError:
    """The error of a hook that raised one, or of an answer that the engine refuses."""
    kind = PlanError if isinstance(error, PlanError) else PolicyError
    where = place(policy, hook, error)
    return _error(kind, policy_label(policy), f"{hook} fails", where, at_s, raised(error, EXPECTED[hook]))


def no_progress(policy: Any, at_s: float, got: str) -> L3EnvError:
    """The error of decisions that leave requests waiting for ever."""
    said = f"expected decisions by which some request gets on; got {got}"
    return _error(PolicyError, policy_label(policy), "is stuck", place(policy, "decide"), at_s, said)


def not_made(label: str, problem: str, where: str, said: str) -> L3EnvError:
    """The error of a policy that is none, before anything runs."""
    return _error(PolicyError, label, problem, where, None, said)


def ask(policy: Any, hook: str, *arguments: Any, at_s: float | None = None) -> Any:
    """What a hook returns. Raises PolicyError, or PlanError where it made illegal knobs, naming its author's line."""
    try:
        return getattr(policy, hook)(*arguments)
    except (Exception, SystemExit) as error:
        raise failed(policy, hook, error, at_s) from error


@contextlib.contextmanager
def blaming(policy: Any, hook: str, at_s: float | None = None) -> Iterator[None]:
    """What fails meanwhile follows from what a hook returned."""
    try:
        yield
    except Exception as error:
        raise failed(policy, hook, error, at_s) from error


def raised(error: BaseException, expected: str) -> str:
    """What was expected and what came instead; errors of l3env's own say both."""
    text = " ".join(str(error).split())
    if isinstance(error, L3EnvError):
        return text
    return f"expected {expected}; got {type(error).__name__}{': ' if text else ''}{text}"


def shown(value: Any) -> str:
    """A value in a few words."""
    if value is None:
        return "None (a return is missing?)"
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def policy_label(policy: Any) -> str:
    """What errors call it: its name, or its class's where it was given none."""
    name = getattr(policy, "name", None)
    return type(policy).__name__ if not isinstance(name, str) or name == "unnamed" else name


def place(policy: Any, hook: str, error: BaseException | None = None) -> str:
    """File and line: the last of the author's own that led to an error, else where the hook begins."""
    asked: Any = getattr(policy, hook, None)
    code = getattr(inspect.unwrap(getattr(asked, "__func__", asked)), "__code__", None)
    file = file_of(type(policy)) or (Path(code.co_filename) if code else None)
    if found := last_line(error, file):
        return found
    if code is None or file is None or not _is_theirs(Path(code.co_filename), file):
        return class_line(type(policy))
    return f"{short(Path(code.co_filename))}:{code.co_firstlineno}, in {hook}"


def file_of(made_by: Any) -> Path | None:
    """The file of a class or function."""
    file = getattr(sys.modules.get(getattr(made_by, "__module__", None) or ""), "__file__", None)
    return None if file is None else Path(file)


def last_line(error: BaseException | None, file: Path | None) -> str | None:
    """The last line of a file, or of those in its folder and below, that led to an error; None where there is none."""
    if error is None or file is None:
        return None
    if isinstance(error, SyntaxError) and error.filename and _is_theirs(Path(error.filename), file):
        return f"{short(Path(error.filename))}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_theirs(Path(frame.filename), file)]
    return f"{short(Path(frames[-1].filename))}:{frames[-1].lineno}, in {frames[-1].name}" if frames else None


def class_line(made_by: Callable[..., Any]) -> str:
    """Where a class or function is defined."""
    name = getattr(made_by, "__name__", type(made_by).__name__)
    try:
        file, line = inspect.getfile(made_by), inspect.getsourcelines(made_by)[1]
    except (OSError, TypeError):
        return f"{getattr(made_by, '__module__', '?')}.{name}, whose source is not at hand"
    return f"{short(Path(file))}:{line}, {name}"


def _is_theirs(path: Path, file: Path) -> bool:
    if path == file:
        return True
    if HOUSE in path.parents or file.parent not in path.parents:
        return False
    return not set(NOT_THEIRS) & set(path.relative_to(file.parent).parts)


def short(path: Path) -> str:
    """A path as one would write it here."""
    folder = Path.cwd()
    return str(path.relative_to(folder)) if folder in path.parents else str(path)


def _error(kind: type[L3EnvError], label: str, problem: str, where: str, at_s: float | None, said: str) -> L3EnvError:
    when = "before the run" if at_s is None else f"at {at_s:.3f} s"
    return kind(f"policy {label!r}: {problem}\n  {where}\n  {when}: {said}")
