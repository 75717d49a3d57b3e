"""``l3env policies check``: what is well is said line by line, what is wrong in three lines."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from l3env.cli import main

HEAD = "import random\nfrom l3env import BasePolicy, Knobs\n\n\nclass Mine(BasePolicy):\n    name = 'mine'\n"
GOOD = f"{HEAD}    decision_interval_s = 0.5\n    def decide(self, view):\n        return Knobs()\n"
CELL = ("--system", "gpu-dgx-a100", "--model", "llama-3-8b", "--trace", "profile:azure-conv-2023?n=60")
COUNTS = (
    "    count = 0\n    def decide(self, view):\n        self.count += 1\n"
    "        return Knobs(prefill_budget_tokens={})\n"
)


def check(
    path: Path, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *more: str
) -> tuple[int, str, str]:
    path.write_text(text)
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(sys, "argv", ["l3env", "policies", "check", path.name, *CELL, *more])
    with pytest.raises(SystemExit) as end:
        main()
    told = capsys.readouterr()
    return int(end.value.code or 0), told.out, told.err


def test_a_good_one(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, told, notes = check(tmp_path / "mine.py", GOOD, capsys, monkeypatch)
    assert (code, notes) == (0, "")
    hooks, run, repeats, decisions = told.splitlines()
    assert hooks == "OK  hooks: all there, with the right arguments; asked every 0.5 s"
    assert run.startswith("OK  run: 60 of 60 requests finished")
    assert repeats.startswith("OK  repeats")
    found = re.fullmatch(r"OK  decisions: (\d+); median ([\d.,]+) us, p99 ([\d.,]+) us", decisions)
    assert found is not None
    assert int(found[1]) > 8  # a replica at least
    assert float(found[2]) <= float(found[3].replace(",", ""))


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, told, _ = check(tmp_path / "mine.py", GOOD + "        print('no')\n", capsys, monkeypatch, "--json")
    found = json.loads(told)
    assert (code, found["ok"], found["policy"]) == (0, True, "mine.py")
    assert 0 < found["median_us"] <= found["p99_us"]
    bad = GOOD.replace("return Knobs()", "return None")
    code, told, notes = check(tmp_path / "mine.py", bad, capsys, monkeypatch, "--json")
    found = json.loads(told)
    assert (code, found["ok"]) == (2, False)
    assert found["error"].splitlines()[1] == "  mine.py:8, in decide"
    assert notes.startswith("error: policy 'mine': decide gives a wrong answer\n")


@pytest.mark.parametrize(
    ("rule", "problem", "said"),
    [
        ("100 + self.count", "state leaks from one run into the next", "; prepare() should forget"),
        ("random.randrange(100, 4000)", "does not repeat", "numbers drawn without a seed"),
    ],
)
def test_what_does_not_repeat(
    rule: str,
    problem: str,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, _, notes = check(tmp_path / "mine.py", HEAD + COUNTS.format(rule), capsys, monkeypatch)
    first, where, last = notes.splitlines()
    assert (code, first) == (2, f"error: policy 'mine.py': {problem}")
    assert where == "  mine.py:5, Mine"
    assert "expected the same results; got request " in last
    assert said in last


def test_state_that_prepare_forgets_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forgets = "    def prepare(self, system, training):\n        self.count = 0\n"
    body = HEAD + COUNTS.format("100 + self.count") + forgets
    assert check(tmp_path / "mine.py", body, capsys, monkeypatch)[0] == 0


def test_a_mistake_is_the_same_three_lines_as_anywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, told, notes = check(tmp_path / "mine.py", GOOD.replace("(self, view)", "(self)"), capsys, monkeypatch)
    assert (code, told) == (2, "")
    assert notes.splitlines() == [
        "error: policy 'mine.py': wrong arguments of decide",
        "  mine.py:8, in decide",
        "  before the run: expected decide(view); got decide()",
    ]
