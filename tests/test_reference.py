"""The grammar of references: taken apart, read as what they are for, every mistake one error that names it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from l3env.choices import Order
from l3env.errors import L3EnvError, PolicyError
from l3env.reference import anything, parameters, parse, parser_of


def test_a_reference_is_a_base_and_options() -> None:
    reference = parse("file.py:Class?x=1&y=a%26b%2Cc&z=p=q")
    assert reference.base == "file.py:Class"
    assert dict(reference.options) == {"x": "1", "y": "a&b,c", "z": "p=q"}
    assert parse("plain").base == "plain"
    assert not parse("plain?").options


def test_a_file_that_is_there_is_taken_whole(tmp_path: Path) -> None:
    file = tmp_path / "odd?n=1.csv"
    assert parse(str(file)).options == {"n": "1.csv"}
    file.touch()
    assert parse(str(file)).base == str(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a?x", r"policy 'a\?x': key 'x' has no value; expected x=VALUE"),
        ("a?x=", "key 'x' has no value"),
        ("a?=1", "key '' has no value; expected KEY=VALUE"),
        ("a?x=1&x=2", "key 'x' is given twice; expected once"),
    ],
)
def test_what_is_no_reference(text: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        parse(text, "policy", PolicyError)


@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        (int, "40e9", 40_000_000_000),
        (int, "-2", -2),
        (int, "9007199254740993", 9_007_199_254_740_993),  # beyond what a double holds
        (float, "2", 2.0),
        (bool, "False", False),
        (str, "40e9", "40e9"),
        (Path, "a/b", Path("a/b")),
        (float | None, "none", None),
        (str | None, "none", None),
        (str | None, "some", "some"),
        (Order, "newest-first", Order.NEWEST_FIRST),
        (Order, "4", Order.NEWEST_FIRST),
        (Literal["off", "lru"], "lru", "lru"),
        (Annotated[int, "what it is"], "3", 3),
        (Any, "3", 3),
        (Any, "0.5", 0.5),
        (Any, "true", True),
        (Any, "text", "text"),
    ],
)
def test_values_are_read_as_what_they_are_for(hint: Any, text: str, value: Any) -> None:
    read = parser_of(hint)(text)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("hint", "text", "expected"),
    [
        (int, "1.5", "a whole number"),
        (int, "inf", "a whole number"),
        (float, "nan", "a finite number"),
        (bool, "1", "true or false"),
        (float | None, "no", "a finite number or none"),
        (Order, "fifo", "one of FCFS, FCFS_HOPELESS_LAST"),
        (Literal["off", "lru"], "on", "one of off, lru"),
        (dict[str, int], "{}", "what cannot be written in a reference; give it in Python"),
    ],
)
def test_values_of_another_type(hint: Any, text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        parser_of(hint)(text)


def made(size: int, *, share: float = 0.5, order: Order = Order.FCFS, note="", plan=None) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
    return size, share, order, note, plan


def test_arguments_follow_a_signature() -> None:
    assert parse("f?size=2e3&share=1&order=by_score&note=1&plan=7").arguments(made) == {
        "size": 2000,
        "share": 1.0,
        "order": Order.BY_SCORE,
        "note": "1",  # its default is a text
        "plan": 7,
    }
    assert parameters(partial(made, size=1))["size"] is int
    assert parse("f").arguments(partial(made, size=1)) == {}
    assert anything("-1e3") == -1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("f?share=1", "'f\\?share=1': missing size; expected f\\?size=VALUE"),
        (
            "f?size=1&shares=1",
            "unknown key 'shares' \\(did you mean share\\?\\); expected one of note, order, plan, share",
        ),
        ("f?size=many", "key 'size': got 'many'; expected a whole number"),
    ],
)
def test_arguments_that_do_not_fit(text: str, message: str) -> None:
    with pytest.raises(L3EnvError, match=message):
        parse(text, "policy").arguments(made)
