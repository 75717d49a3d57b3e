"""Kinds of frozen cells. Each runs something small and gives its results as parts.

A cell also has a ``rate``: how fast requests come, found when it is first kept (where it follows from the capacity) and
kept with it, so that a change of capacity does not hide behind another workload.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import gymnasium
import numpy as np
from numpy.typing import NDArray

from l3env import (
    Budget,
    FixedKnobs,
    Knobs,
    Policy,
    Slo,
    capacity_requests_per_s,
    compare,
    compile_pair,
    load,
    load_trace,
    make_policy,
    run_policy,
)
from l3env.envs.observe.requests import REQUEST_FEATURES
from l3env.errors import SpecError
from l3env.experiments.reproduce.run import rows_of
from l3env.machine.tables import Tables, compile_tables
from l3env.runs.reactive import run_reactive
from l3env.search.tune import Case, probe, tune
from l3env.traces.prover.search import ProofSearch, SearchSettings, earlier_requests
from tests.frozen.figures import Part, Parts, column, columns, known_metrics, numbers, parts_of
from tests.frozen.served import KINDS, Chains, plain

KNOBS = (
    "admit_max_count", "prefill_budget_tokens", "budget_counts_decodes", "prefill_first", "hbm_share_frac", "order",
    "headroom_frac", "reserve_predicted", "sub_batching", "victim", "pim_form", "multi_token", "prefill_in_order",
)  # fmt: skip


SERVED_TOKENS = 1_000_000  # as when they were frozen: a model had no longest request


class Frozen(Protocol):
    """A cell."""

    def rate(self) -> float: ...

    def run(self, rate: float) -> Parts: ...


@cache
def machine(system: str, model: str, changes: tuple[tuple[str, Any], ...] = ()) -> Tables:
    """A compiled pair; changes are fields of the system or the model (``system__``, ``model__``), or ``tp``."""
    if not changes:
        return compile_pair(system, f"{model}?max_model_len={SERVED_TOKENS}")
    of = {
        side: {name.removeprefix(f"{side}__"): value for name, value in changes if name.startswith(f"{side}__")}
        for side in ("system", "model")
    }
    specs = load(f"system/{system}", **of["system"]), load(f"model/{model}", max_model_len=SERVED_TOKENS, **of["model"])
    return compile_tables(*specs, tp=dict(changes).get("tp"))


@dataclass(frozen=True)
class Served:
    """One run of a policy (a name, knobs, or a function that makes one) on ``count`` requests of a kind."""

    system: str
    model: str
    policy: str | Mapping[str, Any] | Callable[[], Policy] = "sarathi"
    kind: str = "plain"
    count: int = 150
    utilization: float = 0.9
    slo: Mapping[str, Any] = field(default_factory=dict)
    prefix_cache: str = "off"
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tables(self) -> Tables:
        return machine(self.system, self.model, tuple(self.changes.items()))

    def _policy(self) -> Policy:
        if isinstance(self.policy, str):
            return make_policy(self.policy)
        if isinstance(self.policy, Mapping):
            return FixedKnobs("fixed", Knobs(**self.policy))
        return self.policy()

    def rate(self) -> float:
        rate = self.utilization * capacity_requests_per_s(self.tables, KINDS[self.kind](self.count, 1.0, 0))
        return float(f"{rate:.6g}")

    def run(self, rate: float) -> Parts:
        make = KINDS[self.kind]
        outcome = run_policy(
            self.tables,
            make(self.count, rate, 0),
            self._policy(),
            slo=Slo(**self.slo),
            training=make(120, rate, 1),
            prefix_cache=self.prefix_cache,
        )
        return parts_of(outcome)


@dataclass(frozen=True)
class Pairs:
    """A system with every model: a few requests each, or the name of the error where a model does not fit."""

    system: str
    models: tuple[str, ...]

    def rate(self) -> float:
        return 2.0

    def run(self, rate: float) -> Parts:
        return {model: self._one(model, rate) for model in self.models}

    def _one(self, model: str, rate: float) -> Part:
        try:
            tables = machine(self.system, model)
        except SpecError as error:
            return type(error).__name__
        replicas = tables.replicas_count
        requests = plain(10 * replicas if replicas <= 8 else 24, rate * replicas, 3, output=40)
        budget = Budget.ALIGN_WHEN_FULL if tables.has_pim else 2048
        outcome = run_policy(
            tables, requests, FixedKnobs("fixed", Knobs(prefill_budget_tokens=budget, hbm_share_frac=0.2))
        )
        return numbers(parts_of(outcome))


@cache
def feature_names() -> list[str]:
    env = gymnasium.make("l3env/Serving-v0", disable_env_checker=True, trace="profile:azure-conv-2023?n=20")
    return list(env.unwrapped.feature_names())


@dataclass(frozen=True)
class Env:
    """An environment under random legal actions: ``envs`` of them side by side, or (0) one alone.

    Attributes:
        fixed_rate: of ``kind``, which is served instead of the trace, where given.
        made: arguments of the environment.
    """

    envs: int
    steps: int
    made: Mapping[str, Any]
    requests: bool = False
    kind: str = ""
    fixed_rate: float = 1.0

    def rate(self) -> float:
        return self.fixed_rate

    def run(self, rate: float) -> Parts:
        name = "l3env/ServingRequests-v0" if self.requests else "l3env/Serving-v0"
        made = {"trace": "profile:azure-conv-2023?n=600", **self.made}
        options = {"workload": KINDS[self.kind](120, rate, 0)} if self.kind else None
        if self.envs:
            env: Any = gymnasium.make_vec(name, num_envs=self.envs, **made)
            levels = env.levels
        else:
            env = gymnasium.make(name, disable_env_checker=True, **made)
            levels = env.unwrapped.knob_levels()
        rng, heads = np.random.default_rng(11), [len(each) for each in levels.values()]
        seen: dict[str, list[Any]] = {}
        finals: list[Mapping[str, Any]] = []
        obs, info = env.reset(seed=3, options=options)
        self._note(seen, obs, info)
        for _ in range(self.steps):
            action = self._action(rng, np.atleast_2d(info["action_mask"]), heads)
            obs, reward, ended, cut, info = env.step(action if self.envs else action[0])
            for what, value in (("rewards", reward), ("terminated", ended), ("truncated", cut)):
                seen.setdefault(what, []).append(np.atleast_1d(np.asarray(value, np.float64)))
            self._note(seen, obs, info)
            if not self.envs and ended:
                finals.append(info["metrics"])
                obs, info = env.reset(options=options)
            elif self.envs and "final_info" in info:
                finals += [each for each in info["final_info"]["metrics"] if each is not None]
        env.close()
        parts: Parts = {what: column(np.stack(values)) for what, values in seen.items()}
        return parts | {"final metrics": numbers([known_metrics(each) for each in finals])}

    def _note(self, seen: dict[str, list[Any]], obs: Any, info: Mapping[str, Any]) -> None:
        """Adds what an agent sees to the columns."""
        state = np.atleast_2d(obs["state"] if self.requests else obs)
        for i, name in enumerate(feature_names()):
            seen.setdefault(f"obs {name}", []).append(state[:, i])
        if self.requests:
            for i, (name, _) in enumerate(REQUEST_FEATURES):
                seen.setdefault(f"obs row {name}", []).append(np.atleast_2d(np.asarray(obs["requests"])[..., i]))
        names = ["action_mask", "clock_s", "elapsed_s"]
        if not self.envs:
            counts = ("arrived", "finished", "rejected", "slo_met", "preemptions", "iterations")
            names += [f"{name}_count" for name in counts] + ["output_tokens"]
        for name in names:
            seen.setdefault(f"info {name}", []).append(np.asarray(info[name]))

    def _action(self, rng: np.random.Generator, mask: NDArray[np.bool_], heads: list[int]) -> NDArray[Any]:
        if self.requests:
            return rng.uniform(-1, 1, mask.shape).astype(np.float32)
        drawn = np.where(mask, rng.random(mask.shape), -1.0)
        return np.stack([part.argmax(axis=1) for part in np.split(drawn, np.cumsum(heads)[:-1], axis=1)], axis=1)


SEARCH = {"theorems_count": 24, "trees_count": 16, "jobs_count": 4, "samples_count": 24, "verifiers_count": 4}


@dataclass(frozen=True)
class Reactive:
    """A client that waits for its answers: chains of requests, or proof searches (with these settings)."""

    system: str
    model: str
    policy: str
    search: Mapping[str, Any] | None = None
    prefix_cache: str = "off"
    replicas: int | None = None
    slo: Mapping[str, Any] = field(default_factory=dict)

    def rate(self) -> float:
        return 20.0

    def run(self, rate: float) -> Parts:
        client: Chains | ProofSearch = Chains(40, 5, rate)
        training = plain(120, rate, 1)
        if self.search is not None:
            client = ProofSearch(SearchSettings(**{**SEARCH, **self.search}))
            training = earlier_requests(client)
        outcome = run_reactive(
            machine(self.system, self.model),
            client,
            lambda: make_policy(self.policy),
            training=training,
            replicas_count=self.replicas,
            prefix_cache=self.prefix_cache,
            slo=Slo(**self.slo),
        )
        return parts_of(outcome)


@dataclass(frozen=True)
class Traces:
    """Workloads by their specs."""

    specs: tuple[str, ...]
    seed: int = 0

    def rate(self) -> float:
        return 0.0

    def run(self, rate: float) -> Parts:
        parts: Parts = {}
        for spec in self.specs:
            w = load_trace(spec, seed=self.seed)
            times = (w.arrival_s, w.prompt_tokens, w.output_tokens, w.parent_idx, w.think_s, w.session_idx)
            parts[spec] = [float(len(w)), *columns((*times, w.prefix_ids, w.prefix_offsets))]
        return parts


@dataclass(frozen=True)
class Search:
    """The search for the best fixed knobs, or every change of one of the default's."""

    system: str
    model: str
    kind: str = "plain"
    probing: bool = False

    def rate(self) -> float:
        return Served(self.system, self.model, kind=self.kind).rate()

    def run(self, rate: float) -> Parts:
        cells = [Case(machine(self.system, self.model), KINDS[self.kind](80, rate, 0), Slo())]
        found = probe(cells, Knobs()) if self.probing else tune(cells, random_count=12, rounds_count=1)
        parts: Parts = {
            "tried": column(found.tried[["goodput_frac", "value"]].to_numpy()),
            "knobs": " ".join(f"{float(getattr(found.knobs, name)):g}" for name in KNOBS),
            "goodput": column(found.goodput_frac),
        }
        return parts | {f"around {name}": column(values) for name, values in sorted(found.around.items())}


@dataclass(frozen=True)
class Compared:
    """Rows of ``compare``."""

    policies: tuple[str, ...]
    system: str
    model: str
    trace: str
    options: Mapping[str, Any]

    def rate(self) -> float:
        return 0.0

    def run(self, rate: float) -> Parts:
        rows = compare(list(self.policies), self.system, self.model, self.trace, **self.options).results
        parts: Parts = {}
        for row in rows.to_dict("records"):
            name = f"{row['policy']} seed {row['seed']} at {row['utilization'] or row['load']:.3g}"
            parts[name] = numbers([row["load"], known_metrics(row)])
        return parts


@dataclass(frozen=True)
class Figure:
    """Rows of ``reproduce``."""

    name: str

    def rate(self) -> float:
        return 0.0

    def run(self, rate: float) -> Parts:
        rows = rows_of(self.name, lambda *_: None)
        return {f"{i:02d} {row['case']}: {row['quantity']}": numbers(row["ours"]) for i, row in enumerate(rows)}
