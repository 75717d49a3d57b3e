"""What tests of published policies share: a machine of one GPU, and what came of a few requests on it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pandas as pd

import l3env
from l3env import Slo, Workload, run_policy
from l3env.machine.tables import Tables, compile_tables
from l3env.policy.registry import PolicyLike, make_policy

BLOCK_TOKENS = 16


@cache
def gpu(pool_blocks: int | None = None) -> Tables:
    """One A100 with llama-3-8b; with KV memory of so many blocks where given."""
    system, model = l3env.load("system/gpu-1xa100"), l3env.load("model/llama-3-8b")
    tables = compile_tables(system, model, tp=1)
    if pool_blocks is not None:
        whole = int(tables.arrays.pool_blocks[0, 0])
        block_bytes = model.kv_bytes_per_token * BLOCK_TOKENS
        spare = system.gpu.hbm_bytes - (whole - pool_blocks - 0.5) * block_bytes
        tables = compile_tables(l3env.load("system/gpu-1xa100", gpu__hbm_bytes=spare), model, tp=1)
        assert tables.arrays.pool_blocks[0, 0] == pool_blocks
    return tables


def requests(*rows: tuple[float, int, int]) -> Workload:
    """(arrival, prompt, output) each."""
    arrivals, prompts, outputs = zip(*rows, strict=True)
    return Workload.build("a few", arrivals, prompts, outputs)


def lengths(*pairs: tuple[int, int], times: int = 60) -> Workload:
    """Earlier requests: each (prompt, output) so many times."""
    prompts, outputs = np.repeat(np.array(pairs), times, axis=0).T
    return Workload.build("earlier", np.arange(float(prompts.size)), prompts, outputs)


def serve(
    policy: PolicyLike,
    workload: Workload,
    tables: Tables | None = None,
    training: Workload | None = None,
    slo: Slo | None = None,
) -> pd.DataFrame:
    """The requests with what came of them; all have finished."""
    outcome = run_policy(tables or gpu(), workload, make_policy(policy), training=training, slo=slo)
    assert outcome.metrics["finished_count"] == len(workload)
    return outcome.requests


def order(served: pd.DataFrame) -> Sequence[int]:
    """Requests by when their first token came."""
    return served["first_token_s"].to_numpy().argsort(kind="stable").tolist()
