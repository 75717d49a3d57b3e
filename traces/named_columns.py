"""Tables of any kind - CSV, JSON lines, a JSON list, Parquet, Arrow - with the same rules for what their columns hold.

A column is an Arrow array (text in a CSV, any type in Parquet and Arrow files) or a list of Python values (JSON). What
is absent is an empty field, a null or a missing key; what is wrong is one error that names file, row, field, what was
got and what was expected.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import chain
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from l3env.errors import TraceError, UnusedWarning
from l3env.traces import times
from l3env.traces.reading import MAX_TOKENS, fail
from l3env.traces.times import PER_S, Times

NONE = -1  # the code of an id that is absent
MOST_SHOWN = 12
EXACT_WHOLE = 2**53

Codes = NDArray[np.int64]


def codes(keys: Sequence[Any]) -> Codes:
    """Whole numbers >= 0 for ids, equal where the ids are, -1 for None.

    Ids that are such numbers below 2^53 stay what they are; others are numbered in order of appearance.
    """
    kinds = set(map(type, keys))
    if kinds <= {int}:
        try:
            numbers = np.array(keys, dtype=np.int64)
        except OverflowError:
            pass
        else:
            if not numbers.size or (numbers.min() >= 0 and numbers.max() < EXACT_WHOLE):
                return numbers
    elif kinds <= {int, type(None)} and all(key is None or 0 <= key < EXACT_WHOLE for key in keys):
        return np.array([NONE if key is None else key for key in keys], dtype=np.int64)
    numbered: dict[Any, int] = {}
    return np.array([NONE if key is None else numbered.setdefault(key, len(numbered)) for key in keys], dtype=np.int64)


@dataclass(frozen=True)
class Table:
    """Columns of one file by name.

    Attributes:
        file: what errors call it.
        columns: name -> Arrow array or list, all of one length.
        line: the file's line (from 1) of a row, or what else errors shall call it.
        repeated: names that several columns have; the first is kept, and asking for it is an error.
        used: the columns that were asked for.
    """

    file: str
    columns: Mapping[str, Any]
    line: Callable[[int], Any]
    repeated: frozenset[str] = frozenset()
    used: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def has(self, column: str) -> bool:
        return column in self.columns

    def need(self, *columns: str, hint: str = "") -> None:
        """Raises for columns that are not there, with those that are."""
        missing = [name for name in columns if name not in self.columns]
        if missing:
            raise TraceError(
                f"{self.file}: missing column {', '.join(map(repr, missing))}; expected {', '.join(columns)}; "
                f"the file has {shown(self.columns)}{hint}"
            )

    def take(self, rows: NDArray[np.int64]) -> Table:
        """Rows by index, which keep their lines."""
        taken = {
            name: [values[row] for row in rows] if isinstance(values, list) else values.take(pa.array(rows))
            for name, values in self.columns.items()
        }
        return Table(self.file, taken, lambda row: self.line(int(rows[row])), self.repeated, self.used)

    def _column(self, name: str) -> Any:
        if name in self.repeated:
            raise TraceError(f"{self.file}: row 1: repeated column {name!r}; expected one of that name")
        self.used.add(name)
        return self.columns[name]

    def present(self, column: str) -> NDArray[np.bool_]:
        """(N,) where the column has something."""
        values = self.columns[column]
        if isinstance(values, list):
            return np.array([value is not None and value != "" for value in values], dtype=bool)
        is_empty = pc.equal(values, "") if pa.types.is_string(values.type) else pa.scalar(False)
        return np.array(pc.invert(pc.or_(pc.is_null(values), pc.fill_null(is_empty, False))).to_numpy(), dtype=bool)

    # ------------------------------------------------------------------------------------------------- what they hold

    def numbers(self, column: str, low: float = 0.0, default: float | None = None) -> NDArray[np.float64]:
        """(N,) finite numbers >= ``low``; ``default`` where there is none."""
        expected = "a number" if low == -np.inf else f"a number >= {low:g}"
        values, absent = self._floats(column, expected, default)
        self.require((np.isfinite(values) & (values >= low)) | absent, column, expected)
        return values

    def measured(self, column: str) -> NDArray[np.float64]:
        """(N,) numbers as they are, NaN where there is none."""
        return self._floats(column, "a number", np.nan)[0]

    def tokens(self, column: str, default: int | None = None) -> Codes:
        """(N,) token counts: whole numbers >= 0."""
        return self.integers(column, 0, MAX_TOKENS, default)

    def integers(self, column: str, low: int, high: int, default: int | None = None) -> Codes:
        """(N,) whole numbers from ``low`` to ``high``."""
        expected = f"a whole number from {low} to {high}"
        values, absent = self._floats(column, expected, default)
        with np.errstate(invalid="ignore"):
            good = (values >= low) & (values <= high) & (values == np.floor(values))
        self.require(good | absent, column, expected)
        return np.array(values, dtype=np.int64)

    def seconds(self, column: str, unit: str = "s") -> NDArray[np.float64]:
        """(N,) durations >= 0 in s, of a column in ``unit``; 0 where there is none."""
        return self.numbers(column, default=0.0) / PER_S[unit]

    def times(self, column: str, unit: str = "s", may_miss: bool = False) -> Times:
        """(N,) points in time: numbers of ``unit``, or dates. Where ``may_miss``, absent ones are 0."""
        expected = times.EXPECTED.format(unit=unit)
        values = self._column(column)
        if not isinstance(values, list):
            if pa.types.is_timestamp(values.type) or pa.types.is_date(values.type):
                return self._moments(column, expected)
            if pa.types.is_string(values.type):
                return self._texts(column, pc.utf8_trim_whitespace(values), unit, expected, may_miss)
        elif any(isinstance(value, str) for value in values):
            for row, value in enumerate(values):
                if not isinstance(value, str):
                    self.fail(row, column, "a text with a date, as in other rows" if value is not None else expected)
            return self._texts(column, pa.chunked_array([pa.array(values, pa.string())]), unit, expected, may_miss)
        rough, absent = self._floats(column, expected, 0.0 if may_miss else None)
        self.require((np.isfinite(rough) & (rough >= 0)) | absent, column, expected)
        exact = values if isinstance(values, list) else values.to_pylist()
        return times.of_numbers([0 if value is None else value for value in exact], unit)

    def _texts(self, column: str, texts: pa.ChunkedArray, unit: str, expected: str, may_miss: bool) -> Times:
        filled = pc.if_else(pc.equal(pc.fill_null(texts, ""), ""), "0" if may_miss else "", texts)
        first = next((text for text in filled.to_pylist() if text), "")
        if times.NUMBER.fullmatch(first):
            rough = np.array(self._cast(column, filled, pa.float64(), expected).to_numpy(), dtype=np.float64)
            self.require(np.isfinite(rough) & (rough >= 0), column, expected)
            return times.of_number_texts(filled, unit)
        found, good = times.of_stamps(texts)
        self.require(good, column, expected)
        return found

    def _moments(self, column: str, expected: str) -> Times:
        values = self._column(column)
        self.require(np.array(values.is_valid().to_numpy(), dtype=bool), column, expected)
        stamps = self._cast(column, values, pa.timestamp("ns"), expected)
        return Times(np.array(stamps.cast(pa.int64()).to_numpy(), dtype=np.int64), dated=True)

    def keys(self, column: str) -> list[Any]:
        """(N,) ids as Python ints or texts; None where absent. A number is an int however it is written (7, 7.0)."""
        expected = "a whole number of 64 bits, or a text"
        values = self._column(column)
        values = values if isinstance(values, list) else values.to_pylist()
        found = [_key(value) for value in values]
        if WRONG in found:
            self.fail(found.index(WRONG), column, expected)
        return found

    def ids(self, column: str) -> Codes:
        """(N,) codes of ids; -1 where absent or -1."""
        values = self._column(column)
        if not isinstance(values, list) and not values.null_count and pa.types.is_integer(values.type):
            numbers = values.to_numpy()
            if not numbers.size or (numbers.min() >= NONE and numbers.max() < EXACT_WHOLE):
                return np.array(numbers, dtype=np.int64)
        return codes([None if key == NONE else key for key in self.keys(column)])

    def id_lists(self, column: str) -> tuple[Codes, Codes]:
        """Codes of the ids of all rows, one after the other, and how many each row has (0 where absent)."""
        values = self._column(column)
        expected = "a list of ids (whole numbers of 64 bits, or texts)"
        values = values if isinstance(values, list) else values.to_pylist()
        rows = [_list(value) for value in values]
        for row, found in enumerate(rows):
            if found is None:
                self.fail(row, column, expected)
        lists: list[Any] = rows
        flat = list(chain.from_iterable(lists))
        if not set(map(type, flat)) <= {int, str}:
            row = next(row for row, found in enumerate(lists) if not set(map(type, found)) <= {int, str})
            self.fail(row, column, expected)
        return codes(flat), np.array([len(found) for found in lists], dtype=np.int64)

    def kept(self, column: str) -> NDArray[Any]:
        """(N,) a column as it is, for ``Workload.extra``: bool, int64, float64 (NaN where absent), or text."""
        values = self._column(column)
        listed = values if isinstance(values, list) else values.to_pylist()
        present = [value for value in listed if value not in (None, "")]
        kinds = set(map(type, present))
        if kinds == {bool} and len(present) == len(listed):
            return np.array(listed, dtype=bool)
        try:
            numbers = [np.nan if value in (None, "") else float(value) for value in listed]
        except (TypeError, ValueError, OverflowError):
            return np.array(["" if value is None else str(value) for value in listed], dtype=np.str_)
        is_whole = len(present) == len(listed) and all(
            number.is_integer() and abs(number) < EXACT_WHOLE for number in numbers
        )
        return np.array(numbers, dtype=np.int64 if is_whole and float not in kinds else np.float64)

    # ---------------------------------------------------------------------------------------------------------- errors

    def require(self, good_mask: NDArray[np.bool_], column: str, expected: str) -> None:
        """Raises for the first row whose mask is False."""
        if not good_mask.all():
            self.fail(int(np.argmin(good_mask)), column, expected)

    def fail(self, row: int, column: str, expected: str) -> NoReturn:
        """Raises for row ``row`` (counted from 0 within the data)."""
        value = self.columns[column][row]
        fail(self.file, self.line(row), column, value.as_py() if isinstance(value, pa.Scalar) else value, expected)

    def about_unused(self, known: Iterable[str] = ()) -> dict[str, list[str]]:
        """Columns that nothing asked for and that are not ``known`` to the format, for a source; one warning names all.

        Empty where there are none.
        """
        names = [name for name in self.columns if name not in self.used and name not in known]
        if not names:
            return {}
        what = "1 column is" if len(names) == 1 else f"{len(names)} columns are"
        text = f"{self.file}: {what} not used: {shown(names)} (?keep=NAME,NAME keeps columns in Workload.extra)"
        warnings.warn(text, UnusedWarning, stacklevel=2)
        return {"unused": names}

    def _floats(self, column: str, expected: str, default: float | None) -> tuple[NDArray[np.float64], Any]:
        """(N,) numbers, with ``default`` where there is none, and where that is. Raises where none may miss."""
        values = self._column(column)
        if isinstance(values, list):
            return self._python_floats(column, values, expected, default)
        if pa.types.is_string(values.type):
            values = pc.utf8_trim_whitespace(values)
            values = pc.if_else(pc.equal(values, ""), pa.scalar(None, pa.string()), values)
        elif not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type) or is_decimal(values.type)):
            self.fail(0, column, expected)
        absent = np.array(pc.is_null(values).to_numpy(), dtype=bool)
        if default is None:
            self.require(~absent, column, expected)
        numbers = np.array(self._cast(column, values, pa.float64(), expected).to_numpy(), dtype=np.float64)
        if default is not None and pa.types.is_floating(self.columns[column].type):
            absent |= np.isnan(numbers)  # pandas writes absent numbers so
        return np.where(absent, 0.0 if default is None else default, numbers), absent

    def _python_floats(
        self, column: str, values: list[Any], expected: str, default: float | None
    ) -> tuple[NDArray[np.float64], Any]:
        absent = np.array([value is None for value in values], dtype=bool)
        numbers = np.full(len(values), 0.0 if default is None else default)
        for row, value in enumerate(values):
            if value is None and default is not None:
                continue
            if type(value) not in (int, float, Decimal):
                self.fail(row, column, expected)
            try:
                numbers[row] = float(value)
            except OverflowError:
                self.fail(row, column, expected)
        return numbers, absent

    def _cast(self, column: str, values: pa.ChunkedArray, kind: pa.DataType, expected: str) -> pa.ChunkedArray:
        """The values as ``kind``; on failure halves the rows until it has the first bad one."""
        is_safe = pa.types.is_string(values.type) or pa.types.is_timestamp(kind)
        try:
            return pc.cast(values, kind, safe=is_safe)
        except pa.ArrowInvalid:
            low, high = 0, len(values)
        while high - low > 1:
            middle = (low + high) // 2
            try:
                pc.cast(values.slice(low, middle - low), kind, safe=is_safe)
                low = middle
            except pa.ArrowInvalid:
                high = middle
        self.fail(low, column, expected)


WRONG = object()


def _key(value: Any) -> Any:
    """An id as int, text or None; ``WRONG`` where it is neither."""
    if isinstance(value, str):
        text = value.strip()
        digits = text.removesuffix(".0").removeprefix("-")
        return (int(text.removesuffix(".0")) if digits.isdecimal() and len(digits) < 40 else text) if text else None
    if value is None or type(value) is int:
        return value
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value):
        return int(value)
    return WRONG


def _list(value: Any) -> list[Any] | None:
    """The ids of one row; None where they are none."""
    if value is None:
        return []
    if isinstance(value, str):
        parts = [part.strip("\"' ") for part in _split(value)]
        return [_key(part) for part in parts if part]
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    return value if isinstance(value, list) else None


def _split(text: str) -> list[str]:
    for mark in ";,|[]":
        text = text.replace(mark, " ")
    return text.split()


def is_decimal(kind: pa.DataType) -> bool:
    """Whether an Arrow type is a decimal of any width."""
    return bool(pa.types.is_decimal(kind))


def shown(names: Iterable[str]) -> str:
    """Names of columns for people: at most a dozen."""
    every = [name or "(no name)" for name in names]
    more = f" and {len(every) - MOST_SHOWN} more" if len(every) > MOST_SHOWN else ""
    return ", ".join(every[:MOST_SHOWN]) + more
