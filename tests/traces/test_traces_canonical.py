"""The canonical file: exact round trips, hand-written files, errors, and nothing half-written."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l3env.errors import TraceError
from l3env.requests.workload import Workload
from l3env.traces import canonical

ARRAYS = ("arrival_s", "prompt_tokens", "output_tokens", "parent_idx", "think_s", "session_idx", "prefix_ids")

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
times = st.floats(min_value=0, max_value=1e12, allow_nan=False)


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    count = draw(st.integers(1, 8))
    tokens = st.lists(st.integers(1, 2**31 - 1), min_size=count, max_size=count)
    some_ids = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4)
    ids = draw(st.lists(some_ids, min_size=count, max_size=count))
    return Workload.build(
        draw(st.text()),
        sorted(draw(st.lists(times, min_size=count, max_size=count))),
        draw(tokens),
        draw(tokens),
        parent_idx=[draw(st.integers(-1, row - 1)) for row in range(count)],
        think_s=draw(st.lists(times, min_size=count, max_size=count)),
        session_idx=draw(st.lists(st.integers(-1, 2**53), min_size=count, max_size=count)),
        prefix_ids=np.array([block for row in ids for block in row], dtype=np.int64),
        prefix_offsets=np.cumsum([0, *map(len, ids)]),
        prefix_block_tokens=draw(st.integers(1, 1024)),
        source=draw(st.dictionaries(st.text(), json_values, max_size=4)),
    )


def assert_same(one: Workload, other: Workload) -> None:
    for column in (*ARRAYS, "prefix_offsets"):
        assert getattr(one, column).dtype == getattr(other, column).dtype
        assert getattr(one, column).tobytes() == getattr(other, column).tobytes(), column
    assert one.name == other.name
    assert one.prefix_block_tokens == other.prefix_block_tokens
    assert dict(one.source) == dict(other.source)


@settings(deadline=None, max_examples=60)
@given(workload=workloads())
@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_round_trip_is_exact(tmp_path_factory: pytest.TempPathFactory, suffix: str, workload: Workload) -> None:
    path = tmp_path_factory.mktemp("canonical") / f"w{suffix}"
    assert canonical.save(workload, path) == path
    assert canonical.matches(path)
    assert_same(workload, canonical.load(path))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def small(**more: Any) -> Workload:
    return Workload.build("w", [0.0, 1.5], [3, 4], [5, 6], **more)


def test_a_hand_written_csv(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,10,20\n0.1,30,40\n")
    workload = canonical.load(path)
    assert workload.name == "mine"
    assert workload.arrival_s.tolist() == [0.0, 0.1]
    assert workload.output_tokens.tolist() == [20, 40]
    assert workload.parent_idx.tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("arrival_s,prompt_tokens\n0,1\n", "missing column 'output_tokens'"),
        ("arrival_s,prompt_tokens,output_tokens\n1,1,1\n-1,1,1\n", "row 3, field arrival_s: got '-1'"),
        ("arrival_s,prompt_tokens,output_tokens\n0,-1,1\n", "row 2, field prompt_tokens: got '-1'"),
        ("arrival_s,prompt_tokens,output_tokens,parent_idx\n0,1,1,0\n", "row 2, field parent_idx: got '0'"),
        ("arrival_s,prompt_tokens,output_tokens,prefix_ids\n0,1,1,1;x\n", "row 2, field prefix_ids: got '1;x'"),
        ("arrival_s,prompt_tokens,output_tokens,prefix_ids\n0,17,1,1;2;3\n", "prefix_block_tokens"),
        ('# {"version": 9}\narrival_s,prompt_tokens,output_tokens\n0,1,1\n', "expected version 1"),
        ("# {\narrival_s,prompt_tokens,output_tokens\n0,1,1\n", "JSON header cannot be read"),
    ],
)
def test_csv_errors(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "w.csv"
    path.write_text(text)
    with pytest.raises(TraceError) as caught:
        canonical.load(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


def test_csv_rows_count_the_json_line(tmp_path: Path) -> None:
    path = canonical.save(small(), tmp_path / "w.csv")
    lines = path.read_text().splitlines()
    assert json.loads(lines[0].removeprefix("# "))["name"] == "w"
    lines[3] = lines[3].replace("4,6", "4,-6")
    path.write_text("\n".join(lines))
    with pytest.raises(TraceError, match="row 4, field output_tokens: got '-6'"):
        canonical.load(path)


def test_other_parquet_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(TraceError, match=r"missing column 'arrival_s'; the file has x; .*\?arrival=COLUMN"):
        canonical.load(path)
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(TraceError, match="not a readable Parquet file"):
        canonical.load(path)


def test_save_refuses_and_leaves_the_old_file(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"suffix '.xlsx'; expected .parquet or .csv"):
        canonical.save(small(), tmp_path / "w.xlsx")
    path = canonical.save(small(), tmp_path / "w.csv")
    before = path.read_bytes()
    with pytest.raises(TraceError, match="not JSON"):
        canonical.save(small(source={"x": object()}), path)
    with pytest.raises(TraceError, match="cannot be written"):
        canonical.save(small(), tmp_path / "nowhere" / "w.csv")
    with contextlib.suppress(KeyboardInterrupt), canonical.written(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
