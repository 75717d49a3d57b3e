"""Files that are there whole or not at all, with several processes writing, of which some are killed."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd

from l3env.files import FOREIGN_S, remove_parts, whole, write_frame, write_text


def test_a_file_is_the_old_one_until_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old ü\n")
    with contextlib.suppress(KeyboardInterrupt), whole(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_text(encoding="utf-8") == "old ü\n"
    with whole(path, sync=True) as file:
        file.write(b"new")
        assert path.read_text(encoding="utf-8") == "old ü\n"
    assert path.read_bytes() == b"new"
    write_frame(tmp_path / "a.parquet", pd.DataFrame({"x": [1.5]}))
    assert pd.read_parquet(tmp_path / "a.parquet")["x"].tolist() == [1.5]
    assert {each.name for each in tmp_path.iterdir()} == {"a.txt", "a.parquet"}


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with whole(path) as first, whole(path) as second:
        first.write(b"1")
        second.write(b"22")
    assert path.read_bytes() == b"1"  # the last to end
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    code = "import os, pathlib, sys; from l3env.files import whole\n"
    code += "with whole(pathlib.Path(sys.argv[1])) as file: file.write(b'half'); file.flush(); os._exit(1)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "cells" / "a")], check=False)
    (left,) = (tmp_path / "cells").iterdir()
    old, recent = (tmp_path / f".elsewhere-1-{n}.part" for n in (0, 1))
    for path in (old, recent, tmp_path / "torn.parquet.part", tmp_path / "kept.parquet"):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 2 * FOREIGN_S,) * 2)
    with whole(tmp_path / "b") as file:
        file.write(b"mine")
        remove_parts(tmp_path)
    assert not left.exists()
    assert left.name.startswith(f".{platform.node()[:40]}-")
    assert {path.name for path in tmp_path.iterdir()} == {"cells", recent.name, "kept.parquet", "b"}
