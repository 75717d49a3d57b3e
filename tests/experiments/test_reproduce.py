"""The L3 paper's results: the parts that run in seconds, held to the paper's figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import l3env
from l3env import Workload
from l3env.errors import L3EnvError
from l3env.experiments.reproduce import common, fig12, fig13, roofline, run
from l3env.experiments.reproduce.common import DEFAULT, machine, measured, throughput


@pytest.mark.parametrize(
    ("rival", "model", "trace", "paper", "tolerance"),
    [
        ("gpu", "opt-66b", "dolphin-r1", 3.94, 0.2),
        ("hbm-pim", "opt-66b", "dolphin-r1", 5.15, 0.2),
        ("hbm-pim-ext", "opt-66b", "openthoughts", 3.45, 0.2),
        ("rank-pim", "qwen-72b", "dolphin-r1", 7.21, 0.2),
    ],
)
def test_best_case_speedups(rival: str, model: str, trace: str, paper: float, tolerance: float) -> None:
    ours, theirs = (measured(name, model, trace) for name in ("l3", rival))
    assert ours is not None
    assert theirs is not None
    assert throughput(ours) / throughput(theirs) == pytest.approx(paper, rel=tolerance)


@pytest.mark.parametrize("rival", ["gpu", "hbm-pim"])
def test_opt_is_out_of_memory_where_the_paper_has_it(rival: str) -> None:
    assert [trace for trace in common.TRACES if measured(rival, "opt-66b", trace) is None] == ["openr1", "openthoughts"]


def test_hbm_pim_is_below_gpu_only_on_opt_dolphin() -> None:
    gpu, pim = (measured(name, "opt-66b", "dolphin-r1") for name in ("gpu", "hbm-pim"))
    assert gpu is not None
    assert pim is not None
    assert throughput(pim) < throughput(gpu)


def test_batch_and_latency_of_gpt_175b() -> None:
    assert [row["ratio"] for row in fig12.rows()] == pytest.approx([1, 1], abs=0.2)


def test_scaling_capacity_and_bandwidth_together_pays_and_capacity_alone_does_not() -> None:
    base = fig13.output_tokens_per_s(1, 1, DEFAULT)
    assert fig13.output_tokens_per_s(8, 8, DEFAULT) / base == pytest.approx(8.23, rel=0.1)
    assert fig13.output_tokens_per_s(1, 8, DEFAULT) / base == pytest.approx(1.01, rel=0.15)


def test_roofline_is_the_smaller_line_and_agrees_with_the_simulator() -> None:
    """Equal requests, all present: the simulated throughput lies below the roofline, and near it."""
    tables = machine("l3", "gpt-175b")
    lines = roofline.Roofline(tables.model, tables.system, tables.tp, 9876.0)
    per_request = tables.model.kv_bytes_per_token * lines.context_tokens
    assert float(lines.batch(10 * per_request)) == pytest.approx(10)
    assert float(lines.attention_tokens_per_s(5 * per_request)) == pytest.approx(5)
    slow, fast = float(lines.tokens_per_s(10 * per_request, 5 * per_request)), lines.fc_tokens_per_s(np.array(10.0))
    assert slow == pytest.approx(5)
    assert float(lines.tokens_per_s(10 * per_request, 1e9 * per_request)) == pytest.approx(float(fast))
    workload = Workload.build("equal", np.zeros(120), np.full(120, 9000), np.full(120, 1600))
    context = roofline.mean_context_tokens(workload)
    assert context == 9000 + 800
    lines = roofline.Roofline(tables.model, tables.system, tables.tp, context)
    assert tables.system.pim is not None
    rate = tables.system.pim.internal_bytes_per_s * tables.system.pim.internal_utilisation_frac
    bound = float(lines.tokens_per_s(tables.pim_tokens * tables.model.kv_bytes_per_token, rate))
    policy = l3env.FixedKnobs("fill", l3env.Knobs(headroom_frac=0.1))
    reached = l3env.run_policy(tables, workload, policy).metrics["output_tokens_per_s"]
    assert 0.6 * bound < reached <= bound


def test_rows_are_json_and_drawn(tmp_path: Path) -> None:
    rows = run.rows_of("fig12", lambda done, total, what: None)
    assert json.loads(json.dumps(rows))[0].keys() == {"figure", "case", "quantity", "paper", "ours", "ratio", "note"}
    assert [path.name for path in run.draw(rows, tmp_path)] == ["fig12.png"]
    with pytest.raises(L3EnvError, match="unknown figure 'fig99'"):
        run.rows_of("fig99", lambda done, total, what: None)


def test_picture_of_the_roofline(tmp_path: Path) -> None:
    tables = machine("l3", "gpt-175b")
    lines = roofline.Roofline(tables.model, tables.system, tables.tp, 9876.0)
    path = roofline.draw(lines, roofline.points("gpt-175b"), "l3-dgx-a100", tmp_path / "r.png")
    assert path.read_bytes().startswith(b"\x89PNG")
