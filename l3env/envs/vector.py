"""``gymnasium.make_vec("l3env/Serving-v0", num_envs=E)``: E environments over one set of arrays.

One call advances all of them; there is no per-environment object. Trajectories equal those of E single environments
with seeds s, s + 1, ..., whatever the number of cores. Ended episodes start anew in the same step, in the next one, or
where the user says so: Gymnasium's three modes.
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
from l3env.envs.episodes import Episode, EpisodeOptions, Episodes, known_only
from l3env.envs.observe.observer import Observer, action_space, observation_space
from l3env.errors import L3EnvError, PlanError
from l3env.policy.levels import levels_of
from l3env.runs.metrics import totals


class ServingVectorEnv(VectorEnv[NDArray[np.float32], NDArray[np.int64], NDArray[Any]]):
    """E replicas, each with its own episode; arguments as for ``ServingEnv``.

    ``infos`` holds arrays by environment: ``elapsed_s``, ``clock_s``, ``action_mask``; of ended episodes ``metrics``
    (``metrics.totals``), where they start anew in the same step with ``final_obs`` within ``final_info``. ``_metrics``
    and the like say where.

    Args:
        max_episode_steps: episodes are truncated there.
        autoreset_mode: "SameStep"; "NextStep": the step after an episode's end starts the next one, its action is
            ignored; "Disabled": ``reset(options={"reset_mask": mask})`` starts them. Gymnasium's ``AutoresetMode``.
        render_mode: None; environments side by side are not rendered.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012
    _more_arguments: tuple[str, ...] = ()

    def __init__(
        self,
        num_envs: int = 1,
        *,
        max_episode_steps: int | None = None,
        autoreset_mode: str | AutoresetMode = AutoresetMode.SAME_STEP,
        render_mode: str | None = None,
        action_knobs: Sequence[str] | None = None,
        **options: Unpack[EpisodeOptions],
    ) -> None:
        own = ("num_envs", "max_episode_steps", "autoreset_mode", "action_knobs")
        known_only(options, *own, *self._more_arguments)
        if render_mode is not None:
            raise L3EnvError(
                f"render_mode = {render_mode!r}: environments side by side are not rendered; make one alone"
            )
        self.num_envs = num_envs
        self.render_mode = None
        self.autoreset_mode = mode_of(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
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
        self._episodes: dict[int, Episode] = {}
        self._steps = np.zeros(num_envs, np.int64)
        self._ended = np.zeros(num_envs, bool)  # and not started anew

    def _make_observer(self, engine: Engine) -> Observer:
        return Observer(engine, has_predictor=self._has_predictor, levels=self.levels)

    @property
    def _has_predictor(self) -> bool:
        return self.episodes.predictor is not None

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | Sequence[dict[str, Any] | None] | None = None,
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Starts E episodes, or those that ``options["reset_mask"]`` ((E,) bool) says.

        A seed s gives environment i the seed s + i. Options as for ``ServingEnv``: for all, or a list of each's.
        """
        each, which = self._options_of(options)
        if not self._rngs and not which.all():
            raise PlanError("reset_mask before the first reset of all environments")
        if seed is not None or not self._rngs:
            seeds = self._seeds(seed)
            fresh = [seeding.np_random(one)[0] for one in seeds]
            self._rngs = [fresh[e] if which[e] or not self._rngs else self._rngs[e] for e in range(self.num_envs)]
        for e in np.flatnonzero(which).tolist():
            self._open(e, each[e])
        infos = self._infos(np.zeros(self.num_envs), self.action_masks()) | self._drawn(which)
        return self._observer.shown(self._observer.look()), infos

    def _drawn(self, which: NDArray[np.bool_]) -> dict[str, Any]:
        """What the episodes are of that have just begun."""
        drawn = np.full(self.num_envs, None, dtype=object)
        for e in np.flatnonzero(which).tolist():
            drawn[e] = self.episodes.drawn(self._episodes[e])
        return {"drawn": drawn, "_drawn": which.copy()}

    def _options_of(
        self, options: dict[str, Any] | Sequence[dict[str, Any] | None] | None
    ) -> tuple[Sequence[dict[str, Any] | None], NDArray[np.bool_]]:
        """Options of each environment, and which are reset."""
        everywhere = np.ones(self.num_envs, bool)
        if options is None or isinstance(options, dict):
            rest = dict(options or {})
            mask = np.asarray(rest.pop("reset_mask", everywhere))
            if mask.shape != everywhere.shape or mask.dtype != bool or not mask.any():
                raise L3EnvError(f"reset_mask: expected ({self.num_envs},) booleans, at least one of them true")
            return [rest or None] * self.num_envs, mask
        if len(options) != self.num_envs:
            raise L3EnvError(f"reset: options for {len(options)} environments; expected {self.num_envs}")
        return options, everywhere

    def _seeds(self, seed: int | Sequence[int | None] | None) -> Sequence[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, int | np.integer):
            return [int(seed) + i for i in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise PlanError(f"reset: {len(seed)} seeds for {self.num_envs} environments")
        return seed

    def _open(self, e: int, options: dict[str, Any] | None = None) -> None:
        self._episodes[e] = self.episodes.draw(self._rngs[e], options)
        self.episodes.open(self.engine, e, self._episodes[e])
        self._observer.forget(e)
        self._steps[e] = 0
        self._ended[e] = False

    def change(self, name: str, value: Any) -> None:
        """Sets what episodes are drawn from (``episodes.CHANGEABLE``), from the next start of each on, or
        ``max_episode_steps``. Raises L3EnvError for what is fixed."""
        if name != "max_episode_steps":
            self.episodes = self.episodes.changed(name, value)
        elif value is None or value >= 1:
            self.max_episode_steps = value
        else:
            raise L3EnvError(f"max_episode_steps = {value}; expected at least 1, or None")

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Every environment runs to its next decision point; (E, knobs) actions."""
        if not self._rngs:
            raise PlanError("step before reset")
        over = np.flatnonzero(self._ended)
        if over.size and self.autoreset_mode == AutoresetMode.DISABLED:
            raise PlanError(
                f"step: environments {over.tolist()} have ended; expected reset with their reset_mask first"
            )
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
        if over.size:
            for values in (rewards, elapsed_s, terminated, truncated):
                values[over] = 0
            self._start(over, obs, masks)
        which = np.flatnonzero(terminated | truncated)
        final = self._end(which, obs, masks, elapsed_s) if which.size else {}
        return self._observer.shown(obs), rewards, terminated, truncated, self._infos(elapsed_s, masks) | final

    def _start(self, which: NDArray[np.int64], obs: NDArray[np.float32], masks: NDArray[np.bool_]) -> None:
        """Starts episodes; their first observations and masks go into ``obs`` and ``masks``."""
        for e in which.tolist():
            self._open(e)
            obs[e] = self._observer.look(e, e + 1)[0]
        masks[which] = self._observer.masks()[which]

    def _end(
        self,
        which: NDArray[np.int64],
        obs: NDArray[np.float32],
        masks: NDArray[np.bool_],
        elapsed_s: NDArray[np.float64],
    ) -> dict[str, Any]:
        """What is said of ended episodes; they start anew where that is in the same step."""
        ended = np.zeros(self.num_envs, bool)
        ended[which] = True
        metrics = np.full(self.num_envs, None, dtype=object)
        for e in which.tolist():
            metrics[e] = totals(self.engine, [e])
        if self.autoreset_mode != AutoresetMode.SAME_STEP:
            self._ended |= ended
            return {"metrics": metrics, "_metrics": ended}
        final_obs = np.full(self.num_envs, None, dtype=object)
        for e in which.tolist():
            final_obs[e] = self._observer.shown(obs[e].copy())
        self._start(which, obs, masks)
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


def mode_of(given: str | AutoresetMode) -> AutoresetMode:
    """Gymnasium's mode, by itself or by its name. Raises L3EnvError for another."""
    for mode in AutoresetMode:
        if given in (mode, mode.name, mode.value):
            return mode
    known = ", ".join(mode.value for mode in AutoresetMode)
    raise L3EnvError(f"autoreset_mode = {given!r}; expected one of {known}")


def totals_now(engine: Engine) -> NDArray[np.void]:
    """(E,) a copy of the engine's totals, for rewards; as bytes, since NumPy copies records field by field."""
    env = engine.state.env
    return env.view(np.uint8).copy().view(env.dtype)
