"""``gymnasium.make_vec("l3env/Serving-v0", num_envs=E)``: E environments over one set of arrays.

One call advances all of them; there is no per-environment object. Trajectories equal those of E single environments
with seeds s, s + 1, ..., whatever the number of cores. Ended episodes start anew in the same step
(``AutoresetMode.SAME_STEP``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from l3env.engine import Engine
from l3env.episodes import Episodes
from l3env.errors import PlanError
from l3env.kernels.run import Stop
from l3env.metrics import totals
from l3env.observe import action_space, mask_rows, observation_space, observe, write_knobs
from l3env.state import MARK_DTYPE


class ServingVectorEnv(VectorEnv[NDArray[np.float32], NDArray[np.int64], NDArray[Any]]):
    """E replicas, each with its own episode; arguments as for ``ServingEnv``.

    ``infos`` holds arrays by environment: ``elapsed_s``, ``clock_s``, ``action_mask``; of ended episodes ``final_obs``
    and ``final_info`` (with ``metrics.totals``), with ``_final_obs`` and ``_final_info`` saying where.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, num_envs: int = 1, *, max_episode_steps: int | None = None, **kwargs: Any) -> None:
        self.num_envs = num_envs
        self.render_mode = None
        self.max_episode_steps = max_episode_steps
        self.single_observation_space = observation_space()
        self.single_action_space = action_space()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.episodes = Episodes.build(**kwargs)
        rule = self.episodes.prefix_cache
        self.engine = Engine(self.episodes.tables, num_envs, self.episodes.requests_count, prefix_cache=rule)
        self.marks = np.zeros(num_envs, MARK_DTYPE)
        self._rngs: list[np.random.Generator] = []
        self._steps = np.zeros(num_envs, np.int64)

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
        return observe(self.engine, self.marks), self._infos(np.zeros(self.num_envs))

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
        self.marks[e] = np.zeros((), MARK_DTYPE)
        self._steps[e] = 0

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Every environment runs to its next decision point; (E, knobs) actions."""
        if not self._rngs:
            raise PlanError("step before reset")
        write_knobs(np.asarray(actions), self.engine.knobs)
        before = self.engine.state.env.copy()
        self.engine.run_all(self.episodes.until, self.episodes.limits(before["clock_s"]))
        after = self.engine.state.env
        rewards = self.episodes.reward(before, after)
        elapsed_s = after["clock_s"] - before["clock_s"]
        self._steps += 1
        terminated = after["stop"] == Stop.DONE
        most = np.inf if self.max_episode_steps is None else self.max_episode_steps
        truncated = (self._steps >= most) & ~terminated
        obs = observe(self.engine, self.marks)
        ended = terminated | truncated
        final = self._restart(np.flatnonzero(ended), obs, elapsed_s) if ended.any() else {}
        return obs, rewards, terminated, truncated, self._infos(elapsed_s) | final

    def _restart(
        self, which: NDArray[np.int64], obs: NDArray[np.float32], elapsed_s: NDArray[np.float64]
    ) -> dict[str, Any]:
        """Ends episodes and starts new ones; their first observations go into ``obs``."""
        ended = np.zeros(self.num_envs, bool)
        ended[which] = True
        final_obs = np.full(self.num_envs, None, dtype=object)
        metrics = np.full(self.num_envs, None, dtype=object)
        for e in which.tolist():
            final_obs[e] = obs[e].copy()
            metrics[e] = totals(self.engine.state.env[e : e + 1])
            self._open(e)
            obs[e] = observe(self.engine, self.marks, e, e + 1)[0]
        info = {"metrics": metrics, "_metrics": ended, "elapsed_s": elapsed_s.copy(), "_elapsed_s": ended.copy()}
        return {"final_obs": final_obs, "_final_obs": ended, "final_info": info, "_final_info": ended.copy()}

    def action_masks(self) -> NDArray[np.bool_]:
        """(E, levels) which levels are legal now, the knobs' heads one after the other."""
        return mask_rows(self.engine, has_predictor=self.episodes.predictor is not None)

    def _infos(self, elapsed_s: NDArray[np.float64]) -> dict[str, Any]:
        everywhere = np.ones(self.num_envs, bool)
        infos = {
            "elapsed_s": elapsed_s,
            "clock_s": self.engine.state.env["clock_s"].copy(),
            "action_mask": self.action_masks(),
        }
        return infos | {f"_{name}": everywhere for name in infos}
