"""What an agent of ``l3env/ServingRequests-v0`` sees and does: rows of single requests, and a score for each.

Visible are the first K waiting requests, in order of arrival or of deadline (``SHOWN_FIRST``), and K running ones, the
newest first (those who filled a gap in the engine's list may come earlier). The action is a score from -1 to 1 for each
row. Waiting requests are admitted from the highest score down, and held back below 0 while anything runs; where memory
runs over, the running request with the lowest score is preempted. A score stays until it is given anew; a request never
scored has 0. Ties go to the earlier request. The other settings are fixed knobs, or follow the scores in the action:
one entry a knob, from -1 (its first level) to 1 (its last).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from l3env.choices import Order, Victim
from l3env.engine.engine import Engine
from l3env.engine.kernels import plan, run
from l3env.engine.kernels.run import Until
from l3env.engine.kernels.scores import set_scores
from l3env.envs.observe.features import FEATURES_COUNT, write_features
from l3env.envs.observe.observer import Observer, observation_space
from l3env.envs.observe.request_rows import REQUEST_FEATURES, set_beside, write_requests
from l3env.errors import PlanError
from l3env.knobs import ABOUT, Knobs, words_in, words_of
from l3env.policy.levels import Levels, levels_of, named_levels, sizes_of
from l3env.policy.plan import Scored
from l3env.policy.view import View, _watched

DEFAULT_VISIBLE = 16

SHOWN_FIRST = {"arrival": Order.FCFS, "deadline": Order.EARLIEST_DEADLINE_HOPELESS_LAST}
"""Which waiting requests an agent sees where more wait than K. By deadline, those who cannot meet theirs come last."""
ROW_FEATURES = len(REQUEST_FEATURES)

BESIDE = tuple(name for name in ABOUT if name not in ("order", "victim"))
"""Knobs that can be set beside scores, which stand for the others."""

ActionKnobs = Sequence[str] | Mapping[str, Sequence[Any]] | None


def request_spaces(visible: int, knobs_count: int = 0) -> tuple[gymnasium.spaces.Dict, gymnasium.spaces.Box]:
    """(observation: global state and request rows, action: a score a row, then the knobs)."""
    rows = gymnasium.spaces.Box(0.0, 1.0, (2 * visible, ROW_FEATURES), np.float32)
    seen = gymnasium.spaces.Dict({"state": observation_space(), "requests": rows})
    return seen, gymnasium.spaces.Box(-1.0, 1.0, (2 * visible + knobs_count,), np.float32)


def fixed_knobs(settings: Mapping[str, Any] | None) -> Knobs:
    """The knobs beside the scores. Raises PlanError for one that does not exist or that scores stand for."""
    given = dict(settings or {})
    for name in given:
        if name not in BESIDE:
            raise PlanError(f"knobs: {name!r} cannot be set beside scores; expected {', '.join(BESIDE)}")
    return Knobs(**given, order=Order.BY_SCORE, victim=Victim.LOWEST_SCORE)


def order_shown(show: str) -> Order:
    """By its name in SHOWN_FIRST. Raises PlanError for another."""
    if show not in SHOWN_FIRST:
        raise PlanError(f"show = {show!r}; expected one of {', '.join(SHOWN_FIRST)}")
    return SHOWN_FIRST[show]


def levels_beside(action_knobs: ActionKnobs) -> Levels:
    """Levels of the knobs that an action sets behind its scores; by name, or the levels themselves.

    Raises PlanError or L3EnvError for a knob that there is not, that scores stand for, or that has no such level.
    """
    if action_knobs is None:
        return {}
    given = action_knobs if isinstance(action_knobs, Mapping) else levels_of(action_knobs)
    for name, values in given.items():
        if name not in BESIDE or not len(values):
            raise PlanError(
                f"action_knobs: {name!r} = {values!r}; expected levels of {', '.join(BESIDE)}: "
                "scores stand for the order and the victim"
            )
    return named_levels(given)


class ViewRequestObserver:
    """What an agent of the environment would see and do, for a policy in the offline runner: one a replica's run."""

    def __init__(
        self,
        *,
        visible: int = DEFAULT_VISIBLE,
        show: str = "arrival",
        knobs: Mapping[str, Any] | None = None,
        action_knobs: ActionKnobs = None,
        has_predictor: bool = False,
    ) -> None:
        self._knobs, self._levels = fixed_knobs(knobs), levels_beside(action_knobs)
        self._settings: dict[str, Any] = {"visible": visible, "show": order_shown(show), "has_predictor": has_predictor}
        self._observer: RequestObserver | None = None

    def look(self, view: View) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.bool_]]:
        """(observation, mask) of one environment, as of the batched one: (1, ...) each."""
        engine, self._e = _watched(view)
        if self._observer is None:
            self._observer = RequestObserver(engine, knobs=self._knobs, levels=self._levels, **self._settings)
        observer, e = self._observer, self._e
        return observer.shown(observer.look(e, e + 1)), observer.masks()[e : e + 1]

    def scored(self, actions: NDArray[Any]) -> Scored:
        """(1, 2 K + knobs) an action, as the environment takes it -> a decision about the requests just shown."""
        assert self._observer is not None
        seen = self._observer.seen[self._e]
        shown = seen >= 0
        beside = {}
        for (name, values), entry in zip(self._levels.items(), actions[0, seen.size :], strict=True):
            place = int((float(entry) + 1.0) * 0.5 * len(values))
            beside[name] = values[min(place, len(values) - 1)]
        return Scored(replace(self._knobs, **beside), seen[shown], np.asarray(actions[0, : seen.size][shown], float))


class RequestObserver(Observer):
    """As ``Observer``, with rows of requests behind the features and scores (then ``levels``) for actions."""

    def __init__(
        self,
        engine: Engine,
        *,
        has_predictor: bool,
        visible: int,
        knobs: Knobs,
        levels: Levels | None = None,
        show: Order = Order.FCFS,
    ) -> None:
        super().__init__(engine, has_predictor=has_predictor)
        self._show = int(show)
        beside = levels or {}
        self._beside, self._beside_words = words_of(beside)
        self._counts = sizes_of(beside)
        self.seen = np.full((engine.num_envs, 2 * visible), -1, np.int64)
        self._frontier = np.zeros((engine.num_envs, visible + 2), np.int64)
        knobs.write(engine.knobs, slice(None))

    @property
    def _width(self) -> int:
        return FEATURES_COUNT + self.seen.shape[1] * ROW_FEATURES

    def look(self, first: int = 0, last: int | None = None) -> NDArray[np.float32]:
        """(last - first, features and rows one after the other) fresh; notes which requests are shown."""
        end = self.engine.num_envs if last is None else last
        state, rows = self._room()
        self._write(first, end, state, rows)
        return self._joined(state, rows)[first:end]

    def _room(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        count = self.engine.num_envs
        state = np.empty((count, FEATURES_COUNT), np.float32)
        return state, np.empty((count, self.seen.shape[1], ROW_FEATURES), np.float32)

    def _joined(self, state: NDArray[np.float32], rows: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.concatenate([state, rows.reshape(len(rows), -1)], axis=1)

    def _write(self, first: int, last: int, state: NDArray[np.float32], rows: NDArray[np.float32]) -> None:
        tables, arrays = self.engine.tables, self.engine.state
        write_features(tables, arrays, self.marks, self.machine, first, last, state)
        write_requests(tables, arrays, self.marks, self._show, first, last, self.seen, self._frontier, rows)

    def masks(self) -> NDArray[np.bool_]:
        """(E, 2 K + knobs) fresh: which rows hold a request; knobs can always be set."""
        return np.concatenate([self.seen >= 0, np.ones((len(self.seen), self._beside.size), np.bool_)], axis=1)

    def check(self, actions: NDArray[Any]) -> NDArray[Any]:
        """(E, 2 K + knobs) scores. Raises PlanError for another shape, or what is not a number from -1 to 1."""
        scores = np.asarray(actions, dtype=np.float64)
        expected = (len(self.seen), self.seen.shape[1] + self._beside.size)
        if scores.shape != expected or not (np.abs(scores) <= 1).all():
            raise PlanError(f"scores of shape {scores.shape}; expected shape {expected}, numbers from -1 to 1")
        return np.ascontiguousarray(scores)

    def step(
        self, actions: NDArray[Any], until: Until, limits: NDArray[np.float64]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Scores the visible requests and runs every environment to its own limit, on all cores."""
        engine, words = self.engine, words_in(self.engine.knobs)
        state, rows = self._room()

        def share(first: int, last: int) -> None:
            set_scores(engine.state, first, last, self.seen[first:last], actions[first:last])
            if self._beside.size:
                set_beside(words, first, last, self._beside, self._beside_words, self._counts, actions)
            run.run(engine.tables, engine.state, engine.knobs, first, last, int(until), limits)
            plan.await_work(engine.tables, engine.state, first, last)
            self._write(first, last, state, rows)

        self._share_out(share, engine.num_envs)
        return self._joined(state, rows), self.masks()

    def shown(self, flat: NDArray[np.float32]) -> Any:
        """Features and rows apart, as the observation space has them; any leading axes."""
        rows = flat[..., FEATURES_COUNT:].reshape(*flat.shape[:-1], self.seen.shape[1], ROW_FEATURES)
        return {"state": np.ascontiguousarray(flat[..., :FEATURES_COUNT]), "requests": np.ascontiguousarray(rows)}
