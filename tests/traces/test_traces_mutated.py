"""Damaged files: whatever is changed in one, it is read or refused in one line, never ends in another error."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from l3env.errors import L3EnvError
from l3env.requests.workload import Workload
from l3env.traces import canonical, catalog

MUTATIONS = 300
SPLICES = [
    *(b"", b"\x00", b"\xff", b'"', b",", b";", b"\n", b"\r\n", b"{", b"}", b"[", b"]", b":", b"-", b".", b"e9", b"nan"),
    *(
        b"null",
        b"true",
        b"1e400",
        b"99999999999999999999999",
        b"-1",
        b"[[[[",
        b'{"a":',
        b"\xef\xbb\xbf",
        b"1.5",
        b'"x"',
    ),
]


def jsonl(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def round_of(index: int) -> dict[str, object]:
    events = [
        {"event_type": kind, "timestamp": f"2026-06-01T05:40:{10 * index + more:02d}.151Z"}
        for kind, more in (("user_message", 0), ("text", 4))
    ]
    row = {"session_id": "s", "round_index": index, "input_tokens_total": 1024, "prefix_tokens": 512}
    return {**row, "output_tokens": 3, "timing_events": events}


SUB = {"input_toks": 4, "output_toks": 2, "tool_duration_ns": 5, "input_tok_ids": [1, 2, 3, 4]}
AGENT = {"t": 0, "type": "n", "in": 130, "out": 5, "hash_ids": [1, 2], "think_time": 1.0, "api_time": 2}
FILES: dict[str, bytes] = {
    "canonical.csv": b"arrival_s,prompt_tokens,output_tokens,parent_idx,think_s,session_id,prefix_ids\n"
    b'1700000000.123456789,512,64,-1,0,a,1;2\n1700000001.5,33,4,0,2.5,"b",7\n',
    "canonical.jsonl": jsonl({"arrival_s": "2023-11-16 18:15:46.68+08:00", "prompt_tokens": 4, "output_tokens": 5}) * 2,
    "azure-csv": b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.6805900,374,44\r\n"
    b"2023-11-16 18:15:46.6805901,396,109\r\n",
    "burstgpt-csv": b"Timestamp,Session ID,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    b"5,aa,ChatGPT,472,18,490,Conversation log\n45,,GPT-4,10,0,10,API log\n",
    "vidur-csv": b"arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,4808,10\n0.052,3180,8\n",
    "mooncake-jsonl": jsonl(
        {"timestamp": 0, "input_length": 513, "output_length": 5, "hash_ids": [7, 8], "session_id": 1},
        {"delay": 500, "input_length": 512, "output_length": 5, "hash_ids": [7], "session_id": 1},
    ),
    "kv-cache-tester": jsonl(
        {
            "block_size": 64,
            "hash_id_scope": "local",
            "requests": [AGENT, {"t": 1, "type": "subagent", "requests": [AGENT]}, AGENT],
        }
    ),
    "prover-log": jsonl(
        *(
            {
                "theorem": "t",
                "job": 0,
                "submitted_s": 4.0 * place,
                "generated_s": 4.0 * place + 1,
                "prompt_tokens": 40,
                "output_tokens": 5,
                "prefix_ids": [1, 2],
            }
            for place in (0, 1)
        )
    ),
    "bailian-jsonl": jsonl(
        {"chat_id": 1, "parent_chat_id": -1, "timestamp": 0.5, "input_length": 33, "output_length": 5, "hash_ids": []},
        {"chat_id": 2, "parent_chat_id": 1, "timestamp": 5.2, "input_length": 16, "output_length": 5, "hash_ids": [1]},
    ),
    "tracelab-jsonl": jsonl(round_of(0), round_of(1)),
    "llmservingsim-jsonl": jsonl(
        {**SUB, "arrival_time_ns": 5}, {"session_id": "s", "arrival_time_ns": 9, "sub_requests": [SUB, SUB]}
    ),
    "vllm-bench": jsonl(
        {"input_lens": [1, 2], "output_lens": [3, 4], "start_times": [0.5, 1], "ttfts": [1, 2], "itls": [[1], []]}
    ),
    "vllm-bench.prompts": jsonl({"prompt": "some text", "output_tokens": 3}, {"prompt": [1, 2]}),
    "vllm-bench.share": json.dumps(
        [{"conversations": [{"from": "a", "value": "x"}, {"from": "b", "value": "y"}]}]
    ).encode(),
    "serving-runs": b"run_id,client_arrival_s,prompt_tokens,output_tokens,ttft_ms,user_id\n"
    b"a,0.5,10,3,5.5,u\na,1,20,3,,\n",
}


def own_files(folder: Path) -> dict[str, bytes]:
    """Binary kinds, and what l3env writes itself."""
    workload = Workload.build("w", [0.0, 1.5], [3, 4], [5, 6], extra={"n": [1, 2], "s": ["a", "b"]})
    table = pa.table(
        {"arrival_s": [0.0, 1.5], "prompt_tokens": ["3", "4"], "output_tokens": [5, 6], "prefix_ids": [[1], []]}
    )
    pq.write_table(table, folder / "t.parquet")
    feather.write_feather(table, folder / "t.arrow")
    client = b"0,2.0,1,Gamma,0.5,1\r\n600,0,0,,0,0\r\n"
    lengths = json.dumps({"0": {"input_tokens": "{10: 1.0}", "output_tokens": "{3: 0.5, 4: 0.5}"}}).encode()
    with tarfile.open(folder / "d.tar", "w") as archive:
        for name, data in (("demo/chunk-0-trace.csv", client), ("demo/chunk-0-dataset.json", lengths)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return {
        "canonical.own.csv": canonical.save(workload, folder / "o.csv").read_bytes(),
        "canonical.own.parquet": canonical.save(workload, folder / "o.parquet").read_bytes(),
        "canonical.parquet": (folder / "t.parquet").read_bytes(),
        "canonical.arrow": (folder / "t.arrow").read_bytes(),
        "canonical.gz": gzip.compress(FILES["canonical.csv"]),
        "servegen": (folder / "d.tar").read_bytes(),
    }


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to three changes: a byte, a piece cut out, put in, doubled or replaced, a field swapped, the end cut off."""
    for _ in range(rng.randint(1, 3)):
        at, to = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        to = min(to, at + 12)
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + data[to:]
        elif kind == 2:
            data = data[:at] + rng.choice(SPLICES) + data[at:]
        elif kind == 3:
            data = data[:to] + data[at:to] + data[to:]
        elif kind == 4:
            data = data[:at] + rng.choice(SPLICES) + data[to:]
        else:
            data = data[: max(at, 1)] if rng.random() < 0.3 else swapped(data, rng)
        data = data or b"\n"
    return data


def swapped(data: bytes, rng: random.Random) -> bytes:
    """A number of the file put in place of another, or of what is far from any."""
    marks = [place for place in range(len(data)) if data[place : place + 1].isdigit()]
    if not marks:
        return data
    at = rng.choice(marks)
    to = at
    while data[to : to + 1].isdigit():
        to += 1
    return data[:at] + rng.choice(SPLICES[10:]) + data[to:]


@pytest.mark.parametrize(
    "name",
    [
        *FILES,
        "canonical.own.csv",
        "canonical.own.parquet",
        "canonical.parquet",
        "canonical.arrow",
        "canonical.gz",
        "servegen",
    ],
)
def test_a_damaged_file_is_read_or_refused(tmp_path: Path, name: str) -> None:
    data = FILES[name] if name in FILES else own_files(tmp_path)[name]
    suffix = ".tar" if name == "servegen" else ".jsonl" if data.startswith(b"{") else ".x"
    trace_format = name.partition(".")[0]
    rng = random.Random(f"{name} 20261128")
    outcomes = {"read": 0, "refused": 0}

    def tries(damaged: bytes, load: Callable[[str], object]) -> None:
        path = tmp_path / f"damaged{suffix}"
        path.write_bytes(damaged)
        try:
            load(str(path))
            outcomes["read"] += 1
        except L3EnvError:
            outcomes["refused"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tries(data, lambda path: catalog.resolve(path))
        assert outcomes["read"] == 1
        for number in range(MUTATIONS):
            damaged = mutated(data, rng)
            spec = f"?format={trace_format}" if number % 2 else ""
            tries(damaged, lambda path, spec=spec: catalog.resolve(path + spec))
    assert outcomes["refused"] > MUTATIONS // 20
