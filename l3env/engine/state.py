"""The data dictionary: every array the engine owns, its shape, its unit.

E environments (or replicas) side by side, N requests each, S = 2 sub-batches, L lanes, P pools, B tokens a block.

Requests that decode are not touched while they decode. Each sub-batch has a *decode clock* that counts its decode
tokens; a decoding request remembers the clock at which it joined, so its KV length and emitted tokens follow by
subtraction, its finish is a fixed clock value (kept in a heap), and the blocks it will need are counted by the phase at
which its KV fills a block. A decode step costs work per lane and pool, none per request.

Multi-token prediction: a step emits one token, or two where the guess of the second holds. How often it holds is drawn
for each request before the run, in eighths (its ``draft_class``: guesses that hold in every DRAFT_STEPS steps, evenly
spread); all requests of a class and sub-batch emit alike, so there is a clock for each class. D = DRAFT_CLASSES, or 1
where no model guesses.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from l3env.choices import (
    ORDERS_COUNT,
)

SUB_BATCHES = 2
NOWHERE = -1
ADDED = -2  # the parent of a request that was added while the environment ran


class Score(IntEnum):
    """Weights of a scorer, by their place in a row of ``State.scorer``; see ``kernels.scorer``. All zero: no scorer.

    Logarithms are natural; *pressure* is log(1 + work of all candidates over the nominal TTFT SLO).
    """

    ON = 0  # not 0: this environment is scheduled by scores
    # a candidate's score: a sum, then from 0 to 1
    WORK = 1  # x log of what is left of its prefill, in nominal TBT SLOs
    WORK_PRESSURE = 2  # x the same x pressure
    STRETCH = 3  # x log of how many times longer than alone the rest of its prefill may take
    STRETCH_PRESSURE = 4
    URGENCY = 5  # x the inverse of the stretch
    BEGUN = 6  # its prefill is under way
    PROGRESS = 7  # x the share of its prefill that is done
    RESUMED = 8  # it has emitted tokens before
    KV = 9  # x its KV over itself and free KV
    PREDICTED = 10  # x log of its predicted output left, over 256 tokens
    # it is lost where log(stretch) < LOST + LOST_PRESSURE x pressure + LOST_WORK x log(work)
    LOST = 11
    LOST_PRESSURE = 12
    LOST_WORK = 13
    GIVEN_UP = 14  # log of the tokens behind its SLO at which a decoding request is lost
    # the iteration
    LEAD = 15  # share of a decoding request's lead that one iteration may use up
    LENGTH = 16  # log of the iteration over what decoding requests can bear
    LENGTH_PRESSURE = 17
    CAP = 18  # log of the longest iteration in nominal TBT SLOs
    CAP_PRESSURE = 19
    DUE = 20  # log of the longest iteration over the time until the first deadline of a candidate
    LEAST_CHUNK = 21  # log of the least prompt tokens
    STALL = 22  # log of the lead in tokens from which on decoding waits for prefill
    STALL_PRESSURE = 23
    STALL_LENGTH = 24  # log of how much longer an iteration without decoding may be
    # lost requests start where there is no candidate and ROOM + ROOM_LEAD x lead + ROOM_FREE x free KV > 0
    ROOM = 25
    ROOM_LEAD = 26
    ROOM_FREE = 27
    # a decoding request's score, for when memory runs over
    KEEP = 28
    KEEP_LEAD = 29
    # log of the share of memory to keep free of new requests, and x log of the mean output over 256 tokens
    HEADROOM = 30
    HEADROOM_LONG = 31
    EVICT = 32  # log of the free share of memory below which a candidate's arrival costs a lost request its place
    FLOOR = 33  # set by the scorer: lower scores are held back


# heaps of an environment: one a queue order (built when first used), one of dependent arrivals, one of the waiting
# requests whose TTFT deadline can still be met, by the latest start that meets it, one of the decoding ones by the
# deadline of a token (see kernels/slo), one a decode clock
ARRIVAL_HEAP = ORDERS_COUNT
SLACK_HEAP = ARRIVAL_HEAP + 1
DUE_HEAP = SLACK_HEAP + 1
FINISH_HEAP = DUE_HEAP + 1  # + sub-batch + SUB_BATCHES x draft class

DRAFT_STEPS = 8
DRAFT_CLASSES = DRAFT_STEPS + 1

# prompts in the queue by octave of their length: bin b holds 2^b to 2^(b+1) - 1 tokens
PROMPT_BINS = 20

# weights of the newest observation in running means: of arrivals lately, of arrivals in the long run, of finished ones
SHORT_WEIGHT = 1 / 8
LONG_WEIGHT = 1 / 128
FINISHED_WEIGHT = 1 / 32

# no winning by starvation: who waits for the first token longer than both, and was not refused on arrival, costs as
# much as one that meets its SLO earns
GUARD_S = 60.0
GUARD_TTFT_SLOS = 10.0  # times the request's own TTFT SLO

NOMINAL_PROMPT_TOKENS = 1024  # of the request that stands for all where a machine is described

REQUEST_DTYPE = np.dtype(
    [
        # what is known at arrival
        ("arrival_s", np.float64),  # for dependent requests set when the parent finishes
        ("think_s", np.float64),
        ("ttft_slo_s", np.float64),
        ("tbt_slo_s", np.float64),
        ("ttft_alone_s", np.float64),  # TTFT on an empty system
        ("prompt_tokens", np.int32),
        ("predicted_tokens", np.int32),  # predicted output, set by the policy's predictor; 0 where it has none
        ("parent_idx", np.int32),
        ("first_child_idx", np.int32),
        ("next_sibling_idx", np.int32),
        # where it is
        ("status", np.int8),
        ("sub", np.int8),
        ("hopeless", np.int8),
        ("joining", np.int8),  # has not decoded since it joined its sub-batch
        ("draft_class", np.int8),  # guessed tokens that hold in DRAFT_STEPS steps
        ("lane", np.int16),
        ("target_tokens", np.int32),  # KV to build by prefill: the prompt, after a preemption what was emitted too
        ("prefilled_tokens", np.int32),
        ("emitted_tokens", np.int32),  # as of ``joined_clock``
        ("kv_tokens", np.int32),  # as of ``joined_clock``
        ("chunk_tokens", np.int32),  # prefill planned for the next iteration
        ("held_tokens", np.int32),  # KV tokens whose blocks are taken while it prefills
        ("promised_blocks", np.int32),  # predicted blocks at its end, for reserving admission
        ("running_pos", np.int32),  # its place in ``running``
        ("joined_clock", np.int64),
        ("admitted_seq", np.int64),  # order of admission
        # what happened
        ("first_token_s", np.float64),  # NaN before
        ("last_token_s", np.float64),  # of the last token before ``joined_clock``; of who left, when
        ("finish_s", np.float64),  # NaN before
        ("preemptions_count", np.int32),
        ("slo_met", np.int8),
        ("score", np.float64),  # -1 to 1, given by an agent; 0 before
        # for the forms of SLO that look at single tokens
        ("missed_deadline", np.int8),
        ("slo_rank", np.int32),  # its TBT SLO among all of the workload
        ("long_gaps_count", np.int32),  # gaps longer than its TBT SLO, as of when it last stopped decoding
        ("long_steps_before", np.int32),  # decode steps longer than that, before it joined
    ],
    align=True,
)

ENV_DTYPE = np.dtype(
    [
        ("table_idx", np.int64),
        ("requests_count", np.int64),
        ("clock_s", np.float64),
        ("seen_s", np.float64),  # what has happened by then is known to who schedules; the clock, unless ``ahead``
        ("frontend_s", np.float64),  # from an arrival until it can be seen; of the serving engine, as the next three
        ("ahead", np.int64),  # is an iteration scheduled while the one before it runs?
        ("by_chunk", np.int64),  # are a prompt's blocks taken chunk by chunk, or whole at admission?
        ("waits_after_preemption", np.int64),  # no admission in an iteration that preempts
        ("next_root_idx", np.int64),  # first root request not arrived yet
        ("running_count", np.int64),
        ("prefill_count", np.int64),
        ("joining_count", np.int64),
        ("waiting_count", np.int64),
        ("leaving_count", np.int64),  # finished in the last iteration, and not known to have
        ("preempted_before_count", np.int64),  # preemptions before this iteration
        ("heaps_built", np.int64),  # bit per queue order
        ("admitted_seq", np.int64),
        ("stop", np.int64),  # see kernels.run.Stop
        ("patience_s", np.float64),  # after which a client without a first token leaves; 0: never
        ("entered_count", np.int64),  # entries of ``entered``, and the first of them that may still leave
        ("patience_idx", np.int64),
        ("bad_request_idx", np.int64),  # which request an illegal plan is about
        ("drafting", np.int64),  # does this iteration's decode step verify a guessed token beside the next one?
        # what happened, summed from the start
        ("arrived_count", np.int64),
        ("finished_count", np.int64),
        ("rejected_count", np.int64),
        ("left_count", np.int64),  # clients that lost patience
        ("rejected_context_count", np.int64),  # of these, for being longer than the model serves
        ("admitted_count", np.int64),
        ("preemptions_count", np.int64),
        ("slo_met_count", np.int64),
        ("beyond_guard_count", np.int64),  # first tokens that came after more than the guard allows
        ("iterations_count", np.int64),
        ("output_tokens", np.int64),
        ("prefill_tokens", np.int64),  # recomputed ones included
        ("recomputed_tokens", np.int64),
        ("decode_tokens", np.int64),
        ("busy_s", np.float64),  # time with an iteration under way
        ("gpu_busy_s", np.float64),
        ("pim_busy_s", np.float64),
        ("transfer_s", np.float64),
        ("transfer_exposed_s", np.float64),
        ("energy_j", np.float64),  # dynamic; static power is added by time
        ("queue_s", np.float64),  # waiting requests integrated over time
        ("present_s", np.float64),  # waiting and running requests integrated over time
        ("waiting_tokens", np.int64),  # prompt tokens (after preemption, emitted ones too) in the queue now
        ("waiting_predicted_tokens", np.int64),
        ("waiting_arrival_s", np.float64),  # their arrival times, summed
        ("prefill_left_tokens", np.int64),  # of the requests in PREFILL
        # what a scheduler can estimate: running means over requests
        ("last_arrival_s", np.float64),
        ("gap_short_s", np.float64),  # between arrivals, and their squares
        ("gap_short_s2", np.float64),
        ("gap_long_s", np.float64),
        ("gap_long_s2", np.float64),
        ("prompt_mean_tokens", np.float64),  # of arrivals
        ("output_mean_tokens", np.float64),  # of finished requests
        ("slo_met_mean", np.float64),  # of finished and rejected requests
        ("slo_form", np.int64),
        # the SLO of a request with NOMINAL_PROMPT_TOKENS
        ("ttft_slo_s", np.float64),
        ("tbt_slo_s", np.float64),
        ("imbalance_s", np.float64),  # slowest lane minus mean lane, summed
        # the last iteration
        ("last_iteration_s", np.float64),
        ("last_interleaved", np.int64),  # two sub-batches, or one batch
        ("last_prefill_tokens", np.int64),
        ("last_decode_tokens", np.int64),
        ("log_count", np.int64),
        ("log_stride", np.int64),
    ],
    align=True,
)

LOG_DTYPE = np.dtype(
    [
        ("end_s", np.float64),
        ("duration_s", np.float64),
        ("iterations_count", np.int64),
        ("gpu_busy_s", np.float64),
        ("pim_busy_s", np.float64),
        ("decode_tokens", np.int64),
        ("prefill_tokens", np.int64),
        ("waiting_count", np.int64),
        ("running_count", np.int64),
        ("hbm_blocks", np.int64),
        ("pim_blocks", np.int64),
    ],
    align=True,
)

# gaps between tokens: logarithmic bins of 1 %, 1 us to 10^5 s
GAP_LOW_S = 1e-6
GAP_RATIO = 1.01
GAP_BINS = 2560


# what an observer keeps of an environment: totals at its last look, and by what it measures
MARK_DTYPE = np.dtype(
    [
        ("is_old", np.int64),  # 0: nothing below is set yet
        ("clock_s", np.float64),
        ("busy_s", np.float64),
        ("gpu_busy_s", np.float64),
        ("pim_busy_s", np.float64),
        ("preemptions_count", np.int64),
        ("output_tokens", np.int64),
        ("prefill_tokens", np.int64),
        ("prefill_token_s", np.float64),  # pace of a prefill of 2,048 tokens on the empty system
        ("capacity_tokens", np.float64),  # KV, all pools
        ("free_tokens", np.float64),  # and of them free now
        ("tbt_slo_s", np.float64),  # mean of the decoding requests, the nominal one where there are none
    ],
    align=True,
)

SUB_DTYPE = np.dtype(
    [
        ("drafts", np.int64),  # decode steps so far that verified a guess
        ("decoding", np.int64),  # decoding requests
        ("last_step_s", np.float64),  # end of the last one
        ("members", np.int64),  # running requests
        # its phase of the last iteration; of one batch, all is the first one's
        ("gpu_s", np.float64),
        ("attention_s", np.float64),  # of the GPU's: prefill and HBM attention; the rest is FC and head
        ("prefill_s", np.float64),  # of that, the prefill
        ("pim_s", np.float64),
        ("transfer_s", np.float64),
        ("read_s", np.float64),  # decode attention of the slowest PIM lane
    ],
    align=True,
)

# the decoding requests of one draft class in a sub-batch
GROUP_DTYPE = np.dtype(
    [
        ("clock", np.int64),  # the decode clock: tokens that such a request would have emitted since the start
        ("emitted", np.int64),  # tokens that each emitted in the last step
        # sums over the decoding ones, from which means and spreads follow at any clock
        ("age_sum", np.int64),  # emitted tokens minus clock of joining
        ("age_sum2", np.int64),
        ("kv_sum", np.int64),  # KV tokens minus clock of joining
        ("kv_sum2", np.int64),
        ("predicted_sum", np.int64),
        ("late_count", np.int64),  # their first token missed its deadline
        ("tbt_slo_s", np.float64),
        ("due_s", np.float64),  # when their next token would be due at the mean TBT of their SLO, as of clock 0
    ],
    align=True,
)

LANE_DTYPE = np.dtype(
    [
        ("count", np.float64),  # decoding requests
        ("kv", np.float64),  # their KV tokens
        ("pending", np.float64),  # KV tokens of running requests that do not decode: prefilling, paused
    ],
    align=True,
)

POOL_DTYPE = np.dtype(
    [
        ("used", np.int64),  # blocks held
        ("peak", np.int64),  # most blocks ever held
        ("promised", np.int64),  # predicted blocks of the residents at their ends
        ("leaving", np.int64),  # of ``used``: blocks of requests that are not known to have finished
    ],
    align=True,
)

HEAP_DTYPE = np.dtype(
    [
        ("key", np.float64),  # by request
        ("item", np.int32),  # by place: the request
        ("pos", np.int32),  # by request: its place, NOWHERE where absent
    ],
    align=True,
)

LISTS_DTYPE = np.dtype(
    [
        ("running", np.int32),  # requests in PREFILL, DECODE or PAUSED, first running_count
        ("prefill", np.int32),  # requests in PREFILL in order of admission, first prefill_count
        ("slo_s", np.float64),  # TBT SLOs of the workload in ascending order
        ("joining", np.int32),  # requests flagged ``joining``, first joining_count
        ("entered", np.int32),  # requests in order of arrival, where clients have patience, first entered_count
        ("leaving", np.int32),  # finished, and not known to have, first leaving_count; ``held_tokens`` are their blocks
    ],
    align=True,
)


# the prefix cache, see ``prefix.py``

PREFIX_ENV_DTYPE = np.dtype(
    [
        ("eviction", np.int64),  # of cached prompt segments, see Eviction
        ("idle_seq", np.int64),  # order in which segments became idle
        # of requests at their first admission, summed from the start
        ("ids_count", np.int64),  # prefix ids,
        ("hits_count", np.int64),  # those of them found cached,
        ("prompt_tokens", np.int64),
        ("hit_tokens", np.int64),  # those of them found cached
        ("evictions_count", np.int64),
        # how much of the arrays is in use
        ("segments_count", np.int64),
        ("ids_used", np.int64),
        ("slots_count", np.int64),  # in each pool
        ("digest", np.uint64),  # of the names of all segments in their order
        ("scored", np.int64),  # scores have changed since idle slots were last put in order
    ],
    align=True,
)

PREFIX_REQUEST_DTYPE = np.dtype(
    [
        ("ids_first", np.int32),  # place of its first id in ``ids``
        ("ids_count", np.int32),
        ("ids_tokens", np.int32),  # prompt tokens that lie in segments
        ("ids_blocks", np.int32),  # blocks of these segments
        ("held_count", np.int32),  # leading segments it holds a reference on
        ("hit_tokens", np.int32),  # prompt tokens found cached at its first admission
        ("moving_tokens", np.int32),  # cached KV that its first chunk waits for, times the links it crosses
    ],
    align=True,
)

PREFIX_POOL_DTYPE = np.dtype(
    [
        ("cached", np.int64),  # blocks of idle segments: nobody holds them, and they go when their room is needed
        ("free_slot", np.int64),  # first of the free slots, linked; or NOWHERE
        ("offer_tokens", np.int64),  # what it holds of the prefix last asked about,
        ("offer_blocks", np.int64),  # and blocks of that which are in use
    ],
    align=True,
)

SEGMENT_DTYPE = np.dtype(
    [
        ("tokens", np.int32),
        ("blocks", np.int32),
        ("depth", np.int32),  # its place in the prompt
        ("end_tokens", np.int32),  # prompt tokens up to its end
        ("name", np.uint64),  # hash of all ids up to it: equal segments of requests added later are told by it
        ("score", np.float64),  # -1 to 1, given by the policy; 0 before
        ("first_copy", np.int64),  # slot x P + pool of one of its copies, or NOWHERE
    ],
    align=True,
)

SLOT_DTYPE = np.dtype(
    [
        ("segment", np.int32),
        ("refs", np.int32),  # running requests that hold it; 0: idle
        ("uses", np.int32),  # requests that held it since it came in
        ("idle_seq", np.int64),  # when it last became idle
        ("next_copy", np.int64),  # the next copy of the same segment; of a free slot: the next free one
    ],
    align=True,
)


class PrefixArrays(NamedTuple):
    """The prefix cache's part of the state: M ids in all, U segments, K slots a pool."""

    env: NDArray[np.void]  # (E,) PREFIX_ENV_DTYPE
    req: NDArray[np.void]  # (E, N) PREFIX_REQUEST_DTYPE
    pool: NDArray[np.void]  # (E, P) PREFIX_POOL_DTYPE
    ids: NDArray[np.int32]  # (E, M) segments of the prompts, one request after the other
    segment: NDArray[np.void]  # (E, U) SEGMENT_DTYPE
    slot: NDArray[np.void]  # (E, P, K) SLOT_DTYPE: copies of segments
    idle: NDArray[np.void]  # (E, P, K) HEAP_DTYPE: slots nobody holds, the first to go on top
    idle_len: NDArray[np.int64]  # (E, P)


class State(NamedTuple):
    """All of the engine's memory. Copying these arrays copies the environments.

    ``lane_class`` is ``()`` where no model guesses, ``scorer`` where none schedules, ``prefix`` without a prefix cache:
    kernels are compiled for that type without any of the code that works on it (see ``kernels.drafts``,
    ``kernels.scorer`` and ``kernels.prefix``).
    """

    env: NDArray[np.void]  # (E,) ENV_DTYPE
    req: NDArray[np.void]  # (E, N) REQUEST_DTYPE
    truth: NDArray[np.int32]  # (E, N) output tokens; kernels and oracle-* policies only
    sub: NDArray[np.void]  # (E, S) SUB_DTYPE
    lane: NDArray[np.void]  # (E, S, L) LANE_DTYPE
    lane_class: NDArray[np.int32] | tuple[()]  # (E, S, L, D) decoding requests by draft class
    group: NDArray[np.void]  # (E, S, D) GROUP_DTYPE
    pool: NDArray[np.void]  # (E, P) POOL_DTYPE
    phase: NDArray[np.int32]  # (E, S, P, D, B) decoding requests by the clock phase at which they need a block
    heap: NDArray[np.void]  # (E, H, N) HEAP_DTYPE
    heap_len: NDArray[np.int64]  # (E, H)
    lists: NDArray[np.void]  # (E, N) LISTS_DTYPE
    prompts: NDArray[np.int32]  # (E, PROMPT_BINS) waiting requests by the octave of the prompt to prefill
    long_steps: NDArray[np.int32]  # (E, S, N) Fenwick tree of decode steps by the TBT SLOs they exceed
    gap_hist: NDArray[np.int64]  # (E, GAP_BINS) tokens by gap, or (E, 1): not recorded
    log: NDArray[np.void]  # (E, rows) LOG_DTYPE, rows merged in pairs when full; (E, 1): not recorded
    scorer: NDArray[np.float64] | tuple[()] = ()  # (E, len(Score)) weights
    prefix: PrefixArrays | tuple[()] = ()


def allocate(
    envs_count: int,
    requests_count: int,
    lanes_count: int,
    pools_count: int,
    block_tokens: int,
    *,
    drafts: bool = False,
    log_rows: int = 0,
) -> State:
    """Zeroed arrays of the given sizes. ``drafts``: a model guesses tokens. ``log_rows`` > 0 records the time line and
    the gaps between tokens."""
    e, n, s = envs_count, requests_count, SUB_BATCHES
    d = DRAFT_CLASSES if drafts else 1
    heaps_count = FINISH_HEAP + s * d
    return State(
        env=np.zeros(e, ENV_DTYPE),
        req=np.zeros((e, n), REQUEST_DTYPE),
        truth=np.zeros((e, n), np.int32),
        sub=np.zeros((e, s), SUB_DTYPE),
        lane=np.zeros((e, s, lanes_count), LANE_DTYPE),
        lane_class=np.zeros((e, s, lanes_count, d), np.int32) if drafts else (),
        group=np.zeros((e, s, d), GROUP_DTYPE),
        pool=np.zeros((e, pools_count), POOL_DTYPE),
        phase=np.zeros((e, s, pools_count, d, block_tokens), np.int32),
        heap=np.zeros((e, heaps_count, n), HEAP_DTYPE),
        heap_len=np.zeros((e, heaps_count), np.int64),
        lists=np.zeros((e, n), LISTS_DTYPE),
        prompts=np.zeros((e, PROMPT_BINS), np.int32),
        long_steps=np.zeros((e, s, n), np.int32),
        gap_hist=np.zeros((e, GAP_BINS if log_rows else 1), np.int64),
        log=np.zeros((e, max(log_rows, 1)), LOG_DTYPE),
    )


def with_prefix_room(state: State, ids_count: int, segments_count: int, slots_count: int) -> State:
    """The same state with room for at least so much in the prefix cache; what is there stays valid."""
    (e, n), p = state.req.shape, state.pool.shape[1]
    old = state.prefix
    if not isinstance(old, PrefixArrays):
        old = PrefixArrays(
            env=np.zeros(e, PREFIX_ENV_DTYPE),
            req=np.zeros((e, n), PREFIX_REQUEST_DTYPE),
            pool=np.zeros((e, p), PREFIX_POOL_DTYPE),
            ids=np.zeros((e, 0), np.int32),
            segment=np.zeros((e, 0), SEGMENT_DTYPE),
            slot=np.zeros((e, p, 0), SLOT_DTYPE),
            idle=np.zeros((e, p, 0), HEAP_DTYPE),
            idle_len=np.zeros((e, p), np.int64),
        )
    return state._replace(
        prefix=old._replace(
            ids=_grown(old.ids, ids_count),
            segment=_grown(old.segment, segments_count),
            slot=_grown(old.slot, slots_count),
            idle=_grown(old.idle, slots_count),
        )
    )


def _grown(array: NDArray[Any], count: int) -> NDArray[Any]:
    """The array with at least ``count`` entries along its last axis, new ones zero."""
    if array.shape[-1] >= count:
        return array
    grown = np.zeros((*array.shape[:-1], count), array.dtype)
    grown[..., : array.shape[-1]] = array
    return grown


def arrays(state: State) -> Iterator[NDArray[Any]]:
    """All arrays that a state has, those of the prefix cache included."""
    for part in (*state[:-1], *state.prefix):
        if not isinstance(part, tuple):
            yield part


def copy(state: State) -> State:
    """An independent copy, for snapshots and planning."""
    prefix = state.prefix
    if isinstance(prefix, PrefixArrays):
        prefix = PrefixArrays._make(map(_copy, prefix))
    return State._make((*map(_copy, state[:-1]), prefix))


def _copy(array: NDArray[Any] | tuple[()]) -> NDArray[Any] | tuple[()]:
    """As bytes, since NumPy copies padded records field by field."""
    return () if isinstance(array, tuple) else array.view(np.uint8).copy().view(array.dtype)


def row_bytes(*, drafts: bool = False) -> int:
    """Bytes that an environment takes for each request it can hold; ``drafts`` as in ``allocate``."""
    heaps_count = FINISH_HEAP + SUB_BATCHES * (DRAFT_CLASSES if drafts else 1)
    per_request = REQUEST_DTYPE.itemsize + LISTS_DTYPE.itemsize + np.dtype(np.int32).itemsize
    return int(per_request + heaps_count * HEAP_DTYPE.itemsize)
