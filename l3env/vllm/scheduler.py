"""vLLM's own scheduler with a policy of l3env in it.

The policy is asked at its decision points about vLLM's state and its answer is set where vLLM has a counterpart: token
budget, running requests, chunks, watermark, queue. What vLLM has none of (turns of prompts, stalls, plans) is a cap on
the tokens of single requests. Memory, prefix cache and outputs stay vLLM's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import vllm
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import Request, RequestStatus

from l3env.choices import Order, Victim
from l3env.errors import L3EnvError, PlanError
from l3env.knobs import UNLIMITED, Knobs
from l3env.policy.plan import Plan
from l3env.vllm.asked import Asked
from l3env.vllm.deciding import Step, by_budget, in_order, last_step_is_planned, of_plan, rest_of, sorted_out
from l3env.vllm.entries import NAME, Entry, entry_of
from l3env.vllm.honoured import check_knobs, check_start, notes
from l3env.vllm.mirror import Present
from l3env.vllm.queues import GatedQueue, KeyedQueue, queue_of
from l3env.vllm.settings import check_version, read_settings

logger = init_logger("vllm.l3env")


class PolicyScheduler(AsyncScheduler):
    """``vllm serve ... --scheduler-cls l3env.vllm.PolicyScheduler`` with the policy in ``L3ENV_POLICY``."""

    clock: Callable[[], float] = staticmethod(time.time)
    """Tells the time in seconds, as arrivals of requests are told."""
    need_mamba_block_aligned_split: bool
    max_num_scheduled_tokens: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_version(vllm.__version__)
        super().__init__(*args, **kwargs)
        config = self.vllm_config
        self._began_s = self.clock()
        self._pool = self.kv_cache_manager.block_pool
        self._blocks_count = self._pool.num_gpu_blocks - 1  # block 0 is null
        self._split_by_mamba = self.need_mamba_block_aligned_split
        self._most_tokens = min(self.max_num_scheduled_tokens, self.scheduler_config.max_num_batched_tokens)
        self._limit_name = "max_num_active_reqs" if hasattr(self, "max_num_active_reqs") else "max_num_running_reqs"
        self._most_running: int = getattr(self, self._limit_name)
        self._step: Step | None = None
        self._plan: Plan | None = None
        self._knobs: Knobs | None = None
        self._noted: set[str] = set()
        self._arrived = 0
        self._fresh: set[Request] = set()  # admitted, and without a first token so far as is known
        self._last_ran = False
        self._last_s = 0.0
        self._held_until_s, self._happened_count = -math.inf, 0
        check_start(
            priority=self.policy != SchedulingPolicy.FCFS,
            chunked=bool(self.scheduler_config.enable_chunked_prefill),
        )
        settings = read_settings(config.additional_config)
        served = str(config.model_config.model)
        self.asked = Asked(settings, served, self._blocks_count, self.block_size, self._tell)
        self.waiting = GatedQueue()
        first = self.asked.try_out()
        self._tell(f"policy {settings.policy} decides ({self.asked.about_machine})")
        if isinstance(first, Knobs):
            self._hold(first)

    def _tell(self, text: str) -> None:
        if text not in self._noted:
            self._noted.add(text)
            logger.info("l3env: %s", text)

    def _now_s(self) -> float:
        return self.clock() - self._began_s

    # what happens to requests

    def add_request(self, request: Request) -> None:
        """As vLLM's; the policy's predictor is asked about a new one."""
        if not hasattr(request, NAME) and request.request_id not in self.requests:
            self._arrived += 1
            entry = Entry(self._arrived, request.arrival_time - self._began_s, request.num_prompt_tokens)
            setattr(request, NAME, entry)
            self.asked.arrive(entry)
        super().add_request(request)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self.asked.counts.preempted += 1
        self._fresh.discard(request)
        return super()._preempt_request(request, *args, **kwargs)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        finished = request.status != RequestStatus.FINISHED_ABORTED
        self.asked.leave(entry_of(request), request.num_output_tokens if finished else None, self._now_s)
        self._fresh.discard(request)
        return super()._free_request(request, *args, **kwargs)

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; notes who has got a first token."""
        if not self._fresh:
            return super().update_from_output(*args, **kwargs)
        before = list(self._fresh)
        found = super().update_from_output(*args, **kwargs)
        for request in before:
            if request.num_output_tokens > 0:
                entry = entry_of(request)
                if math.isnan(entry.first_token_s):
                    entry.first_token_s = self._now_s()
                self._fresh.discard(request)
        return found

    # the step

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """vLLM's step under what the policy has decided."""
        now_s = self._now_s()
        if self.asked.watches:
            self._note_time(now_s)
        if now_s >= self._held_until_s or (
            self.asked.policy.decides_at_events and self.asked.counts.events != self._happened_count
        ):
            self._decide(now_s)
        if self.asked.scorer is not None:
            self._score(now_s)
        waiting = self.waiting
        if isinstance(waiting, KeyedQueue):
            waiting.notice_hopeless(now_s)
        before = set[str]() if self._plan is None else self._preempt(self._named(self._plan.preempt))
        before |= self._set_limits()
        count = len(self.running)
        waiting.gate = self._gate
        try:
            output = super().schedule(*args, **kwargs)
        finally:
            waiting.gate = None
            self._plan = None
            self.need_mamba_block_aligned_split = self._split_by_mamba
        if before and output.preempted_req_ids is not None:
            output.preempted_req_ids |= before
        self._note_admitted(self.running[count:])
        if self.asked.watches:
            self._note_tokens(output)
        return output

    def _mamba_block_aligned_split(self, request: Request, num_new_tokens: int, *args: Any, **kwargs: Any) -> int:
        """Asked for every request in both of vLLM's loops: where caps on tokens are applied."""
        if self._step is not None:
            return self._step.cap(request, num_new_tokens)
        return int(super()._mamba_block_aligned_split(request, num_new_tokens, *args, **kwargs))

    def _set_limits(self) -> set[str]:
        """Sets vLLM's limits for one step; returns who was preempted."""
        knobs, count = self._knobs or Knobs(), len(self.running)
        budget = knobs.prefill_budget_tokens
        plain = self._plan is None and not (knobs.prefill_in_order or knobs.prefill_first)
        self._step, admissions = None, min(knobs.admit_max_count, UNLIMITED)
        if plain and (budget < 0 or (knobs.budget_counts_decodes and count < budget)):
            self.max_num_scheduled_tokens = self._most_tokens if budget < 0 else min(budget, self._most_tokens)
        else:
            self._plan_step(knobs, count)
            assert self._step is not None
            admissions = self._step.admissions
        preempted: set[str] = set()
        if knobs.victim != Victim.NEWEST_ADMITTED and self._is_tight():
            preempted = self._make_room(knobs.victim)
            admissions = 0 if preempted else admissions
            count = len(self.running)
        if count == 0:
            admissions = max(admissions, 1)
        most = min(knobs.running_max_count if self._plan is None else UNLIMITED, self._most_running)
        setattr(self, self._limit_name, max(min(count + admissions, most), count))
        return preempted

    def _plan_step(self, knobs: Knobs, count: int) -> None:
        """Caps of single requests, and vLLM's budget so that everyone gets up to theirs."""
        begun, decoding = sorted_out(self.running)
        alone = count + len(self.waiting) <= 1
        left = knobs.prefill_budget_tokens if knobs.prefill_budget_tokens >= 0 else UNLIMITED
        if knobs.budget_counts_decodes:
            left = max(left - len(decoding), 0)
        most = min(knobs.admit_max_count, max(knobs.running_max_count - count, 0))
        if self._plan is not None:
            self._step = self._step_of(self._plan, begun)
        elif knobs.prefill_in_order:
            waiting = self._startable()
            self._step = in_order(
                begun, waiting, knobs, left, decoding_count=len(decoding), admissions=most if count else max(most, 1),
                alone=alone, floor=self.asked.floor,
            )  # fmt: skip
        else:
            self._step = by_budget(begun, knobs, left, alone=alone)
            self._step.admissions = most
        step = self._step
        if knobs.prefill_first and self._plan is None:
            step.stalls = any(step.caps.values()) or (step.admissions > 0 and next(self._startable(), None) is not None)
        self.need_mamba_block_aligned_split = True
        decodes = 0 if step.stalls else len(decoding)
        self.max_num_scheduled_tokens = min(step.tokens + decodes, self._most_tokens)

    def _startable(self) -> Iterator[Request]:
        """Waiting requests in order, as long as memory and gate let them in."""
        self.waiting.gate = None
        free = self._pool.get_num_free_blocks()
        for request in self.waiting:
            need = math.ceil(request.num_tokens / self.block_size)
            room = free - (self._headroom_blocks if self.running else 0)
            if not self._gate(request) or need > room:
                return
            free -= need
            yield request

    def _step_of(self, plan: Plan, begun: Sequence[Request]) -> Step:
        """A plan's admissions stand first in the queue."""
        admitted = self._named(plan.admit)
        if any(request.status == RequestStatus.RUNNING for request in admitted):
            raise PlanError("plan: a request to admit is not waiting")
        self.waiting.remove_requests(admitted)
        self.waiting = GatedQueue([*admitted, *self.waiting])
        tokens = None
        if plan.prefill is not None:
            names = self._named(plan.prefill)
            counts = plan.prefill.values()
            tokens = {request.request_id: int(count) for request, count in zip(names, counts, strict=True)}
        return of_plan(tokens, begun, admitted, plan.decode)

    # memory

    def _gate(self, request: Request) -> bool:
        """May a waiting request start, by its score and by what was promised to others?"""
        knobs = self._knobs
        if knobs is None or not self.running:
            return True
        if knobs.order == Order.BY_SCORE and entry_of(request).score < self.asked.floor:
            return False
        if not (knobs.reserve_predicted or self._own_headroom):
            return True
        free = self._pool.get_num_free_blocks()
        if self._own_headroom and math.ceil(request.num_tokens / self.block_size) + self._headroom_blocks > free:
            return False
        if not knobs.reserve_predicted:
            return True
        return sum(map(self._promised_blocks, (*self.running, request))) <= self._blocks_count

    def _promised_blocks(self, request: Request) -> int:
        """At its predicted end."""
        entry = entry_of(request)
        tokens = entry.prompt_tokens + max(entry.predicted_tokens, request.num_output_tokens + 1) - 1
        return math.ceil(tokens / self.block_size)

    def _is_tight(self) -> bool:
        """Could the coming step run out of blocks? Never a false no."""
        chunks = math.ceil(self.max_num_scheduled_tokens / self.block_size)
        return bool(self._pool.get_num_free_blocks() < 2 * len(self.running) + chunks)

    def _make_room(self, rule: Victim) -> set[str]:
        """Preempts by the rule until the coming step fits; returns who was preempted."""
        managers = self.kv_cache_manager.coordinator.single_type_managers
        if len(managers) != 1:
            return set()
        held = managers[0].req_to_blocks
        need = {request: self._growth(request, len(held.get(request.request_id, ()))) for request in self.running}
        begun, _ = sorted_out(self.running)
        left = self.max_num_scheduled_tokens - (len(self.running) - len(begun))
        for request in begun:
            chunk = min(rest_of(request), max(left, 0))
            if self._step is not None:
                chunk = self._step.cap(request, chunk)
            left -= chunk
            blocks = math.ceil((request.num_computed_tokens + chunk) / self.block_size)
            need[request] = max(blocks - len(held.get(request.request_id, ())), 0)
        free, total, victims = self._pool.get_num_free_blocks(), sum(need.values()), []
        candidates = sorted(self.running, key=lambda request: (-self._badness(request, rule), entry_of(request).seq))
        for request in candidates:
            if total <= free:
                break
            victims.append(request)
            free += len(held.get(request.request_id, ()))
            total -= need[request]
        return self._preempt(victims)

    def _growth(self, request: Request, held: int) -> int:
        """Blocks of one more token."""
        if last_step_is_planned(request):
            return 0
        return max(math.ceil((request.num_computed_tokens + 1) / self.block_size) - held, 0)

    def _badness(self, request: Request, rule: Victim) -> float:
        entry = entry_of(request)
        if last_step_is_planned(request):
            return -math.inf
        if rule == Victim.MOST_PREDICTED_LEFT:
            return entry.predicted_tokens - request.num_output_tokens - request.num_output_placeholders
        if rule == Victim.LATEST_DEADLINE:
            return entry.arrival_s + entry.ttft_slo_s
        return -entry.score

    def _preempt(self, victims: Iterable[Request]) -> set[str]:
        found = set()
        for request in victims:
            if request.status != RequestStatus.RUNNING:
                raise PlanError(f"preempt: request {entry_of(request).slot} is not running")
            self.running.remove(request)
            self._preempt_request(request, time.monotonic())
            found.add(request.request_id)
        return found

    # decisions

    def _present(self, now_s: float) -> Present:
        used = self._blocks_count - self._pool.get_num_free_blocks()
        return Present(now_s, list(self.waiting), self.running, used)

    def _named(self, slots: Iterable[int]) -> list[Request]:
        """Requests by their index in the view. Raises PlanError for one that is not present."""
        present = {entry_of(request).slot: request for request in (*self.waiting, *self.running)}
        try:
            return [present[int(slot)] for slot in slots]
        except KeyError as error:
            raise PlanError(f"request {error.args[0]} neither waits nor runs; expected an index of the view") from None

    def _decide(self, now_s: float) -> None:
        decision, scores = self.asked.decide(self._present(now_s))
        if scores is not None:
            requests = self._named(scores[0])
            for request, score in zip(requests, scores[1], strict=True):
                entry_of(request).score = float(score)
            self._rekey(requests)
        if isinstance(decision, Plan):
            self._plan = decision
            return
        self._hold(decision)
        self._held_until_s = now_s + self.asked.policy.decision_interval_s
        self._happened_count = self.asked.counts.events

    def _score(self, now_s: float) -> None:
        """A compiled scorer gives scores and knobs anew before each step."""
        present = self._present(now_s)
        knobs, lost = self.asked.score(present, self._knobs or Knobs())
        if lost:
            self._preempt(lost)
        self._rekey(present.waiting)
        self._hold(knobs)

    def _rekey(self, requests: Iterable[Request]) -> None:
        if isinstance(self.waiting, KeyedQueue) and self.waiting.order == Order.BY_SCORE:
            self.waiting.rekey(requests)

    def _hold(self, knobs: Knobs) -> None:
        """Sets what stays as it is until the next decision. Raises PlanError for what vLLM cannot do."""
        if knobs == self._knobs:
            return
        try:
            check_knobs(
                knobs,
                speculates=self.vllm_config.speculative_config is not None,
                splits_by_mamba=bool(self._split_by_mamba),
            )
        except L3EnvError as error:
            raise PlanError(f"policy {self.asked.policy.name!r}: {error}") from None
        for note in notes(knobs, self._most_tokens, self._most_running):
            self._tell(note)
        old, self._knobs = self._knobs, knobs
        if old is None or old.order != knobs.order:
            self.asked.needs_limits(knobs, (*self.waiting, *self.running))
            self.waiting = queue_of(knobs.order, list(self.waiting))
        elif old.victim != knobs.victim:
            self.asked.needs_limits(knobs, (*self.waiting, *self.running))
        self.scheduler_config.long_prefill_token_threshold = (
            knobs.chunk_max_tokens if knobs.chunk_max_tokens < self._most_tokens else 0
        )
        self._headroom_blocks = math.ceil(knobs.headroom_frac * self._blocks_count)
        self._own_headroom = not hasattr(self.kv_cache_manager, "watermark_blocks")
        if not self._own_headroom:
            self.kv_cache_manager.watermark_blocks = self._headroom_blocks

    # what is counted for the view

    def _note_admitted(self, admitted: Sequence[Request]) -> None:
        for request in admitted:
            self.asked.counts.admitted += 1
            entry_of(request).admitted_seq = self.asked.counts.admitted
            if math.isnan(entry_of(request).first_token_s):
                self._fresh.add(request)

    def _note_time(self, now_s: float) -> None:
        counts = self.asked.counts
        if self._last_ran:
            counts.last_s = now_s - self._last_s
            counts.busy_s += counts.last_s
        self._last_s = now_s

    def _note_tokens(self, output: SchedulerOutput) -> None:
        """Decodes are what is neither under way nor new: told by the tokens they were given."""
        counts, total = self.asked.counts, output.total_num_scheduled_tokens
        requests = self.requests
        decodes = sum(
            given == 1 and requests[name].num_computed_tokens > requests[name].num_prompt_tokens
            for name, given in output.num_scheduled_tokens.items()
        )
        self._last_ran = total > 0
        counts.last_prefill_tokens, counts.last_decode_tokens = total - decodes, decodes
        counts.prefill_tokens += total - decodes
        counts.decode_tokens += decodes
