"""``gymnasium.make_vec("l3env/Serving-v0", num_envs=E)``: E environments over one set of arrays.

One call advances all of them; there is no per-environment object. Trajectories equal those of E single environments
with seeds s, s + 1, ..., whatever the number of cores. Ended episodes start anew in the same step
(``AutoresetMode.SAME_STEP``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from l3env.engine.engine import Engine
from l3env.engine.kernels.run import Stop
from l3env.engine.segments import eviction_rule
from l3env.envs.episodes import EpisodeOptions, Episodes
from l3env.envs.observe.observer import Observer, action_space, observation_space
from l3env.errors import PlanError
from l3env.policy.levels import levels_of
from l3env.runs.metrics import totals


class ServingVectorEnv(VectorEnv[NDArray[np.float32], NDArray[np.int64], NDArray[Any]]):
    """E replicas, each with its own episode; arguments as for ``ServingEnv``.

    ``infos`` holds arrays by environment: ``elapsed_s``, ``clock_s``, ``action_mask``; of ended episodes ``final_obs``
    and ``final_info`` (with ``metrics.totals``), with ``_final_obs`` and ``_final_info`` saying where.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int = 1,
        *,
        max_episode_steps: int | None = None,
        action_knobs: Sequence[str] | None = None,
        **options: Unpack[EpisodeOptions],
    ) -> None:
        self.num_envs = num_envs
        self.render_mode = None
        self.max_episode_steps = max_episode_steps
        self.single_observation_space = observation_space()
        self.levels = levels_of(action_knobs)
        self.single_action_space = action_space(self.levels)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.episodes = Episodes.build(**options)
        rule = eviction_rule(self.episodes.prefix_cache)
        self.engine = Engine(self.episodes.pairs, num_envs, self.episodes.requests_count, prefix_cache=rule)
        self._observer = self._make_observer(self.engine)
        self._rngs: list[np.random.Generator] = []
        self._steps = np.zeros(num_envs, np.int64)

    def _make_observer(self, engine: Engine) -> Observer:
        return Observer(engine, has_predictor=self._has_predictor, levels=self.levels)

    @property
    def _has_predictor(self) -> bool:
        return self.episodes.predictor is not None

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Starts E episodes. A seed s gives environment i the seed s + i. Options as for ``ServingEnv``."""
        if seed is not None or not self._rngs:
            self._rngs = [seeding.np_random(each)[0] for each in self._seeds(seed)]
        for e in range(self.num_envs):
            self._open(e, options)
        return self._observer.shown(self._observer.look()), self._infos(np.zeros(self.num_envs), self.action_masks())

    def _seeds(self, seed: int | Sequence[int | None] | None) -> Sequence[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, int | np.integer):
            return [int(seed) + i for i in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise PlanError(f"reset: {len(seed)} seeds for {self.num_envs} environments")
        return seed

    def _open(self, e: int, options: dict[str, Any] | None = None) -> None:
        self.episodes.open(self.engine, e, self.episodes.draw(self._rngs[e], options))
        self._observer.forget(e)
        self._steps[e] = 0

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Every environment runs to its next decision point; (E, knobs) actions."""
        if not self._rngs:
            raise PlanError("step before reset")
        chosen = self._observer.check(actions)
        before = totals_now(self.engine)
        obs, masks = self._observer.step(chosen, self.episodes.until, self.episodes.limits(before["clock_s"]))
        after = self.engine.state.env
        rewards = self.episodes.reward(before, after)
        elapsed_s = after["clock_s"] - before["clock_s"]
        self._steps += 1
        terminated = after["stop"] == Stop.DONE
        truncated = np.zeros(self.num_envs, bool)
        if self.max_episode_steps is not None:
            truncated = (self._steps >= self.max_episode_steps) & ~terminated
        which = np.flatnonzero(terminated | truncated)
        final = self._restart(which, obs, masks, elapsed_s) if which.size else {}
        return self._observer.shown(obs), rewards, terminated, truncated, self._infos(elapsed_s, masks) | final

    def _restart(
        self,
        which: NDArray[np.int64],
        obs: NDArray[np.float32],
        masks: NDArray[np.bool_],
        elapsed_s: NDArray[np.float64],
    ) -> dict[str, Any]:
        """Ends episodes and starts new ones; their first observations and masks go into ``obs`` and ``masks``."""
        ended = np.zeros(self.num_envs, bool)
        ended[which] = True
        final_obs = np.full(self.num_envs, None, dtype=object)
        metrics = np.full(self.num_envs, None, dtype=object)
        for e in which.tolist():
            final_obs[e] = self._observer.shown(obs[e].copy())
            metrics[e] = totals(self.engine.state.env[e : e + 1])
            self._open(e)
            obs[e] = self._observer.look(e, e + 1)[0]
        masks[which] = self._observer.masks()[which]
        info = {"metrics": metrics, "_metrics": ended, "elapsed_s": elapsed_s.copy(), "_elapsed_s": ended.copy()}
        return {"final_obs": final_obs, "_final_obs": ended, "final_info": info, "_final_info": ended.copy()}

    def action_masks(self) -> NDArray[np.bool_]:
        """(E, levels) which levels are legal now, the knobs' heads one after the other."""
        return self._observer.masks()

    def _infos(self, elapsed_s: NDArray[np.float64], masks: NDArray[np.bool_]) -> dict[str, Any]:
        everywhere = np.ones(self.num_envs, bool)
        clock_s = self.engine.state.env["clock_s"].copy()
        infos = {"elapsed_s": elapsed_s, "clock_s": clock_s, "action_mask": masks}
        return infos | {f"_{name}": everywhere for name in infos}


def totals_now(engine: Engine) -> NDArray[np.void]:
    """(E,) a copy of the engine's totals, for rewards; as bytes, since NumPy copies records field by field."""
    env = engine.state.env
    return env.view(np.uint8).copy().view(env.dtype)
