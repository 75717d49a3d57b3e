"""What can be chosen, and where a request can be: the enumerations that settings, policies and kernels share."""

from __future__ import annotations

from enum import IntEnum


class Status(IntEnum):
    """Where a request is in its life."""

    FUTURE = 0  # not arrived
    WAITING = 1  # in the queue, holds no KV (new, or preempted)
    PREFILL = 2  # admitted: blocks of its whole prompt are held
    DECODE = 3
    PAUSED = 4  # keeps its KV, does not decode
    FINISHED = 5
    REJECTED = 6  # longer than the model serves, or than any pool holds
    LEFT = 7  # its client lost patience before the first token


class Order(IntEnum):
    """Queue orders. LAST: requests whose TTFT deadline can no longer be met give way to all others."""

    FCFS = 0
    FCFS_HOPELESS_LAST = 1
    SHORTEST_PROMPT_HOPELESS_LAST = 2
    EARLIEST_DEADLINE_HOPELESS_LAST = 3
    NEWEST_FIRST = 4
    SHORTEST_PREDICTED_HOPELESS_LAST = 5  # prompt left to prefill + predicted output left
    BY_SCORE = 6  # highest score first; those below 0 are held back while anything runs


ORDERS_COUNT = len(Order)


class Eviction(IntEnum):
    """Which cached segment of a prompt goes first where a pool needs its room; see ``kernels.prefix.eviction_key``."""

    OFF = 0  # no prefix cache; as a knob: what the run was opened with
    LRU = 1  # the one whose last holder left longest ago
    LFU = 2  # the one held by the fewest requests since it came in, of these the least recent
    TREE = 3  # the deepest in its prompt, of these the least recent
    SCORE = 4  # the lowest score, given by the policy; of equal ones the least recent


class Victim(IntEnum):
    """Who is preempted when a pool runs over."""

    NEWEST_ADMITTED = 0
    MOST_PREDICTED_LEFT = 1
    LATEST_DEADLINE = 2
    LOWEST_SCORE = 3


HBM_FIRST = 2.0  # as a share of KV in HBM, which no policy's knobs reach: PIM only where HBM is full


class SloForm(IntEnum):
    """What a request must keep besides its TTFT."""

    MEAN_TBT = 0  # the mean time between its tokens
    P99_GAP = 1  # 99 % of the gaps between its tokens, one by one
    TOKEN_DEADLINES = 2  # token k comes by arrival + TTFT SLO + k x TBT SLO


class Budget(IntEnum):
    """Prefill budgets that are not a number of tokens."""

    UNLIMITED = -1
    ALIGN = -2  # per sub-batch, as many as T_PIM hides
    ALIGN_WHEN_FULL = -3  # whole prompts while T_GPU < T_PIM; aligned once memory is full (L3)


class SubBatching(IntEnum):
    """Two interleaved sub-batches on systems with PIM."""

    OFF = 0
    ON = 1
    ADAPTIVE = 2  # in each iteration, interleaved or as one batch, whichever is shorter


class Side(IntEnum):
    """Whose memory a KV pool is, and whose processors attend there."""

    GPU = 0
    PIM = 1
    HOST = 2  # the host's processors


class PimForm(IntEnum):
    """How KV lies on the PIM side."""

    STORED = 0  # as the model stores it: with MLA the latent
    DECOMPRESSED = 1  # plain keys and values of a latent: 71 times the memory for DeepSeek-V3
