"""Knobs: one field is all there is of each, and everything else follows from it."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from l3env import Budget, Knobs, Order, SubBatching, Workload, compile_pair
from l3env.envs.serving import ServingEnv
from l3env.errors import PlanError
from l3env.knobs import ABOUT, KNOB_DTYPE, UNLIMITED, knob_names, knob_table, words_in, words_of
from l3env.policy.levels import LEVELS, MORE_LEVELS, action_of, knobs_of, levels_of
from l3env.search.tune import GRID, Case, tune

NAMES = [field.name for field in fields(Knobs)]
PAGE = Path(__file__).parents[2] / "docs" / "reference.md"


def some_levels() -> dict[str, tuple[Any, ...]]:
    """One level of each knob that is not its default."""
    return {name: next(v for v in about.levels if v != about.default) for name, about in ABOUT.items()}


def test_what_the_engine_holds_follows_from_the_fields() -> None:
    assert [*KNOB_DTYPE.names, *()] == NAMES == knob_names() == [*ABOUT]
    rows = np.zeros(3, KNOB_DTYPE)
    changed = Knobs(**some_levels())
    changed.write(rows, 1)
    assert [rows[1][name] for name in NAMES] == [getattr(changed, name) for name in NAMES]
    assert not rows[[0, 2]].view(np.int64).any()


def test_words_stand_for_levels() -> None:
    """A level written through ``words_in`` is what ``write`` would have put there, for every level of every knob."""
    for name, about in ABOUT.items():
        (column,), (words,) = words_of({name: about.levels})
        for level, word in zip(about.levels, words, strict=True):
            written, set_by_word = np.zeros(1, KNOB_DTYPE), np.zeros(1, KNOB_DTYPE)
            Knobs().write(set_by_word, 0)
            words_in(set_by_word)[0, column] = word
            replace(Knobs(), **{name: level}).write(written, 0)
            assert written == set_by_word


def test_every_knob_can_be_an_action() -> None:
    assert {**LEVELS, **MORE_LEVELS}.keys() == set(NAMES)
    env = ServingEnv(
        system="l3-dgx-a100",
        model="llama-3-8b",
        trace="profile:azure-conv-2023?n=20",
        episode_requests=2,
        action_knobs=NAMES,
    )
    env.reset(seed=0)
    wanted = Knobs(**some_levels())
    env.step(action_of(wanted, env.levels))
    assert env.engine is not None
    expected = np.zeros(1, KNOB_DTYPE)
    wanted.write(expected, 0)
    assert env.engine.knobs[0] == expected[0]
    assert knobs_of(action_of(wanted, levels_of(NAMES)), levels_of(NAMES)) == wanted


def test_every_knob_can_be_searched() -> None:
    """Of knobs that do nothing on the machine one level is tried; all others are."""
    work = Workload.build("two", [0.0, 0.1], [20, 30], [3, 4])
    cell = Case(compile_pair("l3-dgx-h200", "deepseek-v3"), work, predicted_tokens=np.array([3, 4]))
    found = tune([cell], grid={name: ABOUT[name].levels for name in NAMES}, random_count=0, rounds_count=1)
    assert [*found.around] == NAMES
    single = {name for name, levels in found.grid.items() if len(levels) == 1}
    assert single == {"eviction"}  # there is no prefix cache
    assert {*GRID} == {name for name, about in ABOUT.items() if about.tuned}
    assert all(0 not in levels for name, levels in GRID.items() if name == "admit_max_count")


def test_json_there_and_back() -> None:
    for name, about in ABOUT.items():
        for level in about.levels:
            knobs = replace(Knobs(), **{name: level})
            assert Knobs.from_json(json.loads(json.dumps(knobs.to_json()))) == knobs
    assert Knobs.from_json({"order": "NEWEST_FIRST", "sub_batching": 2, "prefill_budget_tokens": -2}) == Knobs(
        order=Order.NEWEST_FIRST, sub_batching=SubBatching.ADAPTIVE, prefill_budget_tokens=Budget.ALIGN
    )


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"admit_max_count": -1}, "admit_max_count = -1; expected at least 0"),
        ({"admit_max_count": 1.5}, "admit_max_count = 1.5; expected at least 0"),
        ({"prefill_budget_tokens": 0}, r"= 0; expected at least 1, UNLIMITED \(-1\), ALIGN \(-2\)"),
        ({"prefill_first": 2}, r"= 2; expected off \(0\) or on \(1\)"),
        ({"headroom_frac": float("nan")}, "headroom_frac = nan; expected 0 to 1"),
        ({"headroom_frac": "half"}, "headroom_frac = half; expected 0 to 1"),
        ({"victim": None}, r"victim = None; expected one of NEWEST_ADMITTED \(0\)"),
        ({"order": 7}, "order = 7; expected one of FCFS"),
    ],
)
def test_what_is_no_value_is_one_clear_error(value: dict[str, Any], says: str) -> None:
    with pytest.raises(PlanError, match=rf"knobs: .*{says}"):
        Knobs(**value)
    with pytest.raises(PlanError, match=rf"knobs: {next(iter(value))}"):
        Knobs.from_json(value)
    with pytest.raises(PlanError, match="unknown knobs speed; expected some of admit_max_count"):
        Knobs.from_json({"speed": 3})


def test_the_table_of_the_docs_is_the_declaration() -> None:
    columns = ("knob", "default", "values", "levels", "set by actions", "searched", "what")
    rows = [[f"`{row['knob']}`", *(row[column] for column in columns[1:])] for row in knob_table()]
    table = [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]
    assert "\n".join(table) in PAGE.read_text("utf-8"), "\n".join(["docs/reference.md should have", *table])
    assert all(name in table[2 + i] for i, name in enumerate(NAMES))
    assert "unlimited" in table[2]
    assert Knobs().admit_max_count == UNLIMITED
