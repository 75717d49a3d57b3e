"""Owns the arrays: loads workloads into environments and drives the kernels. Knows neither Gym nor policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l3env.choices import Eviction, SloForm, Status
from l3env.engine import state as st
from l3env.engine.kernels import look, plan, run
from l3env.engine.kernels import slo as limits
from l3env.engine.kernels.plan import Fault
from l3env.engine.kernels.run import Stop, Until
from l3env.engine.kernels.scores import set_scores
from l3env.engine.segments import Known, Segments, add_prefixes, open_cache, segments
from l3env.errors import PlanError, WorkloadError
from l3env.knobs import KNOB_DTYPE
from l3env.machine.arrays import TableArrays
from l3env.machine.tables import Tables, stack
from l3env.requests.workload import Workload
from l3env.threads import share_out

RUNNING = (Status.PREFILL, Status.DECODE, Status.PAUSED)

FAULT_TEXT = {
    Fault.UNKNOWN_REQUEST: "there is no such request; expected an index from the view",
    Fault.NOT_RUNNING: "it is not running; expected a prefilling, decoding or paused request",
    Fault.NOT_DECODING: "it is not decoding",
    Fault.NOT_PAUSED: "it is not paused",
    Fault.NOT_WAITING: "it is not waiting; only waiting requests can be admitted",
    Fault.NOT_PREFILLING: "it is not prefilling; admit it first",
    Fault.BAD_SUB_BATCH: "sub-batch out of range; expected 0, 1 or -1 (the engine chooses)",
    Fault.BAD_POOL: "no such pool; expected 0 (HBM), a PIM pool, -1 (the engine chooses), -2 (any PIM pool) "
    "or -3 (decompressed, where the model stores a latent)",
    Fault.NO_ROOM: "no room: its prompt's blocks do not fit there after this step's growth",
    Fault.TOO_MANY_TOKENS: "prefill tokens out of range; expected 0 to what is left of its prompt",
}


GOLDEN = (5**0.5 - 1) / 2  # its multiples fill the unit interval evenly

SLO_FORMS = {"mean-tbt": SloForm.MEAN_TBT, "p99-gap": SloForm.P99_GAP, "token-deadlines": SloForm.TOKEN_DEADLINES}


@dataclass(frozen=True)
class Slo:
    """Service-level objective: TTFT and time between tokens, as multiples of a request's own uncontended ones.

    Uncontended: TTFT is one prefill of its whole prompt on the empty system; time between tokens is one decode step at
    the context of its prompt. Both follow from the prompt alone, so a scheduler may know them. Absolute limits
    (``ttft_s``, ``tbt_s``) replace the multiples where given.

    What the limit on the time between tokens is about (``form``): "mean-tbt", a request's mean; "p99-gap", its 99th
    percentile (at most one gap in a hundred is longer); "token-deadlines", token k (the first is 0) is due at arrival +
    TTFT limit + k x the limit, so that time saved early may be spent later.
    """

    ttft_scale: float = 5.0
    tbt_scale: float = 5.0
    ttft_s: float | None = None
    tbt_s: float | None = None
    form: str = "mean-tbt"

    def __post_init__(self) -> None:
        if self.form not in SLO_FORMS:
            raise WorkloadError(f"SLO form = {self.form!r}; expected one of {', '.join(SLO_FORMS)}")
        for name in ("ttft_scale", "tbt_scale", "ttft_s", "tbt_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise WorkloadError(f"SLO {name} = {value}; expected a number > 0")


def draft_classes(acceptance_frac: NDArray[np.float64]) -> NDArray[np.int8]:
    """(N,) acceptance -> (N,) guesses that hold in DRAFT_STEPS steps: rounded up or down by an even sequence over the
    requests, so that the mean is kept and a run does not depend on chance."""
    if not ((acceptance_frac >= 0) & (acceptance_frac <= 1)).all():
        raise WorkloadError("acceptance_frac: expected numbers from 0 to 1")
    dither = (np.arange(acceptance_frac.size) * GOLDEN) % 1.0
    return np.floor(acceptance_frac * st.DRAFT_STEPS + dither).clip(0, st.DRAFT_STEPS).astype(np.int8)


def patience_of(given: float | None) -> float | None:
    """Seconds, or None. Raises WorkloadError for anything but a finite number > 0."""
    if given is not None and not 0 < given < np.inf:
        raise WorkloadError(f"patience_s = {given}; expected a number of seconds > 0, or None")
    return given


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
        prefix_cache: Eviction = Eviction.OFF,
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
            drafts=bool((self.tables.coef["drafts_count"] > 0).any()),
            log_rows=self.LOG_ROWS if record else 0,
        )
        self.prefix_cache = prefix_cache
        self._known = [Known() for _ in range(num_envs)]
        self.knobs = np.zeros(num_envs, KNOB_DTYPE)
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
        acceptance_frac: NDArray[np.float64] | None = None,
        patience_s: float | None = None,
    ) -> None:
        """Puts a workload into environment ``e``, clock at 0.

        Args:
            predicted_tokens: (N,) predicted output tokens for the policies that order or reserve by them.
            acceptance_frac: (N,) share of each request's guessed tokens that hold, where the model guesses; by default
                the model's for all.
            patience_s: after so many seconds without a first token a client leaves; None: never.

        Raises:
            WorkloadError: more requests than the capacity, a patience that is none, or prefix ids that do not fit their
                prompts.
        """
        capacity = self.state.req.shape[1]
        count = len(workload)
        if count > capacity:
            raise WorkloadError(f"{workload.name}: {count} requests; this engine was made for at most {capacity}")
        patience = patience_of(patience_s)
        found = self._segments(table_idx, workload)
        for array in st.arrays(self.state):
            array[e : e + 1].view(np.uint8)[...] = 0  # as bytes: records would be set field by field
        self.state.heap["pos"][e] = st.NOWHERE
        req = self.state.req
        # those of dependent requests are set when their parents end
        floor_s = workload.arrival_s if workload.recorded_floor else 0.0
        req["arrival_s"][e, :count] = np.where(workload.parent_idx < 0, workload.arrival_s, floor_s)
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
        self._set_drafts(e, count, table_idx, acceptance_frac)
        wanted = slo or Slo()
        self.set_limits(e, workload, wanted, table_idx=table_idx)
        self.state.env["slo_form"][e] = SLO_FORMS[wanted.form]
        if wanted.form == "p99-gap":
            self._rank_limits(e, count)
        self.state.env["table_idx"][e] = table_idx
        self._set_rules(e, table_idx)
        self.state.env["requests_count"][e] = count
        self.state.env["patience_s"][e] = 0.0 if patience is None else patience
        if found is not None:
            self._add_prefixes(e, np.arange(count), workload, found)
        run.open_environment(self.tables, self.state, e)

    def _set_drafts(self, e: int, count: int, table_idx: int, acceptance_frac: NDArray[np.float64] | None) -> None:
        """Writes how often guessed tokens hold, where the model guesses."""
        model = self.pairs[table_idx].model
        if model.draft_modules_count:
            chosen = np.full(count, model.draft_acceptance_frac) if acceptance_frac is None else acceptance_frac
            self.state.req["draft_class"][e, :count] = draft_classes(chosen)

    def _set_rules(self, e: int, table_idx: int) -> None:
        """Writes by which rules the serving engine of a pair schedules."""
        env, serving = self.state.env, self.pairs[table_idx].system.serving
        env["frontend_s"][e] = serving.frontend_s
        env["ahead"][e] = serving.schedules_ahead
        env["by_chunk"][e] = serving.blocks_by_chunk
        env["waits_after_preemption"][e] = serving.waits_after_preemption

    def _segments(self, table_idx: int, workload: Workload) -> Segments | None:
        """Those of a workload that the prefix cache is for. Raises WorkloadError where it cannot be."""
        if not (self.prefix_cache and workload.prefix_ids.size):
            return None
        if self.tables.coef["decompressed_pool"][table_idx]:
            raise WorkloadError(
                f"{workload.name}: a prefix cache where KV may lie in two forms in the same memory is not modelled; "
                "switch it off for a latent on the PIM side"
            )
        return segments(workload)

    def _add_prefixes(self, e: int, rows: NDArray[np.int64], workload: Workload, found: Segments) -> None:
        """The first requests with prefix ids open an environment's cache."""
        prefix = self.state.prefix
        if not (isinstance(prefix, st.PrefixArrays) and prefix.env["eviction"][e]):
            self.state = open_cache(self.state, e, self.prefix_cache)
        pair = self.pair(e)
        room = int(self.tables.pool_blocks[self.state.env["table_idx"][e]].max())
        self.state = add_prefixes(self.state, e, rows, workload, found, pair.block_tokens, room, self._known[e])

    def append(
        self,
        e: int,
        workload: Workload,
        *,
        slo: Slo | None = None,
        predicted_tokens: NDArray[np.int64] | None = None,
    ) -> NDArray[np.int64]:
        """Adds requests to environment ``e`` while it runs; one that was done has work again.

        Args:
            workload: root requests, arriving at any time; those from the past enter at once. With a prefix cache they
                share the segments of all requests so far.

        Returns:
            Indices of the new requests.

        Raises:
            WorkloadError: more requests than the capacity, a dependent one, clients with patience, who leave in order
                of arrival, or an SLO on the 99th percentile of gaps, which is counted by the limits of the workload
                that the environment was opened with.
        """
        env, req = self.state.env, self.state.req
        first, capacity = int(env["requests_count"][e]), self.state.req.shape[1]
        rows = np.arange(first, first + len(workload))
        if rows[-1] >= capacity:
            raise WorkloadError(
                f"{workload.name}: {rows.size} more requests; this engine was made for {capacity} in all"
            )
        if (workload.parent_idx != st.NOWHERE).any():
            raise WorkloadError(f"{workload.name}: a request depends on another; only root requests can be added")
        if env["patience_s"][e] > 0:
            raise WorkloadError(f"{workload.name}: requests cannot be added where clients have patience")
        if env["slo_form"][e] == SloForm.P99_GAP:
            raise WorkloadError(f"{workload.name}: requests cannot be added under an SLO of form p99-gap")
        found = self._segments(int(env["table_idx"][e]), workload)
        req["arrival_s"][e, rows] = workload.arrival_s
        req["prompt_tokens"][e, rows] = workload.prompt_tokens
        req["parent_idx"][e, rows] = st.ADDED
        if predicted_tokens is not None:
            req["predicted_tokens"][e, rows] = np.clip(predicted_tokens, 1, 2**30)
        self.state.truth[e, rows] = workload.output_tokens
        if self.pair(e).model.draft_modules_count:
            usual = np.full(rows.size, self.pair(e).model.draft_acceptance_frac)
            req["draft_class"][e, rows] = draft_classes(usual)
        self.set_limits(e, workload, slo or Slo(), first, table_idx=int(env["table_idx"][e]))
        if found is not None:
            self._add_prefixes(e, rows, workload, found)
        env["requests_count"][e] = first + rows.size
        env["stop"][e] = Stop.RUNNING
        run.expect(self.state, e, first, first + rows.size)
        return rows

    def score_requests(self, e: int, requests: NDArray[np.int64], scores: NDArray[np.float64]) -> None:
        """Gives present requests of environment ``e`` their scores. Raises PlanError for one that is not present."""
        known = (requests >= 0) & (requests < self.state.env["requests_count"][e])
        present = np.isin(self.state.req["status"][e, requests[known]], (Status.WAITING, *RUNNING))
        if not known.all() or not present.all():
            wrong = np.concatenate([requests[~known], requests[known][~present]])
            raise PlanError(f"scored: request {wrong[0]} neither waits nor runs")
        set_scores(self.state, e, e + 1, requests[None], scores[None])

    def score_with(self, e: int, weights: NDArray[np.float64]) -> None:
        """Environment ``e`` is scheduled by a scorer from here on, until it is reset.

        Args:
            weights: (len(Score),) as in ``Score``.
        """
        if weights.shape != (len(st.Score),) or not np.isfinite(weights).all():
            raise PlanError(f"scorer: weights of shape {weights.shape}; expected {len(st.Score)} finite numbers")
        if isinstance(self.state.scorer, tuple):
            self.state = self.state._replace(scorer=np.zeros((self.num_envs, len(st.Score))))
        assert isinstance(self.state.scorer, np.ndarray)
        self.state.scorer[e] = weights

    def wait(self, e: int, until_s: float) -> None:
        """Lets time pass in environment ``e`` without an iteration."""
        env = self.state.env
        idle_s = max(until_s - float(env["clock_s"][e]), 0.0)
        env["queue_s"][e] += idle_s * env["waiting_count"][e]
        env["present_s"][e] += idle_s * (env["waiting_count"][e] + env["running_count"][e])
        env["clock_s"][e] += idle_s

    def set_limits(self, e: int, workload: Workload, slo: Slo, first: int = 0, *, table_idx: int = 0) -> None:
        """Writes the uncontended TTFT and the SLO of the requests from slot ``first`` on, and of a nominal one."""
        req, env, rows = self.state.req, self.state.env, slice(first, first + len(workload))
        prompts = np.append(workload.prompt_tokens, st.NOMINAL_PROMPT_TOKENS)
        ttft_alone_s, tbt_alone_s = self.alone_latencies(prompts, table_idx)
        ttft_slo_s = np.full(prompts.size, slo.ttft_s) if slo.ttft_s is not None else slo.ttft_scale * ttft_alone_s
        tbt_slo_s = np.full(prompts.size, slo.tbt_s) if slo.tbt_s is not None else slo.tbt_scale * tbt_alone_s
        req["ttft_alone_s"][e, rows] = ttft_alone_s[:-1]
        req["ttft_slo_s"][e, rows], env["ttft_slo_s"][e] = ttft_slo_s[:-1], ttft_slo_s[-1]
        req["tbt_slo_s"][e, rows], env["tbt_slo_s"][e] = tbt_slo_s[:-1], tbt_slo_s[-1]

    def _rank_limits(self, e: int, count: int) -> None:
        """Where each limit on the time between tokens is among those of the workload."""
        req = self.state.req
        limits_s = req["tbt_slo_s"][e, :count]
        ranked = np.argsort(limits_s, kind="stable")
        self.state.lists["slo_s"][e, :count] = limits_s[ranked]
        req["slo_rank"][e, ranked] = np.arange(count)

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

        share_out(share, self.num_envs)

    def run_to_end(self) -> None:
        """Runs every environment under its knobs until nothing is left to do, each handed to the next free core."""
        limits = np.zeros(self.num_envs)

        def share(first: int, last: int) -> None:
            run.run(self.tables, self.state, self.knobs, first, last, int(Until.END), limits)

        share_out(share, self.num_envs, pieces=self.num_envs)

    def await_work(self, first: int, last: int) -> None:
        """Environments first..last - 1 jump to the next moment with a request present, or to their ends."""
        plan.await_work(self.tables, self.state, first, last)

    def beyond_guard_count(self) -> NDArray[np.int64]:
        """(E,) requests that waited for their first token longer than the guard allows, or do so still."""
        found = np.zeros(self.num_envs, np.int64)
        limits.count_beyond_guard(self.state, found)
        return found

    def stop(self, e: int) -> Stop:
        """How environment ``e`` stands."""
        return Stop(int(self.state.env["stop"][e]))

    def step_plan(
        self,
        e: int,
        ops: NDArray[np.int64],
        *,
        prefill_all: bool,
        decode: bool,
        interleaved: bool,
        multi_token: bool = True,
    ) -> Stop:
        """Applies a plan's operations and runs one iteration.

        Raises:
            PlanError: the plan is not legal; names the request and what was expected.
        """
        fault = plan.step_plan(self.tables, self.state, e, ops, prefill_all, decode, interleaved, multi_token)
        if fault != Fault.NONE:
            request = int(self.state.env["bad_request_idx"][e])
            raise PlanError(f"plan: request {request}: {FAULT_TEXT[Fault(fault)]}")
        return Stop(int(self.state.env["stop"][e]))
