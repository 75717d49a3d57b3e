"""The data dictionary: every array the engine owns, its shape, its unit.

E environments (or replicas) side by side, N requests each, S = 2 sub-batches, L lanes, P pools, B tokens a block.

Requests that decode are not touched while they decode. Each sub-batch has a *decode clock* that counts its decode
steps; a decoding request remembers the clock at which it joined, so its KV length and emitted tokens follow by
subtraction, its finish is a fixed clock value (kept in a heap), and the blocks it will need are counted by the phase at
which its KV fills a block. A decode step costs work per lane and pool, none per request.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SUB_BATCHES = 2
NOWHERE = -1


class Status(IntEnum):
    """Where a request is in its life."""

    FUTURE = 0  # not arrived
    WAITING = 1  # in the queue, holds no KV (new, or preempted)
    PREFILL = 2  # admitted: blocks of its whole prompt are held
    DECODE = 3
    PAUSED = 4  # keeps its KV, does not decode
    FINISHED = 5
    REJECTED = 6  # can never fit in any pool


class Order(IntEnum):
    """Queue orders. LAST: requests whose TTFT deadline can no longer be met give way to all others."""

    FCFS = 0
    FCFS_HOPELESS_LAST = 1
    SHORTEST_PROMPT_HOPELESS_LAST = 2
    EARLIEST_DEADLINE_HOPELESS_LAST = 3
    NEWEST_FIRST = 4
    SHORTEST_PREDICTED_HOPELESS_LAST = 5  # prompt left to prefill + predicted output left


ORDERS_COUNT = len(Order)


class Eviction(IntEnum):
    """Which cached segment of a prompt goes first where a pool needs its room; see ``kernels.prefix.eviction_key``."""

    OFF = 0  # no prefix cache; as a knob: what the run was opened with
    LRU = 1  # the one whose last holder left longest ago
    LFU = 2  # the one held by the fewest requests since it came in, of these the least recent
    TREE = 3  # the deepest in its prompt, of these the least recent


class Victim(IntEnum):
    """Who is preempted when a pool runs over."""

    NEWEST_ADMITTED = 0
    MOST_PREDICTED_LEFT = 1
    LATEST_DEADLINE = 2


# heaps of an environment: one a queue order (built when first used), one a decode clock, one of dependent arrivals
FINISH_HEAP = ORDERS_COUNT
ARRIVAL_HEAP = ORDERS_COUNT + SUB_BATCHES
HEAPS_COUNT = ORDERS_COUNT + SUB_BATCHES + 1

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
        ("lane", np.int16),
        ("target_tokens", np.int32),  # KV to build by prefill: the prompt, after a preemption what was emitted too
        ("prefilled_tokens", np.int32),
        ("emitted_tokens", np.int32),  # as of ``joined_clock``
        ("kv_tokens", np.int32),  # as of ``joined_clock``
        ("chunk_tokens", np.int32),  # prefill planned for the next iteration
        ("promised_blocks", np.int32),  # predicted blocks at its end, for reserving admission
        # its prompt's segments, see ``prefix.py``; all 0 without ids
        ("ids_first", np.int32),  # place of its first id in ``ids``
        ("ids_count", np.int32),
        ("ids_tokens", np.int32),  # prompt tokens that lie in segments
        ("ids_blocks", np.int32),  # blocks of these segments
        ("held_count", np.int32),  # leading segments it holds a reference on
        ("held_blocks", np.int32),  # and their blocks
        ("hit_tokens", np.int32),  # prompt tokens found cached at its first admission
        ("moving_tokens", np.int32),  # cached KV that its first chunk waits for, times the links it crosses
        ("running_pos", np.int32),  # its place in ``running``
        ("joined_clock", np.int64),
        ("admitted_seq", np.int64),  # order of admission
        # what happened
        ("first_token_s", np.float64),  # NaN before
        ("last_token_s", np.float64),  # of the last token before ``joined_clock``
        ("finish_s", np.float64),  # NaN before
        ("preemptions_count", np.int32),
        ("slo_met", np.int8),
    ],
    align=True,
)

ENV_DTYPE = np.dtype(
    [
        ("table_idx", np.int64),
        ("requests_count", np.int64),
        ("clock_s", np.float64),
        ("next_root_idx", np.int64),  # first root request not arrived yet
        ("running_count", np.int64),
        ("prefill_count", np.int64),
        ("joining_count", np.int64),
        ("waiting_count", np.int64),
        ("heaps_built", np.int64),  # bit per queue order
        ("admitted_seq", np.int64),
        ("stop", np.int64),  # see kernels.run.Stop
        ("bad_request_idx", np.int64),  # which request an illegal plan is about
        ("eviction", np.int64),  # of cached prompt segments, see Eviction
        ("eviction_seq", np.int64),  # order in which segments became idle
        # what happened, summed from the start
        ("arrived_count", np.int64),
        ("finished_count", np.int64),
        ("rejected_count", np.int64),
        ("admitted_count", np.int64),
        ("preemptions_count", np.int64),
        ("slo_met_count", np.int64),
        ("iterations_count", np.int64),
        ("output_tokens", np.int64),
        ("prefill_tokens", np.int64),  # recomputed ones included
        ("recomputed_tokens", np.int64),
        ("decode_tokens", np.int64),
        ("prefix_ids_count", np.int64),  # of requests at their first admission: prefix ids,
        ("prefix_hits_count", np.int64),  # those of them found cached,
        ("prefix_prompt_tokens", np.int64),  # prompt tokens,
        ("prefix_hit_tokens", np.int64),  # those of them found cached
        ("prefix_evictions_count", np.int64),
        ("busy_s", np.float64),  # time with an iteration under way
        ("gpu_busy_s", np.float64),
        ("pim_busy_s", np.float64),
        ("transfer_s", np.float64),
        ("transfer_exposed_s", np.float64),
        ("energy_j", np.float64),  # dynamic; static power is added by time
        ("queue_s", np.float64),  # waiting requests integrated over time
        ("present_s", np.float64),  # waiting and running requests integrated over time
        ("waiting_tokens", np.int64),  # prompt tokens (after preemption, emitted ones too) in the queue now
        ("imbalance_s", np.float64),  # slowest lane minus mean lane, summed
        # the last iteration
        ("last_iteration_s", np.float64),
        ("last_gpu_0_s", np.float64),
        ("last_gpu_1_s", np.float64),
        ("last_attention_0_s", np.float64),  # of the GPU's: prefill and HBM attention; the rest is FC and head
        ("last_attention_1_s", np.float64),
        ("last_pim_0_s", np.float64),
        ("last_pim_1_s", np.float64),
        ("last_transfer_0_s", np.float64),
        ("last_transfer_1_s", np.float64),
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


# what a policy may set without writing a plan; held until its next decision
KNOB_DTYPE = np.dtype(
    [
        ("admit_max_count", np.int64),  # new requests an iteration
        ("prefill_budget_tokens", np.int64),  # prompt tokens an iteration, or a Budget
        ("budget_counts_decodes", np.int64),  # decoding requests use up the budget first (Sarathi-Serve)
        ("prefill_first", np.int64),  # an iteration with prefill stalls decoding (vLLM before chunking)
        ("hbm_share_frac", np.float64),  # share of resident KV tokens to hold in HBM, where PIM is there too
        ("order", np.int64),
        ("headroom_frac", np.float64),  # of each pool, kept free of new requests
        ("reserve_predicted", np.int64),  # admit only what fits with all predicted growth
        ("sub_batching", np.int64),  # SubBatching
        ("victim", np.int64),
        ("eviction", np.int64),  # of the prefix cache, where it is on; OFF: leave it
    ],
    align=True,
)


class Budget(IntEnum):
    """Prefill budgets that are not a number of tokens."""

    UNLIMITED = -1
    ALIGN = -2  # per sub-batch, as many as T_PIM hides
    ALIGN_WHEN_FULL = -3  # whole prompts while T_GPU < T_PIM; aligned once memory is full (L3)


# totals at the last observation: what "since the last step" is measured from
MARK_DTYPE = np.dtype(
    [
        ("clock_s", np.float64),
        ("busy_s", np.float64),
        ("gpu_busy_s", np.float64),
        ("pim_busy_s", np.float64),
        ("arrived_count", np.int64),
        ("finished_count", np.int64),
        ("slo_met_count", np.int64),
        ("preemptions_count", np.int64),
        ("output_tokens", np.int64),
        ("prefill_tokens", np.int64),
    ],
    align=True,
)

SUB_DTYPE = np.dtype(
    [
        ("clock", np.int64),  # decode steps so far
        ("last_step_s", np.float64),  # end of the last one
        ("members", np.int64),  # running requests
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
        ("used", np.int64),  # blocks held by running requests; one that several share counts once
        ("peak", np.int64),  # most blocks ever held
        ("promised", np.int64),  # predicted blocks of the residents at their ends
        ("cached", np.int64),  # blocks of idle segments: nobody holds them, and they go when their room is needed
        ("free_slot", np.int64),  # first of the free slots, linked; or NOWHERE
        ("offer_tokens", np.int64),  # what it holds of the prefix last asked about,
        ("offer_blocks", np.int64),  # and blocks of that which are in use
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

SEGMENT_DTYPE = np.dtype(
    [
        ("tokens", np.int32),
        ("blocks", np.int32),
        ("depth", np.int32),  # its place in the prompt
        ("end_tokens", np.int32),  # prompt tokens up to its end
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

LISTS_DTYPE = np.dtype(
    [
        ("running", np.int32),  # requests in PREFILL, DECODE or PAUSED, first running_count
        ("prefill", np.int32),  # requests in PREFILL in order of admission, first prefill_count
        ("joining", np.int32),  # requests flagged ``joining``, first joining_count
    ],
    align=True,
)


class SubBatching(IntEnum):
    """Two interleaved sub-batches on systems with PIM."""

    OFF = 0
    ON = 1
    ADAPTIVE = 2  # in each iteration, interleaved or as one batch, whichever is shorter


class State(NamedTuple):
    """All of the engine's memory. Copying these arrays copies the environments."""

    env: NDArray[np.void]  # (E,) ENV_DTYPE
    req: NDArray[np.void]  # (E, N) REQUEST_DTYPE
    truth: NDArray[np.int32]  # (E, N) output tokens; kernels and oracle-* policies only
    sub: NDArray[np.void]  # (E, S) SUB_DTYPE
    lane: NDArray[np.void]  # (E, S, L) LANE_DTYPE
    pool: NDArray[np.void]  # (E, P) POOL_DTYPE
    phase: NDArray[np.int32]  # (E, S, P, B) decoding requests by the clock phase at which they need a block
    heap: NDArray[np.void]  # (E, H, N) HEAP_DTYPE
    heap_len: NDArray[np.int64]  # (E, H + P); the last P are lengths of ``idle``
    lists: NDArray[np.void]  # (E, N) LISTS_DTYPE
    gap_hist: NDArray[np.int64]  # (E, GAP_BINS) tokens by gap, or (E, 1): not recorded
    log: NDArray[np.void]  # (E, rows) LOG_DTYPE, rows merged in pairs when full; (E, 1): not recorded
    # the prefix cache: M ids in all, U segments, K slots a pool; all of length 1 where there is none
    ids: NDArray[np.int32]  # (E, M) segments of the prompts, one request after the other
    segment: NDArray[np.void]  # (E, U) SEGMENT_DTYPE
    slot: NDArray[np.void]  # (E, P, K) SLOT_DTYPE: copies of segments
    idle: NDArray[np.void]  # (E, P, K) HEAP_DTYPE: slots nobody holds, the first to go on top


def allocate(
    envs_count: int, requests_count: int, lanes_count: int, pools_count: int, block_tokens: int, *, log_rows: int = 0
) -> State:
    """Zeroed arrays of the given sizes. ``log_rows`` > 0 records the time line and the gaps between tokens."""
    e, n, s = envs_count, requests_count, SUB_BATCHES
    return State(
        env=np.zeros(e, ENV_DTYPE),
        req=np.zeros((e, n), REQUEST_DTYPE),
        truth=np.zeros((e, n), np.int32),
        sub=np.zeros((e, s), SUB_DTYPE),
        lane=np.zeros((e, s, lanes_count), LANE_DTYPE),
        pool=np.zeros((e, pools_count), POOL_DTYPE),
        phase=np.zeros((e, s, pools_count, block_tokens), np.int32),
        heap=np.zeros((e, HEAPS_COUNT, n), HEAP_DTYPE),
        heap_len=np.zeros((e, HEAPS_COUNT + pools_count), np.int64),
        lists=np.zeros((e, n), LISTS_DTYPE),
        gap_hist=np.zeros((e, GAP_BINS if log_rows else 1), np.int64),
        log=np.zeros((e, max(log_rows, 1)), LOG_DTYPE),
        ids=np.zeros((e, 1), np.int32),
        segment=np.zeros((e, 1), SEGMENT_DTYPE),
        slot=np.zeros((e, pools_count, 1), SLOT_DTYPE),
        idle=np.zeros((e, pools_count, 1), HEAP_DTYPE),
    )


def with_prefix_room(state: State, ids_count: int, segments_count: int, slots_count: int) -> State:
    """The same state with room for at least so much in the prefix cache; what is there stays valid."""
    wanted = {"ids": ids_count, "segment": segments_count, "slot": slots_count, "idle": slots_count}
    grown = {}
    for name, count in wanted.items():
        array = getattr(state, name)
        if array.shape[-1] < count:
            grown[name] = np.zeros((*array.shape[:-1], count), array.dtype)
            grown[name][..., : array.shape[-1]] = array
    return state._replace(**grown)


def copy(state: State) -> State:
    """An independent copy, for snapshots and planning; as bytes, since NumPy copies padded records field by field."""
    return State._make(array.view(np.uint8).copy().view(array.dtype) for array in state)
