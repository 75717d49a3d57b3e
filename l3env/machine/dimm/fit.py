"""The linear model of a rank, fitted to the simulator: t = a sum(tokens) + b requests + c, per kind of attention.

The target is the mean over the phase of the refresh clock: a layer starts anywhere between two refreshes. Coefficients
minimise the sum of squared relative errors, none below zero. Transfers between host and rank PU are not in it
(``costs/link.py`` prices them), so Q is there at the start.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from l3env.machine.dimm.setup import RankSetup, best_mapping
from l3env.machine.dimm.simulate import simulate
from l3env.machine.dimm.stored import Kind

LENGTHS = (128, 192, 300, 512, 777, 1024, 1500, 2048, 3333, 4096, 8192, 10_000, 16_384, 32_768, 65_536, 131_072)
BATCHES = (1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512)
QUERIES = {"mha": (1, 8), "gqa-2": (2, 8), "gqa-4": (4, 8), "gqa-8": (8, 8), "gqa-16": (16, 8), "mqa-32": (32, 1)}
MOST_PHASES = 128
PERIODS = 12  # refresh periods that a target covers, over its phases


@dataclass(frozen=True)
class Grid:
    """Simulated batches: sums of tokens, numbers of jobs, and how long they took."""

    tokens: NDArray[np.float64]
    jobs: NDArray[np.float64]
    seconds: NDArray[np.float64]


def rank_setup(kind: str, bank_level: bool, macs_per_element: int) -> tuple[RankSetup, int]:
    """(setup, KV heads of a layer) of one kind of attention, with the best mapping."""
    queries, kv_heads = QUERIES[kind]
    chips_per_head, split = best_mapping(queries, kv_heads, macs_per_element) if bank_level else (8, 1)
    setup = RankSetup(
        queries_per_kv_head=queries,
        macs_per_element=macs_per_element,
        chips_per_head=chips_per_head,
        token_split=split,
        bank_level=bank_level,
        host_input=False,
    )
    return setup, kv_heads


def mean_seconds(setup: RankSetup, lengths: NDArray[np.int64]) -> float:
    """Time of a batch, averaged over when it starts within a refresh period."""
    period = setup.refresh_postponed * setup.dram.refi_cycles
    first = simulate(setup, lengths, refresh_due=setup.dram.refi_cycles)
    phases = min(max(math.ceil(PERIODS * period / first.cycles), 1), MOST_PHASES)
    if phases == 1:
        return first.seconds
    due = setup.dram.refi_cycles - (np.arange(phases) + 0.5) / phases * period
    return float(np.mean([simulate(setup, lengths, refresh_due=int(when)).seconds for when in due]))


def run_grid(setup: RankSetup, batches: Iterable[NDArray[np.int64]]) -> Grid:
    rows = [(lengths.sum(), len(lengths), mean_seconds(setup, lengths)) for lengths in batches]
    tokens, jobs, seconds = np.array(rows, dtype=float).T
    return Grid(tokens, jobs, seconds)


def equal_batches(lengths: Iterable[int] = LENGTHS, batches: Iterable[int] = BATCHES) -> list[NDArray[np.int64]]:
    sizes = list(batches)
    return [np.full(batch, length, dtype=np.int64) for length in lengths for batch in sizes]


def mixed_batches(count: int, seed: int = 0) -> list[NDArray[np.int64]]:
    """Batches of unequal lengths, log-uniform in 128-128k: not fitted, only predicted."""
    draw = np.random.default_rng(seed)
    sizes = np.exp(draw.uniform(0, math.log(512), count)).astype(int)
    return [np.exp(draw.uniform(math.log(128), math.log(131_072), size)).astype(np.int64) for size in sizes]


def fit(grid: Grid) -> tuple[float, float, float]:
    """(a, b, c) of least squared relative error, none negative."""
    columns = np.stack([grid.tokens, grid.jobs, np.ones_like(grid.jobs)], axis=1) / grid.seconds[:, None]
    scale = np.linalg.norm(columns, axis=0)
    solution, _ = nnls(columns / scale, np.ones(len(columns)))
    token_s, job_s, batch_s = solution / scale
    return float(token_s), float(job_s), float(batch_s)


def errors(grid: Grid, token_s: float, job_s: float, batch_s: float) -> NDArray[np.float64]:
    """Relative, absolute value."""
    return np.abs((token_s * grid.tokens + job_s * grid.jobs + batch_s) / grid.seconds - 1)


def fitted_kind(name: str, setup: RankSetup, grid: Grid, check: Grid) -> Kind:
    """The fit of one kind with its residuals, on the grid and on batches it has not seen."""
    token_s, job_s, batch_s = fit(grid)
    off, unseen = errors(grid, token_s, job_s, batch_s), errors(check, token_s, job_s, batch_s)
    return Kind(
        name=name,
        queries_per_kv_head=setup.queries_per_kv_head,
        passes_count=setup.passes,
        chips_per_head_count=setup.chips_per_head,
        token_split_count=setup.token_split,
        heads_per_job_count=setup.heads_per_job,
        token_s=token_s,
        job_s=job_s,
        batch_s=batch_s,
        points_count=len(off),
        error_median_frac=float(np.median(off)),
        error_p99_frac=float(np.quantile(off, 0.99)),
        error_worst_frac=float(off.max()),
        unseen_error_median_frac=float(np.median(unseen)),
        unseen_error_worst_frac=float(unseen.max()),
    )
