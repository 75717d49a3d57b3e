"""The wheel: what is in it, and that it does not mind folders of the user's own with the names of its rooms."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.package import trial


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trial.build(tmp_path_factory.mktemp("wheel"))


def test_it_holds_the_package_whole_and_nothing_else(wheel: Path) -> None:
    assert trial.contents(wheel) == trial.expected()
    assert {name.partition("/")[0] for name in trial.contents(wheel)} == {"l3env"}


def test_it_works_beside_folders_of_the_users_own(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    trial.own_folders(tmp_path / "user")
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "NUMBA_DISABLE_JIT": "1"}

    def run(*command: str) -> bytes:
        return subprocess.run(command, cwd=tmp_path / "user", env=env, check=True, stdout=subprocess.PIPE).stdout

    assert str(tmp_path) in run(sys.executable, "-c", "import l3env; print(l3env.__file__)").decode()
    rows = json.loads(run(sys.executable, "-m", "l3env.cli", *trial.COMPARE.split()))["results"]
    assert [row["finished_count"] for row in rows] == [20, 20]
    run(sys.executable, "-c", trial.STEP_ONCE)
