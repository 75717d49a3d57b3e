"""Points in time, kept exactly as a file gives them until the first of them is taken away.

A wall clock of 1.7e9 s leaves float64 some 0.2 us; so times are whole ns (or decimals, where a file has more digits),
and become seconds only as distances from the first arrival.
"""

from __future__ import annotations

import decimal
import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

UNIT_DIGITS = {"s": 0, "ms": 3, "us": 6, "ns": 9}  # a unit is 10^-digits s
PER_S = {unit: 10.0**digits for unit, digits in UNIT_DIGITS.items()}
NS_DIGITS = 9
EXACT_DIGITS = 400  # of intermediate decimals: more than any float64 has
MOST_NS = 2**62
STAMP = (
    r"^(?P<stamp>\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d{1,9})?)?)?)"
    r" ?(?P<zone>Z|z|UTC|utc|GMT|[+-]\d\d:?\d\d|[+-]\d\d)?$"
)
ZONE = re.compile(r"([+-])(\d\d):?(\d\d)?")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?(nan|inf|infinity)", re.IGNORECASE)
EXPECTED = "a number of {unit} >= 0, or a time like 2023-11-16T18:15:46.6805900Z"


@dataclass(frozen=True)
class Times:
    """(N,) points in time: int64 ns, else Python Decimals of s, else float64 s (of drawn times).

    Attributes:
        dated: whether 0 is the beginning of 1970 (the file has dates), rather than a time of the file's own.
    """

    values: NDArray[Any]
    dated: bool = False

    def __len__(self) -> int:
        return int(self.values.size)

    def select(self, rows: NDArray[Any]) -> Times:
        """The times of some rows (mask or indices)."""
        return Times(self.values[rows], self.dated)

    def since_first(self) -> NDArray[np.float64]:
        """(N,) s since the earliest, each the float64 next to the exact distance."""
        first = self.values.min()
        if self.values.dtype == np.float64:
            if first == 0:
                return np.array(self.values)
            return Times(np.array(self._decimals(), dtype=object)).since_first()
        if self.values.dtype == np.int64:
            if int(self.values.max()) - int(first) < 2**53:
                return np.array((self.values - first) / 1e9, dtype=np.float64)
            return np.array([(each - int(first)) / 10**NS_DIGITS for each in self.values.tolist()])  # rounded once
        with decimal.localcontext(prec=EXACT_DIGITS):
            return np.array([float(each - first) for each in self.values])

    def began_at(self) -> str | float:
        """The earliest: a date and time of UTC, else s on the file's own clock, as text where float64 is too short."""
        first = self.values.min()
        if self.dated:
            return f"{np.datetime_as_string(np.datetime64(int(first), 'ns'))}Z"
        if self.values.dtype == np.float64:
            return float(first)
        exact = Decimal(int(first)).scaleb(-NS_DIGITS) if self.values.dtype == np.int64 else first
        return float(exact) if Decimal(repr(float(exact))) == exact else f"{exact.normalize():f}"

    def minus(self, other: Times) -> NDArray[np.float64]:
        """(N,) s from ``other`` to these, each the float64 next to the exact distance."""
        if self.values.dtype == other.values.dtype == np.int64:
            distance = self.values - other.values
            if not distance.size or np.abs(distance).max() < 2**53:
                return np.array(distance / 1e9, dtype=np.float64)
        with decimal.localcontext(prec=EXACT_DIGITS):
            pairs = zip(self._decimals(), other._decimals(), strict=True)
            return np.array([float(one - two) for one, two in pairs], dtype=np.float64)

    def _decimals(self) -> list[Decimal]:
        if self.values.dtype == np.int64:
            return [Decimal(each).scaleb(-NS_DIGITS) for each in self.values.tolist()]
        return [Decimal(repr(each)) if isinstance(each, float) else each for each in self.values.tolist()]

    def moved(self, rows: NDArray[np.int64], sources: NDArray[np.int64], distance_s: NDArray[np.float64]) -> Times:
        """``rows`` set, one after the other, to the time of ``sources`` and ``distance_s`` more."""
        exact = self._decimals()
        for row, source, distance in zip(rows.tolist(), sources.tolist(), distance_s.tolist(), strict=True):
            exact[row] = (exact[source] if source >= 0 else Decimal(0)) + Decimal(repr(distance))
        return Times(of_numbers(exact, "s").values, self.dated)


def of_numbers(numbers: Iterable[Any], unit: str) -> Times:
    """Numbers (int, float, Decimal, or texts of them; finite) of a unit."""
    with decimal.localcontext(prec=EXACT_DIGITS):
        exact = [Decimal(repr(each)) if isinstance(each, float) else Decimal(each) for each in numbers]
        shift = NS_DIGITS - UNIT_DIGITS[unit]
        if all(abs(each.adjusted()) < 19 for each in exact):  # a float of 1e300 is no number of ns
            ns = [each.scaleb(shift) for each in exact]
            whole = [int(each) for each in ns]
            if all(-MOST_NS < few < MOST_NS and few == each for few, each in zip(whole, ns, strict=True)):
                return Times(np.array(whole, dtype=np.int64))
        return Times(np.array([each.scaleb(-UNIT_DIGITS[unit]) for each in exact], dtype=object))


def of_number_texts(texts: pa.ChunkedArray, unit: str) -> Times:
    """As ``of_numbers``, of many texts at once where they have no digits below a ns."""
    try:
        exact = pc.cast(texts, pa.decimal128(38, NS_DIGITS - UNIT_DIGITS[unit]))
    except pa.ArrowInvalid:
        return of_numbers(texts.to_pylist(), unit)
    exact = exact.combine_chunks() if isinstance(exact, pa.ChunkedArray) else exact
    words = np.frombuffer(exact.buffers()[1], dtype="<i8").reshape(-1, 2)[exact.offset : exact.offset + len(exact)]
    low, high = words[:, 0], words[:, 1]
    if ((high == low >> 63) & (np.abs(low) < MOST_NS)).all():
        return Times(np.array(low, dtype=np.int64))
    return of_numbers(texts.to_pylist(), unit)


def of_stamps(texts: pa.ChunkedArray) -> tuple[Times, NDArray[np.bool_]]:
    """Dates and times of day in texts, UTC where they name no zone, and which rows could be read."""
    texts = pc.replace_substring_regex(texts, r"(:\d\d),(\d{1,9})", r"\1.\2")
    found = pc.extract_regex(texts, STAMP)
    good = np.array(pc.is_valid(found).to_numpy(zero_copy_only=False), dtype=bool)
    found = found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found
    stamps, zones = pc.struct_field(found, "stamp"), pc.struct_field(found, "zone")
    ns = np.zeros(len(texts), dtype=np.int64)
    try:
        ns = _ns(stamps)
    except pa.ArrowInvalid:  # a 13th month
        for row in np.flatnonzero(good):
            try:
                ns[row] = _ns(stamps.slice(row, 1))[0]
            except pa.ArrowInvalid:
                good[row] = False
                break
    coded = pc.dictionary_encode(zones)
    shifts = np.array([_zone_ns(zone) for zone in coded.dictionary.to_pylist()] or [0], dtype=np.int64)
    codes = np.array(pc.fill_null(coded.indices, 0).to_numpy(zero_copy_only=False), dtype=np.int64)
    return Times(ns - shifts[codes], dated=True), good


def _ns(stamps: pa.Array) -> NDArray[np.int64]:
    moments = pc.cast(pc.cast(pc.fill_null(stamps, "1970-01-01"), pa.timestamp("ns")), pa.int64())
    return np.array(moments.to_numpy(zero_copy_only=False), dtype=np.int64)


def _zone_ns(zone: str | None) -> int:
    found = ZONE.match(zone or "")
    if found is None:
        return 0
    minutes = int(found[2]) * 60 + int(found[3] or 0)
    return (-1 if found[1] == "-" else 1) * minutes * 60 * 10**NS_DIGITS
