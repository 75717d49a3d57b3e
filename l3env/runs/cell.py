"""One cell: a policy on a machine, serving requests. Whatever compares policies is made of cells.

Common random numbers: the requests of a cell depend on trace, load and seed only, never on the policy.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import pandas as pd

from l3env.engine.engine import Slo, patience_of
from l3env.engine.segments import eviction_rule
from l3env.errors import L3EnvError
from l3env.given import reference
from l3env.machine.pair import compile_pair
from l3env.machine.tables import DEFAULT_BLOCK_TOKENS, Tables
from l3env.policy.protocol import Policy
from l3env.policy.registry import make_policy
from l3env.requests.registry import load_trace
from l3env.requests.workload import Workload
from l3env.runs.content import policy_content, requests_sha256, sha256
from l3env.runs.driver import run_policy, training_window
from l3env.runs.store import REQUESTS, TIMELINES

KEY_CHARS = 40  # of each part of a cell's name
Result = tuple[dict[str, Any], dict[str, pd.DataFrame]]  # figures, frames by kind


class Machine(NamedTuple):
    """Arguments of ``compile_pair``."""

    system: str
    model: str
    tp: int | None
    block_tokens: int


class Requests(NamedTuple):
    """A trace, or its earlier part that policies learn from."""

    trace: str
    seed: int = 0
    earlier: bool = False


class Saturation(NamedTuple):
    """What utilization 1 of a trace refers to."""

    machine: Machine
    requests: Requests
    prefix_cache: str


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        policy: a name, or ``file.py:Class``.
        system, model: preset names or TOML files.
        trace: a trace spec, its window included; see ``load_trace``.
        load: arrival rate as a multiple of the trace's own; or
        utilization: as a multiple of what the reference policy serves at saturation on this machine.
        seed: 0 is the trace itself, others are resampled from it (generated traces are drawn anew).
        prefix_cache: ``off``, or how cached prompt segments are given up: ``lru``, ``lfu``, ``tree``, ``score``.
        patience_s: after so many seconds without a first token a client leaves; None: never.
        training: trace of earlier requests to learn from, at the cell's load or utilization; None: the first fifth.
        record: keep every request and the time line.
    """

    policy: str
    system: str
    model: str
    trace: str
    load: float | None = None
    utilization: float | None = None
    seed: int = 0
    slo: Slo = field(default_factory=Slo)
    prefix_cache: str = "off"
    training: str | None = None
    patience_s: float | None = None
    tp: int | None = None
    block_tokens: int = DEFAULT_BLOCK_TOKENS
    record: bool = True

    def __post_init__(self) -> None:
        for name in ("policy", "system", "model", "trace"):
            object.__setattr__(self, name, reference(getattr(self, name)))
        if (self.load is None) == (self.utilization is None):
            raise L3EnvError(f"load = {self.load}, utilization = {self.utilization}; expected one of them")
        eviction_rule(self.prefix_cache)
        patience_of(self.patience_s)

    @property
    def key(self) -> str:
        """Name of its files: readable, and its own by a hash of all fields."""
        level = f"{'load' if self.utilization is None else 'utilization'}{self.level:.6g}"
        fields = asdict(self)
        if self.patience_s is None:
            del fields["patience_s"]  # as names were before there was patience
        return job_name(fields, self.policy, self.system, self.model, self.trace, level, f"seed{self.seed}")

    @property
    def level(self) -> float:
        """Its load or utilization."""
        return float(next(each for each in (self.load, self.utilization) if each is not None))

    @property
    def machine(self) -> Machine:
        return Machine(self.system, self.model, self.tp, self.block_tokens)

    @property
    def requests(self) -> Requests:
        return Requests(self.trace, self.seed)

    @property
    def earlier(self) -> Requests:
        """What its policy may learn from."""
        return Requests(self.trace, earlier=True) if self.training is None else Requests(self.training)

    @property
    def saturations(self) -> list[Saturation]:
        """What its utilization refers to: with its requests, and with a training trace of its own."""
        if self.utilization is None:
            return []
        traces = [self.trace] if self.training is None else [self.trace, self.training]
        return [Saturation(self.machine, Requests(trace), self.prefix_cache) for trace in traces]

    def row(self) -> dict[str, Any]:
        """What its row says of it."""
        names = ("policy", "system", "model", "trace", "load", "utilization", "seed", "prefix_cache", "patience_s")
        return {name: getattr(self, name) for name in names} | {f"slo_{n}": v for n, v in asdict(self.slo).items()}


def job_name(identity: Any, *parts: str) -> str:
    """File name of a job: its parts, and a hash of all that says which one it is."""
    shown = ("".join(c if c.isalnum() or c in "-_." else "_" for c in part)[-KEY_CHARS:] for part in parts)
    return ".".join((*shown, sha256(identity)[:8]))


@dataclass(frozen=True)
class Ready:
    """A cell with all that it names looked up. Workloads are at load 1."""

    cell: Cell
    load: float
    training_load: float
    tables: Tables
    workload: Workload
    training: Workload

    def policy(self) -> Policy:
        """A fresh one."""
        return make_policy(self.cell.policy)


def serve(ready: Ready) -> Result:
    """Serves the cell's requests."""
    cell = ready.cell
    outcome = run_policy(
        ready.tables,
        ready.workload.at_load(ready.load),
        ready.policy(),
        slo=cell.slo,
        training=ready.training.at_load(ready.training_load),
        record=cell.record,
        prefix_cache=cell.prefix_cache,
        patience_s=cell.patience_s,
    )
    return outcome.metrics, {REQUESTS: outcome.requests, TIMELINES: outcome.timeline} if cell.record else {}


class Lookup:
    """What names stand for, each looked up once."""

    def __init__(self) -> None:
        self.tables = lru_cache(maxsize=32)(lambda machine: compile_pair(*machine))
        self.requests = lru_cache(maxsize=16)(_requests)
        self.policy = lru_cache(maxsize=None)(policy_content)
        self._requests_sha256 = lru_cache(maxsize=None)(lambda named: requests_sha256(self.requests(named)))
        self._machine_sha256 = lru_cache(maxsize=None)(
            lambda machine: [sha256(spec) for spec in (self.tables(machine).system, self.tables(machine).model)]
        )

    def content(self, cell: Cell) -> dict[str, Any]:
        """Machine and requests at load 1."""
        found = {"machine": [*self._machine_sha256(cell.machine), cell.tp, cell.block_tokens]}
        return found | {name: self._requests_sha256(getattr(cell, name)) for name in ("requests", "earlier")}

    def ready(self, cell: Cell, load: float, training_load: float) -> Ready:
        workload, training = self.requests(cell.requests), self.requests(cell.earlier)
        return Ready(cell, load, training_load, self.tables(cell.machine), workload, training)


def _requests(named: Requests) -> Workload:
    """Without a trace's notes, which whoever asked for it has shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        workload = load_trace(named.trace, seed=named.seed)
    return training_window(workload) if named.earlier else workload


@lru_cache(maxsize=2)
def lookup(plan: str) -> Lookup:
    """One a plan and process, so that what is edited between two plans is looked up again."""
    return Lookup()
