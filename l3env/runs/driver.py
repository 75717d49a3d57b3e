"""Runs one workload under one policy: every replica to its end, the policy asked at its decision points."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from l3env.choices import Eviction
from l3env.engine.engine import Engine, Slo
from l3env.engine.kernels.run import Stop, Until
from l3env.engine.segments import eviction_rule, idle_segments, score_segments
from l3env.engine.state import PrefixArrays
from l3env.errors import L3EnvError, PolicyError
from l3env.knobs import Knobs
from l3env.machine.pair import compile_pair
from l3env.machine.tables import Tables
from l3env.policy.mistakes import ask, blaming, failed, no_progress, shown, wrong_answer
from l3env.policy.plan import Plan, Scored
from l3env.policy.protocol import FixedKnobs, Policy
from l3env.policy.registry import beside, check_policy, policy_name
from l3env.policy.view import View
from l3env.requests.workload import Workload
from l3env.runs.metrics import Outcome, collect

NUMBERS = (int, float, np.integer, np.floating)
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
    patience_s: float | None = None,
    decided_s: list[float] | None = None,
) -> Outcome:
    """Serves a workload on all replicas of a system under one policy.

    Requests go to the replicas in turn (a session stays where it began); replicas do not interact.

    Args:
        record: keep time line and gaps between tokens.
        prefix_cache: ``off``, or the rule by which cached prompt segments are given up: ``lru``, ``lfu``, ``tree``, or
            ``score``, by what the policy's ``score_segments`` says.
        patience_s: after so many seconds without a first token a client leaves; None: never.
        decided_s: gets the wall time of every decision.

    Raises:
        PolicyError: a hook of the policy fails or gives no answer, or leaves requests waiting for ever.
        PlanError: it returned something illegal. Both name the policy, its author's line, and the simulated time.
    """
    shares = replica_shares(workload, tables.replicas_count)
    shares = [rows for rows in shares if rows.size]
    check_policy(policy, policy_name(policy)).slo = slo or Slo()
    rule = eviction_rule(prefix_cache)
    engine = Engine(tables, len(shares), max(rows.size for rows in shares), record=record, prefix_cache=rule)
    own: list[dict[str, float]] = []
    with beside(policy):
        for e, rows in enumerate(shares):
            part = workload.select(rows)
            ask(policy, "prepare", tables, training)
            engine.reset(e, part, slo=slo, predicted_tokens=predictions(policy, part), patience_s=patience_s)
            drive(engine, e, policy, decided_s=decided_s)
            own.append(_figures(policy, float(engine.state.env["clock_s"][e])))
    outcome = collect(engine, range(len(shares)), shares, tables.replicas_count)
    for name in dict.fromkeys(name for each in own for name in each):
        if name in outcome.metrics:
            got, at_s = f"{name!r}, which every run has", outcome.metrics["makespan_s"]
            raise wrong_answer(policy, "figures", got, at_s, expected="figures of its own")
        outcome.metrics[name] = float(np.mean([each[name] for each in own if name in each]))
    return outcome


def _figures(policy: Policy, at_s: float) -> dict[str, float]:
    found = ask(policy, "figures", at_s=at_s)
    if not isinstance(found, dict) or not all(isinstance(each, NUMBERS) for each in found.values()):
        raise wrong_answer(policy, "figures", shown(found), at_s)
    return found


def warm_up(prefix_cache: str = "off") -> None:
    """Compiles what a run needs, by one."""
    tables = compile_pair("l3-dgx-a100", "llama-3-8b")
    one = Workload.build("warm-up", [0.0], [16], [2])
    run_policy(tables, one, FixedKnobs("warm-up", Knobs()), prefix_cache=prefix_cache)


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
    """Predicted output tokens by the policy's own predictor; the truth only for oracles.

    A predictor is asked once about each length of a prompt, in ascending order: it is not told how many requests will
    come, nor in which order.
    """
    if policy.wants_truth:
        if not policy.name.startswith("oracle-"):
            raise PolicyError(f"policy {policy.name!r} wants true output lengths; its name must start with 'oracle-'")
        return workload.output_tokens
    predict = ask(policy, "predictor")
    if predict is None:
        return None
    if not callable(predict):
        raise wrong_answer(policy, "predictor", shown(predict))
    prompts, places = np.unique(workload.prompt_tokens, return_inverse=True)
    with blaming(policy, "predictor"):
        predicted = np.asarray(predict(prompts.copy()), dtype=float)
    if predicted.shape != prompts.shape or not np.isfinite(predicted).all():
        raise wrong_answer(policy, "predictor", f"for {prompts.size} prompts: {shown(predicted)}")
    return np.maximum(np.rint(predicted), 1).astype(np.int64)[places]


def drive(
    engine: Engine,
    e: int,
    policy: Policy,
    watch: Callable[[], None] | None = None,
    decided_s: list[float] | None = None,
) -> None:
    """Runs environment ``e`` to its end, asking the policy at its decision points.

    ``watch`` is called after every iteration (and every wait for an arrival); it changes nothing but the speed.
    ``decided_s`` gets the wall time of every decision.
    """
    driver = Driver(engine, e, policy, watch, decided_s)
    stop = driver.wake()
    while stop != Stop.DONE:
        stop = driver.step()
        if stop == Stop.STALLED:
            raise stuck(engine, e, policy)


class Driver:
    """One environment under one policy, moved on piece by piece: knobs hold from one decision point to the next."""

    def __init__(
        self,
        engine: Engine,
        e: int,
        policy: Policy,
        watch: Callable[[], None] | None = None,
        decided_s: list[float] | None = None,
    ) -> None:
        self.engine, self.e, self.policy, self.watch, self.decided_s = engine, e, policy, watch, decided_s
        weights = ask(policy, "scorer")
        if weights is not None:
            with blaming(policy, "scorer"):
                engine.score_with(e, np.asarray(weights, dtype=float))
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
            try:
                stop = engine.step_plan(
                    e,
                    plan.operations(),
                    prefill_all=plan.prefill is None,
                    decode=plan.decode,
                    interleaved=plan.interleave,
                    multi_token=plan.multi_token,
                )
            except Exception as error:
                raise failed(self.policy, "decide", error, before_s) from error
            if self.watch is not None:
                self.watch()
        elif self.policy.decision_interval_s == 0:
            stop = run_watched(engine, e, Until.ITERATIONS, 1, self.watch)
            if not events:  # who has arrived meanwhile is seen by the next decision, which is about them, too
                stop = self.wake()
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
        now_s = float(engine.state.env["clock_s"][e])
        began_s = time.perf_counter()
        decision = ask(self.policy, "decide", View(engine, e), at_s=now_s)
        if self.decided_s is not None:
            self.decided_s.append(time.perf_counter() - began_s)
        if isinstance(decision, Plan):
            return decision
        if isinstance(decision, Scored):
            with blaming(self.policy, "decide", now_s):
                engine.score_requests(e, *decision.checked())
            decision = decision.knobs
        if not isinstance(decision, Knobs):
            raise wrong_answer(self.policy, "decide", shown(decision), now_s)
        decision.write(engine.knobs, e)
        self._held_until_s = now_s + self.policy.decision_interval_s
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
        now_s = float(state.env["clock_s"][self.e])
        found = ask(self.policy, "score_segments", rows, at_s=now_s)
        with blaming(self.policy, "score_segments", now_s):
            scores = np.asarray(found, dtype=float)
        if scores.shape != rows.shape or not np.isfinite(scores).all():
            raise wrong_answer(self.policy, "score_segments", f"for {rows.size} rows: {shown(found)}", now_s)
        score_segments(state, self.e, rows["segment"], scores)


def happened_count(engine: Engine, e: int) -> int:
    """Arrivals, finishes and preemptions so far."""
    env = engine.state.env[e]
    return int(env["arrived_count"] + env["finished_count"] + env["preemptions_count"])


def _until(limit_s: float, events: bool) -> Until:
    if events:
        return Until.EVENT
    return Until.END if math.isinf(limit_s) else Until.TIME


def stuck(engine: Engine, e: int, policy: Policy) -> L3EnvError:
    """The error of a policy that leaves requests waiting for ever."""
    view = View(engine, e)
    return no_progress(
        policy,
        view.now_s,
        f"{view.waiting_count} requests that wait and {view.running_count} that hold memory, none of which makes "
        "progress, while none is still to arrive",
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
