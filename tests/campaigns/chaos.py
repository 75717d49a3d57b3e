"""``python -m tests.campaigns.chaos [--kills N] [--commands compare,sweep,...]``: commands that are killed at random
points and given again, a disk that is full, two commands in one folder. Prints figures; exit code 1 for a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

TRACE = "profile:azure-conv-2023?n=120"
MACHINE = ("--system", "l3-dgx-a100", "--model", "llama-3-8b")
STUDY = f"""
policies: [fcfs, sarathi]
systems: [l3-dgx-a100, gpu-dgx-a100]
models: llama-3-8b
traces: "{TRACE}"
loads: [0.5, 2]
seeds: 2
"""
COMMANDS: Mapping[str, Callable[[Path, Path], tuple[str, ...]]] = {
    "compare": lambda folder, out: (
        *("compare", *MACHINE, "--trace", TRACE, "--policies", "fcfs,sarathi,edf,sjf-prompt", "--seeds", "3"),
        *("--out", str(out)),
    ),
    "sweep": lambda folder, out: ("sweep", str(folder / "study.yaml"), "--out", str(out), "-j", "1"),
    "evaluate": lambda folder, out: (
        *("evaluate", "learned-ppo", *MACHINE, "--trace", TRACE, "--utilization", "0.9", "--baselines", "fcfs,sarathi"),
        *("--seeds", "2", "-j", "1", "--out", str(out)),
    ),
    "train": lambda folder, out: (
        *(
            "train",
            "--algo",
            "ppo",
            *MACHINE,
            "--trace",
            "profile:azure-conv-2023?n=400",
            "--steps",
            "256",
            "--envs",
            "2",
        ),
        *("--episode-requests", "20", "--checkpoint-steps", "64", "--eval-steps", "128", "--hyperparams"),
        *(str(folder / "small.yml"), "--out", str(out)),
    ),
}
PASSING = ("wall_s", "host", "time_s", "seconds", "steps_per_s", "fps")  # columns that no two runs share
SMALL = "n_steps: 32\nbatch_size: 32\nn_epochs: 1\n"
FULL_BYTES = 6000  # of any file, where the disk is taken to be full


def has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def start(args: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """A command in a group of processes of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "l3env.cli", *args],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def finish(args: Sequence[str]) -> float:
    """Runs a command to its end; returns its seconds. Raises AssertionError where it fails."""
    begun_s = time.perf_counter()
    process = start(args)
    _, said = process.communicate()
    assert process.returncode == 0, said[-2000:]
    return time.perf_counter() - begun_s


def kill_after(args: Sequence[str], wait_s: float) -> bool:
    """Kills a command and all that it started; False where it had ended before."""
    process = start(args)
    try:
        process.communicate(timeout=wait_s)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True
    return False


def content(folder: Path) -> dict[str, Any]:
    """All that a finished run has found, but for where and how long it ran, by path."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".parquet":
            found[name] = path.read_bytes()
        elif path.suffix == ".json":
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k not in PASSING}
        elif path.suffix == ".csv":
            frame = pd.read_csv(path)
            frame = frame.drop(columns=[each for each in frame.columns if each in PASSING])
            found[name] = frame.to_csv(index=False)
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                found[name] = {key: arrays[key].tobytes() for key in arrays.files if key != "config"}
        assert not path.name.endswith(".part"), path
    return found


def differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in {*left, *right} if left.get(name) != right.get(name))


def prepared(folder: Path) -> Path:
    (folder / "study.yaml").write_text(STUDY)
    (folder / "small.yml").write_text(SMALL)
    return folder


def kill_campaign(name: str, kills: int, rng: random.Random, folder: Path, *, say=print) -> int:
    """Kills a command so often, in runs that are killed once to four times before they finish; faults."""
    make, whole = COMMANDS[name], folder / f"{name}-whole"
    finish(make(folder, whole))  # compiles, too
    span_s = finish([*make(folder, folder / f"{name}-again")])
    expected, killed, runs, faults = content(whole), 0, 0, 0
    assert expected.keys() >= {"results.csv"} or name == "train"
    while killed < kills:
        out = folder / f"{name}-{runs}"
        for _ in range(rng.randint(1, 4)):
            if killed < kills:
                killed += kill_after(make(folder, out), rng.uniform(0.1, 1.0) * span_s)
        finish(make(folder, out))
        if wrong := differences(content(out), expected):
            faults += 1
            say(f"  {name}, run {runs}: differs in {', '.join(wrong[:5])}")
        runs += 1
    say(f"{name}: killed {killed} times in {runs} runs of {span_s:.0f} s; {faults} differ from one never stopped")
    return faults


def limit_files() -> None:
    """In the child: no file may grow beyond some bytes, as if the disk were full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_BYTES, FULL_BYTES))


def full_disk(folder: Path, *, say=print) -> int:
    """A command that finds no room says so in one line; what was there stays and is gone on with."""
    out = folder / "full"
    few = ["compare", *MACHINE, "--trace", TRACE, "--policies", "fcfs", "--out", str(out)]
    finish(few)
    before = content(out)
    more = [*few[:-3], "fcfs,sarathi,edf", *few[-2:]]
    process = start(more, preexec_fn=limit_files)
    _, said = process.communicate()
    lines = [line for line in said.splitlines() if line.strip()]
    kept = {name: each for name, each in content(out).items() if name.startswith(("cells", "requests", "timelines"))}
    intact = all(kept.get(name) == each for name, each in before.items() if name in kept or name.startswith("cells"))
    finish(more)
    faults = (process.returncode == 0) + ("Traceback" in said) + (not intact)
    last = lines[-1].replace(str(folder), "FOLDER") if lines else "nothing said"
    say(f"a full disk: exit code {process.returncode}, {last!r}; earlier results intact: {intact}")
    return int(faults)


def two_at_once(folder: Path, times: int, *, say=print) -> int:
    """Two commands in one folder at the same time: no cell is lost, none is there twice."""
    alone = folder / "alone"
    finish(COMMANDS["compare"](folder, alone))
    expected, faults = content(alone), 0
    for number in range(times):
        out = folder / f"both-{number}"
        both = [start(COMMANDS["compare"](folder, out)) for _ in range(2)]
        ended = [process.communicate()[1] for process in both]
        bad = any(process.returncode for process in both) or bool(differences(content(out), expected))
        faults += bad
        if bad:
            say(f"  two at once: {differences(content(out), expected)[:5]} {[each[-300:] for each in ended]}")
    say(f"two commands in one folder: {times} times, {faults} with a lost, doubled or changed cell")
    return faults


def campaign(kills: int, names: Sequence[str], seed: int, *, say=print) -> int:
    """All of it, the kills shared out over the commands; returns the number of faults."""
    rng, faults = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as name:
        folder = prepared(Path(name))
        for place, each in enumerate(names):
            share = kills * (place + 1) // len(names) - kills * place // len(names)
            faults += kill_campaign(each, share, rng, folder, say=say)
        faults += full_disk(folder, say=say)
        faults += two_at_once(folder, max(kills // 20, 1), say=say)
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.chaos")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--commands", default=",".join(COMMANDS if has_torch() else [*COMMANDS][:3]))
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    return min(
        campaign(chosen.kills, chosen.commands.split(","), chosen.seed, say=lambda text: print(text, flush=True)), 1
    )


if __name__ == "__main__":
    sys.exit(main())
