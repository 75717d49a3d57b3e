"""What an environment serves: the compiled machine, the trace at its load, and episodes drawn from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from l3env.engine import Engine, Slo
from l3env.errors import L3EnvError
from l3env.kernels.run import Until
from l3env.policy import Policy, make_policy
from l3env.prefix import eviction_rule
from l3env.reward import Reward, get_reward
from l3env.runner import compile_pair, load_at_capacity, predictions, training_window
from l3env.state import Eviction
from l3env.tables import Tables
from l3env.trace_registry import load_trace
from l3env.workload import Workload

DECISIONS = {"iteration": Until.ITERATIONS, "interval": Until.TIME, "event": Until.EVENT}


@dataclass(frozen=True)
class Episodes:
    """Everything that environments of one configuration share.

    Attributes:
        workload: the whole trace at its own rate.
        load: arrival rate of an episode, times the trace's own.
        requests_count: consecutive requests of one episode.
    """

    tables: Tables
    workload: Workload
    load: float
    until: Until
    interval_s: float
    requests_count: int
    reward: Reward
    slo: Slo
    predictor: Policy | None
    prefix_cache: Eviction

    @classmethod
    def build(
        cls,
        system: str = "l3-dgx-a100",
        model: str = "gpt-175b",
        trace: str = "azure-conv-2023",
        *,
        load: float = 1.0,
        utilization: float | None = None,
        decision: str = "interval",
        interval_s: float = 1.0,
        episode_requests: int | None = 500,
        reward: str | Reward = "goodput",
        ttft_scale: float = 5.0,
        tbt_scale: float = 5.0,
        predictor: str | None = None,
        tp: int | None = None,
        prefix_cache: str = "off",
        seed: int = 0,
    ) -> Episodes:
        """From an environment's keyword arguments; see ``ServingEnv``. Raises L3EnvError for what is wrong."""
        if decision not in DECISIONS:
            raise L3EnvError(f"decision = {decision!r}; expected one of {', '.join(DECISIONS)}")
        if not interval_s > 0:
            raise L3EnvError(f"interval_s = {interval_s}; expected a number > 0")
        if episode_requests is not None and episode_requests < 1:
            raise L3EnvError(f"episode_requests = {episode_requests}; expected at least 1, or None")
        chosen_reward = get_reward(reward)
        eviction = eviction_rule(prefix_cache)
        tables = compile_pair(system, model, tp)
        workload = load_trace(trace, seed=seed)
        if utilization is not None:
            load = utilization * load_at_capacity(tables, workload, prefix_cache=prefix_cache)
        policy = None if predictor is None else make_policy(predictor)
        if policy is not None:
            policy.prepare(tables, training_window(workload))
        share = -(-len(workload) // tables.replicas_count)
        return cls(
            tables=tables,
            workload=workload,
            load=load,
            until=DECISIONS[decision],
            interval_s=interval_s,
            requests_count=share if episode_requests is None else min(episode_requests, share),
            reward=chosen_reward,
            slo=Slo(ttft_scale, tbt_scale),
            predictor=policy,
            prefix_cache=eviction,
        )

    def draw(self, rng: np.random.Generator, options: dict[str, Any] | None = None) -> Workload:
        """One episode: this replica's share of consecutive requests, from a random start.

        Options: ``workload`` (serve this instead), ``start`` (index of the first request of the replica's share),
        ``replica`` (whose share), ``load``. Raises L3EnvError for unknown or impossible ones.
        """
        left = dict(options or {})
        load = float(left.pop("load", self.load))
        given: Workload | None = left.pop("workload", None)
        replicas = self.tables.replicas_count
        replica = int(left.pop("replica", rng.integers(replicas)))
        start = left.pop("start", None)
        if left:
            raise L3EnvError(f"unknown reset options {', '.join(left)}; expected workload, start, replica, load")
        if given is not None:
            return given.at_load(load) if load != 1.0 else given
        if not 0 <= replica < replicas:
            raise L3EnvError(f"replica = {replica}; expected 0 to {replicas - 1}")
        rows = np.arange(replica, len(self.workload), replicas)
        count = min(self.requests_count, rows.size)
        first = int(rng.integers(rows.size - count + 1)) if start is None else int(start)
        if not 0 <= first < rows.size:
            raise L3EnvError(f"start = {first}; expected 0 to {rows.size - 1}")
        part = self.workload.select(rows[first : first + count])
        return part.window(float(part.arrival_s[0]), float("inf")).at_load(load)

    def open(self, engine: Engine, e: int, workload: Workload) -> None:
        """Puts an episode into environment ``e`` and goes to its first moment with a request."""
        predicted = None if self.predictor is None else predictions(self.predictor, workload)
        engine.reset(e, workload, slo=self.slo, predicted_tokens=predicted)
        engine.await_work(e, e + 1)

    def limits(self, clock_s: Any) -> Any:
        """Where the next step ends, for ``Engine.run``: an iteration, or a time."""
        return np.ones_like(clock_s) if self.until == Until.ITERATIONS else clock_s + self.interval_s
