"""Knobs: the settings that the engine decodes into a legal plan at every iteration.

One field of ``Knobs`` is all there is of a knob beside its use in a kernel (``k[e]["its_name"]``): default, text, unit,
range, the levels that actions and searches choose among, and what a level needs so as to do anything. The engine's
rows, action spaces, masks, checks, JSON, searches, ``l3env knobs`` and the table in the docs follow from the fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum, StrEnum
from functools import cached_property
from operator import attrgetter
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from l3env.choices import Budget, Eviction, Order, PimForm, SubBatching, Victim
from l3env.errors import PlanError

UNLIMITED = 1 << 30


class Need(StrEnum):
    """What a level of a knob may need so as to do anything."""

    PIM = "a PIM side"
    HBM_AND_PIM = "room for KV both in HBM and on a PIM side"
    LATENT = "a model that stores a latent, and a PIM side"
    GUESSES = "a model that guesses tokens"
    PREFIX_CACHE = "the prefix cache"
    PREDICTOR = "predicted lengths"


@dataclass(frozen=True)
class About:
    """What is to be known of a knob besides its name.

    Attributes:
        default: its type is the knob's: a truth value, a whole number, a share, or a choice that has a name.
        text: what it does.
        levels: what actions and searches choose among.
        unit: of numbers.
        low, high: the range of numbers; none for choices.
        acts: actions set it unless they are told which knobs to set.
        tuned: searches try it unless they are told which knobs to try.
        fleeting: levels for actions alone: held for ever they would end a run.
        need: of a level; None where it always does something.
    """

    default: Any
    text: str
    levels: tuple[Any, ...]
    unit: str = ""
    low: float | None = None
    high: float = UNLIMITED
    acts: bool = False
    tuned: bool = False
    fleeting: tuple[Any, ...] = ()
    need: Callable[[Any], Need | None] = lambda level: None

    @cached_property
    def names(self) -> type[IntEnum] | None:
        """Choices that have a name."""
        return type(self.default) if isinstance(self.default, IntEnum) else None

    @cached_property
    def choices(self) -> frozenset[int]:
        """Legal values that are no numbers of the range."""
        return frozenset((0, 1) if isinstance(self.default, bool) else map(int, self.names or ()))

    @property
    def expected(self) -> str:
        """Legal values in words."""
        if isinstance(self.default, bool):
            return "off (0) or on (1)"
        names = [f"{each.name} ({each:d})" for each in self.names or ()]
        if self.low is None:
            return f"one of {', '.join(names)}"
        numbers = f"at least {self.low:g}" if self.high == UNLIMITED else f"{self.low:g} to {self.high:g}"
        return ", ".join([numbers, *names])

    def is_legal(self, value: Any) -> bool:
        """Is it one of the choices, or a number of the range?"""
        try:
            if value in self.choices:
                return True
            is_whole = isinstance(self.default, float) or value == int(value)
            return self.low is not None and bool(self.low <= value <= self.high) and is_whole
        except (TypeError, ValueError, OverflowError):
            return False

    def typed(self, value: Any) -> Any:
        """A legal value, or the name of a choice, as what the field holds."""
        if self.names is None:
            return type(self.default)(value)
        if value in self.names.__members__:
            return self.names[value]
        return self.names(value) if value in self.choices else int(value)

    def plain(self, value: Any) -> bool | int | float | str:
        """A legal value for JSON and for reading: a choice by its name."""
        typed = self.typed(value)
        return str(typed.name) if isinstance(typed, IntEnum) else typed


def knob(default: Any, text: str, levels: tuple[Any, ...], **about: Any) -> Any:
    """A field of ``Knobs``; arguments as ``About`` has them."""
    return field(default=default, metadata={"about": About(default, text, levels, **about)})


ON_OFF = (False, True)


@dataclass(frozen=True)
class Knobs:
    """Settings that the engine decodes into a legal plan at every iteration, until the policy decides anew.

    ``l3env knobs`` lists them; each field says what it does. Raises PlanError for a value out of its range.
    """

    admit_max_count: int = knob(
        UNLIMITED,
        "new requests an iteration, at most",
        (0, 1, 2, 4, 8, 16, 64, UNLIMITED),
        unit="requests",
        low=0,
        acts=True,
        tuned=True,
        fleeting=(0,),
    )
    prefill_budget_tokens: int = knob(
        Budget.UNLIMITED,
        "prompt tokens an iteration, at most; or a `Budget`",
        (256, 512, 1024, 2048, 4096, 8192, *Budget),
        unit="tokens",
        low=1,
        acts=True,
        tuned=True,
        need=lambda level: Need.PIM if level in (Budget.ALIGN, Budget.ALIGN_WHEN_FULL) else None,
    )
    running_max_count: int = knob(
        UNLIMITED, "requests that run, at most", (16, 64, 128, 256, UNLIMITED), unit="requests", low=1
    )
    chunk_max_tokens: int = knob(
        UNLIMITED,
        "prompt tokens of one request an iteration, at most, unless it is alone",
        (128, 256, 512, 1024, 2048, UNLIMITED),
        unit="tokens",
        low=1,
    )
    budget_counts_decodes: bool = knob(
        False,
        "decoding requests use up the budget first, one token each (Sarathi-Serve)",
        ON_OFF,
        acts=True,
        tuned=True,
    )
    prefill_first: bool = knob(
        False,
        "an iteration with prefill stalls all decoding (vLLM before chunked prefill)",
        ON_OFF,
        tuned=True,
    )
    hbm_share_frac: float = knob(
        0.0,
        "share of resident KV to hold in HBM on systems that also have PIM",
        (0.0, 0.05, 0.1, 0.25, 0.5, 1.0),
        unit="share",
        low=0,
        high=1,
        acts=True,
        tuned=True,
        need=lambda level: Need.HBM_AND_PIM if level > 0 else None,
    )
    order: Order = knob(
        Order.FCFS,
        "queue order",
        tuple(order for order in Order if order != Order.BY_SCORE),  # scores are not an action's to give
        acts=True,
        tuned=True,
        need=lambda level: Need.PREDICTOR if level == Order.SHORTEST_PREDICTED_HOPELESS_LAST else None,
    )
    headroom_frac: float = knob(
        0.01,
        "share of each pool that new requests must leave free",
        (0.0, 0.01, 0.05, 0.1, 0.2, 0.4),
        unit="share",
        low=0,
        high=1,
        acts=True,
        tuned=True,
    )
    reserve_predicted: bool = knob(
        False,
        "admit only what fits together with the predicted growth of all residents",
        ON_OFF,
        need=lambda level: Need.PREDICTOR if level else None,
    )
    sub_batching: SubBatching | bool = knob(
        SubBatching.ON,
        "two interleaved sub-batches (systems with PIM): off, on, or adaptive (whichever is shorter)",
        tuple(SubBatching),
        acts=True,
        tuned=True,
        need=lambda level: Need.PIM if level != SubBatching.OFF else None,
    )
    victim: Victim = knob(
        Victim.NEWEST_ADMITTED,
        "who is preempted when a pool runs over",
        tuple(Victim),
        tuned=True,
        need=lambda level: Need.PREDICTOR if level == Victim.MOST_PREDICTED_LEFT else None,
    )
    pim_form: PimForm = knob(
        PimForm.STORED,
        "how new KV lies on the PIM side, for models that store a latent",
        tuple(PimForm),
        need=lambda level: Need.LATENT if level == PimForm.DECOMPRESSED else None,
    )
    multi_token: bool = knob(
        True,
        "verify a guessed token in each decode step, for models that guess; off, one token a step",
        ON_OFF,
        need=lambda level: Need.GUESSES if level else None,
    )
    eviction: Eviction = knob(
        Eviction.OFF,
        "which cached segment of a prompt goes first, where the prefix cache is on; OFF keeps the rule in use",
        tuple(rule for rule in Eviction if rule != Eviction.SCORE),  # by scores that only a policy gives
        need=lambda level: Need.PREFIX_CACHE if level != Eviction.OFF else None,
    )
    prefill_in_order: bool = knob(
        False,
        "prompts under way take turns with waiting requests in the queue's order, so that a short prompt need not wait "
        "until a long one is done; off, they come first, in order of admission. For budgets in tokens",
        ON_OFF,
    )

    def __post_init__(self) -> None:
        for name, about in ABOUT.items():
            if not about.is_legal(getattr(self, name)):
                raise PlanError(f"knobs: {name} = {getattr(self, name)}; expected {about.expected}")

    def write(self, rows: NDArray[np.void], e: int | slice) -> None:
        """Puts the settings into row (or rows) ``e`` of a KNOB_DTYPE array."""
        rows[e] = _values(self)

    def to_json(self) -> dict[str, bool | int | float | str]:
        """Every knob: a truth value, a number, or a choice by its name."""
        return {name: about.plain(getattr(self, name)) for name, about in ABOUT.items()}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """The inverse of ``to_json``; knobs that are left out have their defaults. Raises PlanError."""
        if unknown := sorted(set(raw) - set(ABOUT)):
            raise PlanError(f"unknown knobs {', '.join(unknown)}; expected some of {', '.join(ABOUT)}")
        for name, value in raw.items():
            about = ABOUT[name]
            if not (about.is_legal(value) or value in getattr(about.names, "__members__", ())):
                raise PlanError(f"knobs: {name} = {value!r}; expected {about.expected}")
        return cls(**{name: ABOUT[name].typed(value) for name, value in raw.items()})


ABOUT: Mapping[str, About] = {each.name: each.metadata["about"] for each in fields(Knobs)}
"""What is to be known of each knob, by name, in the order of the fields."""

_values = attrgetter(*ABOUT)

KNOB_DTYPE = np.dtype(
    [(name, np.float64 if isinstance(about.default, float) else np.int64) for name, about in ABOUT.items()], align=True
)
"""What the engine holds of an environment's knobs until the next decision: a word of 8 bytes each."""


def knob_names() -> list[str]:
    """Fields of Knobs in order."""
    return list(ABOUT)


def words_in(rows: NDArray[np.void]) -> NDArray[np.int64]:
    """(E, K) the same memory as (E,) rows of KNOB_DTYPE, so that a knob can be set by its column."""
    return rows.view(np.int64).reshape(len(rows), len(ABOUT))


def words_of(levels: Mapping[str, Sequence[Any]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """((knobs,) columns of some knobs in ``words_in``, (knobs, most) the words of their levels)."""
    columns = np.array([list(ABOUT).index(name) for name in levels], np.int64)
    words = np.zeros((len(levels), max(map(len, levels.values()), default=0)), np.int64)
    for row, (name, values) in zip(words, levels.items(), strict=True):
        row[: len(values)] = np.array(values, KNOB_DTYPE[name]).view(np.int64)
    return columns, words


def knob_table() -> list[dict[str, str]]:
    """All knobs for reading: default, legal values, levels of actions and searches, what each does."""
    return [
        {
            "knob": name,
            "default": _short(about, about.default),
            "values": about.expected,
            "levels": ", ".join(_short(about, level) for level in about.levels),
            "set by actions": "by default" if about.acts else "where asked for",
            "searched": "by default" if about.tuned else "where asked for",
            "what": about.text,
        }
        for name, about in ABOUT.items()
    ]


def _short(about: About, value: Any) -> str:
    plain = about.plain(value)
    return "unlimited" if plain == UNLIMITED else ("off", "on")[plain] if isinstance(plain, bool) else str(plain)
