"""What can be read from all that a policy is handed. True lengths and arrivals to come are marked numbers.

Two walks start at the View, the machine, the training requests and the policy's own attributes. The *documented* one
takes names without an underscore, items, bases of arrays and what properties and methods without arguments give: it
must find no mark. The *open* one (``gc.get_referents``) ignores that fence: what it finds must lie behind a name with
an underscore, which is all that keeps a policy in one process with the engine from the truth.
"""

from __future__ import annotations

import gc
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

import l3env
from l3env import BasePolicy, Knobs, View, Workload
from l3env.choices import Status
from l3env.engine.engine import Engine
from l3env.engine.rollout import Rollouts
from l3env.runs.driver import run_policy

OUTPUT, PROMPT, ARRIVAL_S = 40_009, 90_011, 7_654_321.125  # marks: + a request's index x STRIDE
STRIDE = 1024
MARGIN = 100  # tokens: what is searched for lies beyond what requests have now, which grows by one at a time
LIMIT = 200_000  # objects of a walk
OPAQUE = (types.ModuleType, type, types.CodeType, types.FrameType, str, bytes, int, float, complex)


def marked(count: int, soon: int) -> Workload:
    """Requests with outputs that nobody can guess; those from ``soon`` on arrive after all others have ended."""
    idx = np.arange(count)
    late = idx >= soon
    return Workload.build(
        "marked",
        np.where(late, ARRIVAL_S + idx * STRIDE, idx * 0.5),
        np.where(late, PROMPT + idx * STRIDE, 100 + idx),
        OUTPUT + idx * STRIDE,
    )


def marks(workload: Workload, status: np.ndarray) -> set[float]:
    """Numbers that a policy may not know while requests have these states."""
    secret: set[float] = set(workload.output_tokens[status != Status.FINISHED].tolist())
    future = status == Status.FUTURE
    return secret | set(workload.prompt_tokens[future].tolist()) | set(workload.arrival_s[future].tolist())


def numbers(array: np.ndarray) -> Iterator[np.ndarray]:
    """The numbers of an array, columns of records one by one, and its bytes as any number that fits them."""
    if array.dtype.names:
        for name in array.dtype.names:
            yield from numbers(array[name])
    elif array.dtype.kind in "iuf":
        yield array
    if array.dtype.kind in "iufV" and array.flags.c_contiguous and array.size:
        raw = array.reshape(-1).view(np.uint8)
        for kind in (np.int32, np.int64, np.float64):
            size = np.dtype(kind).itemsize
            yield raw[: raw.size // size * size].view(kind)


def shows(found: Any, secret: np.ndarray) -> bool:
    """Is one of the marks in an array or a number?"""
    if isinstance(found, np.ndarray):
        return any(bool(np.isin(each, secret).any()) for each in numbers(found))
    return isinstance(found, int | float | np.number) and not isinstance(found, bool) and float(found) in secret


def neighbours(found: Any) -> Iterator[tuple[str, Any]]:
    """(name, what it leads to) by documented means."""
    if isinstance(found, np.ndarray):
        if found.base is not None:
            yield ".base", found.base
        if found.dtype.kind == "O":
            yield from ((f"[{place}]", each) for place, each in enumerate(found.reshape(-1)[:1000]))
        return
    if isinstance(found, Mapping):
        for key, value in list(found.items())[:1000]:
            if not str(key).startswith("_"):
                yield f"[{key!r}]", value
    elif isinstance(found, list | tuple | set | frozenset):
        yield from ((f"[{place}]", each) for place, each in enumerate(list(found)[:1000]))
    if isinstance(found, types.FunctionType) and found.__closure__:
        yield from (
            (f"<closure {n}>", c.cell_contents)
            for n, c in zip(found.__code__.co_freevars, found.__closure__, strict=True)
        )
    if not type(found).__module__.startswith(("l3env", "tests.campaigns")):
        return
    for name in dir(found):
        if name.startswith("_"):
            continue
        try:
            value = getattr(found, name)
        except Exception:  # a property that has nothing to give now
            continue
        yield f".{name}", value
        if inspect.ismethod(value) and isinstance(found, View) and takes_nothing(value):
            yield f".{name}()", value()


def takes_nothing(method: Any) -> bool:
    parameters = inspect.signature(method).parameters.values()
    return all(each.default is not each.empty for each in parameters)


def walk(start: Mapping[str, Any], secret: set[float]) -> tuple[int, list[str]]:
    """(objects seen, paths to marks) by documented means."""
    wanted = np.array(sorted(secret))
    seen, leaks, kept = set(), [], []
    left = [(name, value) for name, value in start.items()]
    while left and len(seen) < LIMIT:
        path, found = left.pop()
        if shows(found, wanted):
            leaks.append(path)
        if isinstance(found, OPAQUE) or found is None or id(found) in seen:
            continue
        seen.add(id(found))
        kept.append(found)  # so that no other object gets its id
        left += [(path + name, value) for name, value in neighbours(found)]
    return len(seen), leaks


def behind_the_fence(view: View, secret: set[float]) -> list[str]:
    """Names by which the open walk gets to arrays with marks; each begins at a View's attribute."""
    wanted = np.array(sorted(secret))
    found = []
    for name, value in vars(view).items():
        seen: set[int] = set()
        left = [value]
        while left and len(seen) < LIMIT:
            each = left.pop()
            if id(each) in seen or isinstance(each, OPAQUE):
                continue
            seen.add(id(each))
            if isinstance(each, np.ndarray) and shows(each, wanted):
                found.append(name)
                break
            if isinstance(each, np.ndarray) and each.base is not None:
                left.append(each.base)
            if isinstance(each, Engine | View | list | tuple | dict | np.ndarray) or type(each).__name__ == "State":
                left += gc.get_referents(each)
    return found


class Curious(BasePolicy):
    """Looks into everything at every few decisions, and plans with imagined futures."""

    name = "curious"

    def __init__(self, workload: Workload, every: int, limit: int) -> None:
        self._hidden = workload  # the campaign's own, to know the marks
        self.every, self.limit = every, limit
        self.decisions, self.searched, self.objects = 0, 0, 0
        self.leaks: set[str] = set()
        self.fences: set[str] = set()
        self.asked: list[np.ndarray] = []

    def prepare(self, system, training) -> None:
        self.system, self.training = system, training
        self.rollouts = Rollouts(system, 2, 1)

    def predictor(self):
        def predict(prompts):
            self.asked.append(prompts)
            return prompts / 2

        return predict

    def decide(self, view: View) -> Knobs:
        self.decisions += 1
        if self.decisions % self.every == 0 and self.searched < self.limit:
            self.search(view)
        return Knobs(admit_max_count=2)

    def search(self, view: View) -> None:
        present = view.present
        view.imagine(self.rollouts, 0, present["emitted_tokens"] + 5)
        self.rollouts.start(0, 0)
        engine = view._engine  # to know the marks; not a policy's to do
        secret = marks(self._hidden, engine.state.req["status"][0, : len(self._hidden)])
        if present["kv_tokens"].max(initial=0) + MARGIN > min(secret):
            return
        self.searched += 1
        start = {"view": view, "system": self.system, "training": self.training, "rollouts": self.rollouts}
        start |= {"self.slo": self.slo, "waiting": view.waiting(1000)}
        count, leaks = walk(start, secret)
        self.objects += count
        self.leaks.update(leaks)
        if self.searched <= 3:
            self.fences.update(behind_the_fence(view, secret))


def campaign(decisions: int, seed: int = 1, every: int = 97) -> str:
    """So many decisions of a policy that looks into everything. Raises AssertionError for a mark that it finds."""
    rng = np.random.default_rng(seed)
    soon = 6
    workload = marked(soon + 3, soon)
    trained = Workload.build("earlier", np.arange(20.0), rng.integers(1, 500, 20), rng.integers(1, 500, 20))
    tables = l3env.compile_pair("gpu-dgx-a100?gpus_count=1", "llama-3-8b?max_model_len=200000", tp=1)
    policy = Curious(workload, every, decisions)
    run_policy(tables, workload, policy, training=trained)
    assert policy.searched > 0
    assert not policy.leaks, sorted(policy.leaks)
    assert all(name.startswith("_") for name in policy.fences), policy.fences
    (asked,) = policy.asked
    assert asked.tolist() == sorted(set(workload.prompt_tokens.tolist()))  # lengths, not who comes when
    return (
        f"{policy.decisions:,} decisions, {policy.searched:,} of them searched: {policy.objects:,} objects, no true "
        f"length and no arrival to come; behind names with an underscore: {', '.join(sorted(policy.fences))}"
    )
