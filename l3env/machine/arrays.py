"""The numbers that kernels receive of a system and a model: their layout. ``tables`` fills them in."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DENSE_TOKENS = 8192  # FC times are tabulated for every count up to here,
STRIDE_TOKENS = 64  # then every 64 tokens, linear in between,
TABLE_TOKENS = 32768  # up to here; beyond, the last slope goes on (compute-bound: exact)
SLOPE_STEPS = 256  # strides behind that slope where times rise in steps (waves of tiles)
ROWS = ("fc", "head", "comm", "draft", "experts")  # what is tabulated by tokens, see ``TableArrays``
FC, HEAD, COMM, DRAFT, EXPERTS = range(len(ROWS))
HBM = 0  # the pool and the lane of KV in the GPUs' HBM,
FIRST_PIM = 1  # and the first ones of the PIM side; see ``Tables.pools`` for what each is

COEF_DTYPE = np.dtype(
    [
        ("lanes_count", np.int64),
        ("pools_count", np.int64),
        ("block_tokens", np.int64),
        ("served_tokens", np.int64),  # prompt and output of the longest request that is served
        ("has_pim", np.int64),  # is there a PIM side (pools 1..)?
        ("decompressed_lane", np.int64),  # lane of decompressed KV, the last one; 0: none
        ("decompressed_pool", np.int64),  # its pool, the last one; 0: none
        ("decompressed_share", np.float64),  # blocks of each other PIM pool that one of its blocks takes
        ("drafts_count", np.int64),  # tokens guessed a decode step (multi-token prediction); 0: none
        ("step_host_s", np.float64),  # what the serving engine's host needs for a step,
        ("step_host_request_s", np.float64),  # more for each request of it,
        ("step_host_eager_s", np.float64),  # and for launching one of more tokens than are captured in a graph
        ("captured_tokens", np.int64),
        ("sends", np.int64),  # is there an all-to-all that computing hides?
        ("dispatch_frac", np.float64),  # dispatch's share of it where it has phases of its own; 0: finely interleaved
        ("comm_sm_frac", np.float64),  # share of the multiprocessors that it takes while it runs
        ("fc_slope_s", np.float64),  # per token beyond TABLE_TOKENS
        ("head_slope_s", np.float64),
        ("comm_slope_s", np.float64),
        ("draft_slope_s", np.float64),
        ("experts_slope_s", np.float64),
        ("prefill_pair_s", np.float64),  # compute, per causal (query, key) pair
        ("prefill_kv_s", np.float64),  # memory, per KV token read
        ("prefill_query_s", np.float64),  # memory, per query token
        ("prefill_fixed_s", np.float64),  # per batch of chunks
        ("prefill_new_s", np.float64),  # compute, per new token
        ("prefill_tile_s", np.float64),  # and per started tile of new tokens,
        ("prefill_tile_tokens", np.float64),  # of so many: fewer have as many pairs
        ("prefill_history_tokens", np.float64),  # fewer new tokens cost as much on a history
        ("prefill_history_token_s", np.float64),  # per token of a chunk's history: plain KV from the latent again
        ("prefill_tail_s", np.float64),  # the longest tile of the longest chunk,
        ("prefill_tail_token_s", np.float64),  # more per new token
        ("prefill_exponent", np.float64),  # p-norm of work and longest tile
        ("hbm_token_s", np.float64),  # decode attention on the GPU, per KV token
        ("hbm_verify_s", np.float64),  # the same with the guessed token's query beside it, the guess's own included
        ("hbm_request_s", np.float64),  # and per query token
        ("hbm_fixed_s", np.float64),  # and per batch
        ("hbm_split_s", np.float64),  # more where KV is long enough to be split
        ("hbm_regroup_s", np.float64),  # more for several requests
        ("hbm_tile_s", np.float64),  # a request's tiles, beside reading,
        ("hbm_wave_requests", np.float64),  # past so many that the multiprocessors take at once
        ("hbm_mean_token_s", np.float64),  # beside reading, per token of the mean request: a head that is not split
        ("hbm_exponent", np.float64),  # p-norm of reading and tiles
        ("pim_token_s", np.float64),  # decode attention in one lane, per KV token
        ("pim_verify_s", np.float64),  # the same with the guessed token's query
        ("decompressed_token_s", np.float64),  # decode attention on decompressed KV over all lanes, per KV token
        ("decompressed_verify_s", np.float64),
        ("pim_request_s", np.float64),  # per request
        ("pim_batch_s", np.float64),  # and per sub-batch that decodes on the PIM side
        ("transfer_token_s", np.float64),  # KV of one prefilled token to the PIM side
        ("transfer_request_s", np.float64),  # Q, K, V and output of one decoding request
        ("decompressed_token_ratio", np.float64),  # both for decompressed KV, over the above
        ("decompressed_request_ratio", np.float64),
        ("transfer_latency_s", np.float64),  # per sub-batch that decodes on the PIM side: two transfers a layer
        ("transfer_exposed_frac", np.float64),  # share of transfer time that blocks a given rank
        ("fc_batch_j", np.float64),
        ("fc_token_j", np.float64),
        ("prefill_pair_j", np.float64),
        ("prefill_kv_j", np.float64),
        ("hbm_token_j", np.float64),
        ("pim_token_j", np.float64),
        ("decompressed_token_j", np.float64),
        ("transfer_token_j", np.float64),
        ("transfer_request_j", np.float64),
        ("static_w", np.float64),
        ("gpu_busy_w", np.float64),  # all GPUs, above idle, while they are busy,
        ("gpu_most_w", np.float64),  # and the most with their work; 0: work alone counts
    ]
)


class TableArrays(NamedTuple):
    """What kernels receive. T tables, L lanes and P pools (padded to the largest)."""

    coef: NDArray[np.void]  # (T,) COEF_DTYPE
    rows_s: NDArray[np.float64]  # (T, len(ROWS), K) times, see ROWS and fc_grid_tokens
    lane_pool: NDArray[np.int64]  # (T, L)
    pool_blocks: NDArray[np.int64]  # (T, P) capacity
    forms: tuple[int, ...]  # PimForm in which KV may lie; a tuple, since kernels are compiled for its length

    @property
    def fc_s(self) -> NDArray[np.float64]:
        """(T, K) fully connected layers."""
        return self.rows_s[:, FC]

    @property
    def head_s(self) -> NDArray[np.float64]:
        """(T, K) language-model head."""
        return self.rows_s[:, HEAD]

    @property
    def comm_s(self) -> NDArray[np.float64]:
        """(T, K) all-to-all beside the FC of a batch."""
        return self.rows_s[:, COMM]

    @property
    def draft_s(self) -> NDArray[np.float64]:
        """(T, K) the module that guesses tokens, for so many requests."""
        return self.rows_s[:, DRAFT]

    @property
    def experts_s(self) -> NDArray[np.float64]:
        """(T, K) the experts' part of FC where it has phases of its own beside the all-to-all."""
        return self.rows_s[:, EXPERTS]


def fc_grid_tokens() -> NDArray[np.float64]:
    """Token counts at which FC and head times are tabulated."""
    dense = np.arange(DENSE_TOKENS + 1)
    return np.concatenate([dense, np.arange(DENSE_TOKENS + STRIDE_TOKENS, TABLE_TOKENS + 1, STRIDE_TOKENS)]).astype(
        float
    )
