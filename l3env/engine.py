"""Owns the arrays: loads workloads into environments and drives the kernels. Knows neither Gym nor policies."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from l3env import state as st
from l3env.errors import PlanError, WorkloadError
from l3env.kernels import look, plan, run
from l3env.kernels.plan import Fault
from l3env.kernels.run import Stop, Until
from l3env.prefix import segments
from l3env.tables import TableArrays, Tables, stack
from l3env.workload import Workload

FAULT_TEXT = {
    Fault.UNKNOWN_REQUEST: "there is no such request; expected an index from the view",
    Fault.NOT_RUNNING: "it is not running; expected a prefilling, decoding or paused request",
    Fault.NOT_DECODING: "it is not decoding",
    Fault.NOT_PAUSED: "it is not paused",
    Fault.NOT_WAITING: "it is not waiting; only waiting requests can be admitted",
    Fault.NOT_PREFILLING: "it is not prefilling; admit it first",
    Fault.BAD_SUB_BATCH: "sub-batch out of range; expected 0, 1 or -1 (the engine chooses)",
    Fault.BAD_POOL: "no such pool; expected 0 (HBM), a PIM pool, -1 (the engine chooses) or -2 (any PIM pool)",
    Fault.NO_ROOM: "no room: its prompt's blocks do not fit there after this step's growth",
    Fault.TOO_MANY_TOKENS: "prefill tokens out of range; expected 0 to what is left of its prompt",
}


THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _pool() -> ThreadPoolExecutor:
    """Kernels run without the interpreter's lock, so threads are enough."""
    return ThreadPoolExecutor(THREADS, thread_name_prefix="l3env")


@dataclass(frozen=True)
class Slo:
    """Service-level objective: TTFT and mean time between tokens, as multiples of a request's own uncontended ones.

    Uncontended: TTFT is one prefill of its whole prompt on the empty system; time between tokens is one decode step at
    the context of its prompt. Both follow from the prompt alone, so a scheduler may know them. Absolute limits
    (``ttft_s``, ``tbt_s``) replace the multiples where given.
    """

    ttft_scale: float = 5.0
    tbt_scale: float = 5.0
    ttft_s: float | None = None
    tbt_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft_scale", "tbt_scale", "ttft_s", "tbt_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise WorkloadError(f"SLO {name} = {value}; expected a number > 0")


class Engine:
    """E environments of up to N requests each, over one or more compiled (system, model) pairs.

    Args:
        tables: the pairs; environments name theirs by index at reset.
        num_envs: E.
        requests_capacity: N, the largest workload an environment will be given.
        record: keep the time line and the histogram of gaps between tokens (offline runs).
        prefix_cache: keep and share the KV of equal prompt beginnings (workloads with prefix ids); which goes first.
    """

    LOG_ROWS = 4096

    def __init__(
        self,
        tables: Tables | Sequence[Tables],
        num_envs: int,
        requests_capacity: int,
        *,
        record: bool = False,
        prefix_cache: st.Eviction = st.Eviction.OFF,
    ) -> None:
        self.pairs = [tables] if isinstance(tables, Tables) else list(tables)
        self.tables: TableArrays = stack(self.pairs)
        self.num_envs = num_envs
        blocks = {pair.block_tokens for pair in self.pairs}
        self.state = st.allocate(
            num_envs,
            requests_capacity,
            self.tables.lane_pool.shape[1],
            self.tables.pool_blocks.shape[1],
            max(blocks),
            log_rows=self.LOG_ROWS if record else 0,
        )
        self.prefix_cache = prefix_cache
        self.knobs = np.zeros(num_envs, st.KNOB_DTYPE)
        self._limits = np.zeros(num_envs)

    def pair(self, e: int) -> Tables:
        """The compiled pair environment ``e`` runs on."""
        return self.pairs[int(self.state.env["table_idx"][e])]

    def reset(
        self,
        e: int,
        workload: Workload,
        *,
        table_idx: int = 0,
        slo: Slo | None = None,
        predicted_tokens: NDArray[np.int64] | None = None,
    ) -> None:
        """Puts a workload into environment ``e``, clock at 0.

        Args:
            predicted_tokens: (N,) predicted output tokens for the policies that order or reserve by them.

        Raises:
            WorkloadError: more requests than the capacity, or prefix ids that do not fit their prompts.
        """
        capacity = self.state.req.shape[1]
        count = len(workload)
        if count > capacity:
            raise WorkloadError(f"{workload.name}: {count} requests; this engine was made for at most {capacity}")
        for array in self.state:
            array[e] = np.zeros((), array.dtype)
        self.state.heap["pos"][e] = st.NOWHERE
        req = self.state.req
        req["arrival_s"][e, :count] = workload.arrival_s
        req["think_s"][e, :count] = workload.think_s
        req["prompt_tokens"][e, :count] = workload.prompt_tokens
        req["parent_idx"][e, :count] = workload.parent_idx
        req["first_child_idx"][e] = st.NOWHERE
        req["next_sibling_idx"][e] = st.NOWHERE
        req["first_token_s"][e] = np.nan
        req["finish_s"][e] = np.nan
        if predicted_tokens is not None:
            req["predicted_tokens"][e, :count] = np.clip(predicted_tokens, 1, 2**30)
        self.state.truth[e, :count] = workload.output_tokens
        self._set_slo(e, table_idx, workload, slo or Slo())
        self.state.env["table_idx"][e] = table_idx
        self.state.env["requests_count"][e] = count
        if self.prefix_cache and workload.prefix_ids.size:
            self._open_prefix_cache(e, table_idx, workload)
        run.open_environment(self.tables, self.state, e)

    def _open_prefix_cache(self, e: int, table_idx: int, workload: Workload) -> None:
        found, block = segments(workload), self.pairs[table_idx].block_tokens
        count, blocks = len(workload), -(-found.tokens // block)
        # a pool holds a segment once, in a block at least
        slots = min(int(self.tables.pool_blocks[table_idx].max()), found.tokens.size)
        self.state = state = st.with_prefix_room(self.state, found.ids.size, found.tokens.size, slots)
        state.ids[e, : found.ids.size] = found.ids
        segment = state.segment[e, : found.tokens.size]
        segment["tokens"], segment["blocks"], segment["depth"] = found.tokens, blocks, found.depth
        segment["end_tokens"], segment["first_copy"] = found.end_tokens, st.NOWHERE
        state.slot["next_copy"][e] = np.append(np.arange(1, state.slot.shape[2]), st.NOWHERE)
        state.idle["pos"][e] = st.NOWHERE
        offsets = workload.prefix_offsets
        sums = np.concatenate([[0], np.cumsum(blocks[found.ids])])
        req = state.req[e, :count]
        req["ids_first"], req["ids_count"] = offsets[:-1], np.diff(offsets)
        req["ids_tokens"], req["ids_blocks"] = found.request_tokens, np.diff(sums[offsets])
        state.env["eviction"][e] = self.prefix_cache

    def _set_slo(self, e: int, table_idx: int, workload: Workload, slo: Slo) -> None:
        ttft_s, tbt_s = self.alone_latencies(workload.prompt_tokens, table_idx)
        req, count = self.state.req, len(workload)
        req["ttft_alone_s"][e, :count] = ttft_s
        req["ttft_slo_s"][e, :count] = slo.ttft_scale * ttft_s if slo.ttft_s is None else slo.ttft_s
        req["tbt_slo_s"][e, :count] = slo.tbt_scale * tbt_s if slo.tbt_s is None else slo.tbt_s

    def alone_latencies(
        self, prompt_tokens: NDArray[np.int64], table_idx: int = 0
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(TTFT, time between tokens) of each prompt on the empty system, seconds."""
        ttft_s, tbt_s = np.empty(prompt_tokens.size), np.empty(prompt_tokens.size)
        look.alone_latencies(self.tables, table_idx, prompt_tokens.astype(np.int64), ttft_s, tbt_s)
        return ttft_s, tbt_s

    def run(self, e: int, until: Until = Until.END, limit: float = 0.0) -> Stop:
        """Runs environment ``e`` under ``self.knobs[e]``; says why it came back."""
        self._limits[e] = limit
        run.run(self.tables, self.state, self.knobs, e, e + 1, int(until), self._limits)
        return Stop(int(self.state.env["stop"][e]))

    def run_all(self, until: Until, limits: NDArray[np.float64]) -> None:
        """Runs every environment under its knobs to its own limit, on all cores; ``stop`` says how each ended.

        The environments are shared out over threads; each is run by one, so results do not depend on their number.
        """

        def share(first: int, last: int) -> None:
            run.run(self.tables, self.state, self.knobs, first, last, int(until), limits)
            plan.await_work(self.tables, self.state, first, last)

        edges = np.linspace(0, self.num_envs, min(THREADS, self.num_envs) + 1).astype(int).tolist()
        if len(edges) == 2:
            share(0, self.num_envs)
        else:
            list(_pool().map(share, edges[:-1], edges[1:]))

    def await_work(self, first: int, last: int) -> None:
        """Environments first..last - 1 jump to the next moment with a request present, or to their ends."""
        plan.await_work(self.tables, self.state, first, last)

    def stop(self, e: int) -> Stop:
        """How environment ``e`` stands."""
        return Stop(int(self.state.env["stop"][e]))

    def step_plan(self, e: int, ops: NDArray[np.int64], *, prefill_all: bool, decode: bool, interleaved: bool) -> Stop:
        """Applies a plan's operations and runs one iteration.

        Raises:
            PlanError: the plan is not legal; names the request and what was expected.
        """
        fault = plan.step_plan(self.tables, self.state, e, ops, prefill_all, decode, interleaved)
        if fault != Fault.NONE:
            request = int(self.state.env["bad_request_idx"][e])
            raise PlanError(f"plan: request {request}: {FAULT_TEXT[Fault(fault)]}")
        return Stop(int(self.state.env["stop"][e]))
