"""How features are declared, and how numbers are brought into [0, 1].

A group of features is one file: an enumeration with an entry a feature, and the function that fills them in.
"""

from __future__ import annotations

from collections import namedtuple
from enum import IntEnum
from typing import Any, Self

import numpy as np

from l3env.jit import inner


class Feature(IntEnum):
    """Base of a group. A member's value is its column in the group, in the order of the entries, from 0.

    An entry is ``name = text`` or ``name = text, scale``; the text says where the scale is with ``{scale}``.
    """

    text: str
    scale: float | None

    def __new__(cls, text: str, scale: float | None = None) -> Self:
        column = len(cls.__members__)
        member = int.__new__(cls, column)
        member._value_ = column
        member.text = text if scale is None else text.format(scale=f"{scale:,g}")
        member.scale = scale
        return member


def scales_of(group: type[Feature]) -> Any:
    """The scales of a group's features, as floats by name, in a form that kernels take."""
    scales = {each.name: float(each.scale) for each in group if each.scale is not None}
    return namedtuple(f"{group.__name__}Scales", scales)(**scales)


@inner
def squash(value, scale):
    """[0, inf) -> [0, 1): the value over itself plus the scale."""
    return value / (value + scale)


@inner
def around_half(value, scale):
    """(-inf, inf) -> (0, 1), 0 at one half."""
    return 0.5 + 0.5 * value / (abs(value) + scale)


@inner
def share(part, whole):
    """A part of a whole, 0 where there is none."""
    return min(max(part / whole, 0.0), 1.0) if whole > 0 else 0.0


@inner
def deviation_share(mean, mean_of_squares):
    """Standard deviation over itself plus the mean."""
    deviation = np.sqrt(max(mean_of_squares - mean * mean, 0.0))
    return share(deviation, deviation + mean)
