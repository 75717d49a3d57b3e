"""Every format on small files written here; each malformed file gives one error that names file, row and field."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from l3env.errors import TraceError, UnusedWarning
from l3env.traces import azure, burstgpt, canonical, catalog, kv_cache_tester, mooncake, servegen, vidur
from l3env.traces.window import Window

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
BURST_3 = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
LENGTHS = "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def mooncake_row(timestamp: object, tokens: int, output: object, ids: list[int]) -> str:
    return json.dumps({"timestamp": timestamp, "input_length": tokens, "output_length": output, "hash_ids": ids}) + "\n"


# ---------------------------------------------------------------------------------------------------------- Azure


def test_azure_rows(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "a.csv",
        AZURE
        + "2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:46.6805901,396,109\r\n2023-11-16 18:16:46.68059,9,1",
    )
    workload = azure.load(path)
    assert workload.arrival_s.tolist() == [0.0, 1e-7, 60.0]  # the seventh digit is 100 ns
    assert workload.prompt_tokens.tolist() == [374, 396, 9]
    assert workload.output_tokens.tolist() == [44, 109, 1]
    assert workload.source["skipped"] == {}
    assert catalog.find_format(path).name == "azure-csv"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("2023-11-16 18:15:46.68,374,44\r\n2023-13-16 18:15:45.1,1,1\r\n", "row 3, field TIMESTAMP"),
        ("2023-11-16 18:15:46.68,0,44\r\n", "no request left of 1 rows (1 with zero prompt tokens)"),
        ("2023-11-16 18:15:46.68,374,0\r\n", "no request left of 1 rows (1 with zero output tokens)"),
        ("2023-11-16 18:15:46.68,3,-4\r\n", "row 2, field GeneratedTokens: got '-4'"),
        ("2023-11-16 18:15:46.68,3.5,4\r\n", "row 2, field ContextTokens: got '3.5'"),
        ("2023-11-16 18:15:46.68,many,4\r\n", "row 2, field ContextTokens: got 'many'"),
        ("2023-11-16 18:15:46.68,nan,4\r\n", "row 2, field ContextTokens: got 'nan'"),
        ("2023-11-16 18:15:46.68,,4\r\n", "row 2, field ContextTokens: got ''"),
        ("2023-11-16 18:15:46.68,3,99999999999\r\n", "row 2, field GeneratedTokens: got '99999999999'"),
        ("2023-11-16 18:15:46.68,3,4\r\n2023-11-16 18:15:47,3\r\n", "row 3: got 2 fields; expected 3"),
        ("2023-11-16 18:15:46.68,3,4,5\r\n", "row 2: got 4 fields; expected 3"),
        ("2023-11-16 18:15:46.68,3,4\r\n\r\n2023-11-16 18:15:47,x,4\r\n", "row 4, field ContextTokens: got 'x'"),
        ("", "no rows below the header"),
    ],
)
def test_azure_errors(tmp_path: Path, rows: str, expected: str) -> None:
    path = write(tmp_path, "a.csv", AZURE + rows)
    with pytest.raises(TraceError) as caught:
        azure.load(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


def test_columns_are_named(tmp_path: Path) -> None:
    with pytest.warns(UnusedWarning, match=r"a\.csv: 1 column is not used: Model"):
        azure.load(
            write(tmp_path, "a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens,Model\n2023-11-16 18:15:46,1,2,x\n")
        )
    with pytest.raises(TraceError, match="missing column 'GeneratedTokens'"):
        azure.load(write(tmp_path, "b.csv", "TIMESTAMP,ContextTokens\n2023-11-16 18:15:46,1\n"))
    with pytest.raises(TraceError, match="repeated column 'ContextTokens'"):
        azure.load(write(tmp_path, "c.csv", "TIMESTAMP,ContextTokens,ContextTokens,GeneratedTokens\n1,2,3,4\n"))
    with pytest.raises(TraceError, match="no such file"):
        azure.load(tmp_path / "nothing.csv")


def test_a_late_bad_row_is_found(tmp_path: Path) -> None:
    good = "".join(f"2023-11-16 18:15:{i % 60:02d},{i + 1},1\r\n" for i in range(60))
    path = write(tmp_path, "a.csv", AZURE + good + "2023-11-16 18:16:00,x,1\r\n" + "2023-11-16 18:16:01,y,1\r\n")
    with pytest.raises(TraceError, match="row 62, field ContextTokens: got 'x'"):
        azure.load(path)


# ------------------------------------------------------------------------------------------------------- BurstGPT


def test_burstgpt_counts_failures(tmp_path: Path) -> None:
    rows = "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,10,0,10,API log\n118,GPT-4,417,276,693,Conversation log\n"
    path = write(tmp_path, "b.csv", BURST + rows)
    workload = burstgpt.load(path)
    assert workload.arrival_s.tolist() == [0.0, 113.0]
    assert workload.output_tokens.tolist() == [18, 276]
    assert list(workload.source["skipped"].values()) == [1]
    assert burstgpt.load(path, model="GPT-4").prompt_tokens.tolist() == [417]
    with pytest.raises(TraceError, match="model 'GPT-5'; expected one of ChatGPT, GPT-4"):
        burstgpt.load(path, model="GPT-5")


def test_burstgpt_3_columns(tmp_path: Path) -> None:
    rows = (
        "5.0,aa,1.5,ChatGPT,4,1,5,Conversation log\n"
        "6.5,,2.0,GPT-4,1,2,3,API log\n"
        "7.0,aa,1,ChatGPT,2,2,4,Conversation log\n"
    )
    workload = burstgpt.load(write(tmp_path, "b.csv", BURST_3 + rows))
    assert workload.arrival_s.tolist() == [0.0, 1.5, 2.0]
    assert workload.session_idx.tolist() == [0, -1, 0]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("5,ChatGPT,4,1,6,Conversation log\n", "row 2, field Total tokens: got '6'"),
        ("5,ChatGPT,0,1,1,Conversation log\n", "no request left of 1 rows (1 with zero prompt tokens)"),
        ("-5,ChatGPT,1,1,2,Conversation log\n", "row 2, field Timestamp: got '-5'"),
        ("5,ChatGPT,1,0,1,Conversation log\n", "no request left of 1 rows (1 with zero output tokens)"),
    ],
)
def test_burstgpt_errors(tmp_path: Path, row: str, expected: str) -> None:
    with pytest.raises(TraceError) as caught:
        burstgpt.load(write(tmp_path, "b.csv", BURST + row))
    assert expected in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- vidur


def test_vidur_with_arrivals(tmp_path: Path) -> None:
    path = write(tmp_path, "v.csv", VIDUR + "0.0,4808,10\n0.052,3180,8\n")
    workload = vidur.load(path)
    assert workload.arrival_s.tolist() == [0.0, 0.052]
    assert workload.prompt_tokens.tolist() == [4808, 3180]
    assert catalog.find_format(path).name == "vidur-csv"


def test_lengths_only_needs_an_arrival_process(tmp_path: Path) -> None:
    rows = "".join(f"{i + 1},2,{i + 3},0.5\n" for i in range(4000))
    path = write(tmp_path, "l.csv", LENGTHS + rows)
    assert vidur.load(path).span_s == 0.0
    poisson = vidur.load(path, arrivals="poisson", rate=5.0)
    gaps_s = np.diff(poisson.arrival_s)
    assert poisson.arrival_s[0] == 0.0
    assert gaps_s.mean() == pytest.approx(1 / 5, rel=0.06)  # 4 standard errors
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(1.0, abs=0.06)
    gaps_s = np.diff(vidur.load(path, arrivals="gamma", rate=5.0, cv=3.0).arrival_s)
    assert gaps_s.mean() == pytest.approx(1 / 5, rel=0.2)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(3.0, rel=0.2)
    assert vidur.load(path, arrivals="closed").arrival_s.max() == 0.0
    with pytest.raises(TraceError, match="needs rate="):
        vidur.load(path, arrivals="poisson")
    with pytest.raises(TraceError, match="rate -1"):
        vidur.load(path, arrivals="poisson", rate=-1.0)
    with pytest.raises(TraceError, match="expected one of closed, poisson, gamma"):
        vidur.load(path, arrivals="uniform", rate=1.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LENGTHS + "3,4,8,0.75\n", "row 2, field num_total_tokens: got '8'"),
        (VIDUR + "1.0,3,4\n-0.5,3,4\n", "row 3, field arrived_at: got '-0.5'"),
        (VIDUR + "1.0,3,0\n", "no request left of 1 rows (1 with zero output tokens)"),
        ("arrived_at,num_prefill_tokens\n1,2\n", "missing column 'num_decode_tokens'"),
    ],
)
def test_vidur_errors(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(TraceError) as caught:
        vidur.load(write(tmp_path, "v.csv", text))
    assert expected in str(caught.value)


# ------------------------------------------------------------------------------------------------------- Mooncake


@pytest.mark.parametrize("packed", [False, True])
def test_mooncake_rows(tmp_path: Path, packed: bool) -> None:
    text = mooncake_row(0, 513, 5, [7, 8]) + mooncake_row(1500, 512, 6, [7]) + mooncake_row(1600, 1, 1, [9])
    path = tmp_path / ("m.jsonl.gz" if packed else "m.jsonl")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    workload = mooncake.load(path)
    assert workload.arrival_s.tolist() == [0.0, 1.5, 1.6]
    assert workload.prefix_ids.tolist() == [7, 8, 7, 9]
    assert workload.prefix_offsets.tolist() == [0, 2, 3, 4]
    assert workload.prefix_block_tokens == 512
    assert catalog.find_format(path).name == "mooncake-jsonl"


def test_mooncake_spreads_a_coarse_clock_only(tmp_path: Path) -> None:
    text = "".join(mooncake_row(3000 * (i // 10), 10, i + 1, [i]) for i in range(100))
    path = write(tmp_path, "m.jsonl", text)
    raw, spread = mooncake.load(path, spread=False), mooncake.load(path)
    assert np.unique(raw.arrival_s).size == 10
    assert np.unique(spread.arrival_s).size == 100
    assert np.array_equal(spread.arrival_s // 3.0, raw.arrival_s // 3.0)  # each stays within its own step
    assert spread.output_tokens.tolist() == list(range(1, 101))  # in the file's order
    assert np.array_equal(spread.arrival_s, mooncake.load(path).arrival_s)
    assert "3 s" in spread.source["spread"]
    fine = write(tmp_path, "f.jsonl", "".join(mooncake_row(30 * i, 10, 1, [i]) for i in range(50)))
    assert np.array_equal(mooncake.load(fine).arrival_s, mooncake.load(fine, spread=False).arrival_s)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (mooncake_row(-1, 10, 1, [1]), "row 2, field timestamp: got -1"),
        (mooncake_row(0, -1, 1, []), "row 2, field input_length: got -1"),
        (mooncake_row(0, 10, 1.5, [1]), "row 2, field output_length: got 1.5"),
        (mooncake_row(0, 10, "3", [1]), "row 2, field output_length: got '3'"),
        (mooncake_row(0, 10, True, [1]), "row 2, field output_length: got True"),
        (mooncake_row(0, 513, 1, [1]), "row 2, field hash_ids: got '1 ids'; expected 2"),
        (mooncake_row(0, 10, 1, [1.5]), "row 2, field hash_ids: got [1.5]; expected a list of ids"),  # type: ignore[list-item]
        ("{not json}\n", "row 2: not JSON"),
        ('{"timestamp": 0, "input_length": 3}\n', "row 2, field output_length: got None"),
        ("[1]\n", "row 2: got fields [1]"),
    ],
)
def test_mooncake_errors(tmp_path: Path, line: str, expected: str) -> None:
    path = write(tmp_path, "m.jsonl", mooncake_row(0, 10, 1, [1]) + line)
    with pytest.raises(TraceError) as caught:
        mooncake.load(path)
    assert expected in str(caught.value)


def test_mooncake_unsorted_and_empty(tmp_path: Path) -> None:
    path = write(tmp_path, "m.jsonl", mooncake_row(10, 10, 1, [1]) + mooncake_row(9, 10, 2, [2]))
    workload = mooncake.load(path)
    assert workload.arrival_s.tolist() == [0.0, 0.001]
    assert workload.output_tokens.tolist() == [2, 1]
    assert workload.prefix_ids.tolist() == [2, 1]
    assert workload.source["rows_out_of_order"] == 1
    with pytest.raises(TraceError, match="empty"):
        mooncake.load(write(tmp_path, "e.jsonl", ""))


# ------------------------------------------------------------------------------------------------ kv-cache-tester


def request(t: float, prompt: int, output: int, ids: list[int] | None = None, **more: Any) -> dict[str, Any]:
    ids = list(range(prompt // 64)) if ids is None else ids
    fixed = {"type": "n", "model": "m", "input_types": [], "output_types": [], "stop": ""}
    return {"t": t, "in": prompt, "out": output, "hash_ids": ids, **fixed, **more}


def session(requests: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    top = {"id": "x", "models": [], "block_size": 64, "hash_id_scope": "local", "tool_tokens": 0, "system_tokens": 0}
    return {**top, "requests": requests, "totals": {}, **more}


def write_sessions(folder: Path, sessions: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    for number, document in enumerate(sessions):
        (folder / f"trace_{number:04d}.json").write_text(json.dumps(document))
    return folder


def test_sessions_are_closed_loops(tmp_path: Path) -> None:
    first = session([request(0, 130, 5, think_time=0.0, api_time=2.0), request(10, 200, 6, think_time=8.0)])
    second = session([request(0, 64, 1), request(4, 64, 2, api_time=1.0), request(9, 65, 3)])
    folder = write_sessions(tmp_path / "s", [first, second])
    workload = kv_cache_tester.load(folder, session_rate=1e-6)
    assert workload.prompt_tokens.tolist() == [130, 200, 64, 64, 65]
    assert workload.parent_idx.tolist() == [-1, 0, -1, 2, 3]
    assert workload.think_s.tolist() == [0.0, 8.0, 0.0, 4.0, 4.0]  # 4 - 0 - unknown service; 9 - 4 - 1
    assert workload.session_idx.tolist() == [0, 0, 1, 1, 1]
    start_s = workload.arrival_s[2]
    assert workload.arrival_s == pytest.approx([0, 10, start_s, start_s + 4, start_s + 9])
    assert workload.prefix_block_tokens == 64
    rows = [workload.prefix_ids[a:b].tolist() for a, b in pairwise(workload.prefix_offsets)]
    assert rows[0] == rows[1][:2]
    assert rows[2] == rows[3] == rows[4]
    assert not set(rows[1]) & set(rows[2])  # ids of two sessions never meet
    assert catalog.find_format(folder).name == "kv-cache-tester"
    assert len(kv_cache_tester.load(folder, sessions=1)) == 2


def test_zero_output_is_skipped_and_the_chain_goes_on(tmp_path: Path) -> None:
    rows = [
        request(0, 64, 5, api_time=1.0, think_time=0.0),
        request(3, 64, 0, api_time=1.5, think_time=2.0),
        request(9, 64, 7, think_time=4.5),
    ]
    workload = kv_cache_tester.load(write_sessions(tmp_path / "s", [session(rows)]))
    assert workload.output_tokens.tolist() == [5, 7]
    assert workload.parent_idx.tolist() == [-1, 0]
    assert workload.think_s.tolist() == [0.0, 2.0 + 1.5 + 4.5]
    assert workload.source["skipped"] == {"zero output tokens": 1}


def test_a_subagent_forks_from_the_request_before_it(tmp_path: Path) -> None:
    inner = [request(0.0, 64, 21, think_time=0.0, api_time=1.0), request(5.0, 64, 22, think_time=4.0)]
    rows = [
        request(0, 64, 1, api_time=2.0, think_time=0.0),
        request(10, 64, 2, api_time=2.0, think_time=8.0),
        {"t": 15.0, "type": "subagent", "requests": inner, "agent_id": "a"},
        request(30, 64, 3, think_time=18.0),
    ]
    workload = kv_cache_tester.load(write_sessions(tmp_path / "s", [session(rows)]))
    assert workload.output_tokens.tolist() == [1, 2, 21, 22, 3]
    assert workload.parent_idx.tolist() == [-1, 0, 1, 2, 1]
    assert workload.think_s.tolist() == [0.0, 8.0, 15.0 - 12.0, 4.0, 18.0]
    assert workload.arrival_s.tolist() == [0.0, 10.0, 15.0, 20.0, 30.0]


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (session([request(0, 64, -1)]), "row 1, field out: got -1"),
        (session([request(0, 0, 1)]), "no request with output"),
        (session([request(5, 64, 1), request(-4, 64, 1)]), "row 2, field t: got -4"),
        (session([request(0, 64, 1, think_time=-2)]), "row 1, field think_time: got -2"),
        (session([request(0, 64, 1, ids=[])]), "row 1, field hash_ids: got '0 ids'; expected 1"),
        (session([request(0, 64, 1, ids=[1.5])]), "row 1, field hash_ids"),  # type: ignore[list-item]
        (session([{"t": 0, "type": "n"}]), "row 1: missing field in, out"),
        (session([request(0, 64, 1)], hash_id_scope="far"), "field hash_id_scope: got 'far'; expected 'local'"),
        (session([]), "field requests"),
        (session([{"t": 1, "type": "subagent", "requests": [request(0, 64, "x")]}]), "row 1.1, field out: got 'x'"),  # type: ignore[arg-type]
        (session([request(0, 64, 0)]), "no request with output"),
    ],
)
def test_session_errors(tmp_path: Path, document: dict[str, Any], expected: str) -> None:
    folder = write_sessions(tmp_path / "s", [document])
    with pytest.raises(TraceError) as caught:
        kv_cache_tester.load(folder)
    assert expected in str(caught.value)


def test_a_single_session_and_bad_json(tmp_path: Path) -> None:
    folder = write_sessions(tmp_path / "s", [session([request(0, 64, 1)])])
    single = folder / "trace_0000.json"
    assert catalog.find_format(single).name == "kv-cache-tester"
    assert len(kv_cache_tester.load(single)) == 1
    single.write_text("{")
    with pytest.raises(TraceError, match=r"trace_0000\.json: not JSON"):
        kv_cache_tester.load(single)


# ------------------------------------------------------------------------------------------------------- ServeGen


def client_files(number: int, rates: list[float], lengths: dict[str, str] | None) -> dict[str, str]:
    rows = [
        f"{600 * i},{r},{1.0 if r else 0},{'Gamma' if r else ''},{0.5 if r else 0},{1 if r else 0}"
        for i, r in enumerate(rates)
    ]
    files = {f"data/demo/chunk-{number}-trace.csv": "\r\n".join(rows) + "\r\n"}
    if lengths is not None:
        files[f"data/demo/chunk-{number}-dataset.json"] = json.dumps({"0": lengths})
    return files


def write_archive(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return path


TEXT = {"input_tokens": "{10: 0.25, 20: 0.75}", "output_tokens": "{3: 1.0}", "reason_ratio": "{0.5: 1.0}"}


def test_servegen_draws_the_published_counts(tmp_path: Path) -> None:
    files = {**client_files(0, [2.0, 0.0, 1.0], TEXT), **client_files(7, [0.0, 0.5, 0.5], TEXT)}
    path = write_archive(tmp_path / "demo.tar.gz", files)
    workload = servegen.load(path, window=Window(0, 1800))
    window = (workload.arrival_s // 600).astype(int)
    for number, counts in ((0, [1200, 0, 600]), (7, [0, 300, 300])):
        assert np.bincount(window[workload.session_idx == number], minlength=3).tolist() == counts
    assert set(workload.prompt_tokens) == {10, 20}
    assert (workload.prompt_tokens == 20).mean() == pytest.approx(0.75, abs=0.04)  # 4 standard errors
    assert set(workload.output_tokens) == {3}
    assert catalog.find_format(path).name == "servegen"
    again, other = servegen.load(path), servegen.load(path, seed=1)
    assert np.array_equal(again.arrival_s, workload.arrival_s)  # the first hour holds all of it
    assert not np.array_equal(other.prompt_tokens[:1000], workload.prompt_tokens[:1000])
    part = servegen.load(path, window=Window(100, 700))
    inside = (workload.arrival_s >= 100) & (workload.arrival_s < 700)
    assert np.allclose(part.arrival_s, workload.arrival_s[inside] - 100)
    assert len(servegen.load(path, scale=0.5)) == 1200


def test_servegen_gaps_have_the_fitted_shape(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "demo.tar.gz", client_files(0, [20.0] * 6, TEXT))
    gaps_s = np.diff(servegen.load(path).arrival_s)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(np.sqrt(2.0), rel=0.05)  # gamma of shape 0.5: CV = 1/sqrt(k)


def test_servegen_adds_the_tokens_of_images(tmp_path: Path) -> None:
    lengths = {
        "text_tokens": "{5: 1.0}",
        "image_tokens": "{100: 1.0}",
        "image_count": "{0: 0.5, 2: 0.5}",
        "audio_tokens": "{0: 1.0}",
        "audio_count": "{0: 1.0}",
        "video_tokens": "{}",
        "video_count": "{}",
        "output_tokens": "{3: 1.0}",
    }
    path = write_archive(tmp_path / "demo.tar.gz", client_files(0, [1.0], lengths))
    assert set(servegen.load(path).prompt_tokens) == {5, 205}
    assert set(servegen.load(path, prompt="text").prompt_tokens) == {5}


def test_servegen_rates_only_needs_lengths(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "demo.tar.gz", client_files(0, [1.0], None))
    with pytest.raises(TraceError, match="arrival rates only; expected lengths=TRACE"):
        servegen.load(path)
    workload = catalog.resolve(f"{path}?lengths=openr1", 0)
    openr1 = catalog.resolve("openr1", 0)
    assert workload is not None
    assert openr1 is not None
    pairs = set(zip(openr1.prompt_tokens.tolist(), openr1.output_tokens.tolist(), strict=True))
    assert set(zip(workload.prompt_tokens.tolist(), workload.output_tokens.tolist(), strict=True)) <= pairs
    with pytest.raises(TraceError, match="lengths=nothing: no such trace"):
        catalog.resolve(f"{path}?lengths=nothing", 0)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"data/demo/chunk-0-trace.csv": "0,1,1,Zipf,1,1\r\n"}, "row 1, field distribution: got 'Zipf'"),
        ({"data/demo/chunk-0-trace.csv": "0,1,1,Gamma,0,1\r\n"}, "row 1, field shape: got '0'"),
        ({"data/demo/chunk-0-trace.csv": "0,-1,1,Gamma,1,1\r\n"}, "row 1, field rate_per_s: got '-1'"),
        ({"data/demo/chunk-0-trace.csv": "0,0,0,,0,0\r\n500,0,0,,0,0\r\n"}, "row 2, field window_start_s: got '500'"),
        ({"data/demo/chunk-0-trace.csv": "0,1,1,,1,1\r\n"}, "row 1, field distribution: got ''"),
        (client_files(0, [1.0], {**TEXT, "output_tokens": "{0: 1.0}"}), "field output_tokens: got values 0 to 0"),
        (client_files(0, [1.0], {**TEXT, "output_tokens": "{3: 0.4}"}), "probabilities sum to 0.4"),
        (client_files(0, [1.0], {**TEXT, "output_tokens": "__import__('os')"}), "expected a Python dict"),
        (client_files(0, [1.0], {"input_tokens": "{3: 1.0}"}), "without output_tokens"),
        ({**client_files(0, [1.0], TEXT), **client_files(1, [1.0], None)}, "chunk 1 has only one of its two files"),
        ({**client_files(0, [1.0], TEXT), **client_files(1, [1.0, 1.0], TEXT)}, "expected the same number"),
        (client_files(0, [0.0], TEXT), "no request arrives"),
    ],
)
def test_servegen_errors(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    path = write_archive(tmp_path / "demo.tar.gz", files)
    with pytest.raises(TraceError) as caught:
        servegen.load(path, lengths=None if any("dataset" in name for name in files) else catalog.resolve("openr1", 0))
    assert expected in str(caught.value)


# ------------------------------------------------------------------------------------------------ finding a format


def test_formats_do_not_claim_each_others_files(tmp_path: Path) -> None:
    paths = {
        "azure-csv": write(tmp_path, "a.csv", AZURE),
        "burstgpt-csv": write(tmp_path, "b.csv", BURST),
        "vidur-csv": write(tmp_path, "v.csv", LENGTHS),
        "mooncake-jsonl": write(tmp_path, "m.jsonl", mooncake_row(0, 10, 1, [1])),
        "canonical": write(tmp_path, "c.csv", "arrival_s,prompt_tokens,output_tokens\n"),
        "kv-cache-tester": write_sessions(tmp_path / "s", [session([])]),
        "servegen": write_archive(tmp_path / "d.tar.gz", client_files(0, [1.0], TEXT)),
    }
    modules = (azure, burstgpt, vidur, mooncake, canonical, kv_cache_tester, servegen)
    for name, path in paths.items():
        assert [module.FORMAT.name for module in modules if module.FORMAT.matches(path)] == [name]


def test_unknown_files(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"no known trace format .*'hello'.*azure-csv"):
        catalog.find_format(write(tmp_path, "x.txt", "hello\n"))
    with pytest.raises(TraceError, match="no known trace format"):
        catalog.find_format(write(tmp_path, "x.tar.gz", "not a tar"))
    with pytest.raises(TraceError, match="no known trace format"):
        catalog.find_format(write(tmp_path, "x.csv.gz", "\x1f\x8b broken"))
    with pytest.raises(TraceError, match="format 'azure'; expected one of azure-csv"):
        catalog.find_format(tmp_path / "x.txt", "azure")
