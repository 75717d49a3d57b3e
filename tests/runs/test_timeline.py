"""Timelines, read back: lanes, bubbles, requests, against the figures of the same run when nobody watches."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from l3env import Workload, compile_pair, load_trace, make_policy, run_policy
from l3env.runs.driver import replica_shares
from l3env.runs.metrics import Outcome
from l3env.runs.timeline import DEVICES, GPU, PCIE, PIM, RANKSET, REQUESTS, record, write

CASES = [
    ("l3-dgx-a100", "gpt-175b", "l3-model"),  # two sub-batches, or one where shorter
    ("l3-dgx-a100", "gpt-175b", "l3"),  # plans
    ("l3-dgx-a100", "qwen-72b", "random"),  # knobs for a second at a time
    ("rank-pim-dgx-a100", "gpt-89b", "edf"),  # transfers block every rank
    ("hbm-pim-dgx-a100", "llama-2-7b", "hybrid-greedy"),  # no link to the PIM side
    ("gpu-dgx-a100", "qwen-72b", "sarathi"),
]
Span = tuple[int, int, str, dict[str, Any]]  # start and end in whole nanoseconds, category, arguments


def workload(count: int = 80) -> Workload:
    """A burst and a trickle, so that queues build up and the machine is idle between requests too."""
    rng = np.random.default_rng(3)
    arrival_s = np.sort(np.concatenate([rng.uniform(0, 2, count // 2), rng.uniform(0, 400, count - count // 2)]))
    return Workload.build("w", arrival_s, rng.integers(10, 3000, count), rng.integers(1, 150, count))


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def run(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Outcome, Outcome]:
    """The trace as read back from its file, its outcome, and the outcome of the same replica unwatched."""
    system, model, name = request.param
    tables, requests = compile_pair(system, model), workload()
    events, watched = record(tables, requests, make_policy(name), training=requests)
    path = tmp_path_factory.mktemp("timeline") / "trace.json"
    write(path, events, {"policy": name})
    part = requests.select(replica_shares(requests, tables.replicas_count)[0])
    events_read = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return events_read, watched, _one_replica(tables, part, name, requests)


def _one_replica(tables: Any, part: Workload, name: str, training: Workload) -> Outcome:
    import dataclasses

    return run_policy(dataclasses.replace(tables, replicas_count=1), part, make_policy(name), training=training)


def spans(events: list[dict[str, Any]]) -> dict[tuple[int, int], list[Span]]:
    lanes: dict[tuple[int, int], list[Span]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            start = round(event["ts"] * 1000)
            lanes[event["pid"], event["tid"]].append(
                (start, start + round(event["dur"] * 1000), event["cat"], event["args"])
            )
    return {lane: sorted(found, key=lambda span: span[:2]) for lane, found in lanes.items()}


def total_s(found: list[Span], *categories: str) -> float:
    return sum(end - start for start, end, category, _ in found if category in categories) * 1e-9


def test_watching_changes_nothing(run: Any) -> None:
    _, watched, plain = run
    for name, value in watched.metrics.items():
        assert value == plain.metrics[name] or (np.isnan(value) and np.isnan(plain.metrics[name])), name
    same = [column for column in plain.requests if column != "row"]
    pd.testing.assert_frame_equal(watched.requests[same], plain.requests[same], check_exact=True)
    pd.testing.assert_frame_equal(watched.timeline, plain.timeline, check_exact=True)


def test_spans_on_one_lane_never_overlap(run: Any) -> None:
    lanes = spans(run[0])
    assert (DEVICES, GPU) in lanes
    for lane, found in lanes.items():
        for (_, end, *_), (start, *_) in pairwise(found):
            assert start >= end, (lane, start, end)


def test_bubbles_and_busy_times_add_up_to_the_metrics(run: Any) -> None:
    events, outcome, _ = run
    lanes, figures = spans(events), outcome.metrics
    work = {GPU: ("prefill", "attention", "FC"), PIM: ("busy",)}
    for tid, name in ((GPU, "gpu"), (PIM, "pim")):
        found = lanes.get((DEVICES, tid), [])
        busy_s, bubble_s = total_s(found, *work[tid]), total_s(found, "bubble")
        iterating_s = outcome.timeline["duration_s"].sum()
        rounding_s = len(found) * 1e-9
        assert bubble_s == pytest.approx(figures[f"{name}_bubble_frac"] * iterating_s, abs=rounding_s)
        assert busy_s == pytest.approx(figures[f"{name}_busy_frac"] * figures["makespan_s"], abs=rounding_s)
        if found:
            assert busy_s + bubble_s == pytest.approx(iterating_s, abs=rounding_s)


def test_the_pim_side_is_what_its_ranksets_and_links_do(run: Any) -> None:
    """Nothing outside the PIM side's busy time; every rankset attends for as long as the others; transfers share."""
    lanes = spans(run[0])
    ranksets = {tid: found for (pid, tid), found in lanes.items() if pid == DEVICES and tid >= RANKSET}
    if not ranksets:
        assert (DEVICES, PIM) not in lanes
        return
    busy = [(start, end) for start, end, category, _ in lanes[DEVICES, PIM] if category == "busy"]
    starts = np.array([start for start, _ in busy])
    for found in (*ranksets.values(), lanes.get((DEVICES, PCIE), [])):
        for start, end, *_ in found:
            first, last = busy[int(np.searchsorted(starts, start + 1, side="right")) - 1]
            assert first - 1 <= start
            assert end <= last + 2
    attention_s = [total_s(found, "attention") for found in ranksets.values()]
    assert attention_s == pytest.approx([attention_s[0]] * len(ranksets), rel=1e-6)
    blocked_s = [total_s(found, "transfer") for found in ranksets.values()]
    moving_s = total_s(lanes.get((DEVICES, PCIE), []), "transfer")
    overlapped = len(ranksets) > 1
    assert sum(blocked_s) == pytest.approx(moving_s, rel=1e-3) if overlapped else blocked_s[0] == moving_s
    tail = max(end for start, end, *_ in ranksets[max(ranksets)])
    assert abs(tail - max(end for _, end in busy)) < 2e9


def test_requests_from_arrival_to_finish(run: Any) -> None:
    events, outcome, _ = run
    lanes = spans(events)
    for r, row in enumerate(outcome.requests.itertuples()):
        found = lanes.get((REQUESTS, r), [])
        if row.status != "finished":
            continue
        assert found[0][0] == pytest.approx(row.arrival_s * 1e9, abs=2)
        assert found[-1][1] == pytest.approx(row.finish_s * 1e9, abs=2)
        assert all(start == end for (_, end, *_), (start, *_) in pairwise(found))
        if row.preemptions_count == 0:
            waiting_s, prefill_s = total_s(found, "waiting"), total_s(found, "prefill")
            assert waiting_s + prefill_s == pytest.approx(row.ttft_s, abs=4e-9)
            assert total_s(found, "decode", "paused") == pytest.approx(row.e2e_s - row.ttft_s, abs=4e-9)


def test_flows_lead_from_the_request_through_its_prefills(run: Any) -> None:
    events, outcome, _ = run
    prefills = [span for span in spans(events)[DEVICES, GPU] if span[2] == "prefill"]
    starts = np.array([start for start, *_ in prefills])
    flows: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for event in events:
        if event["ph"] in "stf":
            flows[event["id"]].append((round(event["ts"] * 1000), event["ph"]))
    finished = np.flatnonzero(outcome.requests["status"] == "finished")
    assert set(finished) <= set(flows)
    for r in finished.tolist():
        kinds = "".join(kind for _, kind in flows[r] if kind != "t")
        assert kinds.startswith("s")
        assert kinds.count("s") == kinds.count("f")
        steps = [at for at, kind in flows[r] if kind == "t"]
        assert len(steps) >= 1
        for at in steps:
            start, end, *_ = prefills[int(np.searchsorted(starts, at + 1, side="right")) - 1]
            assert start <= at <= end


def test_counters_follow_the_queue(run: Any) -> None:
    events, outcome, _ = run
    waiting = [event["args"]["waiting"] for event in events if event["ph"] == "C" and event["name"] == "requests"]
    assert len(waiting) == outcome.metrics["iterations_count"]
    assert max(waiting) > 0 or outcome.metrics["queue_mean_count"] == 0
    lengths = outcome.timeline
    if (lengths["iterations_count"] == 1).all():
        assert waiting == lengths["waiting_count"].tolist()


def test_cli_timeline(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    out = tmp_path / "a" / "trace.json"
    args = ("--trace", "profile:azure-conv-2023?n=40", "--policy", "sarathi", "--out", str(out))
    assert "written" in run_cli("timeline", *args).stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["otherData"]["policy"] == "sarathi"
    assert len(load_trace("profile:azure-conv-2023?n=40")) == 40
    assert sum(event["ph"] == "f" for event in found["traceEvents"]) >= 40
    assert "expected 1 number" in run_cli("timeline", "--load", "1,2", ok=False).stderr
