"""Offline comparison: the same workloads under several policies, every replica simulated, results as rows.

Common random numbers: a cell's workload depends on trace, load and seed only, never on the policy.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from l3env import specs
from l3env.engine import Engine, Slo
from l3env.errors import L3EnvError, PolicyError
from l3env.kernels.run import Stop, Until
from l3env.metrics import Outcome, collect
from l3env.policy import FixedKnobs, Knobs, Policy, View, make_policy
from l3env.prefix import eviction_rule, idle_segments, score_segments
from l3env.state import Eviction, PrefixArrays
from l3env.tables import DEFAULT_BLOCK_TOKENS, Tables, compile_tables
from l3env.trace_registry import load_trace
from l3env.workload import Workload

TRAINING_FRAC = 0.2  # predictors are fitted on the first fifth of a trace's requests
STALL_ITERATIONS = 10_000  # plans in a row that let no time pass


def run_policy(
    tables: Tables,
    workload: Workload,
    policy: Policy,
    *,
    slo: Slo | None = None,
    training: Workload | None = None,
    record: bool = True,
    prefix_cache: str = "off",
) -> Outcome:
    """Serves a workload on all replicas of a system under one policy.

    Requests go to the replicas in turn (a session stays where it began); replicas do not interact.

    Args:
        record: keep time line and gaps between tokens.
        prefix_cache: ``off``, or the rule by which cached prompt segments are given up: ``lru``, ``lfu``, ``tree``, or
            ``score``, by what the policy's ``score_segments`` says.

    Raises:
        PolicyError: the policy leaves requests waiting for ever.
        PlanError: it returned something illegal.
    """
    shares = replica_shares(workload, tables.replicas_count)
    shares = [rows for rows in shares if rows.size]
    policy.slo = slo or Slo()
    rule = eviction_rule(prefix_cache)
    engine = Engine(tables, len(shares), max(rows.size for rows in shares), record=record, prefix_cache=rule)
    own: list[dict[str, float]] = []
    for e, rows in enumerate(shares):
        part = workload.select(rows)
        policy.prepare(tables, training)
        engine.reset(e, part, slo=slo, predicted_tokens=predictions(policy, part))
        drive(engine, e, policy)
        own.append(policy.figures())
    outcome = collect(engine, range(len(shares)), shares)
    outcome.metrics.update({name: float(np.mean([each[name] for each in own])) for name in own[0]})
    return outcome


def warm_up() -> None:
    """Compiles what a run needs, by one."""
    tables = compile_pair("l3-dgx-a100", "llama-3-8b")
    run_policy(tables, Workload.build("warm-up", [0.0], [16], [2]), FixedKnobs("warm-up", Knobs()))


def replica_shares(workload: Workload, replicas_count: int) -> list[NDArray[np.int64]]:
    """Row indices of each replica: root requests in turn, dependent ones with their parents."""
    rows = np.arange(len(workload))
    roots_mask = workload.parent_idx < 0
    replica = np.where(roots_mask, (np.cumsum(roots_mask) - 1) % replicas_count, 0)
    for row in np.flatnonzero(~roots_mask):  # parents come first, so one pass suffices
        replica[row] = replica[workload.parent_idx[row]]
    return [rows[replica == r] for r in range(replicas_count)]


def training_window(workload: Workload) -> Workload:
    """The earlier requests that predictors are fitted on."""
    return workload.head(max(int(TRAINING_FRAC * len(workload)), 1))


def predictions(policy: Policy, workload: Workload) -> NDArray[np.int64] | None:
    """Predicted output tokens by the policy's own predictor; the truth only for oracles."""
    if policy.wants_truth:
        if not policy.name.startswith("oracle-"):
            raise PolicyError(f"policy {policy.name!r} wants true output lengths; its name must start with 'oracle-'")
        return workload.output_tokens
    predict = policy.predictor()
    if predict is None:
        return None
    predicted = np.asarray(predict(workload.prompt_tokens.copy()), dtype=float)
    if predicted.shape != (len(workload),) or not np.isfinite(predicted).all():
        raise PolicyError(f"policy {policy.name!r}: its predictor must return one finite number per request")
    return np.maximum(np.rint(predicted), 1).astype(np.int64)


def drive(engine: Engine, e: int, policy: Policy, watch: Callable[[], None] | None = None) -> None:
    """Runs environment ``e`` to its end, asking the policy at its decision points.

    ``watch`` is called after every iteration (and every wait for an arrival); it changes nothing but the speed.
    """
    driver = Driver(engine, e, policy, watch)
    stop = driver.wake()
    while stop != Stop.DONE:
        stop = driver.step()
        if stop == Stop.STALLED:
            raise stuck(engine, e, policy)


class Driver:
    """One environment under one policy, moved on piece by piece: knobs hold from one decision point to the next."""

    def __init__(self, engine: Engine, e: int, policy: Policy, watch: Callable[[], None] | None = None) -> None:
        self.engine, self.e, self.policy, self.watch = engine, e, policy, watch
        weights = policy.scorer() if hasattr(policy, "scorer") else None
        if weights is not None:
            engine.score_with(e, weights)
        self._held_until_s = -math.inf  # the knobs that stand hold until then
        self._frozen = 0

    def wake(self) -> Stop:
        """Goes to the next moment with a request present."""
        self.engine.await_work(self.e, self.e + 1)
        return self.engine.stop(self.e)

    def step(self, limit_s: float = math.inf, *, events: bool = False) -> Stop:
        """Goes to the next decision point, or ends with the iteration that reaches ``limit_s``.

        Args:
            events: ends after any iteration with an arrival, a finish or a preemption, too.

        Raises:
            PolicyError: many plans in a row that let no time pass.
            PlanError: the policy returned something illegal.
        """
        engine, e = self.engine, self.e
        before_s = float(engine.state.env["clock_s"][e])
        plan = None
        if before_s >= self._held_until_s:
            self._score_segments()
            decision = self.policy.decide(View(engine, e))
            if isinstance(decision, Knobs):
                decision.write(engine.knobs, e)
                self._held_until_s = before_s + self.policy.decision_interval_s
            else:
                plan = decision
        if plan is not None:
            stop = engine.step_plan(
                e,
                plan.operations(),
                prefill_all=plan.prefill is None,
                decode=plan.decode,
                interleaved=plan.interleave,
                multi_token=plan.multi_token,
            )
            if self.watch is not None:
                self.watch()
        elif self.policy.decision_interval_s == 0:
            stop = run_watched(engine, e, Until.ITERATIONS, 1, self.watch)
        else:
            limit_s = min(limit_s, self._held_until_s)
            stop = run_watched(engine, e, _until(limit_s, events), limit_s, self.watch)
            if not events:  # no decision while there is nothing to decide, as in the environments
                stop = self.wake()
        self._frozen = self._frozen + 1 if float(engine.state.env["clock_s"][e]) == before_s else 0
        if self._frozen > STALL_ITERATIONS:
            raise stuck(engine, e, self.policy)
        return stop

    def _score_segments(self) -> None:
        """Asks the policy what cached segments are worth, where they are given up by that."""
        state = self.engine.state
        if not isinstance(state.prefix, PrefixArrays) or state.prefix.env["eviction"][self.e] != Eviction.SCORE:
            return
        score = getattr(self.policy, "score_segments", None)
        if score is None:
            raise PolicyError(f"policy {self.policy.name!r} has no score_segments, which prefix cache 'score' asks for")
        rows = idle_segments(state, self.e)
        if not rows.size:
            return
        scores = np.asarray(score(rows), dtype=float)
        if scores.shape != rows.shape or not np.isfinite(scores).all():
            raise PolicyError(f"policy {self.policy.name!r}: score_segments must return one finite number per row")
        score_segments(state, self.e, rows["segment"], scores)


def _until(limit_s: float, events: bool) -> Until:
    if events:
        return Until.EVENT
    return Until.END if math.isinf(limit_s) else Until.TIME


def stuck(engine: Engine, e: int, policy: Policy) -> PolicyError:
    """The error of a policy that leaves requests waiting for ever."""
    view = View(engine, e)
    return PolicyError(
        f"policy {policy.name!r} is stuck at {view.now_s:.3f} s: {view.waiting_count} requests wait, "
        f"{view.running_count} hold memory, none makes progress, and none is still to arrive"
    )


def run_watched(engine: Engine, e: int, until: Until, limit: float, watch: Callable[[], None] | None) -> Stop:
    """``Engine.run``; with ``watch`` one iteration at a time, with the same result."""
    if watch is None:
        return engine.run(e, until, limit)
    env = engine.state.env[e]
    last_count = int(env["iterations_count"]) + (limit if until == Until.ITERATIONS else math.inf)
    last_s = limit if until == Until.TIME else math.inf
    while True:
        stop = engine.run(e, Until.TIME, 0.0)  # a limit in the past: one iteration, or one wait
        watch()
        if stop != Stop.RUNNING or env["iterations_count"] >= last_count or env["clock_s"] >= last_s:
            return stop


def reference_policy(tables: Tables) -> str:
    """The policy whose capacity ``utilization`` refers to."""
    return "l3-model" if tables.has_pim else "sarathi"


def capacity_requests_per_s(
    tables: Tables, workload: Workload, policy: Policy | None = None, *, prefix_cache: str = "off"
) -> float:
    """What a system serves at saturation: all requests present at once, rate at which the first 90 % finish."""
    chosen = policy or make_policy(reference_policy(tables))
    outcome = run_policy(tables, workload.closed_loop(), chosen, record=False, prefix_cache=prefix_cache)
    finish_s = np.sort(outcome.requests["finish_s"].dropna().to_numpy())
    if finish_s.size == 0:
        raise L3EnvError(f"{workload.name}: no request ever fits on {tables.system.name} with {tables.model.name}")
    count = max(math.ceil(0.9 * finish_s.size), 1)
    return count / float(finish_s[count - 1])


def load_at_capacity(tables: Tables, workload: Workload, *, prefix_cache: str = "off") -> float:
    """The load at which a trace's arrival rate equals the capacity: utilization 1.

    Raises:
        L3EnvError: all requests arrive at once.
    """
    if not math.isfinite(workload.rate_per_s):
        raise L3EnvError(f"{workload.name}: all requests arrive at once, so utilization has no meaning; use load")
    return capacity_requests_per_s(tables, workload, prefix_cache=prefix_cache) / workload.rate_per_s


@dataclass(frozen=True)
class CompareConfig:
    """Everything that repeats a comparison."""

    policies: tuple[str, ...]
    system: str
    model: str
    trace: str
    loads: tuple[float, ...] = (1.0,)
    utilizations: tuple[float, ...] = ()
    seeds_count: int = 1
    tp: int | None = None
    block_tokens: int = DEFAULT_BLOCK_TOKENS
    slo: Slo = field(default_factory=Slo)
    training: str | None = None  # trace of earlier requests to learn from; None: the first fifth of the trace itself
    prefix_cache: str = "off"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> CompareConfig:
        """The inverse of ``to_json``. Raises L3EnvError for unknown keys."""
        known = dict(raw)
        try:
            known["slo"] = Slo(**known.get("slo", {}))
            for name in ("policies", "loads", "utilizations"):
                known[name] = tuple(known.get(name, ()))
            return cls(**known)
        except TypeError as error:
            raise L3EnvError(f"comparison config: {error}") from None


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    policy: str
    load: float
    utilization: float | None
    seed: int

    @property
    def key(self) -> str:
        """File name of the cell's results."""
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in self.policy)
        return f"{name}.load{self.load:.6g}.seed{self.seed}"


@dataclass(frozen=True)
class Comparison:
    """Results of all cells: rows as the contract names them, requests and time lines by cell key."""

    config: CompareConfig
    results: pd.DataFrame
    requests: dict[str, pd.DataFrame]
    timelines: dict[str, pd.DataFrame]


def compile_pair(system: str, model: str, tp: int | None = None, block_tokens: int = DEFAULT_BLOCK_TOKENS) -> Tables:
    """Compiles a system and a model named as on the command line: preset names or TOML files."""
    return compile_tables(named_spec("system", system), named_spec("model", model), tp=tp, block_tokens=block_tokens)


def named_spec(kind: str, name: str) -> Any:
    """A preset, or a TOML file where the name ends so."""
    return specs.load(f"{kind}:{name}" if name.endswith(".toml") else f"{kind}/{name}")


def compare(
    policies: Sequence[str],
    system: str,
    model: str,
    trace: str,
    *,
    load: float | Sequence[float] = 1.0,
    utilization: float | Sequence[float] | None = None,
    seeds: int = 1,
    slo: Slo | None = None,
    tp: int | None = None,
    prefix_cache: str = "off",
    out: str | Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Comparison:
    """Runs every policy on the same workloads.

    Args:
        policies: names, or ``file.py:Class``.
        system, model: preset names or TOML files.
        trace: a trace spec, see ``load_trace``.
        load: arrival rates as multiples of the trace's own.
        utilization: instead, as multiples of what the reference policy serves at saturation on this system.
        seeds: seed 0 is the trace itself, further ones are resampled from it (generated traces are drawn anew).
        prefix_cache: ``off``, or how cached prompt segments are given up: ``lru``, ``lfu``, ``tree``, ``score``.
        out: folder for the cells' results; cells found there from the same configuration are not run again.
        progress: called with (cells done, cells in all, name of the one now starting).

    Raises:
        L3EnvError: anything wrong with the input, before the first cell runs.
    """
    utilizations = () if utilization is None else tuple(np.atleast_1d(utilization).tolist())
    loads = () if utilizations else tuple(np.atleast_1d(load).tolist())
    config = CompareConfig(
        tuple(policies),
        system,
        model,
        trace,
        loads,
        utilizations,
        seeds,
        tp,
        slo=slo or Slo(),
        prefix_cache=prefix_cache,
    )
    return run_comparison(config, out=out, progress=progress)


def run_comparison(
    config: CompareConfig,
    *,
    out: str | Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Comparison:
    """Runs the cells of a configuration; see ``compare``."""
    if config.seeds_count < 1:
        raise L3EnvError(f"seeds = {config.seeds_count}; expected at least 1")
    tables = compile_pair(config.system, config.model, config.tp, config.block_tokens)
    for ref in config.policies:
        make_policy(ref)
    eviction_rule(config.prefix_cache)
    store = None if out is None else CellStore(Path(out), config)
    base = load_trace(config.trace, seed=0)
    _note_prefix_ids(config, base)
    training = training_window(base) if config.training is None else load_trace(config.training, seed=0)
    rows, requests, timelines = [], {}, {}
    cells = list(_cells(config, tables, base))
    workloads: dict[int, Workload] = {0: base}
    for done, cell in enumerate(cells):
        if progress is not None:
            progress(done, len(cells), f"{cell.policy}, load {cell.load:.3g}, seed {cell.seed}")
        stored = store.read(cell) if store is not None else None
        if stored is None:
            if cell.seed not in workloads:
                workloads[cell.seed] = load_trace(config.trace, seed=cell.seed)
            workload = workloads[cell.seed]
            separate = config.training is not None
            earlier = _earlier(tables, training, cell, separate=separate, prefix_cache=config.prefix_cache)
            if cell.load != 1.0:
                workload = workload.at_load(cell.load)
            start = time.perf_counter()
            outcome = run_policy(
                tables,
                workload,
                make_policy(cell.policy),
                slo=config.slo,
                training=earlier,
                prefix_cache=config.prefix_cache,
            )
            row = _identity(config, cell) | outcome.metrics | {"wall_s": time.perf_counter() - start}
            stored = (row, outcome.requests, outcome.timeline)
            if store is not None:
                store.write(cell, *stored)
        rows.append(stored[0])
        requests[cell.key], timelines[cell.key] = stored[1], stored[2]
    if progress is not None:
        progress(len(cells), len(cells), "done")
    return Comparison(config, pd.DataFrame(rows), requests, timelines)


def _earlier(tables: Tables, training: Workload, cell: Cell, *, separate: bool, prefix_cache: str) -> Workload:
    """The training requests at the cell's load; those of a trace of their own at the cell's utilization."""
    if separate and cell.utilization is not None:
        return training.at_load(cell.utilization * load_at_capacity(tables, training, prefix_cache=prefix_cache))
    return training.at_load(cell.load)


def _note_prefix_ids(config: CompareConfig, base: Workload) -> None:
    if base.prefix_ids.size and config.prefix_cache == "off":
        text = "has prefix ids, and the prefix cache is off; with lru, equal beginnings of prompts share their KV"
    elif not base.prefix_ids.size and config.prefix_cache != "off":
        text = f"has no prefix ids, so prefix cache {config.prefix_cache} has no effect"
    else:
        return
    warnings.warn(f"trace {config.trace} {text}", stacklevel=3)


def _cells(config: CompareConfig, tables: Tables, base: Workload) -> Iterator[Cell]:
    pairs: list[tuple[float, float | None]] = [(load, None) for load in config.loads]
    if config.utilizations:
        full = load_at_capacity(tables, base, prefix_cache=config.prefix_cache)
        pairs = [(utilization * full, utilization) for utilization in config.utilizations]
    for load, utilization in pairs:
        for seed in range(config.seeds_count):
            for policy in config.policies:
                yield Cell(policy, load, utilization, seed)


def _identity(config: CompareConfig, cell: Cell) -> dict[str, Any]:
    return {
        "policy": cell.policy,
        "system": config.system,
        "model": config.model,
        "trace": config.trace,
        "load": cell.load,
        "utilization": cell.utilization,
        "seed": cell.seed,
        "prefix_cache": config.prefix_cache,
    }


class CellStore:
    """Results on disk, one cell at a time, each complete or absent.

    ``config.json`` says what the folder belongs to; a folder of another configuration is refused.
    """

    def __init__(self, folder: Path, config: CompareConfig) -> None:
        self.folder = folder
        wanted = json.loads(json.dumps(config.to_json()))
        path = folder / "config.json"
        if path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                raise L3EnvError(f"{path}: not JSON: {error}; remove the folder or choose another --out") from None
            if {"prefix_cache": "off", **found} != wanted:  # folders from before there was one
                raise L3EnvError(f"{folder} holds results of another configuration; remove it or choose another --out")
        for name in ("cells", "requests", "timelines"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(wanted, indent=2) + "\n")

    def read(self, cell: Cell) -> tuple[dict[str, Any], pd.DataFrame, pd.DataFrame] | None:
        """A finished cell, or None."""
        path = self.folder / "cells" / f"{cell.key}.json"
        if not path.exists():
            return None
        row = json.loads(path.read_text(encoding="utf-8"))
        tables = [pd.read_parquet(self.folder / kind / f"{cell.key}.parquet") for kind in ("requests", "timelines")]
        return row, tables[0], tables[1]

    def write(self, cell: Cell, row: dict[str, Any], requests: pd.DataFrame, timeline: pd.DataFrame) -> None:
        """The row comes last: a cell with a row is whole."""
        for kind, frame in (("requests", requests), ("timelines", timeline)):
            write_frame(self.folder / kind / f"{cell.key}.parquet", frame)
        write_text(self.folder / "cells" / f"{cell.key}.json", json.dumps(row) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or nothing."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """Writes a whole Parquet file or nothing."""
    part = path.with_name(path.name + ".part")
    frame.to_parquet(part)
    part.replace(path)
