"""Builds the wheel and tries it in a folder that has ``policies``, ``traces`` and ``experiments`` of its own.

    make wheel

builds it as an index would, from the source distribution, into ``dist/``, installs it with what it needs into a bare
environment and runs the main commands from such a folder.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("experiments", "policies", "traces")  # folders at the top that are rooms of the package
MINE = """from l3env import BasePolicy, Knobs

class Mine(BasePolicy):
    name = "mine"

    def decide(self, view):
        return Knobs(prefill_budget_tokens=1024)
"""
STEP_ONCE = """import gymnasium, l3env
env = gymnasium.make("l3env/Serving-v0", trace="profile:azure-conv-2023?n=500", episode_requests=20)
env.reset(seed=0)
env.step(env.action_space.sample())
"""
COMPARE = "compare --policies fcfs,policies/mine.py:Mine --trace profile:azure-conv-2023?n=20 --out runs/mine --json"


def build(folder: Path) -> Path:
    """The wheel, built from the source distribution, so that nothing but what that holds can be in it."""
    with tempfile.TemporaryDirectory() as unpacked:
        source = Path(unpacked, _backend("build_sdist", ROOT, Path(unpacked)))
        shutil.rmtree(ROOT / "l3env.egg-info")  # else it would hide the entry points of a later installation
        with tarfile.open(source) as archive:
            archive.extractall(unpacked, filter="data")
        return folder / _backend("build_wheel", source.with_name(source.name.removesuffix(".tar.gz")), folder)


def _backend(hook: str, project: Path, folder: Path) -> str:
    """Calls the build backend as pip does, in a process of its own; gives the name of the file it wrote."""
    call = f"import sys; from setuptools import build_meta; print(build_meta.{hook}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", call, folder], cwd=project, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{hook} failed:\n{done.stderr}")
    return done.stdout.splitlines()[-1]


def contents(wheel: Path) -> set[str]:
    """What it installs, without the notes about itself."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def expected() -> set[str]:
    """Every file of the package and its linked rooms that git keeps, under the name it has in the package."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "l3env", *LINKED]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    links = {f"l3env/{room}" for room in LINKED}
    return {
        name if name.startswith("l3env/") else f"l3env/{name}"
        for name in listed
        if name not in links and (ROOT / name).exists()
    }


def own_folders(folder: Path) -> None:
    """Packages of the user's own that have the names of the linked rooms, one of them with a policy."""
    for room in LINKED:
        (folder / room).mkdir(parents=True)
        (folder / room / "__init__.py").write_text(f"raise AssertionError('{room} of the user was imported')\n")
    (folder / "policies" / "mine.py").write_text(MINE)


def try_out(python: Path, folder: Path) -> None:
    """The main commands with an installed wheel, from a folder of ``own_folders``."""

    def run(*command: str) -> str:
        print("$", *command[:1], *(part if "\n" not in part else "..." for part in command[1:]), file=sys.stderr)
        return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout

    l3env = str(python.with_name("l3env"))
    rows = json.loads(run(l3env, *COMPARE.split()))["results"]
    assert [row["finished_count"] for row in rows] == [20, 20], rows
    run(str(python), "-c", STEP_ONCE)
    run(l3env, "demo", "--out", "runs/demo")
    assert {row["figure"] for row in json.loads(run(l3env, "reproduce", "fig11", "--json"))} == {"fig11"}


def main() -> None:
    dist = ROOT / "dist"
    dist.mkdir(exist_ok=True)
    wheel = build(dist)
    extra, missing = contents(wheel) - expected(), expected() - contents(wheel)
    if extra or missing:
        sys.exit(f"{wheel.name}: holds what it should not: {sorted(extra)}; lacks: {sorted(missing)}")
    with tempfile.TemporaryDirectory() as scratch:
        python = Path(scratch) / "venv" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
        subprocess.run([*pip, wheel], check=True)
        own_folders(Path(scratch) / "user")
        try_out(python, Path(scratch) / "user")
    print(f"built and tried: {wheel}")


if __name__ == "__main__":
    main()
