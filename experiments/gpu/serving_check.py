"""A simulated serving engine against a measured run of the real one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from l3env.errors import SpecError
from l3env.experiments.gpu.serving_run import Measured
from l3env.machine import specs
from l3env.machine.tables import Tables, compile_tables
from l3env.policies.vllm import Vllm
from l3env.runs.driver import run_policy
from l3env.runs.metrics import Outcome


def machine(
    system: str, model: str, engine: str | None, tp: int | None, kv_blocks: int | None, longest_tokens: int
) -> Tables:
    """The pair under a serving engine, that serves requests as long as those of the run.

    Raises SpecError for names and for more blocks than there can be.
    """
    spec = specs.named("system", system)
    if engine is not None:
        spec = replace(spec, engine=specs.named("engine", engine))
    served = specs.named("model", model)
    served = replace(served, max_model_len=max(served.served_tokens, longest_tokens))
    tables = compile_tables(spec, served, tp=tp)
    if kv_blocks is None:
        return tables
    if kv_blocks < 1:
        raise SpecError(f"KV blocks: {kv_blocks}; expected at least 1")
    blocks = tables.arrays.pool_blocks.copy()
    blocks[0, 0] = kv_blocks
    return replace(tables, arrays=tables.arrays._replace(pool_blocks=blocks))


def simulate(
    run: Measured,
    system: str,
    model: str,
    *,
    engine: str | None = None,
    tp: int | None = None,
    kv_blocks: int | None = None,
    budget_tokens: int | None = None,
    max_num_seqs: int | None = None,
) -> Outcome:
    """Serves the run's requests under the engine's own scheduling; limits that are not given are the engine's."""
    longest = int((run.workload.prompt_tokens + run.workload.output_tokens).max())
    tables = machine(system, model, engine, tp, kv_blocks, longest)
    limits = {"prefill_budget_tokens": budget_tokens, "running_max_count": max_num_seqs}
    policy = Vllm(**{name: value for name, value in limits.items() if value is not None})
    return run_policy(tables, run.workload, policy, record=False)


def figures(outcome: Outcome, run: Measured) -> dict[str, float]:
    """Ratios of ours over measured, and medians over requests of |ours / measured - 1|."""
    found: dict[str, float] = {"requests_count": len(run.workload)}
    for name, measured in (("ttft", run.ttft_s), ("tpot", run.tpot_s), ("e2e", run.e2e_s)):
        ours = outcome.requests[f"{name}_s"].to_numpy(dtype=float)
        both = np.isfinite(ours) & np.isfinite(measured)
        ours, measured = ours[both], measured[both]
        found[f"{name}_mean_ratio"] = float(ours.mean() / measured.mean())
        found[f"{name}_p50_ratio"] = _quantile_ratio(ours, measured, 0.5)
        found[f"{name}_p99_ratio"] = _quantile_ratio(ours, measured, 0.99)
        found[f"{name}_median_abs"] = float(np.median(np.abs(ours / measured - 1)))
    found["makespan_ratio"] = outcome.metrics["makespan_s"] / run.makespan_s
    for name in ("preemptions_count", "rejected_count"):
        found[name] = outcome.metrics[name]
    return found


def _quantile_ratio(ours: NDArray[np.float64], measured: NDArray[np.float64], quantile: float) -> float:
    return float(np.quantile(ours, quantile) / np.quantile(measured, quantile))
