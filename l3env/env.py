"""``l3env/Serving-v0``: one replica of a serving system as a Gymnasium environment.

A step sets the knobs (``observe.LEVELS``) and runs the engine to the next decision point, so it may cover many
iterations; ``info["elapsed_s"]`` says how much time went by (a semi-Markov decision process). An episode serves
consecutive requests of the trace and terminates when all have finished.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from l3env.engine import Engine, Slo
from l3env.errors import L3EnvError, PlanError
from l3env.kernels.run import Stop, Until
from l3env.metrics import collect
from l3env.observe import FEATURES, LEVELS, action_space, knobs_of, mask_heads, observation_space, observe
from l3env.policy import make_policy
from l3env.reward import Reward, get_reward
from l3env.runner import TRAINING_FRAC, compile_pair, load_at_capacity, predictions
from l3env.state import MARK_DTYPE
from l3env.trace_registry import load_trace
from l3env.workload import Workload

DECISIONS = {"iteration": Until.ITERATIONS, "interval": Until.TIME, "event": Until.EVENT}


class ServingEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.int64]]):
    """Scheduling of one replica.

    Observation: Box(0, 1, (FEATURES_COUNT,)), see ``observe.FEATURES``. Action: MultiDiscrete, see ``observe.LEVELS``.

    Args:
        system, model: preset names or TOML files.
        trace: a trace spec; its requests are shared by the system's replicas in turn, this one gets its part.
        load, utilization: arrival rate as a multiple of the trace's own, or of what the reference policy sustains.
        decision: where a step ends: "interval" (``interval_s`` of simulated time), "iteration", or "event" (an arrival,
            a finish or a preemption, at the latest after ``interval_s``).
        episode_requests: consecutive requests an episode serves; None: all.
        reward: a name of ``reward.REWARDS`` or a function.
        ttft_scale, tbt_scale: the SLO, as multiples of a request's uncontended latencies.
        predictor: name of a policy whose length predictor fills in predicted output lengths, e.g. "srtf-predicted".
        seed: of the trace, where it is generated.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  # Gymnasium declares it so

    def __init__(
        self,
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
        seed: int = 0,
        render_mode: str | None = None,
    ) -> None:
        if decision not in DECISIONS:
            raise L3EnvError(f"decision = {decision!r}; expected one of {', '.join(DECISIONS)}")
        if not interval_s > 0:
            raise L3EnvError(f"interval_s = {interval_s}; expected a number > 0")
        if episode_requests is not None and episode_requests < 1:
            raise L3EnvError(f"episode_requests = {episode_requests}; expected at least 1, or None")
        self.render_mode = render_mode
        self.observation_space: gymnasium.spaces.Space[NDArray[np.float32]] = observation_space()
        self.action_space = action_space()
        self.tables = compile_pair(system, model, tp)
        self.workload = load_trace(trace, seed=seed)
        self.load = load
        if utilization is not None:
            self.load = utilization * load_at_capacity(self.tables, self.workload)
        self.until = DECISIONS[decision]
        self.interval_s = interval_s
        self.reward = get_reward(reward)
        self.slo = Slo(ttft_scale, tbt_scale)
        self.predictor = None if predictor is None else make_policy(predictor)
        if self.predictor is not None:
            training = self.workload.head(max(int(TRAINING_FRAC * len(self.workload)), 1))
            self.predictor.prepare(self.tables, training)
        self.episode_requests = len(self.workload) if episode_requests is None else episode_requests
        self.engine: Engine | None = None
        self.marks = np.zeros(1, MARK_DTYPE)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Starts an episode at a random place of the trace.

        Options: ``workload`` (a Workload to serve instead), or ``start`` (index of the first request of this replica's
        share) and ``replica`` (whose share); ``load``. Unknown options are an error.
        """
        super().reset(seed=seed)
        part = self._episode(dict(options or {}))
        if self.engine is None or self.engine.state.req.shape[1] < len(part):
            self.engine = Engine(self.tables, 1, len(part), record=True)
        predicted = None if self.predictor is None else predictions(self.predictor, part)
        self.engine.reset(0, part, slo=self.slo, predicted_tokens=predicted)
        self.engine.await_work(0)
        self.marks[:] = np.zeros((), MARK_DTYPE)
        return observe(self.engine, self.marks)[0], self._info(0.0)

    def _episode(self, options: dict[str, Any]) -> Workload:
        load = float(options.pop("load", self.load))
        given: Workload | None = options.pop("workload", None)
        replicas = self.tables.replicas_count
        replica = int(options.pop("replica", self.np_random.integers(replicas)))
        start = options.pop("start", None)
        if options:
            raise L3EnvError(f"unknown reset options {', '.join(options)}; expected workload, start, replica, load")
        if given is not None:
            return given.at_load(load) if load != 1.0 else given
        if not 0 <= replica < replicas:
            raise L3EnvError(f"replica = {replica}; expected 0 to {replicas - 1}")
        rows = np.arange(replica, len(self.workload), replicas)
        count = min(self.episode_requests, rows.size)
        first = int(self.np_random.integers(rows.size - count + 1)) if start is None else int(start)
        if not 0 <= first < rows.size:
            raise L3EnvError(f"start = {first}; expected 0 to {rows.size - 1}")
        part = self.workload.select(rows[first : first + count])
        return part.window(float(part.arrival_s[0]), float("inf")).at_load(load)

    def step(self, action: NDArray[np.int64]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Holds the knobs until the next decision point."""
        if self.engine is None:
            raise PlanError("step before reset")
        if not self.action_space.contains(np.asarray(action)):
            raise PlanError(f"action {action!r}; expected one of {self.action_space}")
        knobs_of(np.asarray(action)).write(self.engine.knobs, 0)
        before = self.engine.state.env.copy()
        limit = 1.0 if self.until == Until.ITERATIONS else float(before["clock_s"][0]) + self.interval_s
        self.engine.run(0, self.until, limit)
        stop = self.engine.await_work(0)
        after = self.engine.state.env
        reward = float(self.reward(before, after)[0])
        elapsed_s = float(after["clock_s"][0] - before["clock_s"][0])
        terminated = stop == Stop.DONE
        return observe(self.engine, self.marks)[0], reward, terminated, False, self._info(elapsed_s, terminated)

    def action_masks(self) -> NDArray[np.bool_]:
        """Which levels are legal now, the knobs' heads one after the other (sb3-contrib's convention)."""
        assert self.engine is not None, "action_masks before reset"
        return np.concatenate(mask_heads(self.engine, 0, has_predictor=self.predictor is not None))

    def _info(self, elapsed_s: float, ended: bool = False) -> dict[str, Any]:
        assert self.engine is not None
        env = self.engine.state.env[0]
        counts = ("arrived", "finished", "rejected", "slo_met", "preemptions", "iterations")
        info: dict[str, Any] = {f"{name}_count": int(env[f"{name}_count"]) for name in counts}
        info |= {"elapsed_s": elapsed_s, "clock_s": float(env["clock_s"]), "output_tokens": int(env["output_tokens"])}
        info["action_mask"] = self.action_masks()
        if ended:
            rows = np.arange(int(env["requests_count"]))
            info["metrics"] = collect(self.engine, [0], [rows]).metrics
        return info

    @staticmethod
    def feature_names() -> list[str]:
        """Names of the observation's entries."""
        return [name for name, _ in FEATURES]

    @staticmethod
    def knob_levels() -> dict[str, tuple[Any, ...]]:
        """What each action entry chooses among."""
        return dict(LEVELS)
