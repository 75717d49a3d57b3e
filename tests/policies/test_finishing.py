"""Whatever the engine accepts, every policy finishes: requests about as large as a pool, growth over its end, little
memory beside them."""

from __future__ import annotations

import numpy as np
import pytest

import l3env
from l3env import Workload
from l3env.machine.tables import Tables, compile_tables
from l3env.policy.registry import make_policy, policy_names
from l3env.runs.driver import run_policy
from tests.policies.served import gpu

SLOW = ("rmaxts", "requests-agent")  # they plan, or search; tried on fewer requests
EACH = [name for name in policy_names() if make_policy(name).decision_interval_s == 0]  # asked at every iteration
POLICIES = [name for name in policy_names() if name not in (*SLOW, *EACH)]
LONG_TOKENS = 201
BLOCK_TOKENS = 16


def small(system: str, **changes: float) -> Tables:
    """A machine whose pools hold a few thousand tokens of the smallest model."""
    model = l3env.load("model/llama-3-8b", max_model_len=1_000_000)
    return compile_tables(l3env.load(f"system/{system}", **changes), model, tp=1)


def machines() -> dict[str, Tables]:
    weights = 20e9  # llama-3-8b's 16 GB and what runs beside it
    return {
        "gpu": small("gpu-dgx-a100", gpu__hbm_bytes=weights),
        "l3, PIM larger": small("l3-dgx-a100", gpu__hbm_bytes=weights, pim__capacity_bytes=400e9),
        "l3, HBM larger": small("l3-dgx-a100", gpu__hbm_bytes=30e9, pim__capacity_bytes=24e9),
    }


def about(pool_tokens: int) -> list[tuple[int, int]]:
    """(prompt, output) of requests that fill a pool to its last token, by their prompt or by growing."""
    return [
        (pool_tokens, 1),
        (pool_tokens - 1, 2),
        (pool_tokens - 200, 201),
        (pool_tokens // 2, pool_tokens - pool_tokens // 2 + 1),
    ]


def crowd(tables: Tables) -> Workload:
    """Requests as large as each pool, one larger than all, and small ones in between."""
    sizes = sorted({int(blocks) * BLOCK_TOKENS for blocks in tables.arrays.pool_blocks[0] if blocks > 0})
    rows = [each for size in sizes[-2:] for each in about(size)]
    rows = [row for large in rows for row in (large, (300, 40), (50, 5))] + [(sizes[-1] + BLOCK_TOKENS, 1)]
    prompts, outputs = np.array(rows).T
    return Workload.build("about a pool", np.linspace(0.0, 2.0, len(rows)), prompts, outputs)


@pytest.fixture(scope="module")
def tried() -> dict[str, tuple[Tables, Workload]]:
    return {name: (tables, crowd(tables)) for name, tables in machines().items()}


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_finishes_whatever_the_engine_accepts(
    policy: str, tried: dict[str, tuple[Tables, Workload]]
) -> None:
    for tables, workload in tried.values():
        figures = run_policy(tables, workload, make_policy(policy), training=workload.head(4), record=False).metrics
        assert figures["rejected_count"] == 1
        assert figures["finished_count"] == len(workload) - 1


@pytest.mark.parametrize("policy", [name for name in EACH if name not in SLOW])
def test_policies_asked_at_every_iteration_finish_too(policy: str, tried: dict[str, tuple[Tables, Workload]]) -> None:
    """All on a pool of 640 tokens; on large ones those whose outputs are short."""
    little = gpu(40)
    cells = [(little, crowd(little))]
    cells += [(tables, w.select(np.flatnonzero(w.output_tokens <= LONG_TOKENS))) for tables, w in tried.values()]
    for tables, workload in cells:
        figures = run_policy(tables, workload, make_policy(policy), training=workload.head(4), record=False).metrics
        assert figures["rejected_count"] == 1
        assert figures["finished_count"] == len(workload) - 1


@pytest.mark.parametrize("policy", ["l3", "sarathi"])
def test_a_request_that_grows_over_a_pool_alone_goes_to_the_larger_one(
    policy: str, tried: dict[str, tuple[Tables, Workload]]
) -> None:
    """Nothing else waits, runs or comes when it is preempted."""
    for tables, _ in tried.values():
        sizes = sorted(int(blocks) * BLOCK_TOKENS for blocks in tables.arrays.pool_blocks[0])
        first, larger = max(sizes[0] - 20, 100), sizes[-1]
        one = Workload.build("grows", [0.0], [first], [larger - first + 1])
        assert run_policy(tables, one, make_policy(policy), record=False).metrics["finished_count"] == 1


@pytest.mark.parametrize("policy", SLOW)
def test_policies_that_search_finish_too(policy: str, tried: dict[str, tuple[Tables, Workload]]) -> None:
    tables, workload = tried["l3, HBM larger"]
    workload = workload.head(6)
    figures = run_policy(tables, workload, make_policy(policy), training=workload.head(4), record=False).metrics
    assert figures["finished_count"] == len(workload)


def test_a_request_says_why_it_was_rejected(tried: dict[str, tuple[Tables, Workload]]) -> None:
    tables, workload = tried["gpu"]
    requests = run_policy(tables, workload, make_policy("fcfs")).requests
    reasons = requests["rejected_because"].astype(str)
    assert reasons.tolist() == [""] * (len(workload) - 1) + ["memory"]
