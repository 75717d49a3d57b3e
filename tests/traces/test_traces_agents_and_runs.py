"""Chats, agents' rounds, LLMServingSim, vLLM's benchmark and measured runs: small files, values worked by hand."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from l3env.errors import TraceError, TraceWarning
from l3env.requests.workload import Workload
from l3env.traces import bailian, catalog, kv_cache_tester, llmservingsim, mooncake, serving_runs, tracelab, vllm_bench

PROFILES = Path(__file__).resolve().parents[3] / "shared" / "profiles" / "serving"


def write(folder: Path, name: str, *rows: Any) -> Path:
    path = folder / name
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def prefixes(workload: Workload) -> list[list[int]]:
    return [workload.prefix_ids[a:b].tolist() for a, b in pairwise(workload.prefix_offsets)]


def found(path: Path) -> str:
    return catalog.find_format(path).name


# --------------------------------------------------------------------------------------------------- Qwen-Bailian


def chat(chat_id: int, parent: int, at_s: float, prompt: int, ids: list[int], **more: Any) -> dict[str, Any]:
    row = {"chat_id": chat_id, "parent_chat_id": parent, "timestamp": at_s, "input_length": prompt, "output_length": 5}
    return {**row, "type": "text", "turn": 1, "hash_ids": ids, **more}


def test_bailian_chats(tmp_path: Path) -> None:
    rows = [
        chat(10, -1, 61.114, 33, [1, 2, 3]),
        chat(12, 10, 66.314, 50, [1, 2, 4, 5]),
        chat(11, -1, 62.0, 16, [9]),
        chat(13, 12, 70.0, 64, [1, 2, 4, 6], output_length=0),
        chat(14, 13, 71.5, 64, [1, 2, 4, 6]),
        chat(15, 999, 80.0, 1, [7]),
    ]
    path = write(tmp_path, "qwen.jsonl", *rows)
    assert found(path) == "bailian-jsonl"
    assert not mooncake.matches(path)
    workload = bailian.load(path)
    assert workload.arrival_s.tolist() == [0.0, 0.886, 5.2, 10.386, 18.886]
    assert workload.parent_idx.tolist() == [-1, -1, 0, 2, -1]
    assert workload.think_s.tolist() == [0.0, 0.0, 5.2, 3.686 + 1.5, 0.0]
    assert workload.session_idx.tolist() == [0, 1, 0, 0, 2]
    assert workload.prefix_block_tokens == 16
    assert prefixes(workload)[2] == [1, 2, 4, 5]
    assert workload.source["rows_out_of_order"] == 1
    assert workload.source["skipped"] == {"zero output tokens": 1}


# ------------------------------------------------------------------------------------- Mooncake and kv-cache-tester


def test_mooncake_sessions(tmp_path: Path) -> None:
    rows = [
        {"session_id": "a", "timestamp": 100, "input_length": 600, "output_length": 5},
        {"session_id": "b", "timestamp": 200, "input_length": 700, "output_length": 5},
        {"session_id": "a", "delay": 500, "input_length": 800, "output_length": 5},
        {"session_id": "a", "delay": 250, "timestamp": 2000, "input_length": 900, "output_length": 5},
    ]
    workload = mooncake.load(write(tmp_path, "m.jsonl", *rows))
    assert workload.prompt_tokens.tolist() == [600, 700, 800, 900]
    assert workload.arrival_s.tolist() == [0.0, 0.1, 0.5, 1.9]
    assert workload.parent_idx.tolist() == [-1, -1, 0, 2]
    assert workload.think_s.tolist() == [0.0, 0.0, 0.5, 0.25]
    assert workload.session_idx.tolist() == [0, 1, 0, 0]
    with pytest.raises(TraceError, match="row 2, field timestamp: got None"):
        mooncake.load(write(tmp_path, "m.jsonl", rows[0], {"input_length": 1, "output_length": 1, "delay": None}))


def test_sessions_in_one_file(tmp_path: Path) -> None:
    """A line each, the ids of both the same numbers: apart where they are local, equal where they are global."""
    session = {"hash_id_scope": "local", "requests": [{"t": 0, "in": 130, "out": 5, "hash_ids": [1, 2, 3]}]}
    local = kv_cache_tester.load(write(tmp_path, "l.jsonl", session, session))
    assert found(tmp_path / "l.jsonl") == "kv-cache-tester"
    assert prefixes(local)[0] != prefixes(local)[1]
    assert local.session_idx.tolist() == [0, 1]
    shared = {**session, "hash_id_scope": "global"}
    both = kv_cache_tester.load(write(tmp_path, "g.json", json.dumps([shared, shared])))
    assert prefixes(both) == [[1, 2, 3], [1, 2, 3]]
    assert both.prefix_block_tokens == 64
    assert len(kv_cache_tester.load(tmp_path / "g.json", sessions=1)) == 1
    odd = {
        "hash_id_scope": "local",
        "requests": [{"t": 1, "in": 128, "out": 1, "hash_ids": ["x", 2**63]}, {"in": 64, "out": 1}],
    }
    workload = kv_cache_tester.load(write(tmp_path, "o.jsonl", odd, session))
    assert prefixes(workload) == [[0, 1], [], [3, 4, 5]]
    assert workload.parent_idx.tolist() == [-1, 0, -1]
    with pytest.raises(TraceError, match="field hash_id_scope: got 'local'; expected 'global', as in the other"):
        kv_cache_tester.load(write(tmp_path, "x.jsonl", session, shared))


def test_a_session_with_the_least_there_may_be(tmp_path: Path) -> None:
    path = write(tmp_path, "s.json", {"requests": [{"in": 100, "out": 3}, {"t": 5, "in": 200, "out": 3}]})
    assert found(path) == "kv-cache-tester"
    workload = kv_cache_tester.load(path)
    assert workload.think_s.tolist() == [0.0, 5.0]
    assert workload.prefix_ids.size == 0


def test_requests_of_a_session_out_of_order(tmp_path: Path) -> None:
    rows = [{"t": 9, "in": 3, "out": 1}, {"t": 2, "in": 1, "out": 1, "api_time": 1.0}, {"t": 4, "in": 2, "out": 1}]
    workload = kv_cache_tester.load(write(tmp_path, "s.json", {"hash_id_scope": "local", "requests": rows}))
    assert workload.prompt_tokens.tolist() == [1, 2, 3]
    assert workload.think_s.tolist() == [0.0, 1.0, 5.0]
    assert workload.source["rows_out_of_order"] == 2


# ------------------------------------------------------------------------------------------------------- TraceLab


def event(kind: str, second: float) -> dict[str, str]:
    return {"event_type": kind, "timestamp": f"2026-06-01T05:40:{second:06.3f}Z"}


def round_of(
    session: str, index: int, prompt: int, prefix: int, *events: dict[str, str], **more: Any
) -> dict[str, Any]:
    row = {
        "provider": "claude",
        "session_id": session,
        "round_index": index,
        "round_id": "r",
        "model": "m",
        "tools": [],
    }
    counts = {"prefix_tokens": prefix, "newly_append_tokens": prompt - prefix, "output_tokens": 10}
    return {**row, "input_tokens_total": prompt, **counts, "timing_events": list(events), **more}


def test_tracelab_rounds(tmp_path: Path) -> None:
    rows = [
        round_of("s", 0, 1100, 900, event("user_message", 1), event("reasoning", 3), event("tool_call", 4.5)),
        round_of("t", 0, 512, 512, event("user_message", 2), event("text", 3)),
        round_of("s", 2, 2100, 1598, event("tool_result", 30), event("text", 31)),
        round_of("s", 1, 1600, 1098, event("tool_result", 6), event("tool_result", 8.25), event("text", 9)),
        round_of("s", 3, 9, 9, event("user_message", 40), event("text", 41), output_tokens=0),
        round_of("s", 4, 9, 9),
        round_of("s", 5, 2200, 2098, event("user_message", 50), event("text", 51), input_tokens_total=None),
    ]
    path = write(tmp_path, "rounds.jsonl", *rows)
    assert found(path) == "tracelab-jsonl"
    workload = tracelab.load(path)
    assert workload.prompt_tokens.tolist() == [1100, 512, 1600, 2100, 2200]
    assert workload.arrival_s.tolist() == [0.0, 1.0, 7.25, 29.0, 49.0]
    assert workload.parent_idx.tolist() == [-1, -1, 0, 2, 3]
    assert workload.think_s.tolist() == [0.0, 0.0, 8.25 - 4.5, 30 - 9, 50 - 31]
    assert workload.session_idx.tolist() == [0, 1, 0, 0, 0]
    assert workload.source["skipped"] == {"zero output tokens": 1, "no time recorded": 1}
    first, other, second, third, last = prefixes(workload)  # whole blocks of 512
    assert [len(ids) for ids in (first, other, second, third, last)] == [2, 1, 3, 4, 4]
    assert second[:2] == first
    assert third[:3] == second
    assert last == third
    assert not set(other) & set(first)
    assert len(tracelab.load(path, sessions=1)) == 4
    assert tracelab.load(path, prefix_block_tokens=100).prefix_block_tokens == 100
    with pytest.raises(TraceError, match=r"row 2, field begin: got 'never'; expected a number"):
        tracelab.load(write(tmp_path, "b.jsonl", rows[0], round_of("s", 1, 9, 0, {"timestamp": "never"})))


# -------------------------------------------------------------------------------------------------- LLMServingSim


def test_llmservingsim_requests_and_sessions(tmp_path: Path) -> None:
    tokens = list(range(40))
    rows = [
        {
            "input_toks": 33,
            "output_toks": 5,
            "arrival_time_ns": 4059740,
            "input_tok_ids": tokens[:33],
            "output_tok_ids": [1],
        },
        {
            "session_id": "session_0",
            "arrival_time_ns": 2_000_000_000,
            "sub_requests": [
                {"input_toks": 16, "output_toks": 1, "tool_duration_ns": 127348767, "input_tok_ids": tokens[:16]},
                {
                    "input_toks": 32,
                    "output_toks": 2,
                    "tool_duration_ns": 500,
                    "input_tok_ids": [*tokens[:16], *[7] * 16],
                },
                {"input_toks": 40, "output_toks": 3},
            ],
        },
        {"input_toks": 150, "output_toks": 80, "arrival_time_ns": 1_000_000_000},
    ]
    path = write(tmp_path, "w.jsonl", *rows)
    assert found(path) == "llmservingsim-jsonl"
    workload = llmservingsim.load(path)
    assert workload.prompt_tokens.tolist() == [33, 150, 16, 32, 40]
    assert workload.arrival_s.tolist() == [0.0, 0.99594026, 1.99594026, 1.99594026, 1.99594026]
    assert workload.parent_idx.tolist() == [-1, -1, -1, 2, 3]
    assert workload.think_s.tolist() == [0.0, 0.0, 0.0, 0.127348767, 5e-7]
    assert workload.session_idx.tolist() == [-1, -1, 0, 0, 0]
    assert prefixes(workload) == [[0, 1], [], [0], [0, 2], []]
    assert workload.prefix_block_tokens == 16
    with pytest.raises(TraceError, match=r"row 1, field input_tok_ids: got '2 ids'; expected input_toks = 3"):
        llmservingsim.load(write(tmp_path, "b.jsonl", {**rows[0], "input_toks": 3, "input_tok_ids": [1, 2]}))
    with pytest.raises(TraceError, match=r"row 1\.2, field output_toks: got None"):
        llmservingsim.load(
            write(
                tmp_path,
                "b.jsonl",
                {"arrival_time_ns": 0, "sub_requests": [{"input_toks": 1, "output_toks": 1}, {"input_toks": 1}]},
            )
        )


# -------------------------------------------------------------------------------------------------- vLLM's benchmark


def test_vllm_results(tmp_path: Path) -> None:
    result = {
        "date": "20261101-120000",
        "model_id": "m",
        "request_rate": 4,
        "input_lens": [10, 20, 30],
        "output_lens": [3, 0, 2],
        "start_times": [1000.5, 1000.75, 1001.25],
        "ttfts": [0.1, 0.0, 0.2],
        "itls": [[0.25, 0.5], [], [0.125]],
        "generated_texts": ["", "", ""],
        "errors": ["", "x", ""],
    }
    path = write(tmp_path, "r.json", json.dumps(result, indent=1))
    assert found(path) == "vllm-bench"
    workload = vllm_bench.load(path)
    assert workload.arrival_s.tolist() == [0.0, 0.75]
    assert workload.prompt_tokens.tolist() == [10, 30]
    assert workload.extra["ttft_s"].tolist() == [0.1, 0.2]
    assert workload.extra["e2e_s"].tolist() == [0.1 + 0.75, 0.2 + 0.125]
    assert workload.source["skipped"] == {"zero output tokens": 1}
    assert workload.source["run"]["model_id"] == "m"
    short = {name: value for name, value in result.items() if name not in ("start_times", "ttfts", "itls")}
    two = write(tmp_path, "two.jsonl", result, {**short, "input_lens": [4, 5, 6]})
    with pytest.raises(TraceError, match=r"2 results; expected \?run= with one of 1 to 2"):
        catalog.resolve(str(two))
    second = catalog.resolve(f"{two}?run=2")
    assert second is not None
    assert second.prompt_tokens.tolist() == [4, 6]
    assert second.arrival_s.tolist() == [0.0, 0.0]
    with pytest.raises(TraceError, match="field output_lens: got '1 values'; expected a list of 3"):
        vllm_bench.load(write(tmp_path, "r.json", {**result, "output_lens": [1]}))


def test_vllm_data_sets(tmp_path: Path) -> None:
    custom = write(tmp_path, "c.jsonl", {"prompt": "x" * 10, "output_tokens": 7}, {"prompt": [5, 6, 7]}, {"prompt": ""})
    assert found(custom) == "vllm-bench"
    workload = vllm_bench.load(custom)
    assert workload.prompt_tokens.tolist() == [2, 3]  # 10 / 4, half to even
    assert workload.output_tokens.tolist() == [7, 256]
    assert workload.source["skipped"] == {"zero prompt tokens": 1}
    assert vllm_bench.load(custom, chars_per_token=2.0, output_tokens=9).output_tokens.tolist() == [7, 9]
    turns = [{"from": "human", "value": "x" * 40}, {"from": "gpt", "value": "x" * 80}, {"from": "human", "value": "y"}]
    share = write(
        tmp_path, "s.json", json.dumps([{"id": "a", "conversations": turns}, {"id": "b", "conversations": turns[:1]}])
    )
    assert found(share) == "vllm-bench"
    workload = vllm_bench.load(share)
    assert (workload.prompt_tokens.tolist(), workload.output_tokens.tolist()) == ([10], [20])
    assert workload.source["skipped"] == {"fewer than two turns": 1}
    assert "2 texts estimated at 4 characters a token" in workload.source["lengths"]


# -------------------------------------------------------------------------------------------------- measured runs

RUNS = "run_id,request_id,client_arrival_s,queued_s,first_token_s,finish_s,prompt_tokens,output_tokens,ttft_ms\n"


def test_runs_are_chosen(tmp_path: Path) -> None:
    rows = (
        "a/x@1,0,0.0,0.0,0.5,1,10,5,500\na/x@1,1,0.25,0.4,0.7,2,20,5,\nb,0,3.0,0,1,1,30,6,100\nb,1,4.5,0,1,1,40,6,100\n"
    )
    path = write(tmp_path, "requests_x.csv", RUNS + rows)
    write(tmp_path, "runs_requests.csv", "run_id,gpu,complete\na/x@1,H100,0\nb,A100,1\n")
    assert found(path) == "serving-runs"
    with pytest.raises(TraceError, match=r"2 runs; expected \?run= with one of a/x@1, b"):
        serving_runs.load(path)
    with pytest.raises(TraceError, match="run=c: no such run; expected one of a/x@1, b"):
        serving_runs.load(path, run="c")
    whole = catalog.resolve(f"{path}?run=b")
    assert whole is not None
    assert whole.arrival_s.tolist() == [0.0, 1.5]
    assert whole.source["clock_began_at"] == 3.0
    assert whole.source["run"] == {"gpu": "A100", "complete": "1"}
    with pytest.warns(TraceWarning, match="run a/x@1 is not complete"):
        part = serving_runs.load(path, run="a/x@1")
    assert part.arrival_s.tolist() == [0.0, 0.25]  # the client's clock, not queued_s
    assert part.source["complete"] is False
    assert np.array_equal(part.extra["ttft_ms"], [500.0, np.nan], equal_nan=True)
    alone = write(
        tmp_path, "m.azure4.requests.csv", "id,arrival_s,sent_s,prompt_tokens,output_tokens\n0,0.1,0.2,374.000000,44\n"
    )
    assert found(alone) == "serving-runs"
    assert serving_runs.load(alone).name == "m.azure4"
    assert serving_runs.load(alone).extra["sent_s"].tolist() == [0.2]
    with pytest.raises(TraceError, match="the table is of one run"):
        serving_runs.load(alone, run="x")


def test_the_inputs_of_runs(tmp_path: Path) -> None:
    text = "workload,request_id,arrival_ms,prompt_tokens,output_tokens,block_ids\n"
    text += "w,0,46.926808,33,5,0 1\nw,1,146.926808,16,5,0\n"
    path = write(tmp_path, "w.csv", text)
    workload = catalog.resolve(str(path))
    assert workload is not None
    assert workload.arrival_s.tolist() == [0.0, 0.1]
    assert prefixes(workload) == [[0, 1], [0]]


@pytest.mark.parametrize(
    ("file", "run", "requests", "ttft_ms"),
    [
        ("requests_llmservingsim.csv.gz", "lss/RTX4090/Llama-3.1-8B", 300, 65456.6),
        ("vllm-0.22-h100/llama-3-8b.azure10.requests.csv.gz", None, 450, None),
    ],
)
def test_the_measured_runs(file: str, run: str | None, requests: int, ttft_ms: float | None) -> None:
    """Figures of the collection's README."""
    if not (PROFILES / file).exists():
        pytest.skip(f"no {file} in ../shared/profiles")
    workload = serving_runs.load(PROFILES / file, run=run)
    assert len(workload) == requests
    if ttft_ms is not None:
        assert workload.extra["ttft_ms"].mean() == pytest.approx(ttft_ms, abs=0.05)
        assert workload.source["run"]["gpu"] == "RTX 4090 24GB"
    else:
        ttft_s = workload.extra["first_token_s"] - workload.extra["sent_s"]
        assert ttft_s.mean() == pytest.approx(0.0631, abs=0.002)
        assert workload.arrival_s[0] == 0.0
