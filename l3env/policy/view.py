"""View: what a policy may look at.

A policy never holds an engine array: a View gathers what it is asked for into fresh rows, of present requests only, and
true output lengths are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from l3env.choices import Order, Status
from l3env.engine.engine import Engine, Slo
from l3env.engine.kernels import look
from l3env.engine.rollout import Rollouts, present_idx
from l3env.machine.tables import Tables
from l3env.requests.workload import Workload

ROW_DTYPE = np.dtype(
    [
        ("idx", np.int64),
        ("status", np.int8),
        ("sub_batch", np.int8),
        ("pool", np.int64),  # -1 while waiting
        ("lane", np.int64),
        ("arrival_s", np.float64),
        ("ttft_deadline_s", np.float64),
        ("tbt_slo_s", np.float64),
        ("ttft_alone_s", np.float64),
        ("prompt_tokens", np.int64),
        ("prefill_left_tokens", np.int64),
        ("emitted_tokens", np.int64),
        ("kv_tokens", np.int64),
        ("predicted_tokens", np.int64),  # the policy's own prediction; 0 without a predictor
        ("first_token_s", np.float64),
        ("preemptions_count", np.int64),
        ("admitted_seq", np.int64),
    ],
    align=True,
)


FINISHED_DTYPE = np.dtype(
    [("idx", np.int64), ("arrival_s", np.float64), ("prompt_tokens", np.int64), ("output_tokens", np.int64)]
)


@dataclass(frozen=True)
class PoolView:
    """A memory pool: 0 is HBM, the others are the PIM side's."""

    capacity_blocks: NDArray[np.int64]  # (P,)
    used_blocks: NDArray[np.int64]  # (P,)
    block_tokens: int

    @property
    def free_tokens(self) -> NDArray[np.int64]:
        """(P,) tokens that still fit."""
        return (self.capacity_blocks - self.used_blocks) * self.block_tokens


def _watched(view: View) -> tuple[Engine, int]:
    """The engine behind a view and the environment in it: for observers, which show no truth; never for policies."""
    return view._engine, view._e


class View:
    """What a real scheduler could know, at one decision. Made fresh each time; arrays handed out are copies."""

    def __init__(self, engine: Engine, e: int) -> None:
        self._engine, self._e = engine, e
        self._env = engine.state.env[e]

    @property
    def system(self) -> Tables:
        """The machine: specs, capacities, tensor-parallel degree."""
        return self._engine.pair(self._e)

    @property
    def now_s(self) -> float:
        """Simulated time."""
        return float(self._env["clock_s"])

    @property
    def waiting_count(self) -> int:
        """Requests that have arrived and hold no memory."""
        return int(self._env["waiting_count"])

    @property
    def running_count(self) -> int:
        """Requests that hold memory: prefilling, decoding, paused."""
        return int(self._env["running_count"])

    @property
    def arrived_count(self) -> int:
        """Requests that have arrived so far."""
        return int(self._env["arrived_count"])

    @property
    def finished_count(self) -> int:
        """Requests that have got all of their tokens."""
        return int(self._env["finished_count"])

    def waiting(self, limit: int = 64, order: Order = Order.FCFS) -> NDArray[np.void]:
        """The first ``limit`` waiting requests of an order as ROW_DTYPE rows."""
        found = np.empty(min(limit, self.waiting_count), np.int64)
        frontier = np.empty(found.size + 2, np.int64)
        count = look.peek_queue(self._engine.tables, self._engine.state, self._e, int(order), found, frontier)
        return self._rows(found[:count])

    @cached_property
    def running(self) -> NDArray[np.void]:
        """All running requests (prefilling, decoding, paused) as ROW_DTYPE rows."""
        return self._rows(self._engine.state.lists["running"][self._e, : self.running_count].astype(np.int64))

    @cached_property
    def prefilling(self) -> NDArray[np.void]:
        """The prefilling ones in order of admission."""
        count = int(self._env["prefill_count"])
        return self._rows(self._engine.state.lists["prefill"][self._e, :count].astype(np.int64))

    @property
    def present(self) -> NDArray[np.void]:
        """All requests that wait or run as ROW_DTYPE rows, by index."""
        return self._rows(present_idx(self._engine, self._e))

    def imagine(
        self,
        rollouts: Rollouts,
        scenario: int,
        output_tokens: NDArray[np.int64],
        future: Workload | None = None,
        slo: Slo | None = None,
    ) -> None:
        """Copies the present into a scenario of ``rollouts``, true output lengths and arrivals to come left out.

        Args:
            output_tokens: one for each of ``present``: imagined, and more than it has emitted.
            future: imagined arrivals.
        """
        idx = present_idx(self._engine, self._e)
        rollouts.imagine(self._engine, self._e, idx, scenario, output_tokens, future, slo or Slo())

    @property
    def finished(self) -> NDArray[np.void]:
        """All finished requests as FINISHED_DTYPE rows, by index: their lengths are known by now."""
        req = self._engine.state.req[self._e, : int(self._env["requests_count"])]
        idx = np.flatnonzero(req["status"] == Status.FINISHED)
        rows = np.empty(idx.size, FINISHED_DTYPE)
        rows["idx"] = idx
        for name, column in (("arrival_s", "arrival_s"), ("prompt_tokens",) * 2, ("output_tokens", "emitted_tokens")):
            rows[name] = req[column][idx]
        return rows

    @property
    def decoding(self) -> NDArray[np.void]:
        """Those of ``running`` that get tokens, as ROW_DTYPE rows."""
        return self.running[self.running["status"] == Status.DECODE]

    @property
    def paused(self) -> NDArray[np.void]:
        """Those of ``running`` that keep their KV and get none."""
        return self.running[self.running["status"] == Status.PAUSED]

    def _rows(self, idx: NDArray[np.int64]) -> NDArray[np.void]:
        rows = np.zeros(idx.size, ROW_DTYPE)
        look.gather(self._engine.tables, self._engine.state, self._e, idx, rows)
        return rows

    @property
    def pools(self) -> PoolView:
        """Capacity and use of the KV pools."""
        tables, table = self._engine.tables, int(self._env["table_idx"])
        count = int(tables.coef["pools_count"][table])
        return PoolView(
            tables.pool_blocks[table, :count].copy(),
            self._engine.state.pool["used"][self._e, :count].copy(),
            self.system.block_tokens,
        )

    @property
    def last_iteration(self) -> dict[str, float]:
        """What was measured of the last iteration: duration, device times per phase (GPU attention apart), tokens."""
        phases, names = self._engine.state.sub[self._e], ("gpu", "attention", "pim", "transfer")
        found = {f"{name}_{i}_s": float(phases[f"{name}_s"][i]) for name in names for i in (0, 1)}
        found |= {name: float(self._env[f"last_{name}"]) for name in ("prefill_tokens", "decode_tokens")}
        return {"iteration_s": float(self._env["last_iteration_s"])} | found

    @property
    def totals(self) -> dict[str, float]:
        """Sums since the start: busy times, tokens, preemptions."""
        names = ("busy_s", "gpu_busy_s", "pim_busy_s", "output_tokens", "prefill_tokens", "preemptions_count")
        return {name: float(self._env[name]) for name in names}
