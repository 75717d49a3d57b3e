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
import pytest

from l3env.errors import MOST_CHARACTERS, L3EnvError, SpecError
from l3env.files import FOREIGN_S, read_json, read_toml, read_yaml, remove_parts, whole, write_frame, write_text


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


READERS = {"x.json": read_json, "x.toml": read_toml, "x.yaml": read_yaml}
LAUGHS = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(9)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i + 1}: &a{i + 1}\n  <<: [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(9))


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("x.json", "[" * 100_000, "nested too deep"),
        ("x.toml", "a = " + "[" * 100_000, "nested too deep"),
        ("x.yaml", "[" * 100_000, "nested too deep"),
        ("x.json", "9" * 5000, "cannot be read as JSON"),
        ("x.toml", "a = " + "9" * 5000, "cannot be read as TOML"),
        ("x.yaml", "a: " + "9" * 5000, "cannot be read as YAML"),
        ("x.yaml", "a: 2001-99-99", "cannot be read as YAML"),
        ("x.yaml", "a: !!timestamp x", "not what its tag says"),
        ("x.yaml", "a: !!bool x", "not what its tag says"),
        ("x.yaml", "a: !!int ''", "not what its tag says"),
        ("x.yaml", "a: \ud800".encode("utf-8", "surrogatepass"), "cannot be read as YAML"),
        ("x.yaml", LAUGHS, "more than 100,000 values"),
        ("x.yaml", MERGES, "more than 100,000 values"),
        ("x.yaml", "a: &a [*a]", "an alias that contains itself"),
        ("x.yaml", "x" * (2**20 + 1), "more than 1,048,576 bytes"),
        ("x.toml", "x" * (2**24 + 1), "more than 16,777,216 bytes"),
    ],
)
def test_a_document_that_cannot_be_read_is_one_short_error(tmp_path, name, text, problem):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SpecError, match=problem) as found:
        READERS[name](path, SpecError)
    assert str(found.value).startswith(str(path))
    assert len(str(found.value)) < 5000


def test_aliases_that_repeat_a_little_are_read(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: &a {x: 1}\nb: [*a, *a]\nc: {<<: *a, y: 2}\n")
    assert read_yaml(path) == {"a": {"x": 1}, "b": [{"x": 1}, {"x": 1}], "c": {"x": 1, "y": 2}}
    path.write_text("")
    assert read_yaml(path) is None


def test_an_error_that_quotes_too_much_is_cut():
    text = str(L3EnvError("file.csv: row 3: got " + "x" * 10**6 + "; expected a number"))
    assert len(text) <= MOST_CHARACTERS
    assert text.startswith("file.csv: row 3: got x")
    assert text.endswith("x; expected a number")
