"""``l3env/Serving-v0``: one replica of a serving system as a Gymnasium environment.

A step sets the knobs (``policy.levels.LEVELS``) and runs the engine to the next decision point, so it may cover many
iterations; ``info["elapsed_s"]`` says how much time went by (a semi-Markov decision process). An episode serves
consecutive requests of the trace and terminates when all have finished.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import gymnasium
import numpy as np
from numpy.typing import NDArray

from l3env.engine.engine import Engine
from l3env.engine.kernels.run import Stop
from l3env.engine.segments import eviction_rule
from l3env.envs.episodes import EpisodeOptions, Episodes, known_only
from l3env.envs.observe.features import FEATURES
from l3env.envs.observe.observer import Observer, action_space, observation_space
from l3env.envs.render import Renderer
from l3env.errors import L3EnvError, PlanError
from l3env.policy.levels import levels_of
from l3env.runs.metrics import collect


class ServingEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.int64]]):
    """Scheduling of one replica.

    Observation: Box(0, 1, (FEATURES_COUNT,)), see ``observe.features.FEATURES``. Action:
    MultiDiscrete, see ``policy.levels.LEVELS``.

    Args:
        action_knobs: the knobs that an action sets, by default those of ``policy.levels.LEVELS``; also those of
            ``policy.levels.MORE_LEVELS``. The others keep the defaults of ``Knobs``.
        render_mode: "human" (a live panel in the terminal) or "rgb_array" (``render`` returns (H, W, 3) pixels).
    """

    metadata: dict[str, Any] = {"render_modes": ["human", "rgb_array"], "render_fps": 10}  # noqa: RUF012  # Gymnasium's
    _more_arguments: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        render_mode: str | None = None,
        action_knobs: Sequence[str] | None = None,
        **options: Unpack[EpisodeOptions],
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise L3EnvError(
                f"render_mode = {render_mode!r}; expected {', '.join(self.metadata['render_modes'])} or None"
            )
        known_only(options, "render_mode", "action_knobs", *self._more_arguments)
        self.render_mode = render_mode
        self.renderer = None if render_mode is None else Renderer()
        self.observation_space: gymnasium.spaces.Space[NDArray[np.float32]] = observation_space()
        self.levels = levels_of(action_knobs)
        self.action_space = action_space(self.levels)
        self.episodes = Episodes.build(**options)
        self.engine: Engine | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Starts an episode at a random place of the trace; for the options see ``Episodes.draw``.

        ``info["drawn"]`` says what it is of, see ``Episodes.drawn``.
        """
        super().reset(seed=seed)
        self.episode = self.episodes.draw(self.np_random, options)
        if self.engine is None or self.engine.state.req.shape[1] < len(self.episode.workload):
            self._make_engine(len(self.episode.workload))
        assert self.engine is not None
        self.episodes.open(self.engine, 0, self.episode)
        self._observer.forget(0)
        if self.renderer is not None:
            self.renderer.reset()
            self._show()
        drawn = {"drawn": self.episodes.drawn(self.episode)}
        return self._observer.shown(self._observer.look()[0]), self._info(0.0) | drawn

    def _make_engine(self, requests_count: int) -> None:
        rule = eviction_rule(self.episodes.prefix_cache)
        self.engine = Engine(self.episodes.pairs, 1, requests_count, record=True, prefix_cache=rule)
        self._observer = self._make_observer(self.engine)

    def _make_observer(self, engine: Engine) -> Observer:
        return Observer(engine, has_predictor=self._has_predictor, levels=self.levels)

    @property
    def _has_predictor(self) -> bool:
        return self.episodes.predictor is not None

    def step(self, action: NDArray[np.int64]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Holds the knobs until the next decision point."""
        if self.engine is None:
            raise PlanError("step before reset")
        if not self.action_space.contains(np.asarray(action)):
            raise PlanError(f"action {action!r}; expected one of {self.action_space}")
        before = self.engine.state.env.copy()
        limits = self.episodes.limits(before["clock_s"])
        obs, _ = self._observer.step(self._observer.check(np.asarray(action)[None]), self.episodes.until, limits)
        after = self.engine.state.env
        reward = float(self.episodes.reward(before, after)[0])
        elapsed_s = float(after["clock_s"][0] - before["clock_s"][0])
        terminated = self.engine.stop(0) == Stop.DONE
        self._show()
        return self._observer.shown(obs[0]), reward, terminated, False, self._info(elapsed_s, terminated)

    def _show(self) -> None:
        if self.render_mode == "human":
            self.render()

    def render(self) -> NDArray[np.uint8] | None:
        """The queue, the pools and the devices now: pixels, or (render_mode "human") in the terminal. None without."""
        if self.renderer is None:
            return None
        if self.engine is None:
            raise PlanError("render before reset")
        shot = self.renderer.observe(self.engine, 0)
        if self.render_mode == "rgb_array":
            return self.renderer.pixels(shot)
        self.renderer.show(shot)
        return None

    def close(self) -> None:
        """Ends the live panel."""
        if self.renderer is not None:
            self.renderer.close()

    def action_masks(self) -> NDArray[np.bool_]:
        """Which levels are legal now, the knobs' heads one after the other (sb3-contrib's convention)."""
        assert self.engine is not None, "action_masks before reset"
        return self._observer.masks()[0]

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

    def knob_levels(self) -> dict[str, tuple[Any, ...]]:
        """What each action entry chooses among."""
        return dict(self.levels)
