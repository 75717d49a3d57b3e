"""The time of an iteration: the work of both sub-batches, priced. The only place where it is put together.

A sub-batch prefills chunks of prompts and decodes. The GPUs do the prefill attention, the decode attention on KV in
HBM, then the fully connected layers (FC) and the head; the PIM side does the decode attention on its KV and takes the
new KV over the link (arXiv 2504.17584, section 6):

    two sub-batches   T = max(T_GPU_0, T_PIM_0) + max(T_GPU_1, T_PIM_1)
    one batch         T = max(prefill and HBM attention, T_PIM) + FC and head

What a serving engine's host needs for a step beside comes in ``engine.kernels.iteration``.

With two, the GPU's phase i attends to sub-batch i and batches the FC of its chunks with the decodes of the other one,
whose KV of new chunks arrives on the PIM side meanwhile. A GPU's batch lies beside the all-to-all, where there is one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from l3env.choices import SubBatching
from l3env.jit import inner, kernel
from l3env.machine.arrays import FIRST_PIM
from l3env.machine.forms import decompressed_load, stored_lanes, stored_requests, stored_tokens
from l3env.machine.price import (
    draft_batch_s,
    fc_batch_s,
    gpu_batch_s,
    hbm_attention_s,
    head_batch_s,
    lane_attention_s,
    pim_side_s,
    prefill_batch_s,
    prefill_tail_s,
    prefill_work_s,
)


class Prefill(NamedTuple):
    """Chunks of prompts."""

    chunks: int
    tokens: int
    ends: int  # prompts that end here: each emits a token
    attention_s: float  # launches apart
    longest_s: float  # the longest chunk's last tile
    pushed_tokens: float  # KV that crosses the link to the PIM side, in tokens of KV as stored


class Decode(NamedTuple):
    """A decode step, the KV of its own tokens included."""

    requests: int
    hbm_requests: float
    hbm_kv_tokens: float
    pim_kv_tokens: float  # as stored
    decompressed_kv_tokens: float
    slowest_s: float  # attention of the slowest PIM lane, of KV as stored
    read_s: float  # that and of decompressed KV
    moved_requests: float  # whose queries and outputs cross the link; two queries of one count twice


class Work(NamedTuple):
    """What a sub-batch does in an iteration, or both as one batch."""

    prefill: Prefill
    decode: Decode


class Batch(NamedTuple):
    """An iteration's work, and with how many query tokens a request decodes: 2 where it verifies a guess."""

    subs: tuple[Work, Work]
    whole: Work
    queries: int


class Phase(NamedTuple):
    """Times of a phase on both sides."""

    tokens: int  # of the FC batch
    prefill_s: float
    attention_s: float  # that and the decode attention in HBM
    fc_s: float
    back_s: float  # FC, head and guesses
    gpu_s: float
    pim_s: float
    read_s: float  # decode attention of the slowest PIM lane
    moving_s: float  # transfers


class Iteration(NamedTuple):
    """A priced iteration."""

    duration_s: float
    phases: tuple[Phase, Phase]  # one batch: the second is empty
    interleaved: int
    slowest_s: float  # attention of the slowest PIM lane, of KV as stored; of two sub-batches the sum


@inner
def no_prefill():
    return Prefill(0, 0, 0, 0.0, 0.0, 0.0)


@inner
def no_decode():
    return Decode(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


@inner
def no_phase():
    return Phase(0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


@inner
def with_chunk(t, table, prefill, tokens, history, ends, pushed_tokens):
    """The prefill with one more chunk on a history, at the end of its prompt or not."""
    return Prefill(
        prefill.chunks + 1,
        prefill.tokens + tokens,
        prefill.ends + ends,
        prefill.attention_s + prefill_work_s(t, table, tokens, history),
        max(prefill.longest_s, prefill_tail_s(t, table, tokens)),
        prefill.pushed_tokens + pushed_tokens,
    )


@inner
def pushed_tokens(t, table, lane, tokens):
    """What new KV in a lane adds to the transfers, in tokens of KV as stored."""
    return stored_tokens(t.forms, t.coef[table], lane, tokens) if lane > 0 else 0.0


@inner
def both_prefills(first, second):
    """Chunks of both sub-batches as one batch."""
    return Prefill(
        first.chunks + second.chunks,
        first.tokens + second.tokens,
        first.ends + second.ends,
        first.attention_s + second.attention_s,
        max(first.longest_s, second.longest_s),
        first.pushed_tokens + second.pushed_tokens,
    )


@inner
def loaded_lane_s(t, table, load, queries):
    """Attention of a PIM lane under its load, the new tokens included."""
    return lane_attention_s(t, table, load["kv"] + queries * load["count"], load["count"], queries)


@inner
def decode_step(t, table, lanes, requests, queries):
    """Decode steps of sub-batch 0, of 1, and of both as one batch.

    Args:
        lanes: (S, L) decoding requests (``count``) and their KV tokens (``kv``) before the step.
        requests: (of sub-batch 0, of 1).
    """
    first_s, second_s, both_s = 0.0, 0.0, 0.0
    first_kv, second_kv = 0.0, 0.0
    for lane in range(FIRST_PIM, stored_lanes(t.forms, t.coef[table])):
        here_s = loaded_lane_s(t, table, lanes[0, lane], queries), loaded_lane_s(t, table, lanes[1, lane], queries)
        first_s, second_s = max(first_s, here_s[0]), max(second_s, here_s[1])
        both_s = max(both_s, here_s[0] + here_s[1])
        first_kv += lanes[0, lane]["kv"] + queries * lanes[0, lane]["count"]
        second_kv += lanes[1, lane]["kv"] + queries * lanes[1, lane]["count"]
    first, first_beside_s = decode_of(t, table, lanes[0], requests[0], queries, first_kv, first_s)
    second, second_beside_s = decode_of(t, table, lanes[1], requests[1], queries, second_kv, second_s)
    both = Decode(
        first.requests + second.requests,
        first.hbm_requests + second.hbm_requests,
        first.hbm_kv_tokens + second.hbm_kv_tokens,
        first_kv + second_kv,
        first.decompressed_kv_tokens + second.decompressed_kv_tokens,
        both_s,
        both_s + first_beside_s + second_beside_s,
        first.moved_requests + second.moved_requests,
    )
    return first, second, both


@inner
def decode_of(t, table, lanes, requests, queries, pim_kv_tokens, slowest_s):
    """(a sub-batch's decode step, attention of its decompressed KV), given its PIM lanes' KV and slowest one."""
    decompressed_kv, beside_s = decompressed_load(t.forms, t, table, lanes, queries)
    in_hbm = lanes[0]["count"]
    moved = stored_requests(t.forms, t.coef[table], lanes, float(requests) - in_hbm) * queries
    hbm_kv = lanes[0]["kv"] + queries * in_hbm
    step = Decode(requests, in_hbm, hbm_kv, pim_kv_tokens, decompressed_kv, slowest_s, slowest_s + beside_s, moved)
    return step, beside_s


@inner
def batch_of(first, second, steps, queries):
    """A batch from the prefill of each sub-batch and what ``decode_step`` gives."""
    subs = Work(first, steps[0]), Work(second, steps[1])
    return Batch(subs, Work(both_prefills(first, second), steps[2]), queries)


@inner
def phase(t, table, mine, other, queries):
    """A phase attends to ``mine``; the decodes of ``other`` join its FC batch, and its new KV arrives at the PIM side.
    One batch is both."""
    prefill, decode = mine.prefill, mine.decode
    prefill_s = prefill_batch_s(t, table, prefill.attention_s, prefill.longest_s, prefill.chunks)
    attention_s = prefill_s + hbm_attention_s(t, table, decode.hbm_kv_tokens, decode.hbm_requests, queries)
    rows = queries * other.decode.requests
    tokens = prefill.tokens + rows
    fc_s = fc_batch_s(t, table, tokens)
    back_s = fc_s + head_batch_s(t, table, prefill.ends + rows)
    back_s += draft_batch_s(t, table, (queries - 1) * other.decode.requests)
    gpu_s = gpu_batch_s(t, table, attention_s + back_s, tokens)
    pushed = other.prefill.pushed_tokens
    pim_s, read_s, moving_s = pim_side_s(t, table, decode.read_s, decode.moved_requests, pushed)
    return Phase(tokens, prefill_s, attention_s, fc_s, back_s, gpu_s, pim_s, read_s, moving_s)


@inner
def price(t, table, batch, mode):
    """An iteration under a mode of sub-batching (``SubBatching``): two sub-batches, one batch, or the shorter."""
    (first, second), whole, queries = batch
    two_s, one_s = np.inf, np.inf
    phases, one = (no_phase(), no_phase()), no_phase()
    if mode != SubBatching.OFF:
        phases = phase(t, table, first, second, queries), phase(t, table, second, first, queries)
        two_s = max(phases[0].gpu_s, phases[0].pim_s) + max(phases[1].gpu_s, phases[1].pim_s)
    if mode != SubBatching.ON:
        one = phase(t, table, whole, whole, queries)
        one_s = gpu_batch_s(t, table, max(one.attention_s, one.pim_s) + one.back_s, one.tokens)
    if one_s < two_s:
        return Iteration(one_s, (one, no_phase()), 0, whole.decode.slowest_s)
    return Iteration(two_s, phases, 1, first.decode.slowest_s + second.decode.slowest_s)


@inner
def one_batch_s(t, table, prefill, decode):
    """A batch of its own, without guesses."""
    whole = Work(prefill, decode)
    idle = Work(no_prefill(), no_decode())
    return price(t, table, Batch((idle, idle), whole, 1), SubBatching.OFF).duration_s


@inner
def ttft_alone_s(t, table, prompt_tokens):
    """TTFT of a prompt on the empty system: one whole prefill."""
    pushed = float(prompt_tokens) if t.coef[table]["has_pim"] else 0.0
    return one_batch_s(t, table, with_chunk(t, table, no_prefill(), prompt_tokens, 0, 1, pushed), no_decode())


@inner
def tbt_alone_s(t, table, kv_tokens):
    """Time of one decode step of one request at a context length, on the empty system."""
    kv = float(kv_tokens)
    if t.coef[table]["has_pim"]:
        lane_s = lane_attention_s(t, table, kv, 1.0)
        return one_batch_s(t, table, no_prefill(), Decode(1, 0.0, 0.0, kv, 0.0, lane_s, lane_s, 1.0))
    return one_batch_s(t, table, no_prefill(), Decode(1, 1.0, kv, 0.0, 0.0, 0.0, 0.0, 0.0))


@kernel
def price_batch(t, table, lanes, chunks, queries, mode):
    """A priced iteration of a batch that stands in arrays: ``lanes`` (S, L) as in ``decode_step``, and a row a chunk
    (``sub_batch``, ``tokens``, ``history_tokens``, ``lane``, ``ends``)."""
    requests_0, requests_1 = 0, 0
    for lane in range(lanes.shape[1]):
        requests_0 += np.int64(lanes[0, lane]["count"])
        requests_1 += np.int64(lanes[1, lane]["count"])
    first, second = no_prefill(), no_prefill()
    for i in range(chunks.shape[0]):
        row = chunks[i]
        pushed = pushed_tokens(t, table, row["lane"], row["tokens"])
        if row["sub_batch"] == 0:
            first = with_chunk(t, table, first, row["tokens"], row["history_tokens"], row["ends"], pushed)
        else:
            second = with_chunk(t, table, second, row["tokens"], row["history_tokens"], row["ends"], pushed)
    steps = decode_step(t, table, lanes, (requests_0, requests_1), queries)
    return price(t, table, batch_of(first, second, steps, queries), mode)
