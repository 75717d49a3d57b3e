"""Runs one workload under one policy: every replica to its end, the policy asked at its decision points."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from l3env.choices import Eviction
from l3env.engine.engine import Engine, Slo
from l3env.engine.kernels.run import Stop, Until
from l3env.engine.segments import eviction_rule, idle_segments, score_segments
from l3env.engine.state import PrefixArrays
from l3env.errors import PolicyError
from l3env.knobs import Knobs
from l3env.machine.pair import compile_pair
from l3env.machine.tables import Tables
from l3env.policy.plan import Plan, Scored
from l3env.policy.protocol import FixedKnobs, Policy
from l3env.policy.registry import check_policy, policy_name
from l3env.policy.view import View
from l3env.requests.workload import Workload
from l3env.runs.metrics import Outcome, collect

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
    check_policy(policy, policy_name(policy)).slo = slo or Slo()
    rule = eviction_rule(prefix_cache)
    engine = Engine(tables, len(shares), max(rows.size for rows in shares), record=record, prefix_cache=rule)
    own: list[dict[str, float]] = []
    for e, rows in enumerate(shares):
        part = workload.select(rows)
        policy.prepare(tables, training)
        engine.reset(e, part, slo=slo, predicted_tokens=predictions(policy, part))
        drive(engine, e, policy)
        own.append(policy.figures())
    outcome = collect(engine, range(len(shares)), shares, tables.replicas_count)
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
        weights = policy.scorer()
        if weights is not None:
            engine.score_with(e, weights)
        self._held_until_s = -math.inf  # the knobs that stand hold until then
        self._happened_count = 0  # when they were decided
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
        at_events = self.policy.decides_at_events
        plan = None
        if before_s >= self._held_until_s or (at_events and happened_count(engine, e) != self._happened_count):
            plan = self._decide()
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
            stop = run_watched(engine, e, _until(limit_s, events or at_events), limit_s, self.watch)
            if not events:  # no decision while there is nothing to decide, as in the environments
                stop = self.wake()
        self._frozen = self._frozen + 1 if float(engine.state.env["clock_s"][e]) == before_s else 0
        if self._frozen > STALL_ITERATIONS:
            raise stuck(engine, e, self.policy)
        return stop

    def _decide(self) -> Plan | None:
        """Asks the policy: a plan for the next iteration, or None where knobs and scores now stand."""
        engine, e = self.engine, self.e
        self._score_segments()
        decision = self.policy.decide(View(engine, e))
        if isinstance(decision, Plan):
            return decision
        if isinstance(decision, Scored):
            engine.score_requests(e, *decision.checked())
            decision = decision.knobs
        decision.write(engine.knobs, e)
        self._held_until_s = float(engine.state.env["clock_s"][e]) + self.policy.decision_interval_s
        self._happened_count = happened_count(engine, e)
        return None

    def _score_segments(self) -> None:
        """Asks the policy what cached segments are worth, where they are given up by that."""
        state = self.engine.state
        if not isinstance(state.prefix, PrefixArrays) or state.prefix.env["eviction"][self.e] != Eviction.SCORE:
            return
        rows = idle_segments(state, self.e)
        if not rows.size:
            return
        scores = np.asarray(self.policy.score_segments(rows), dtype=float)
        if scores.shape != rows.shape or not np.isfinite(scores).all():
            raise PolicyError(f"policy {self.policy.name!r}: score_segments must return one finite number per row")
        score_segments(state, self.e, rows["segment"], scores)


def happened_count(engine: Engine, e: int) -> int:
    """Arrivals, finishes and preemptions so far."""
    env = engine.state.env[e]
    return int(env["arrived_count"] + env["finished_count"] + env["preemptions_count"])


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
    last_s = limit if until in (Until.TIME, Until.EVENT) else math.inf
    before_count = happened_count(engine, e)
    while True:
        stop = engine.run(e, Until.TIME, 0.0)  # a limit in the past: one iteration, or one wait
        watch()
        if stop != Stop.RUNNING or env["iterations_count"] >= last_count or env["clock_s"] >= last_s:
            return stop
        if until == Until.EVENT:
            engine.await_work(e, e + 1)  # lets in who has arrived
            if happened_count(engine, e) != before_count:
                return engine.stop(e)
