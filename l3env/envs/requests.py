"""``l3env/ServingRequests-v0``: the scheduler scores single requests; alone and batched. See ``observe.requests``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from l3env.engine.engine import Engine
from l3env.envs.episodes import EpisodeOptions
from l3env.envs.observe.observer import Observer
from l3env.envs.observe.requests import (
    DEFAULT_VISIBLE,
    ActionKnobs,
    RequestObserver,
    fixed_knobs,
    levels_beside,
    order_shown,
    request_spaces,
)
from l3env.envs.serving import ServingEnv
from l3env.envs.vector import ServingVectorEnv


class ServingRequestsEnv(ServingEnv):
    """Scheduling of one replica by scores of requests.

    Observation: {"state": as ``ServingEnv``, "requests": (2 K, features)}, see
    ``observe.request_rows``.
    Action: (2 K,) scores from -1 to 1, then the ``action_knobs``. ``info["action_mask"]``: which rows hold a request.

    Args:
        visible: K, waiting and running requests shown, each.
        show: which waiting ones come first, by "arrival" or by "deadline" (those who cannot meet theirs last).
        knobs: the settings beside the scores, by their names in ``Knobs``.
        action_knobs: settings that each action chooses anew: names, with the levels of ``policy.levels.LEVELS`` and
            ``MORE_LEVELS``, or names with levels. The range from -1 to 1 is divided evenly among a knob's levels.
        render_mode: as for ``ServingEnv``.
    """

    _more_arguments = ("visible", "show", "knobs")

    def __init__(
        self,
        *,
        render_mode: str | None = None,
        visible: int = DEFAULT_VISIBLE,
        show: str = "arrival",
        knobs: Mapping[str, Any] | None = None,
        action_knobs: ActionKnobs = None,
        **options: Unpack[EpisodeOptions],
    ) -> None:
        chosen = levels_beside(action_knobs)
        shown = {"visible": visible, "show": order_shown(show), "knobs": fixed_knobs(knobs), "levels": chosen}
        self._shown: dict[str, Any] = shown
        super().__init__(render_mode=render_mode, **options)
        self.levels = chosen
        self.observation_space, self.action_space = request_spaces(visible, len(chosen))  # type: ignore[assignment]

    def _make_observer(self, engine: Engine) -> Observer:
        return RequestObserver(engine, has_predictor=self._has_predictor, **self._shown)


class ServingRequestsVectorEnv(ServingVectorEnv):
    """E of them over one set of arrays; arguments as for ``ServingRequestsEnv``."""

    _more_arguments = ("visible", "show", "knobs")

    def __init__(
        self,
        num_envs: int = 1,
        *,
        max_episode_steps: int | None = None,
        autoreset_mode: str | AutoresetMode = AutoresetMode.SAME_STEP,
        render_mode: str | None = None,
        visible: int = DEFAULT_VISIBLE,
        show: str = "arrival",
        knobs: Mapping[str, Any] | None = None,
        action_knobs: ActionKnobs = None,
        **options: Unpack[EpisodeOptions],
    ) -> None:
        chosen = levels_beside(action_knobs)
        shown = {"visible": visible, "show": order_shown(show), "knobs": fixed_knobs(knobs), "levels": chosen}
        self._shown: dict[str, Any] = shown
        super().__init__(
            num_envs,
            max_episode_steps=max_episode_steps,
            autoreset_mode=autoreset_mode,
            render_mode=render_mode,
            **options,
        )
        self.levels = chosen
        self.single_observation_space, self.single_action_space = request_spaces(visible, len(chosen))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def _make_observer(self, engine: Engine) -> Observer:
        return RequestObserver(engine, has_predictor=self._has_predictor, **self._shown)
