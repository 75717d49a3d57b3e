"""What an action and a search choose among: the levels of knobs, and which of them do anything on a machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.errors import L3EnvError, PlanError
from l3env.knobs import ABOUT, Knobs, Need
from l3env.machine.tables import Tables

Levels = Mapping[str, tuple[Any, ...]]

LEVELS: Levels = {name: about.levels for name, about in ABOUT.items() if about.acts}
"""The action: one level of each knob."""

MORE_LEVELS: Levels = {name: about.levels for name, about in ABOUT.items() if not about.acts}
"""Knobs that an action may set besides (``action_knobs`` of the environments)."""


def levels_of(action_knobs: Sequence[str] | None) -> Levels:
    """Levels of the knobs that an action sets, in the order given; LEVELS by default.

    Raises L3EnvError for none, an unknown one, or one named twice.
    """
    if action_knobs is None:
        return LEVELS
    names = [action_knobs] if isinstance(action_knobs, str) else list(action_knobs)
    if not names or len(set(names)) < len(names) or not set(names) <= ABOUT.keys():
        raise L3EnvError(f"action_knobs = {action_knobs!r}; expected one or more of {', '.join(ABOUT)}, each once")
    return {name: ABOUT[name].levels for name in names}


def named_levels(given: Mapping[str, Sequence[Any]]) -> Levels:
    """Levels as somebody chose them, each as its knob's field holds it. Raises PlanError for what is no legal value."""
    for name, values in given.items():
        if name not in ABOUT or not len(values):
            raise PlanError(f"levels of {name!r}: {values!r}; expected levels of {', '.join(ABOUT)}")
        for value in values:
            Knobs(**{name: value})
    return {name: tuple(ABOUT[name].typed(value) for value in values) for name, values in given.items()}


def lasting(levels: Levels) -> Levels:
    """The settings that a search may hold for a whole run: without those that would end it."""
    return {
        name: tuple(value for value in values if value not in ABOUT[name].fleeting) for name, values in levels.items()
    }


def available(pair: Tables, *, has_predictor: bool = False, has_prefix_cache: bool = False) -> frozenset[Need]:
    """What levels may need and a machine has."""
    has = {
        Need.PIM: pair.has_pim,
        Need.HBM_AND_PIM: pair.has_pim and pair.has_hbm_kv,
        Need.LATENT: pair.arrays.coef["decompressed_lane"][0] > 0,
        Need.GUESSES: pair.arrays.coef["drafts_count"][0] > 0,
        Need.PREFIX_CACHE: has_prefix_cache,
        Need.PREDICTOR: has_predictor,
    }
    return frozenset(need for need, there in has.items() if there)


def useful(name: str, values: Sequence[Any], has: frozenset[Need]) -> list[bool]:
    """Which of a knob's levels do something, given what there is."""
    needs = [ABOUT[name].need(value) for value in values]
    return [need is None or need in has for need in needs]


def knobs_of(action: NDArray[np.int64], levels: Levels = LEVELS) -> Knobs:
    """The settings an action stands for."""
    return Knobs(**{name: values[int(i)] for (name, values), i in zip(levels.items(), action, strict=True)})


def action_of(knobs: Knobs, levels: Levels = LEVELS) -> NDArray[np.int64]:
    """The action nearest to some settings: the same order and mode, numbers to the closest level."""
    return np.array([_nearest(values, getattr(knobs, name)) for name, values in levels.items()], dtype=np.int64)


def sizes_of(levels: Levels) -> NDArray[np.int64]:
    """(knobs,) how many levels each has."""
    return np.array([len(values) for values in levels.values()], dtype=np.int64)


def admits_none(levels: Levels) -> int:
    """Place in a mask of the level that admits nobody; -1 where no action sets it."""
    place = 0
    for name, values in levels.items():
        if name == "admit_max_count" and 0 in values:
            return place + values.index(0)
        place += len(values)
    return -1


def _nearest(levels: tuple[Any, ...], value: Any) -> int:
    if value in levels:
        return levels.index(value)
    return int(np.argmin([abs(float(level) - float(value)) for level in levels]))
