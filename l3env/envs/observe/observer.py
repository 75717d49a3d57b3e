"""What an agent sees and does: features with names and ranges, the knob action space and its mask.

Every feature could be known to a real scheduler; true output lengths are in none. All lie in [0, 1]: shares are shares,
and a quantity with a scale is shown as x / (x + scale). Times are measured by the SLO, queues by what the machine does
in that time, and KV by what its memory holds, so that a state means the same on another system, model or load.

TTFT and TBT SLO without further words are those of a request with 1,024 prompt tokens; "pace" is the time per token of
a prefill of 2,048 tokens on the empty system.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from l3env.choices import Eviction
from l3env.engine.engine import Engine
from l3env.engine.kernels.run import Until
from l3env.engine.state import MARK_DTYPE
from l3env.envs.observe.features import FEATURES_COUNT, MACHINE, write_features
from l3env.envs.observe.step import step_batch
from l3env.errors import PlanError
from l3env.knobs import Knobs, words_in, words_of
from l3env.policy.levels import LEVELS, Levels, admits_none, available, sizes_of, useful
from l3env.policy.view import View, _watched
from l3env.threads import Sharer


class Observer:
    """Watches the environments of an engine: what happened since its last look at each is part of what it sees."""

    def __init__(self, engine: Engine, *, has_predictor: bool = False, levels: Levels = LEVELS) -> None:
        self.engine = engine
        self.legal = static_masks(engine, has_predictor=has_predictor, levels=levels)
        self._none = admits_none(levels)
        self._sizes = sizes_of(levels)
        self._columns, self._values = words_of(levels)
        self.marks = np.zeros(engine.num_envs, MARK_DTYPE)
        self.machine = np.zeros((engine.num_envs, FEATURES_COUNT - MACHINE), np.float32)
        self._share_out = Sharer()
        Knobs().write(engine.knobs, slice(None))  # what no action sets

    def forget(self, e: int) -> None:
        """Environment ``e`` starts anew."""
        self.marks[e] = 0

    def look(self, first: int = 0, last: int | None = None) -> NDArray[np.float32]:
        """(last - first, FEATURES_COUNT) fresh features of a range of environments, all by default."""
        end = self.engine.num_envs if last is None else last
        out = np.empty((self.engine.num_envs, FEATURES_COUNT), np.float32)
        write_features(self.engine.tables, self.engine.state, self.marks, self.machine, first, end, out)
        return out[first:end]

    def masks(self) -> NDArray[np.bool_]:
        """(E, sum of levels) fresh: which levels do something in each environment now; at least one of each knob."""
        return mask_rows(self.engine, self.legal, self._none)

    def check(self, actions: NDArray[Any]) -> NDArray[Any]:
        """(E, knobs) actions as ``step`` takes them; see ``check_actions``."""
        return check_actions(actions, self.engine.num_envs, self._sizes)

    def shown(self, flat: NDArray[np.float32]) -> Any:
        """Features as the observation space has them: as they are."""
        return flat

    def step(
        self, actions: NDArray[Any], until: Until, limits: NDArray[np.float64]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Every environment runs under its (checked) action to its own limit; fresh features and masks.

        Long steps are shared out to all cores; each environment is run by one thread, so results do not depend on it.
        """
        engine = self.engine
        obs = np.empty((engine.num_envs, FEATURES_COUNT), np.float32)
        masks = np.empty((engine.num_envs, self.legal.shape[1]), np.bool_)
        how, tables, state, knobs, marks = int(until), engine.tables, engine.state, engine.knobs, self.marks
        words = words_in(knobs)

        def share(first: int, last: int) -> None:
            step_batch(
                tables, state, knobs, words, actions, self._columns, self._values, how, limits,
                marks, self.machine, self.legal, self._none, first, last, obs, masks,
            )  # fmt: skip

        self._share_out(share, engine.num_envs)
        return obs, masks


class ViewObserver:
    """What an agent in an environment would see, for a policy in the offline runner: one for each replica's run."""

    def __init__(self, *, has_predictor: bool = False, levels: Levels = LEVELS) -> None:
        self._has_predictor, self._levels = has_predictor, levels
        self._observer: Observer | None = None

    def look(self, view: View) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """((FEATURES_COUNT,) features, (sum of levels,) mask) now; "since the last step" is since the last look."""
        engine, e = _watched(view)
        if self._observer is None:
            self._observer = Observer(engine, has_predictor=self._has_predictor, levels=self._levels)
        mask = self._observer.legal[engine.state.env["table_idx"][e]].copy()
        none = admits_none(self._levels)
        if none >= 0:
            mask[none] = engine.state.env["running_count"][e] > 0
        return self._observer.look(e, e + 1)[0], mask


def observation_space() -> gymnasium.spaces.Space[NDArray[np.float32]]:
    """All features lie in [0, 1]."""
    return gymnasium.spaces.Box(0.0, 1.0, (FEATURES_COUNT,), np.float32)


def action_space(levels: Levels = LEVELS) -> gymnasium.spaces.MultiDiscrete:
    """One level of each knob, in the order of ``levels``."""
    return gymnasium.spaces.MultiDiscrete(sizes_of(levels))


def check_actions(actions: NDArray[Any], num_envs: int, sizes: NDArray[np.int64]) -> NDArray[Any]:
    """(E, knobs) actions as the engine takes them. Raises PlanError for a wrong shape or type or level."""
    given, expected = np.asarray(actions), (num_envs, len(sizes))
    if given.dtype.kind in "iu" and given.shape == expected:
        found = np.ascontiguousarray(given, np.int64)
        if not (found.view(np.uint64) >= sizes.view(np.uint64)).any():  # negative ones are large
            return found
    shown = f"{given.dtype} of shape {given.shape}"
    raise PlanError(f"actions: {shown}; expected integers, expected shape {expected}, entries from 0 to below {sizes}")


def static_masks(engine: Engine, *, has_predictor: bool = False, levels: Levels = LEVELS) -> NDArray[np.bool_]:
    """(T, sum of levels) the part of the masks that depends on the machine alone, heads concatenated."""
    cache = engine.prefix_cache != Eviction.OFF
    have = [available(pair, has_predictor=has_predictor, has_prefix_cache=cache) for pair in engine.pairs]
    return np.array([np.concatenate([useful(name, levels[name], has) for name in levels]) for has in have])


def mask_rows(engine: Engine, static: NDArray[np.bool_], none: int) -> NDArray[np.bool_]:
    """(E, sum of levels) which levels do something in each environment now; at least one of each knob is legal.

    Args:
        static: ``static_masks`` of the engine; none: ``admits_none`` of the levels.
    """
    rows = static[engine.state.env["table_idx"]]
    if none >= 0:
        rows[:, none] = engine.state.env["running_count"] > 0
    return rows
