"""Compiles a system and a model into the numbers the engine sees. Nothing else of physics reaches a kernel.

Tables of several (system, model) pairs stack along a first axis T; each environment names its row.

Places for KV. Pool 0 and lane 0 are the GPUs' HBM (capacity 0 where KV may not live there); the others are the PIM
side's, see ``costs/pim.py``. A request lives in one lane; the lane belongs to one pool; pools have capacities in
blocks of ``block_tokens`` tokens.

A latent (MLA) may also lie on the PIM side decompressed, as plain keys and values: one more lane and pool, the last of
each, spread evenly over all ranks. It shares the ranks' memory and time with the other PIM lanes and pools: its
attention adds to that of every rank, and each of its blocks takes ``decompressed_share`` blocks of every other PIM
pool.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l3env.choices import PimForm, Side, SubBatching
from l3env.errors import SpecError
from l3env.machine.arrays import (
    COEF_DTYPE,
    FIRST_PIM,
    HBM,
    ROWS,
    SLOPE_STEPS,
    STRIDE_TOKENS,
    TableArrays,
    fc_grid_tokens,
)
from l3env.machine.batch import Chunk, Decodes, chunk_rows, loads
from l3env.machine.costs import attention, energy, experts, gpu, link, memory, pim
from l3env.machine.iteration import Iteration, price_batch
from l3env.machine.specs import GpuSpec, ModelSpec, SystemSpec

DEFAULT_BLOCK_TOKENS = 16


@dataclass(frozen=True)
class Pool:
    """A memory for KV.

    Attributes:
        name: "HBM", "PIM", or "PIM 3" where there are several; "PIM, decompressed".
        side: whose memory it is; that side's processors attend to what lies there.
        blocks_count: its capacity; 0 where KV may not lie there.
        lanes_count: what computes there serially, side by side.
        form: how KV lies.
        link: name of the link that KV and queries take from the GPUs; None where they are there.
    """

    name: str
    side: Side
    blocks_count: int
    lanes_count: int
    form: PimForm
    link: str | None


@dataclass(frozen=True)
class Tables:
    """One compiled (system, model) pair.

    Attributes:
        system, model: what was compiled.
        tp: tensor-parallel degree of a replica; ``replicas_count`` replicas fill the system.
        arrays: rows for the kernels, T = 1.
    """

    system: SystemSpec
    model: ModelSpec
    tp: int
    replicas_count: int
    arrays: TableArrays

    @property
    def has_pim(self) -> bool:
        return self.system.pim is not None

    @property
    def pools(self) -> tuple[Pool, ...]:
        """Where KV may lie, by the index that views, plans and logs use."""
        decompressed = int(self.arrays.coef["decompressed_pool"][0])
        lanes = np.bincount(self.arrays.lane_pool[0], minlength=self.arrays.pool_blocks.shape[1])
        found = [Pool("HBM", Side.GPU, int(self.arrays.pool_blocks[0, HBM]), 1, PimForm.STORED, None)]
        link = None if self.system.pim_link is None else self.system.pim_link.name
        end = decompressed or self.arrays.pool_blocks.shape[1]
        for pool in range(FIRST_PIM, self.arrays.pool_blocks.shape[1]):
            assert self.system.pim is not None
            host = self.system.pim.kind == "host-cpu"
            name = "host" if host else "PIM"
            if pool == decompressed:
                name += ", decompressed"
            elif end > FIRST_PIM + 1:
                name += f" {pool - FIRST_PIM}"
            form = PimForm.DECOMPRESSED if pool == decompressed else PimForm.STORED
            blocks = int(self.arrays.pool_blocks[0, pool])
            found.append(Pool(name, Side.HOST if host else Side.PIM, blocks, int(lanes[pool]), form, link))
        return tuple(found)

    @property
    def has_hbm_kv(self) -> bool:
        return bool(self.arrays.pool_blocks[0, HBM] > 0)

    @property
    def block_tokens(self) -> int:
        return int(self.arrays.coef["block_tokens"][0])

    @property
    def hbm_tokens(self) -> int:
        """KV tokens that fit in the HBM pool of one replica."""
        return int(self.arrays.pool_blocks[0, HBM]) * self.block_tokens

    @property
    def pim_tokens(self) -> int:
        """KV tokens that fit in the PIM pools of one replica, in the form in which the model stores them."""
        decompressed = int(self.arrays.coef["decompressed_pool"][0])
        return int(self.arrays.pool_blocks[0, FIRST_PIM : decompressed or None].sum()) * self.block_tokens

    def iteration_s(
        self,
        decodes: Iterable[Decodes] = (),
        chunks: Iterable[Chunk] = (),
        *,
        sub_batching: SubBatching = SubBatching.OFF,
        multi_token: bool = False,
    ) -> float:
        """How long an iteration of a batch takes, by the formula that the engine goes by.

        Args:
            decodes: requests that decode, by where their KV lies.
            chunks: prompt tokens that are prefilled beside them.
            sub_batching: as one batch, as two interleaved sub-batches (systems with a PIM side), or the shorter.
            multi_token: each decoding request verifies a guessed token, where the model guesses.

        Raises:
            SpecError: a place that this system does not have.
        """
        return self.iteration(decodes, chunks, sub_batching=sub_batching, multi_token=multi_token).duration_s

    def iteration(
        self,
        decodes: Iterable[Decodes] = (),
        chunks: Iterable[Chunk] = (),
        *,
        sub_batching: SubBatching = SubBatching.OFF,
        multi_token: bool = False,
    ) -> Iteration:
        """The same with the times of both sides in each phase."""
        queries = 2 if multi_token and self.arrays.coef["drafts_count"][0] else 1
        mode = sub_batching if self.has_pim else SubBatching.OFF
        rows = loads(self.arrays, decodes), chunk_rows(self.arrays, chunks)
        priced: Iteration = price_batch(self.arrays, 0, *rows, queries, int(mode))
        return priced


def compile_tables(
    system: SystemSpec, model: ModelSpec, *, tp: int | None = None, block_tokens: int = DEFAULT_BLOCK_TOKENS
) -> Tables:
    """Compiles one replica of ``model`` on ``system``.

    Args:
        tp: tensor-parallel degree, by default the model's, or the system's where it shares out experts; must divide the
            GPUs of a host.
        block_tokens: tokens per KV block.

    Raises:
        SpecError: the degree does not divide the GPUs, the model does not fit, or no place is left for KV.
    """
    degree = _degree(system, model, tp)
    if block_tokens < 1:
        raise SpecError(f"block_tokens = {block_tokens}: expected at least 1")
    replicas = system.gpus_count // degree
    free_hbm = memory.free_hbm_bytes(system, model, degree)
    block_bytes = block_tokens * model.kv_bytes_per_token

    lane_pool, pool_blocks = [0], [0]
    if system.hbm_kv:
        pool_blocks = [int(free_hbm // (block_bytes * memory.kv_copies_count(model, degree)))]
    coef = np.zeros(1, COEF_DTYPE)
    if system.pim is not None:
        plan = pim.layout(system.pim, model, system.host_gpus_count // degree)
        pim_bytes = (free_hbm,) if system.pim.holds_weights else plan.pool_bytes
        lane_pool += [FIRST_PIM + pool for pool in plan.lane_pool]
        pool_blocks += [int(size // block_bytes) for size in pim_bytes]
        _fill_pim(coef, system, model, degree, plan)
        if model.mla is not None:
            coef["decompressed_lane"], coef["decompressed_pool"] = len(lane_pool), len(pool_blocks)
            ratio = model.decompressed_bytes_per_token / model.kv_bytes_per_token
            coef["decompressed_share"] = ratio / len(pim_bytes)
            lane_pool.append(len(pool_blocks))
            pool_blocks.append(int(min(pool_blocks[1:]) // (ratio / len(pim_bytes))))
    _fill_gpu(coef, system, model, degree)
    for name in ("step_host_s", "step_host_request_s", "step_host_eager_s"):
        coef[name] = getattr(system.serving, name)
    coef["captured_tokens"] = (system.serving.captured_tokens or (0,))[-1]
    coef["lanes_count"], coef["pools_count"] = len(lane_pool), len(pool_blocks)
    coef["block_tokens"], coef["served_tokens"] = block_tokens, model.served_tokens
    if max(pool_blocks) == 0:
        raise SpecError(f"{model.name} on {system.name}: weights and activations leave no room for KV")

    rows = _rows(system, model, degree)
    back = SLOPE_STEPS if system.gpu.sm_count else 1
    for name, row in rows.items():
        coef[f"{name}_slope_s"] = (row[-1] - row[-1 - back]) / (back * STRIDE_TOKENS)
    coef["sends"] = rows["comm"].any()
    if coef["sends"][0] and system.experts is not None:
        coef["dispatch_frac"] = experts.DISPATCH_FRAC if system.experts.overlap_by_phase else 0.0
        coef["comm_sm_frac"] = system.experts.comm_sm_count / max(system.gpu.sm_count, 1)
    lanes, blocks = np.array([lane_pool], dtype=np.int64), np.array([pool_blocks], dtype=np.int64)
    # models that guess tokens, too: kernels that are compiled for the one are compiled for both
    several = coef["decompressed_lane"][0] or coef["drafts_count"][0]
    forms = tuple(map(int, PimForm)) if several else (int(PimForm.STORED),)
    times = np.array([[rows[name] for name in ROWS]])
    return Tables(system, model, degree, replicas, TableArrays(coef, times, lanes, blocks, forms))


def _degree(system: SystemSpec, model: ModelSpec, tp: int | None) -> int:
    """The tensor-parallel degree that is asked for, or the usual one. Raises SpecError where it does not divide."""
    usual = min(model.tensor_parallel_count, system.gpus_count)
    if model.moe is not None and system.experts is not None:
        usual = system.experts.tensor_parallel_count
    degree = usual if tp is None else tp
    if degree < 1 or system.gpus_count % degree:
        raise SpecError(f"{model.name} on {system.name}: tp = {degree} does not divide {system.gpus_count} GPUs")
    if system.host_gpus_count % degree:
        raise SpecError(f"{model.name} on {system.name}: tp = {degree} does not divide the GPUs of a host")
    return degree


def _rows(system: SystemSpec, model: ModelSpec, tp: int) -> dict[str, NDArray[np.float64]]:
    """Times at every count of ``fc_grid_tokens``: FC, head, all-to-all that computing hides, guessing of tokens, the
    experts' part of FC."""
    grid = fc_grid_tokens()
    fc, comm = experts.fc_and_all_to_all_s(system, model, tp, grid)
    if system.serving.captured_tokens or system.serving.step_gpu_s:
        fc = _as_stepped(fc, system)
    head, draft = gpu.head_s(model, system.gpu, tp, grid), experts.draft_s(system, model, tp, grid)
    return {"fc": fc, "head": head, "comm": comm, "draft": draft, "experts": experts.phase_s(system, model, tp, grid)}


def _as_stepped(fc_s: NDArray[np.float64], system: SystemSpec) -> NDArray[np.float64]:
    """FC as the serving engine runs it: padded to the captured batches, with what a step has beside the layers."""
    padded = fc_s.copy()
    for tokens in range(1, (system.serving.captured_tokens or (0,))[-1] + 1):
        padded[tokens] = fc_s[system.serving.padded_tokens(tokens)]  # the grid holds every count up to DENSE_TOKENS
    padded[1:] += system.serving.step_gpu_s
    return padded


def _fill_gpu(coef: NDArray[np.void], system: SystemSpec, model: ModelSpec, tp: int) -> None:
    device = system.gpu
    fill_attention(coef, device, model, tp)
    coef["drafts_count"] = model.draft_modules_count
    batch_j, token_j = energy.fc_j(model, device, tp, system.experts)
    coef["fc_batch_j"] = batch_j
    coef["fc_token_j"] = token_j + energy.all_reduce_token_j(system, model, tp)
    coef["prefill_pair_j"] = energy.attention_pair_j(model, device.mac_j)
    coef["prefill_kv_j"] = model.kv_bytes_per_token * energy.gpu_byte_j(device)
    coef["hbm_token_j"] = energy.hbm_token_j(model, device)
    coef["static_w"] = energy.static_power_w(system, tp)
    coef["gpu_busy_w"], coef["gpu_most_w"] = energy.gpu_busy_w(device, tp)


def fill_attention(coef: NDArray[np.void], device: GpuSpec, model: ModelSpec, tp: int) -> None:
    """Coefficients of the GPU's attention, all layers of a model on one of ``tp`` GPUs."""
    coef["prefill_pair_s"] = attention.prefill_pair_s(model, device, tp)
    coef["prefill_kv_s"] = attention.kv_read_s(model, device, tp)
    coef["prefill_query_s"] = attention.query_move_s(model, device, tp)
    coef["prefill_fixed_s"] = attention.launch_s(model, device, model.naive_form, device.prefill_launch_s)
    coef["prefill_new_s"] = attention.new_token_s(model, device, tp)
    coef["prefill_history_token_s"] = attention.history_token_s(model, device, tp)
    tiles = attention.prefill_tiles(model, device, tp)
    for name, value in tiles._asdict().items():
        coef[f"prefill_{name}"] = value
    coef["prefill_exponent"] = device.prefill_exponent
    stored = model.stored_form
    coef["hbm_token_s"] = attention.decode_token_s(model, device, tp)
    coef["hbm_verify_s"] = attention.decode_token_s(model, device, tp, query_tokens=2) * _draft_ratio(model)
    coef["hbm_request_s"] = attention.query_move_s(model, device, tp, stored) * device.decode_query_moves
    coef["hbm_fixed_s"] = attention.launch_s(model, device, stored, device.decode_launch_s)
    coef["hbm_split_s"] = model.layers_count * device.decode_split_s
    coef["hbm_regroup_s"] = attention.regroup_s(model, device, tp)
    coef["hbm_tile_s"], coef["hbm_wave_requests"] = attention.decode_tiles(model, device, tp)
    coef["hbm_mean_token_s"] = attention.decode_head_token_s(model, device)
    coef["hbm_exponent"] = device.decode_exponent


def _draft_ratio(model: ModelSpec) -> float:
    """Attention layers with the guessing module's own over those without."""
    return (model.layers_count + model.draft_modules_count) / model.layers_count


def _fill_pim(coef: NDArray[np.void], system: SystemSpec, model: ModelSpec, tp: int, plan: pim.Layout) -> None:
    assert system.pim is not None
    coef["has_pim"] = 1
    coef["pim_token_s"] = pim.lane_token_s(system.pim, model, plan.lane_bytes_per_s)
    coef["pim_verify_s"] = pim.verify_token_s(system.pim, model, plan.lane_bytes_per_s) * _draft_ratio(model)
    coef["pim_request_s"] = pim.lane_request_s(system.pim, model, plan.lane_bytes_per_s)
    coef["pim_batch_s"] = pim.batch_s(system.pim, model)
    coef["pim_token_j"] = energy.pim_token_j(system, model)
    coef["transfer_exposed_frac"] = link.exposed_transfer_frac(system)
    naive = model.naive_form
    if model.mla is not None:
        whole = plan.lane_bytes_per_s * plan.lanes_count
        coef["decompressed_token_s"] = pim.stream_token_s(system.pim, model, whole, naive)
        coef["decompressed_verify_s"] = pim.stream_token_s(system.pim, model, whole, naive, 2) * _draft_ratio(model)
        coef["decompressed_token_j"] = energy.pim_token_j(system, model, naive)
    if system.pim_link is None:
        return
    rate = link.transfer_bytes_per_s(system, tp)
    coef["transfer_token_s"] = model.kv_bytes_per_token / rate
    coef["transfer_request_s"] = link.decode_request_bytes(model) / rate
    coef["decompressed_token_ratio"] = model.decompressed_bytes_per_token / model.kv_bytes_per_token
    coef["decompressed_request_ratio"] = link.decode_request_bytes(model, naive) / link.decode_request_bytes(model)
    coef["transfer_latency_s"] = 2 * model.layers_count * system.pim_link.latency_s
    coef["transfer_token_j"] = model.kv_bytes_per_token * energy.transfer_byte_j(system)
    coef["transfer_request_j"] = energy.decode_transfer_j(system, model)


def stack(tables: list[Tables]) -> TableArrays:
    """Joins several compiled pairs along T, lanes and pools padded (padding has capacity 0 and is never used)."""
    lanes = max(t.arrays.lane_pool.shape[1] for t in tables)
    pools = max(t.arrays.pool_blocks.shape[1] for t in tables)

    def padded(rows: NDArray[np.int64], width: int) -> NDArray[np.int64]:
        return np.pad(rows, ((0, 0), (0, width - rows.shape[1])))

    return TableArrays(
        np.concatenate([t.arrays.coef for t in tables]),
        np.concatenate([t.arrays.rows_s for t in tables]),
        np.concatenate([padded(t.arrays.lane_pool, lanes) for t in tables]),
        np.concatenate([padded(t.arrays.pool_blocks, pools) for t in tables]),
        max((t.arrays.forms for t in tables), key=len),
    )
