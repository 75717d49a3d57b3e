"""What commands print: results on stdout, all else on stderr; no name cut at 80 columns, none read as markup."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from l3env.cli import app, main
from l3env.cli.columns import show_table
from l3env.cli.shared import out
from l3env.errors import L3EnvError

runner = CliRunner()
TRACE = "profile:azure-conv-2023?n=12"
CELL = ("--system", "gpu-dgx-a100", "--model", "llama-3-8b")
LISTS = [["systems"], ["models"], ["policies"], ["knobs"], ["traces", "list"]]
POLICY = (
    "from l3env import FixedKnobs, Knobs\nclass Mine(FixedKnobs):\n    def __init__(self):\n        super().__init__"
)
Ended = tuple[int, str, str]  # exit code, stdout, stderr


@pytest.fixture
def ended(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """How a command ends as a process would, errors of the user's included."""

    def run(*command: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["l3env", *command])
        with pytest.raises(SystemExit) as end:
            main()
        told = capfd.readouterr()
        assert "Traceback" not in told.err
        return int(end.value.code or 0), told.out, told.err

    return run


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out, "width", 80)


def run_policies(folder: Path) -> Path:
    """A folder with a file of a policy whose every name could be taken for markup."""
    place = folder / "p[train]" / "q["
    place.mkdir(parents=True)
    (place / "x].py").write_text(f"{POLICY}('mine', Knobs())\n")
    return place / "x].py"


# --- widths


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("command", LISTS)
def test_lists_fit_80_columns_and_cut_no_name(command: list[str]) -> None:
    told = runner.invoke(app, command)
    rows = json.loads(runner.invoke(app, [*command, "--json"]).stdout)
    first = {"traces": "name", "systems": "name", "models": "name", "policies": "policy", "knobs": "knob"}[command[0]]
    lines = told.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in told.stdout
    begins = [line.split(" ")[0] for line in lines]
    assert [each for each in begins if each in {row[first] for row in rows}] == [row[first] for row in rows]


@pytest.mark.usefixtures("narrow")
def test_lesser_columns_give_way_and_a_note_says_which(capsys: pytest.CaptureFixture[str]) -> None:
    heads, long = ("policy", "95 % of it", "95 % of it", "lesser", "what"), "n" * 30
    show_table(heads, [(long, "1.0 to 2.0", "3.0 to 4.0", "7", "words and more words " * 3)], ("lesser",))
    told = capsys.readouterr()
    assert all(told.out.count(each) == 1 for each in (long, "1.0 to 2.0", "3.0 to 4.0"))
    assert max(map(len, told.out.splitlines())) <= 80
    assert "7" not in told.out
    assert told.err == "note: 80 columns are too few for lesser; a wider terminal or --json shows all\n"
    show_table(heads, [("short", "1.0 to 2.0", "3.0 to 4.0", "7", "few words")], ("lesser",))
    told = capsys.readouterr()
    assert told.out.count("95 % of it") == 2
    assert "7" in told.out
    assert told.err == ""


@pytest.mark.usefixtures("narrow")
def test_a_name_wider_than_the_terminal_is_broken_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    name = "".join(str(i % 10) for i in range(200))
    show_table(("policy", "load"), [(name, "0.5")])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert "".join(line[:74].split(" ")[0] for line in lines) == name


@pytest.mark.usefixtures("narrow")
def test_a_comparison_at_80_columns_has_its_policies_whole(ended: Callable[..., Ended]) -> None:
    long = "sarathi?prefill_budget_tokens=2048&headroom_frac=0.05&admit_max_count=64&prefill_in_order=true"
    code, told, notes = ended("compare", *CELL, "--trace", TRACE, "--policies", f"fcfs,{long}")
    assert code == 0
    assert max(map(len, told.splitlines())) <= 80
    rows = told.partition("fcfs")[2].splitlines()[1:]
    assert "".join(row.split("  ")[0].split(" ")[0].strip() for row in rows).startswith(long[:40])
    assert "too few for" in notes
    assert "goodput" in told


# --- markup


def test_brackets_are_shown_as_they_are(
    tmp_path: Path, ended: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In policies, traces, folders and errors."""
    monkeypatch.chdir(tmp_path)
    ref = f"{run_policies(tmp_path).relative_to(tmp_path)}:Mine"
    (tmp_path / "t[bold][").mkdir()
    trace, folder = "t[bold][/].csv", "o[/red]"
    assert ended("traces", "convert", TRACE, trace)[2].endswith(f"requests written to {trace}\n")
    code, told, notes = ended("compare", *CELL, "--trace", trace, "--policies", f"{ref},{ref}?x=1", "--out", folder)
    assert (code, f"error: policy '{ref}?x=1'" in notes) == (2, True)
    code, told, notes = ended("compare", *CELL, "--trace", trace, "--policies", f"{ref},fcfs", "--out", folder)
    assert code == 0
    assert f"written: {folder}/results.csv" in notes
    assert f"written: {folder}/report.html" in ended("report", folder)[2]
    assert "spec: t[bold][/].csv" in ended("traces", "stats", trace)[1]
    options = ("--policies", ref, "--seeds", "1", "--tolerance", "0.5", "-j", "1")
    monkeypatch.setattr(out, "width", 250)  # figures may be wide
    code, told, _ = ended("capacity", *CELL, "--trace", trace, *options)
    assert code == 0
    assert ref in told
    assert trace in told
    code, told, notes = ended("timeline", *CELL, "--trace", trace, "--policy", ref, "--out", "l[/x].json")
    assert code == 0
    assert "written: l[/x].json" in notes
    for wrong in ("[train]", "[/x]"):
        assert f"unknown policy '{wrong}'" in ended("compare", "--policies", wrong)[2]
        assert f"'{wrong}'" in ended(wrong)[2]
        assert wrong in ended("report", wrong)[2]


def test_brackets_in_the_error_of_a_run(tmp_path: Path, ended: Callable[..., Ended]) -> None:
    path = tmp_path / "mine.py"
    body = "    def decide(self, view):\n        raise ValueError('[train] and [/x]')\n"
    path.write_text(f"from l3env import BasePolicy\nclass Mine(BasePolicy):\n{body}")
    code, _, notes = ended(
        "compare", *CELL, "--trace", TRACE, "--policies", f"{path},fcfs", "--out", str(tmp_path / "o")
    )
    assert code == 1
    assert "got ValueError: [train] and [/x]" in notes


def test_a_name_that_could_be_a_formula_is_drawn(tmp_path: Path, ended: Callable[..., Ended]) -> None:
    (tmp_path / "a$^$b$_$.py").write_text(run_policies(tmp_path).read_text())
    asked = ("--trace", TRACE, "--policies", f"{tmp_path}/a$^$b$_$.py,fcfs", "--load", "1,2", "--out", f"{tmp_path}/o")
    assert ended("compare", *CELL, *asked)[0] == 0
    assert {"goodput.png", "latency_cdf.png", "load_curve.png"} < {each.name for each in (tmp_path / "o").iterdir()}


# --- errors of the user's


@pytest.fixture(params=["a file", "in a file", "in /proc"])
def nowhere(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """What cannot be a folder."""
    (tmp_path / "file").write_text("")
    return {"a file": f"{tmp_path}/file", "in a file": f"{tmp_path}/file/x", "in /proc": "/proc/x"}[request.param]


@pytest.mark.parametrize(
    "command",
    [
        ["compare", *CELL],
        ["capacity", *CELL],
        ["demo"],
        ["sweep", "study.yaml"],
        ["timeline"],
        ["tune"],
        ["evaluate", "learned-ppo"],
        ["train"],
        ["reproduce", "fig12"],
        ["roofline"],
    ],
    ids=lambda command: command[0],
)
def test_out_where_nothing_can_be_written(command: list[str], nowhere: str, ended: Callable[..., Ended]) -> None:
    is_file = command[0] in ("timeline", "tune", "roofline")
    place = f"{nowhere}/x" if is_file else nowhere
    code, told, notes = ended(*command, "--out", place)
    assert (code, told) == (2, "")
    (line,) = notes.splitlines()
    assert line.startswith(f"error: --out {place}: ")
    assert line.endswith("expected a folder that can be written to")


def test_asking_for_a_folder_leaves_none_behind(tmp_path: Path, ended: Callable[..., Ended]) -> None:
    code, _, notes = ended("compare", "--policies", "fcsf", "--out", str(tmp_path / "a" / "b"))
    assert (code, "did you mean 'fcfs'" in notes) == (2, True)
    assert not (tmp_path / "a").exists()
    code, _, notes = ended("timeline", "--out", str(tmp_path))
    assert (code, notes) == (2, f"error: --out {tmp_path}: is a folder; expected a file\n")


@pytest.mark.parametrize(
    "command",
    [
        ["compare", "--policies", ""],
        ["compare", "--policies", " , "],
        ["compare", "--utilization", ""],
        ["compare", "--load", ""],
        ["capacity", "--policies", ""],
        ["capacity", "--system", ""],
        ["evaluate", "learned-ppo", "--baselines", ""],
        ["tune", "--system", ""],
        ["train", "--out", "x", "--system", ""],
        ["timeline", "--policy", ""],
    ],
    ids=lambda command: " ".join(command),
)
def test_an_empty_list_is_an_error(
    command: list[str], ended: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, told, notes = ended(*command)
    assert (code, told) == (2, "")
    assert "expected a n" in notes
    assert list(tmp_path.iterdir()) == []


def test_an_empty_number_is_an_error(ended: Callable[..., Ended]) -> None:
    code, told, notes = ended("compare", "--seeds", "")
    assert (code, told) == (2, "")
    assert "'--seeds'" in notes


@pytest.mark.parametrize("name", ["L3ENV_THREADS", "NUMBA_NUM_THREADS", "LOKY_MAX_CPU_COUNT"])
@pytest.mark.parametrize("value", ["many", "0", "-1", "1.5"])
def test_a_variable_that_is_no_number(
    name: str, value: str, ended: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert ended("systems") == (2, "", f"error: {name} = '{value}'; expected a whole number >= 1\n")


@pytest.mark.parametrize("name", ["L3ENV_CACHE_DIR", "L3ENV_TRACE_DIR"])
def test_a_variable_that_is_no_folder(
    name: str, ended: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(name, str(tmp_path / "file"))
    assert ended("systems") == (2, "", f"error: {name} = '{tmp_path}/file'; expected a folder, not a file\n")


# --- folders


def test_report_says_what_a_folder_is(tmp_path: Path, ended: Callable[..., Ended]) -> None:
    """Each as its command leaves it, but for training, whose file is written by hand."""
    cell = (*CELL, "--trace", TRACE)
    ended(
        "capacity",
        *cell,
        "--policies",
        "fcfs",
        "--seeds",
        "1",
        "--tolerance",
        "0.5",
        "-j",
        "1",
        "--out",
        f"{tmp_path}/c",
    )
    ended("evaluate", "learned-ppo", *cell, "--seeds", "1", "--baselines", "fcfs", "-j", "1", "--out", f"{tmp_path}/e")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "config.yml").write_text("algo: ppo\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("{}")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text('{"machines": []}')
    for name, said in (
        ("c", "kept searches of l3env capacity"),
        ("e", "results of l3env evaluate: see results.csv"),
        ("t", "a training run: see learning_curve.png"),
        ("empty", "no results here"),
        ("file", "is a file"),
        ("none", "no such folder"),
        ("old", "unknown key 'machines'"),
    ):
        code, told, notes = ended("report", str(tmp_path / name))
        assert (code, told) == (2, "")
        assert notes.startswith(f"error: {tmp_path / name}")
        assert said in notes


def test_a_capacity_of_one_policy_that_cannot_run(tmp_path: Path, ended: Callable[..., Ended]) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from l3env import BasePolicy\nclass Mine(BasePolicy):\n    def decide(self, view):\n        pass\n"
    )
    asked = ("capacity", *CELL, "--trace", TRACE, "--seeds", "1", "--tolerance", "0.5", "-j", "1", "--policies")
    code, told, notes = ended(*asked, str(path))
    assert (code, told) == (2, "")
    assert notes.splitlines()[-3:][0] == "error: policy 'Mine': decide gives a wrong answer"
    code, told, notes = ended(*asked, f"{path},fcfs")
    assert (code, "fcfs" in told, "Mine" in notes) == (1, True, True)


def test_a_sweep_with_failures_ends_with_1(tmp_path: Path, ended: Callable[..., Ended]) -> None:
    (tmp_path / "mine.py").write_text(
        "from l3env import BasePolicy\nclass Mine(BasePolicy):\n    def decide(self, view):\n        pass\n"
    )
    study = tmp_path / "study.yaml"
    study.write_text(
        f"policies: [fcfs, '{tmp_path}/mine.py']\nsystems: gpu-dgx-a100\nmodels: llama-3-8b\n"
        f"traces: '{TRACE}'\nloads: 1\n"
    )
    code, told, notes = ended("sweep", str(study), "--backend", "sequential", "--out", str(tmp_path / "o"))
    assert (code, told) == (1, "1 runs done, 1 failed\n")
    assert "got None (a return is missing?)" in notes
    assert (tmp_path / "o" / "report.html").exists()
    shutil.rmtree(tmp_path / "o")
    study.write_text(study.read_text().replace("fcfs, ", ""))
    code, told, _ = ended("sweep", str(study), "--backend", "sequential", "--out", str(tmp_path / "o"))
    assert (code, told) == (1, "0 runs done, 1 failed\n")


def test_results_are_on_stdout_and_notes_on_stderr(ended: Callable[..., Ended], tmp_path: Path) -> None:
    code, told, notes = ended("compare", *CELL, "--trace", TRACE, "--policies", "fcfs", "--out", str(tmp_path))
    assert code == 0
    assert told.splitlines()[0].startswith("gpu-dgx-a100 · llama-3-8b")
    assert "written" not in told
    assert "written: " in notes
    assert "fcfs" not in notes


def test_an_error_of_the_disk_is_no_traceback(ended: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "runs/x")

    monkeypatch.setattr("l3env.cli.lists.show_table", full)
    assert ended("systems") == (2, "", "error: runs/x: No space left on device\n")


def test_a_second_installation_does_not_compile_in_silence(tmp_path: Path) -> None:
    """Another cache: the first process says that it compiles, before it does; the next one has nothing to say."""
    code = (
        "import sys; sys.argv = ['l3env', 'compare', '--trace', 'nowhere.csv']\n"
        "from l3env.cli.shared import announce_compilation\nfrom l3env.jit import kernel\n"
        "announce_compilation()\nexec(compile('def two(x): return 2 * x', {!r}, 'exec'))\n"
        "print(kernel(two)(4))\n"
    )
    (tmp_path / "own.py").write_text("def two(x): return 2 * x\n")
    env = {"L3ENV_CACHE_DIR": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", code.format(str(tmp_path / "own.py"))]
    first = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    again = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert (first.stdout, again.stdout) == ("8\n", "8\n")
    assert first.stderr == "compiling kernels (once per version, about a minute) ...\n"
    assert again.stderr == ""


def test_an_unknown_command_line_still_raises_for_programs() -> None:
    assert isinstance(runner.invoke(app, ["compare", "--policies", "fcsf"]).exception, L3EnvError)
