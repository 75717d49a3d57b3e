"""Files as users bring them: every container, packing, clock, id and optional column, against values worked by hand."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import warnings
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from l3env.errors import TraceError, TraceWarning, UnusedWarning
from l3env.requests.workload import Workload
from l3env.traces import canonical, catalog, reading
from l3env.traces.containers import parse_csv

ROWS = [(0.0, 512, 64), (0.4, 2048, 128), (1.2, 900, 100)]
HEADER = "arrival_s,prompt_tokens,output_tokens"


def read(path: Path, options: str = "", seed: int = 0) -> Workload:
    workload = catalog.resolve(f"{path}?{options}" if options else str(path), seed)
    assert workload is not None
    return workload


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def csv(rows: Any = ROWS, header: str = HEADER, mark: str = ",") -> str:
    lines = [header.replace(",", mark), *(mark.join(str(cell) for cell in row) for row in rows)]
    return "\n".join(lines) + "\n"


def same_rows(workload: Workload) -> None:
    assert workload.arrival_s.tolist() == [0.0, 0.4, 1.2]
    assert workload.prompt_tokens.tolist() == [512, 2048, 900]
    assert workload.output_tokens.tolist() == [64, 128, 100]


def prefixes(workload: Workload) -> list[list[int]]:
    return [workload.prefix_ids[a:b].tolist() for a, b in pairwise(workload.prefix_offsets)]


# ----------------------------------------------------------------------------------------------------- containers


@pytest.mark.parametrize(
    "text",
    [
        csv(),
        csv(mark=";"),
        csv(mark="\t"),
        "\ufeff" + csv(),
        csv().replace("\n", "\r\n"),
        csv().replace("\n", "\n\n").replace("512", " 512 "),
        "\n\n" + csv() + "  \n\t\n\n",
        csv().replace("0.4,2048,128", '"0.4","2048","128"'),
        HEADER.replace("prompt_tokens", '"prompt_tokens"') + csv().removeprefix(HEADER),
        "# a note of mine\n" + csv(),
        csv().encode("utf-16"),
        csv(rows=[(a, f"{b}.0", f"{c}.000") for a, b, c in ROWS]),
        csv().rstrip("\n"),
        "".join(json.dumps(dict(zip(HEADER.split(","), row, strict=True))) + "\n\n" for row in ROWS),
        json.dumps([dict(zip(HEADER.split(","), row, strict=True)) for row in ROWS], indent=2),
        json.dumps([dict(zip(HEADER.split(","), (str(row[0]), *row[1:]), strict=True)) for row in ROWS]),
    ],
)
def test_texts_of_all_kinds(tmp_path: Path, text: str | bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same_rows(read(write(tmp_path, "mine.txt", text)))


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: bytes(pa.Codec("zstd").compress(data, asbytes=True)),
}


@pytest.mark.parametrize("packing", PACKERS)
def test_packed_files_by_their_first_bytes(tmp_path: Path, packing: str) -> None:
    for text in (csv(), "".join(json.dumps(dict(zip(HEADER.split(","), row, strict=True))) + "\n" for row in ROWS)):
        path = write(tmp_path, "named.anything", PACKERS[packing](text.encode()))
        same_rows(read(path))
    azure = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.6805900,374,44\r\n"
    assert read(write(tmp_path, "a", PACKERS[packing](azure.encode()))).prompt_tokens.tolist() == [374]
    broken = PACKERS[packing](csv().encode() * 50)[:-9]
    with pytest.raises(TraceError, match=r"cannot be read|no known trace format"):
        read(write(tmp_path, "b", broken), "format=canonical")


TYPES: list[dict[str, pa.Array]] = [
    {"arrival_s": pa.array([0.0, 0.4, 1.2]), "prompt_tokens": pa.array([512, 2048, 900], pa.uint16())},
    {
        "arrival_s": pa.array(["0.0", "0.4", "1.2"], pa.large_string()),
        "prompt_tokens": pa.array([512.0, 2048.0, 900.0]),
    },
    {
        "arrival_s": pa.array([Decimal("5.0"), Decimal("5.4"), Decimal("6.2")]),
        "prompt_tokens": pa.array([512, 2048, 900]),
    },
    {
        "arrival_s": pa.array(
            [datetime(2024, 1, 1, 0, 0, 0, us, UTC) for us in (0, 400_000)]
            + [datetime(2024, 1, 1, 0, 0, 1, 200_000, UTC)]
        ),
        "prompt_tokens": pa.array(["512", "2048", "900"]).dictionary_encode(),
    },
    {"arrival_s": pa.array([1, 1, 1], pa.int32()), "prompt_tokens": pa.array([512, 2048, 900], pa.float32())},
]


@pytest.mark.parametrize("place", range(len(TYPES)))
@pytest.mark.parametrize("kind", ["parquet", "arrow", "feather", "stream"])
def test_arrow_types_and_files(tmp_path: Path, kind: str, place: int) -> None:
    table = pa.table({**TYPES[place], "output_tokens": pa.array([64, 128, 100], pa.uint8())})
    path = tmp_path / "mine.bin"
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "feather":
        feather.write_feather(table, path)
    else:
        maker = pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as sink, maker(sink, table.schema) as writer:
            writer.write_table(table)
    workload = read(path)
    assert workload.arrival_s.tolist() == ([0.0, 0.0, 0.0] if place == 4 else [0.0, 0.4, 1.2])
    assert workload.prompt_tokens.tolist() == [512, 2048, 900]


def test_parquet_of_pandas(tmp_path: Path) -> None:
    frame = pd.DataFrame(ROWS, columns=HEADER.split(","))
    frame["parent_idx"] = pd.array([None, 0, None], dtype="Int64")
    frame["think_s"] = [np.nan, 2.5, np.nan]
    frame["session_id"] = ["a", "a", None]
    frame["prefix_ids"] = [np.array([2**64 - 1, 5], np.uint64), np.array([2**64 - 1], np.uint64), None]
    path = tmp_path / "mine.parquet"
    frame.to_parquet(path)
    workload = read(path)
    same_rows(workload)
    assert workload.parent_idx.tolist() == [-1, 0, -1]
    assert workload.think_s.tolist() == [0.0, 2.5, 0.0]
    assert workload.session_idx.tolist() == [0, 0, -1]
    assert prefixes(workload) == [[0, 1], [0], []]
    own = canonical.save(workload, tmp_path / "own.parquet")
    pd.read_parquet(own).to_parquet(tmp_path / "again.parquet")
    again = read(tmp_path / "again.parquet")
    same_rows(again)
    assert prefixes(again) == prefixes(workload)
    table = pa.table({"arrival_s": [0.0, None], "prompt_tokens": [1, 1], "output_tokens": [1, 1]})
    pq.write_table(table, path)
    with pytest.raises(TraceError, match=r"mine\.parquet: row 2, field arrival_s: got None"):
        read(path)


def test_what_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_BYTES", 10_000)
    monkeypatch.setattr(reading, "MOST_LINE_BYTES", 5_000)
    monkeypatch.setattr(reading, "CHUNK_BYTES", 1_000)
    with pytest.raises(TraceError, match="more than 10,000 bytes, unpacked"):
        read(write(tmp_path, "bomb.csv.gz", gzip.compress((csv() + "9,9,9\n" * 5000).encode())))
    with pytest.raises(TraceError, match="a line of more than 5,000 bytes"):
        read(write(tmp_path, "line.jsonl", '{"arrival_s": 0, "x": "' + "x" * 8000))
    with pytest.raises(TraceError, match="nested too deep"):
        read(write(tmp_path, "deep.jsonl", '{"arrival_s": ' + "[" * 4000), "format=canonical")
    same = pa.table({name: pa.array([1] * 3000) for name in ("arrival_s", "prompt_tokens", "output_tokens")})
    pq.write_table(same, tmp_path / "same.parquet")
    assert (tmp_path / "same.parquet").stat().st_size < 10_000
    with pytest.raises(TraceError, match="more than 10,000 bytes, unpacked"):
        read(tmp_path / "same.parquet")
    with tarfile.open(tmp_path / "many.tar", "w") as archive:
        for number in range(3):  # each unpacks to less than the limit
            data = gzip.compress(b"0,2.0,1,Gamma,0.5,1\n" * 250)
            info = tarfile.TarInfo(f"demo/chunk-{number}-trace.csv")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    with pytest.raises(TraceError, match="more than 10,000 bytes, unpacked"):
        read(tmp_path / "many.tar")
    with pytest.raises(TraceError, match=r"row 1: 10,001 columns; expected at most 10,000"):
        parse_csv(b"," * 10_000 + b"\n1,2\n", "x.csv")
    monkeypatch.undo()
    deep = '{"arrival_s": 0, "prompt_tokens": ' + "[" * 100_000 + "]" * 100_000 + "}"
    with pytest.raises(TraceError, match="nested too deep"):
        read(write(tmp_path, "deep.jsonl", deep), "format=canonical")


# ---------------------------------------------------------------------------------------------------------- clocks


@pytest.mark.parametrize(
    "times",
    [
        ("2124.0", "2124.4", "2125.2"),
        ("1700000000.0", "1700000000.4", "1700000001.2"),
        ("1700000000.123456789", "1700000000.523456789", "1700000001.323456789"),
        ("1700000000.1234567890123", "1700000000.5234567890123", "1700000001.3234567890123"),
        ("1.7e9", "1.7000000004e9", "1700000001.2"),
        ("2023-11-16T18:15:46.6", "2023-11-16T18:15:47", "2023-11-16T18:15:47.800000000"),
        ("2023-11-16 18:15:46.6Z", "2023-11-16 18:15:47 UTC", "2023-11-16 18:15:47.8+0000"),
        ("2023-11-17T02:15:46.6+08:00", "2023-11-16T18:15:47Z", "2023-11-16T10:45:47.8-0730"),
        ("2023-11-16 18:15:59.6", "2023-11-16 18:16", "2023-11-16 18:16:00.8"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "json"])
def test_time_begins_at_the_first_arrival(tmp_path: Path, kind: str, times: tuple[str, ...]) -> None:
    rows = [(time, *row[1:]) for time, row in zip(times, ROWS, strict=True)]
    if kind == "csv":
        path = write(tmp_path, "t.csv", csv(rows))
    else:
        quoted = "-" in times[0]
        lines = (
            f'{{"arrival_s": {json.dumps(a) if quoted else a}, "prompt_tokens": {b}, "output_tokens": {c}}}'
            for a, b, c in rows
        )
        path = write(tmp_path, "t.jsonl", "\n".join(lines))
    workload = read(path)
    same_rows(workload)
    began = workload.source["clock_began_at"]
    if "-" in times[0]:
        assert str(began).startswith("2023-11-16T18:15:")
    else:
        assert Decimal(str(began)) == Decimal(times[0])
    json.dumps(dict(workload.source))


def test_dates_of_days_and_long_spans(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    table = {"arrival_s": [date(1971, 1, 1), date(2023, 1, 1)], "prompt_tokens": [1, 2], "output_tokens": [1, 1]}
    pq.write_table(pa.table(table), path)
    assert read(path).arrival_s.tolist() == [0.0, 18993 * 86400.0]
    for bad in ("2023-13-01 00:00:00", "soon", "", "nan", "inf", "-1"):
        with pytest.raises(
            TraceError, match=r"t\.csv: row 3, field arrival_s: got .*; expected a number of s >= 0, or a"
        ):
            read(write(tmp_path, "t.csv", csv([(0, 1, 1) if bad[:1] in "ni-" else ("2023-01-01", 1, 1), (bad, 1, 1)])))


def test_windows_count_from_the_first_arrival(tmp_path: Path) -> None:
    for start in (0.0, 2124.0, 1.7e9):
        path = write(
            tmp_path, "t.csv", csv([(start + time, b, c) for time, b, c in ((0, 1, 1), (5, 2, 1), (10, 3, 1))])
        )
        assert read(path, "window=4:11").prompt_tokens.tolist() == [2, 3]
        assert read(path, "window=50%:100%").arrival_s.tolist() == [0.0, 5.0]


@pytest.mark.parametrize(("unit", "scale"), [("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
def test_units(tmp_path: Path, unit: str, scale: int) -> None:
    rows = [(round(time * scale) if scale > 1 else time, b, c) for time, b, c in ROWS]
    same_rows(
        read(write(tmp_path, "t.csv", csv(rows, "when,prompt_tokens,output_tokens")), f"arrival=when&unit={unit}")
    )
    if unit != "s":
        same_rows(read(write(tmp_path, "t.csv", csv(rows, f"arrival_time_{unit},prompt_tokens,output_tokens"))))
    with pytest.raises(TraceError, match="key 'unit': got 'min'; expected one of s, ms, us, ns"):
        read(tmp_path / "t.csv", "arrival=when&unit=min")


# --------------------------------------------------------------------------------------------------------- columns


def test_columns_of_any_name(tmp_path: Path) -> None:
    rows = [
        (7, 0.0, 512, 64, "", 0, "x", "1 2"),
        (8, 0.4, 2048, 128, 7, 250, "x", "1 2 3"),
        (9, 1.2, 900, 100, 8, 50, "", ""),
    ]
    text = csv(rows, "key,t0,n_in,n_out,after,wait,who,blocks")
    options = "arrival=t0&prompt=n_in&output=n_out&id=key&parent=after&think=wait&unit=s&session=who&prefix=blocks"
    workload = read(write(tmp_path, "a.csv", text), options + "&prefix_block_tokens=32&keep=key")
    same_rows(workload)
    assert workload.parent_idx.tolist() == [-1, 0, 1]
    assert workload.think_s.tolist() == [0.0, 250.0, 50.0]
    assert workload.session_idx.tolist() == [0, 0, -1]
    assert prefixes(workload) == [[1, 2], [1, 2, 3], []]
    assert workload.prefix_block_tokens == 32
    assert workload.extra["key"].tolist() == [7, 8, 9]
    assert read(tmp_path / "a.csv", options.replace("unit=s", "unit=ms")).think_s.tolist() == [0.0, 0.25, 0.05]
    with pytest.raises(TraceError, match=r"missing column 'arrival_s'; the file has key, t0, n_in.*\?arrival=COLUMN"):
        read(tmp_path / "a.csv")
    with pytest.raises(TraceError, match=r"prompt=n: no such column; the file has key"):
        read(tmp_path / "a.csv", options.replace("n_in", "n"))
    with pytest.raises(TraceError, match="keep: no column 'nothing'"):
        read(tmp_path / "a.csv", options + "&keep=nothing")


@pytest.mark.parametrize(
    "header",
    [
        "arrival_time,input_length,output_length",
        "timestamp,prompt_len,output_len",
        "Arrival Time,Prompt Tokens,Completion Tokens",
        "time,num_prompt_tokens,num_output_tokens",
    ],
)
def test_usual_names(tmp_path: Path, header: str) -> None:
    same_rows(read(write(tmp_path, "a.csv", csv(header=header))))


def test_names_that_are_not_clear(tmp_path: Path) -> None:
    text = csv([(0, 0, 5, 1)], "timestamp,arrival_time,prompt_tokens,output_tokens")
    with pytest.raises(TraceError, match="columns timestamp, arrival_time may all be the arrival"):
        read(write(tmp_path, "a.csv", text))
    assert len(read(tmp_path / "a.csv", "arrival=timestamp")) == 1
    mapped = csv([("2023-11-16 00:00:01", 5, 1)], "TIMESTAMP,ContextTokens,GeneratedTokens")
    options = "arrival=TIMESTAMP&prompt=ContextTokens&output=GeneratedTokens"
    assert read(write(tmp_path, "b.csv", mapped), options).source["format"] == "canonical"


def test_what_is_not_used_is_named_once(tmp_path: Path) -> None:
    files = {
        "c.csv": csv([(*row, "x", "y") for row in ROWS], HEADER + ",gpu,tier"),
        "a.csv": "TIMESTAMP,ContextTokens,GeneratedTokens,gpu,tier\n2023-11-16 18:15:46,1,2,x,y\n",
        "b.csv": "Timestamp,Request tokens,Response tokens,gpu,tier\n5,1,2,x,y\n",
        "v.csv": "arrived_at,num_prefill_tokens,num_decode_tokens,gpu,tier\n5,1,2,x,y\n",
        "m.jsonl": '{"timestamp": 5, "input_length": 1, "output_length": 2, "gpu": 1, "tier": {}}\n' * 3,
        "q.jsonl": '{"chat_id": 1, "timestamp": 5, "input_length": 1, "output_length": 2, "gpu": 1, "tier": 2}\n',
        "l.jsonl": '{"arrival_time_ns": 5, "input_toks": 1, "output_toks": 2, "gpu": 1, "tier": 2}\n',
        "k.json": '{"hash_id_scope": "local", "gpu": 1, "requests": [{"t": 0, "in": 1, "out": 2, "tier": 3}]}',
    }
    for name, text in files.items():
        with pytest.warns(UnusedWarning, match=r"gpu, tier") as caught:
            workload = read(write(tmp_path, name, text))
        assert len(caught) == 1, name
        assert workload.source["unused"] == ["gpu", "tier"], name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = read(tmp_path / "c.csv", "keep=gpu,tier")
        images = read(
            write(tmp_path, "i.csv", "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n2024-10-15 12:00:00.1,3,1,2\n")
        )
    assert kept.extra["tier"].tolist() == ["y", "y", "y"]
    assert images.extra["NumImages"].tolist() == [3]


def test_extra_columns_follow_their_rows(tmp_path: Path) -> None:
    rows = [(1.2, 900, 100, 3, 0.5, "c,\n'\""), (0.0, 512, 64, 1, "", "a"), (0.4, 2048, 128, 2, 2.5, "ü")]
    text = "arrival_s,prompt_tokens,output_tokens,n,x,name\n"
    text += "".join(
        f'{a},{b},{c},{n},{x},"{str(name).replace(chr(34), chr(34) * 2)}"\n' for a, b, c, n, x, name in rows
    )
    workload = read(write(tmp_path, "e.csv", text), "keep=n,x,name")
    same_rows(workload)
    assert workload.source["rows_out_of_order"] == 2
    assert workload.extra["n"].tolist() == [1, 2, 3]
    assert workload.extra["n"].dtype == np.int64
    assert np.array_equal(workload.extra["x"], [np.nan, 2.5, 0.5], equal_nan=True)
    assert workload.extra["name"].tolist() == ["a", "ü", "c,\n'\""]
    assert workload.select([0, 2]).extra["n"].tolist() == [1, 3]
    assert workload.head(2).extra["name"].tolist() == ["a", "ü"]
    assert workload.window(0.3, 2.0).extra["n"].tolist() == [2, 3]
    assert workload.stretch(1, 3).extra["n"].tolist() == [2, 3]
    assert workload.at_load(2.0).extra["n"].tolist() == [1, 2, 3]
    sample = read(tmp_path / "e.csv", "keep=n", seed=3)
    assert np.array_equal(
        sample.extra["n"], [{512: 1, 2048: 2, 900: 3}[prompt] for prompt in sample.prompt_tokens.tolist()]
    )
    for name in ("own.csv", "own.parquet"):
        back = canonical.load(canonical.save(workload, tmp_path / name))
        assert back.arrival_s.tobytes() == workload.arrival_s.tobytes()
        assert dict(back.source) == dict(workload.source)
        for column, values in workload.extra.items():
            assert back.extra[column].dtype == values.dtype
            assert np.array_equal(back.extra[column], values, equal_nan=column == "x")
    with pytest.raises(ValueError, match="extra column 'prompt_tokens'"):
        Workload.build("w", [0.0], [1], [1], extra={"prompt_tokens": [1]})
    with pytest.raises(ValueError, match=r"extra column 'x' of shape \(2,\)"):
        Workload.build("w", [0.0], [1], [1], extra={"x": [1, 2]})
    with pytest.raises(TraceError, match="extra column ' x'"):
        canonical.save(Workload.build("w", [0.0], [1], [1], extra={" x": [1]}), tmp_path / "own.csv")


# ------------------------------------------------------------------------------------------------------------ rows


def test_zero_tokens_are_skipped_alike(tmp_path: Path) -> None:
    files = {
        "c.csv": csv([(0, 5, 0), (1, 0, 5), (2, 3, 4)]),
        "a.csv": csv(
            [("2023-11-16 00:00:00", 5, 0), ("2023-11-16 00:00:01", 0, 5), ("2023-11-16 00:00:02", 3, 4)],
            "TIMESTAMP,ContextTokens,GeneratedTokens",
        ),
        "b.csv": csv([(0, 5, 0), (1, 0, 5), (2, 3, 4)], "Timestamp,Request tokens,Response tokens"),
        "v.csv": csv([(0, 5, 0), (1, 0, 5), (2, 3, 4)], "arrived_at,num_prefill_tokens,num_decode_tokens"),
        "m.jsonl": "".join(
            f'{{"timestamp": {t}, "input_length": {b}, "output_length": {c}}}\n'
            for t, b, c in ((0, 5, 0), (1, 0, 5), (2, 3, 4))
        ),
        "q.jsonl": "".join(
            f'{{"chat_id": {t}, "timestamp": {t}, "input_length": {b}, "output_length": {c}}}\n'
            for t, b, c in ((0, 5, 0), (1, 0, 5), (2, 3, 4))
        ),
        "l.jsonl": "".join(
            f'{{"arrival_time_ns": {t}, "input_toks": {b}, "output_toks": {c}}}\n'
            for t, b, c in ((0, 5, 0), (1, 0, 5), (2, 3, 4))
        ),
        "p.jsonl": "".join(
            f'{{"theorem": "t", "job": {t}, "submitted_s": {t}, "generated_s": 9, '
            f'"prompt_tokens": {b}, "output_tokens": {c}}}\n'
            for t, b, c in ((0, 5, 0), (1, 0, 5), (2, 3, 4))
        ),
        "k.json": json.dumps(
            {
                "hash_id_scope": "local",
                "requests": [{"t": t, "in": b, "out": c} for t, b, c in ((0, 5, 0), (1, 0, 5), (2, 3, 4))],
            }
        ),
        "r.csv": csv([(0, 0, 5, 0), (1, 1, 0, 5), (2, 2, 3, 4)], "arrival_s,sent_s,prompt_tokens,output_tokens"),
        "w.json": json.dumps({"input_lens": [5, 0, 3], "output_lens": [0, 5, 4], "start_times": [0, 1, 2]}),
    }
    for name, text in files.items():
        workload = read(write(tmp_path, name, text))
        assert workload.prompt_tokens.tolist() == [3], name
        assert workload.arrival_s.tolist() == [0.0], name  # of the first request that is left
        assert workload.source["skipped"] == {"zero output tokens": 1, "zero prompt tokens": 1}, name
        assert workload.source["rows"] == 3, name


def test_what_waits_for_a_skipped_row_waits_for_its_parent(tmp_path: Path) -> None:
    rows = [(0, 5, 1, -1, 0), (1, 5, 0, 0, 2), (2, 0, 3, 1, 4), (3, 5, 7, 2, 8), (4, 5, 9, "", "")]
    workload = read(write(tmp_path, "p.csv", csv(rows, HEADER + ",parent_idx,think_s")))
    assert workload.output_tokens.tolist() == [1, 7, 9]
    assert workload.parent_idx.tolist() == [-1, 0, -1]
    assert workload.think_s.tolist() == [0.0, 14.0, 0.0]
    assert workload.arrival_s.tolist() == [0.0, 3.0, 4.0]  # as recorded


def test_rows_out_of_order(tmp_path: Path) -> None:
    rows = [(5, 1, 1, 3), (2, 2, 1, -1), (2, 3, 1, -1), (1, 4, 1, -1), (7, 5, 1, 0)]
    workload = read(write(tmp_path, "p.csv", csv(rows, HEADER + ",parent_idx")))
    assert workload.prompt_tokens.tolist() == [4, 2, 3, 1, 5]
    assert workload.arrival_s.tolist() == [0.0, 1.0, 1.0, 4.0, 6.0]
    assert workload.parent_idx.tolist() == [-1, -1, -1, 0, 3]
    assert workload.source["rows_out_of_order"] == 3
    early = read(write(tmp_path, "p.csv", csv([(1, 1, 1, 1), (3, 2, 1, -1)], HEADER + ",parent_idx")))
    assert early.prompt_tokens.tolist() == [2, 1]
    assert early.arrival_s.tolist() == [2.0, 2.0]
    assert early.source["arrivals_moved_to_their_parents"] == 1
    with pytest.raises(
        TraceError, match="row 2, field parent_idx: got '1'; expected -1 or the index of a row that does"
    ):
        read(write(tmp_path, "p.csv", csv([(1, 1, 1, 1), (3, 2, 1, 0)], HEADER + ",parent_idx")))


def test_lines_are_counted_as_an_editor_does(tmp_path: Path) -> None:
    text = (
        "\n# no, this is a row\n".replace("# no, this is a row\n", "")
        + HEADER
        + ',note\n\n0,1,1,"two\nlines"\n\n1,x,1,\n'
    )
    with pytest.raises(TraceError, match="row 7, field prompt_tokens: got 'x'"):
        read(write(tmp_path, "p.csv", text))
    with pytest.raises(TraceError, match=r"row 5: got 2 fields; expected 3"):
        read(write(tmp_path, "p.csv", HEADER + "\n\n0,1,1\n\n1,2\n"))


# ------------------------------------------------------------------------------------------------------------- ids


@pytest.mark.parametrize("ids", [[2**64 - 1, 8], [-(2**63), 8], ["a", "8"], [2**60, 8], ["f" * 64, "b"], [-1, -2]])
def test_ids_of_any_kind(tmp_path: Path, ids: list[Any]) -> None:
    rows = [
        {"timestamp": 5000 * i, "input_length": 1024, "output_length": 5, "hash_ids": row}
        for i, row in enumerate((ids, ids[::-1], ids))
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for path, options in (
        (write(tmp_path, "m.jsonl", text), ""),
        (
            write(
                tmp_path,
                "c.csv",
                csv(
                    [(i, 1024, 5, ";".join(map(str, row["hash_ids"]))) for i, row in enumerate(rows)],
                    HEADER + ",prefix_ids",
                ),
            ),
            "",
        ),  # type: ignore[arg-type]
    ):
        found = prefixes(read(path, options))
        assert found[0] == found[2] == found[1][::-1] == [found[0][0], found[0][1]]
        assert found[0][0] != found[0][1]
        assert min(found[0]) >= 0


def test_sessions_of_any_kind(tmp_path: Path) -> None:
    for ids, expected in (
        ((2**64 - 1, -7, 2**64 - 1), [0, 1, 0]),
        (("u1", "", "u1"), [0, -1, 0]),
        ((5, -1, 5), [5, -1, 5]),
    ):
        rows = [(*row, each) for row, each in zip(ROWS, ids, strict=True)]
        assert read(write(tmp_path, "s.csv", csv(rows, HEADER + ",session_id"))).session_idx.tolist() == expected


def test_parents_by_id(tmp_path: Path) -> None:
    rows = [(*row, key, parent) for row, key, parent in zip(ROWS, ("a", "b", "c"), ("", "a", "gone"), strict=True)]
    workload = read(write(tmp_path, "s.csv", csv(rows, HEADER + ",request_id,parent_id")))
    assert workload.parent_idx.tolist() == [-1, 0, -1]
    with pytest.raises(TraceError, match="row 3, field parent_id: got 'b'; expected the request_id of another row"):
        read(
            write(
                tmp_path,
                "s.csv",
                csv(
                    [(*row, key, key if key == "b" else "") for row, key in zip(ROWS, "abc", strict=True)],
                    HEADER + ",request_id,parent_id",
                ),
            )
        )


def test_block_sizes(tmp_path: Path) -> None:
    def mooncake(*rows: tuple[int, int], options: str = "") -> int:
        lines = (
            json.dumps({"timestamp": 0, "input_length": tokens, "output_length": 1, "hash_ids": list(range(count))})
            + "\n"
            for tokens, count in rows
        )
        return read(write(tmp_path, "m.jsonl", "".join(lines)), options).prefix_block_tokens

    assert mooncake((600, 2), (513, 2), (512, 1)) == 512
    assert mooncake((33, 3), (50, 4)) == 16
    assert mooncake((33, 2), (50, 3)) == 16  # whole blocks only
    assert mooncake((1000, 10), (901, 10), (100, 1)) == 100
    assert mooncake((1024, 2), options="prefix_block_tokens=64") == 64
    with pytest.raises(
        TraceError, match=r"row 2, field hash_ids: got '1 ids'; expected 2, one per 512.*prefix_block_tokens="
    ):
        mooncake((10, 1), (513, 1))
    with pytest.raises(
        TraceError, match=r"row 1, field hash_ids: got .*; expected at most one id for each 512 prompt tokens"
    ):
        mooncake((1024, 3), options="prefix_block_tokens=512")
    prefix = write(tmp_path, "p.csv", csv([(0, 1024, 5, "7;8"), (1, 1024, 5, "7;8")], HEADER + ",prefix_ids"))
    assert read(prefix).prefix_block_tokens == 16
    assert "16 tokens an id (the default" in read(prefix).source["prefix_blocks"]
    assert read(prefix, "prefix_block_tokens=512").prefix_block_tokens == 512


def test_files_of_our_own_are_as_they_were_saved(tmp_path: Path) -> None:
    """Not begun anew at the first arrival: a window of a trace may begin before its first request."""
    workload = Workload.build("w", [5.0, 7.1], [1, 2], [3, 4], session_idx=[9, 2])
    for name in ("w.csv", "w.parquet"):
        back = read(canonical.save(workload, tmp_path / name))
        assert back.arrival_s.tolist() == [5.0, 7.1]
        assert back.session_idx.tolist() == [9, 2]


def test_a_warning_of_the_file_is_a_warning(tmp_path: Path) -> None:
    assert issubclass(UnusedWarning, TraceWarning)
    assert not issubclass(UnusedWarning, TraceError)
