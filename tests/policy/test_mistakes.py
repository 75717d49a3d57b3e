"""What authors of policies get wrong, in three lines: the policy; file and line; when, what was expected, what came."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import l3env
from l3env import BasePolicy, Knobs, View, Workload
from l3env.cli import main
from l3env.errors import PlanError, PolicyError
from l3env.machine.tables import Tables
from l3env.policy.registry import make_policy
from l3env.runs.driver import run_policy

CELL = ("--system", "gpu-dgx-a100", "--model", "llama-3-8b", "--trace", "profile:azure-conv-2023?n=12")
HEAD = "from l3env import BasePolicy, FixedKnobs, Knobs, Order, Plan, Scored, View\nimport math\n\n"
DECIDES = "    def decide(self, view):\n        return Knobs()\n"
AT = r"at \d+\.\d{3} s: "
BEFORE = "before the run: "


def written(folder: Path, body: str) -> str:
    """A file with a class ``Mine``, which begins at line 4; its lines after the first are ``body``."""
    path = folder / "mine.py"
    path.write_text(f"{HEAD}class Mine(BasePolicy):\n    name = 'my-policy'\n{body}")
    return f"{path}:Mine"


def said_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *command: str
) -> tuple[int, list[str]]:
    """Exit code of a command, and the lines of its error."""
    monkeypatch.setattr(sys, "argv", ["l3env", *command])
    with pytest.raises(SystemExit) as end:
        main()
    told = capsys.readouterr()
    assert "Traceback" not in told.err
    _, found, error = told.err.partition("error: ")
    assert found, told.err
    return int(end.value.code or 0), [line.strip() for line in error.strip().splitlines()]


MISTAKES = {
    "no return": (
        "    def decide(self, view):\n        Knobs()\n",
        "my-policy': decide gives a wrong answer",
        "mine.py:6, in decide",
        AT + r"expected Knobs, Scored or Plan; got None \(a return is missing\?\)",
    ),
    "wrong type": (
        "    def decide(self, view):\n        return {'order': 1}\n",
        "my-policy': decide gives a wrong answer",
        "mine.py:6, in decide",
        AT + r"expected Knobs, Scored or Plan; got dict \{'order': 1\}",
    ),
    "scored without knobs": (
        "    def decide(self, view):\n        return Scored(None, [], [])\n",
        "decide gives a wrong answer",
        "mine.py:6, in decide",
        AT + "expected Knobs, Scored or Plan; got None",
    ),
    "score of nobody": (
        "    def decide(self, view):\n        return Scored(Knobs(), [99], [0.5])\n",
        "decide fails",
        "mine.py:6, in decide",
        AT + "scored: request 99 neither waits nor runs",
    ),
    "exception": (
        "    def decide(self, view):\n        return self.rule()\n    def rule(self):\n        return 1 / 0\n",
        "my-policy': decide fails",
        "mine.py:9, in rule",
        AT + "expected Knobs, Scored or Plan; got ZeroDivisionError: division by zero",
    ),
    "exception in a helper of l3env's": (
        "    def decide(self, view):\n        return view.waiting(limit='many')\n",
        "decide fails",
        "mine.py:7, in decide",
        AT + "expected Knobs, Scored or Plan; got TypeError: ",
    ),
    "exit": (
        "    def decide(self, view):\n        raise SystemExit(0)\n",
        "decide fails",
        "mine.py:7, in decide",
        AT + "expected Knobs, Scored or Plan; got SystemExit: 0",
    ),
    "absurd knobs": (
        "    def decide(self, view):\n        return Knobs(headroom_frac=2)\n",
        "decide fails",
        "mine.py:7, in decide",
        AT + "knobs: headroom_frac = 2; expected ",
    ),
    "illegal plan": (
        "    def decide(self, view):\n        return Plan(admit=[99])\n",
        "decide fails",
        "mine.py:6, in decide",
        AT + "plan: request 99: there is no such request",
    ),
    "plan of wrong types": (
        "    def decide(self, view):\n        return Plan(admit=5)\n",
        "decide fails",
        "mine.py:6, in decide",
        AT + "expected Knobs, Scored or Plan; got TypeError: ",
    ),
    "stuck with plans": (
        "    def decide(self, view):\n        return Plan()\n",
        "my-policy': is stuck",
        "mine.py:6, in decide",
        AT + "expected decisions by which some request gets on; got 2 requests that wait and 0 that hold memory",
    ),
    "prepare": (
        "    def prepare(self, system, training):\n        training.nothing\n" + DECIDES,
        "prepare fails",
        "mine.py:7, in prepare",
        BEFORE + "expected that it returns; got AttributeError: ",
    ),
    "predictor of another type": (
        "    def predictor(self):\n        return 5\n" + DECIDES,
        "predictor gives a wrong answer",
        "mine.py:6, in predictor",
        BEFORE + "expected None, or a function of prompt tokens .*; got int 5",
    ),
    "predictor that fails": (
        "    def predictor(self):\n        return lambda prompts: prompts.nothing\n" + DECIDES,
        "predictor fails",
        "mine.py:7, in <lambda>",
        BEFORE + "expected .*; got AttributeError: ",
    ),
    "predictor of one number": (
        "    def predictor(self):\n        return lambda prompts: 7\n" + DECIDES,
        "predictor gives a wrong answer",
        "mine.py:6, in predictor",
        BEFORE + "expected .*one finite number per request; got for 2 prompts: ",
    ),
    "scorer": (
        "    def scorer(self):\n        return [1.0, 2.0]\n" + DECIDES,
        "scorer fails",
        "mine.py:6, in scorer",
        BEFORE + r"scorer: weights of shape \(2,\); expected \d+ finite numbers",
    ),
    "figures": (
        "    def figures(self):\n        return {'mine': 'many'}\n" + DECIDES,
        "figures gives a wrong answer",
        "mine.py:6, in figures",
        AT + r"expected a dict of numbers by name; got dict \{'mine': 'many'\}",
    ),
    "figures that every run has": (
        "    def figures(self):\n        return {'slo_attainment_frac': 1.0}\n" + DECIDES,
        "figures gives a wrong answer",
        "mine.py:6, in figures",
        AT + "expected figures of its own; got 'slo_attainment_frac', which every run has",
    ),
    "no decide": (
        "    def decides(self, view):\n        return Knobs()\n",
        r"mine\.py:Mine': lacks decide",
        "mine.py:4, Mine",
        BEFORE + "expected all that l3env.BasePolicy has; got none of decide",
    ),
    "wrong signature": (
        "    def decide(self):\n        return Knobs()\n",
        "wrong arguments of decide",
        "mine.py:6, in decide",
        BEFORE + r"expected decide\(view\); got decide\(\)",
    ),
    "hook that is none": (
        "    figures = 5\n" + DECIDES,
        "wrong arguments of figures",
        "mine.py:4, Mine",
        BEFORE + r"expected figures\(\); got int 5",
    ),
    "interval": (
        "    decision_interval_s = -1\n" + DECIDES,
        "wrong decision_interval_s",
        "mine.py:4, Mine",
        BEFORE + "expected seconds, 0 or more; got int -1",
    ),
    "interval that is no number": (
        "    decision_interval_s = math.nan\n" + DECIDES,
        "wrong decision_interval_s",
        "mine.py:4, Mine",
        BEFORE + "expected seconds, 0 or more; got float nan",
    ),
    "truth": (
        "    wants_truth = True\n" + DECIDES,
        "wrong name",
        "mine.py:4, Mine",
        BEFORE + "it wants true output lengths; its name must start with 'oracle-'; got 'my-policy'",
    ),
    "constructor": (
        "    def __init__(self):\n        raise RuntimeError('no such thing')\n" + DECIDES,
        r"mine\.py:Mine': cannot be made",
        "mine.py:7, in __init__",
        BEFORE + "expected a policy; got RuntimeError: no such thing",
    ),
    "missing argument": (
        "    def __init__(self, budget: int):\n        pass\n" + DECIDES,
        r"mine\.py:Mine': cannot be made",
        "mine.py:6, __init__",
        BEFORE + r"missing budget; expected .*mine\.py:Mine\?budget=VALUE",
    ),
    "syntax": (
        "    def decide(self, view)\n        return Knobs()\n",
        r"mine\.py fails to import",
        "mine.py:6",
        BEFORE + "expected a file that can be imported; got SyntaxError: expected ':'",
    ),
    "import": (
        DECIDES + "import nothing_of_this_name\n",
        r"mine\.py fails to import",
        "mine.py:8, in <module>",
        BEFORE + "expected a file that can be imported; got ModuleNotFoundError: ",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_three_lines(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    body, problem, where, said = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    ref = written(tmp_path, body)
    code, lines = said_of(capsys, monkeypatch, "compare", *CELL, "--policies", ref)
    assert code == 2
    assert len(lines) == 3, lines
    assert re.match("policy '.*" + problem, lines[0]), lines
    assert lines[1] == where
    assert re.match(said, lines[2]), lines


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("x=1", r"unknown key 'x'.*; expected one of budget"),
        ("budget=some", "key 'budget': got 'some'; expected a whole"),
    ],
)
def test_wrong_arguments_name_the_constructor(
    options: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = written(tmp_path, "    def __init__(self, budget: int = 3):\n        pass\n" + DECIDES) + f"?{options}"
    code, lines = said_of(capsys, monkeypatch, "compare", *CELL, "--policies", f"fcfs,{ref}")
    assert (code, len(lines)) == (2, 3)
    assert ref in lines[0]
    assert lines[1].endswith("mine.py:6, __init__")
    assert re.match(BEFORE + said, lines[2])


def test_segment_scores_of_another_number(tmp_path: Path, mha_tables: Tables) -> None:
    body = "    def score_segments(self, segments):\n        return [0.5]\n" + DECIDES
    workload = Workload.build(
        "shared",
        range(0, 60, 10),
        [64] * 6,
        [2] * 6,
        prefix_ids=[i for r in range(6) for i in range(4 * r, 4 * r + 4)],
        prefix_offsets=range(0, 28, 4),
        prefix_block_tokens=16,
    )
    with pytest.raises(PolicyError, match=r"score_segments gives a wrong answer\n.*mine\.py:6, in score_segments\n"):
        run_policy(mha_tables, workload, make_policy(written(tmp_path, body)), prefix_cache="score")


def test_a_policy_typed_in_is_named_by_its_class(mha_tables: Tables) -> None:
    """It has no name of its own; a test's line is the author's."""

    class Nameless(BasePolicy):
        def decide(self, view: View) -> Knobs:
            raise KeyError("here")

    line = Nameless.decide.__code__.co_firstlineno + 1
    with pytest.raises(PolicyError, match=rf"policy 'Nameless': decide fails\n.*test_mistakes\.py:{line}, in decide"):
        run_policy(mha_tables, Workload.build("one", [0.0], [9], [2]), Nameless())


def test_errors_keep_their_kind_and_their_cause(mha_tables: Tables) -> None:
    class Absurd(BasePolicy):
        def decide(self, view: View) -> Knobs:
            return Knobs(prefill_budget_tokens=0)

    with pytest.raises(PlanError) as found:
        run_policy(mha_tables, Workload.build("one", [0.0], [9], [2]), Absurd())
    assert isinstance(found.value.__cause__, PlanError)


def test_a_kept_result_has_the_traceback(tmp_path: Path) -> None:
    ref = written(tmp_path, "    def decide(self, view):\n        return 1 / 0\n")
    l3env.compare([ref], "gpu-dgx-a100", "llama-3-8b", CELL[-1], out=tmp_path / "out")
    (kept,) = (tmp_path / "out" / "cells").iterdir()
    assert "line 7, in decide" in json.loads(kept.read_text())["traceback"]


def test_modules_beside_a_file_are_imported_early_and_late(tmp_path: Path, mha_tables: Tables) -> None:
    """At the top, in the constructor, and in a hook."""
    for name, number in (("early", 1), ("made", 2), ("late", 4)):
        (tmp_path / f"{name}.py").write_text(f"NUMBER = {number}\n")
    body = (
        "    def __init__(self):\n        import early, made\n        self.sum = early.NUMBER + made.NUMBER\n"
        "    def decide(self, view):\n        import late\n"
        "        return Knobs(prefill_budget_tokens=self.sum + late.NUMBER)\n"
    )
    workload = Workload.build("one", [0.0], [70], [1])
    outcome = run_policy(mha_tables, workload, make_policy(written(tmp_path, body)))
    assert outcome.metrics["iterations_count"] == 10  # 7 prompt tokens at a time
    assert not {"early", "made", "late"} & sys.modules.keys()


def test_a_file_with_one_policy_needs_no_class(tmp_path: Path) -> None:
    path = Path(written(tmp_path, DECIDES).removesuffix(":Mine"))
    assert make_policy(str(path)).name == "my-policy"
    path.write_text(path.read_text() + "class Other(Mine): pass\n")
    with pytest.raises(PolicyError, match=r"has several policies: Mine, Other; expected .*mine\.py:Class"):
        make_policy(str(path))
    path.write_text("x = 1\n")
    with pytest.raises(PolicyError, match="no class with decide"):
        make_policy(str(path))


def test_one_that_fails_among_several_does_not_lose_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = written(tmp_path, "    def decide(self, view):\n        return None\n")
    monkeypatch.setattr(sys, "argv", ["l3env", "compare", *CELL, "--policies", f"{ref},fcfs", "--json"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    told = capsys.readouterr()
    failed, done = json.loads(told.out)["results"]
    assert failed["error"].count("\n") == 2
    assert done["error"] is None
    assert done["finished_count"] == 12


def test_what_a_policy_prints_leaves_json_alone(tmp_path: Path) -> None:
    """Where it is imported, made and asked, here and in workers: to stderr."""
    body = (
        "    print('imported')\n    def __init__(self):\n        print('made')\n"
        "    def decide(self, view):\n        print('asked')\n        return Knobs()\n"
    )
    ref = written(tmp_path, body)
    for jobs in ("1", "2"):
        command = [
            sys.executable,
            "-m",
            "l3env.cli",
            "compare",
            *CELL,
            "--policies",
            f"{ref},fcfs",
            "-j",
            jobs,
            "--json",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert len(json.loads(done.stdout)["results"]) == 2
        assert {"imported", "made", "asked"} <= set(done.stderr.split())


def test_a_mistake_of_a_real_command(tmp_path: Path) -> None:
    written(tmp_path, "    def decide(self, view):\n        return view.now\n")
    command = [sys.executable, "-m", "l3env.cli", "compare", *CELL, "--policies", "mine.py", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()[-3:]
    assert lines[0] == "error: policy 'my-policy': decide fails"
    assert lines[1] == "  mine.py:7, in decide"
    assert "'View' object has no attribute 'now'" in lines[2]


def test_the_built_in_ones_keep_the_protocol() -> None:
    for name in l3env.policy.policy_names():
        make_policy(name)
