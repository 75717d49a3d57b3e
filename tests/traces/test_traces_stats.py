"""Statistics on tables small enough to do by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from l3env.requests.workload import Workload
from l3env.traces import stats


def test_by_hand() -> None:
    # gaps 1, 1, 4 s; three whole windows of 2 s hold 2, 1, 0 arrivals (the fourth is at the end)
    workload = Workload.build("w", [10, 11, 12, 16], [10, 20, 30, 40], [1, 1, 1, 5], session_idx=[0, 0, 3, -1])
    found = stats.describe(workload)
    assert found["requests_count"] == 4
    assert found["span_s"] == 6.0
    assert found["rate_per_s"] == pytest.approx(3 / 6)
    assert found["gap_cv"] == pytest.approx(np.sqrt(2.0) / 2.0)
    assert found["prompt_mean_tokens"] == 25.0
    assert found["prompt_sd_tokens"] == pytest.approx(np.sqrt(125.0))
    assert found["prompt_p50_tokens"] == 25.0
    assert found["prompt_p90_tokens"] == pytest.approx(37.0)
    assert found["output_mean_tokens"] == 2.0
    assert found["output_total_tokens"] == 8
    assert found["sessions_count"] == 2
    assert found["prefix_hit_frac"] is None
    assert stats.idc(workload.arrival_s, window_s=2.0) == pytest.approx((2 / 3) / 1.0)
    json.dumps(found, allow_nan=False)


def test_without_a_clock() -> None:
    found = stats.describe(Workload.build("w", [0, 0], [1, 2], [1, 2]))
    assert found["rate_per_s"] is None
    assert found["gap_cv"] is None
    assert found["idc_10s"] is None
    json.dumps(found, allow_nan=False)


def test_prefix_hits_are_leading_blocks_seen_before() -> None:
    rows = [[1, 2, 3], [1, 2, 4], [5, 2], [], [1, 2, 3, 9], [5, 2]]
    hits = 0 + 2 + 0 + 0 + 3 + 2  # [5, 2]: 5 is new, so 2 is no leading block
    workload = Workload.build(
        "w",
        np.arange(6),
        np.full(6, 64),
        np.ones(6),
        prefix_ids=[block for row in rows for block in row],
        prefix_offsets=np.cumsum([0, *map(len, rows)]),
        prefix_block_tokens=16,
    )
    assert stats.prefix_hit_frac(workload) == pytest.approx(hits / 14)


def test_prefix_hits_against_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 30, rng.integers(0, 6)).tolist() for _ in range(200)]
    seen: set[int] = set()
    hits = 0
    for row in rows:
        for block in row:
            if block not in seen:
                break
            hits += 1
        seen |= set(row)
    workload = Workload.build(
        "w",
        np.arange(200),
        np.full(200, 64),
        np.ones(200),
        prefix_ids=[block for row in rows for block in row],
        prefix_offsets=np.cumsum([0, *map(len, rows)]),
        prefix_block_tokens=16,
    )
    assert stats.prefix_hit_frac(workload) == pytest.approx(hits / sum(map(len, rows)))
