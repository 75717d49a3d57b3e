"""Every cost against its closed form or a number worked out by hand; lookups against the functions they tabulate."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l3env.errors import SpecError
from l3env.jit import kernel
from l3env.machine import price, specs
from l3env.machine.arrays import COEF_DTYPE, DENSE_TOKENS, STRIDE_TOKENS, TABLE_TOKENS, fc_grid_tokens
from l3env.machine.costs import attention, energy, gpu, link, memory, pim
from l3env.machine.tables import compile_tables, stack

A100 = specs.load("gpu/a100-80-ideal")  # plain data-sheet rooflines: closed forms
NVLINK = specs.load("link/nvlink3-ideal")
IDEAL = {"gpu": "gpu/a100-80-ideal", "gpu_link": "link/nvlink3-ideal"}
L3 = specs.load("system/l3-dgx-a100", **IDEAL)
GPT = specs.load("model/gpt-175b")
QWEN = specs.load("model/qwen-72b")
LLAMA = specs.load("model/llama-2-7b")
FLOP_PER_S = 312e12 * 0.8
BYTES_PER_S = 2.039e12 * 0.85
SYSTEMS = specs.names("system")
MODELS = specs.names("model")


def roofline_s(flop: float, moved_bytes: float) -> float:
    """One operation of the plain roofline."""
    return float(gpu.overlap_s(A100, gpu.compute_s(A100, flop), gpu.memory_s(A100, moved_bytes)))


def test_roofline_is_the_larger_of_compute_and_memory_and_both_are_equal_at_the_balance_point():
    balance = FLOP_PER_S / BYTES_PER_S  # FLOP per byte
    assert (roofline_s(FLOP_PER_S, 0.0)) == pytest.approx(1.0, rel=1e-12)
    assert (roofline_s(0.0, BYTES_PER_S)) == pytest.approx(1.0, rel=1e-12)
    at = [(roofline_s(balance * share * 1e9, 1e9)) for share in (0.5, 1.0, 2.0)]
    assert at[0] == at[1] == pytest.approx(1e9 / BYTES_PER_S, rel=1e-12)
    assert at[2] == pytest.approx(2 * at[1], rel=1e-12)


def test_fc_of_gpt_175b_by_hand_is_flat_in_tokens_then_linear_with_the_knee_where_the_roofline_bends():
    """FFN up on one of 8 GPUs: 12288 x 6144 weights; memory-bound while 2 n k m / F < 2 (k m + n (k + m)) / B."""
    k, m = 12_288, 49_152 // 8
    knee = k * m / (k * m * BYTES_PER_S / FLOP_PER_S - (k + m))  # tokens
    assert 140 < knee < 160  # near 144 = FLOP/s over elements/s, moved by the activations
    flop, moved = gpu.linear_flop_and_bytes(GPT, np.array([np.floor(knee), np.ceil(knee)]), k, m)
    compute, memory_s = flop / FLOP_PER_S, moved / BYTES_PER_S
    assert compute[0] < memory_s[0]
    assert compute[1] > memory_s[1]
    assert gpu.linear_shapes(GPT, 8) == [(k, 1536 + 2 * 1536), (1536, k), (k, m), (m, k)]
    # one token: all 21.7 GB of a GPU's layer weights once, and 192 all-reduces
    weights_s = GPT.layers_count * GPT.layer_parameters_count * 2 / 8 / BYTES_PER_S
    reduce_s = 192 * (20e-6 + 2 * 7 / 8 * 12_288 * 2 / 225e9)
    assert float(gpu.fc_s(GPT, A100, NVLINK, 8, 1)) == pytest.approx(weights_s + reduce_s, rel=1e-3)
    assert weights_s == pytest.approx(96 * 12 * 12_288**2 * 2 / 8 / BYTES_PER_S, rel=1e-12)
    # very many tokens: 2 FLOP a weight and token
    tokens = 1e6
    compute_s = 2 * GPT.layers_count * GPT.layer_parameters_count / 8 * tokens / FLOP_PER_S
    wire_s = 192 * (20e-6 + 2 * 7 / 8 * 12_288 * 2 * tokens / 225e9)
    assert float(gpu.fc_s(GPT, A100, NVLINK, 8, tokens)) == pytest.approx(compute_s + wire_s, rel=1e-9)


def test_gated_ffn_and_shared_kv_heads_have_the_models_own_shapes():
    """Qwen-72B at TP 4: 16 query heads and 2 KV heads a GPU, gate and up side by side."""
    assert gpu.linear_shapes(QWEN, 4) == [
        (8192, 2048 + 2 * 2 * 128),
        (2048, 8192),
        (8192, 2 * 29_568 / 4),
        (29_568 / 4, 8192),
    ]
    # more GPUs than KV heads: each holds a whole one
    assert gpu.linear_shapes(QWEN, 16)[0] == (8192, 512 + 2 * 128)
    assert attention.kv_read_s(QWEN, A100, 16) == attention.kv_read_s(QWEN, A100, 8)


def test_all_reduce_is_a_ring_and_costs_nothing_on_one_gpu():
    """2 (p - 1) / p of the message over 0.75 x 300 GB/s, plus 20 us."""
    assert float(gpu.all_reduce_s(NVLINK, 2, 225e9)) == pytest.approx(20e-6 + 1.0, rel=1e-12)
    assert float(gpu.all_reduce_s(NVLINK, 8, 225e9)) == pytest.approx(20e-6 + 1.75, rel=1e-12)
    assert float(gpu.all_reduce_s(NVLINK, 1, 1e12)) == 0.0
    one_gpu = gpu.fc_s(LLAMA, A100, NVLINK, 1, 64)
    slow_link = specs.from_mapping(
        "link",
        {"name": "slow", "bytes_per_s": 1.0, "utilisation_frac": 1.0, "latency_s": 1.0, "j_per_byte": 0.0},
        "here",
    )
    assert gpu.fc_s(LLAMA, A100, slow_link, 1, 64) == one_gpu


def test_nothing_to_do_takes_no_time():
    assert gpu.fc_s(GPT, A100, NVLINK, 8, [0, 1])[0] == 0
    assert gpu.head_s(GPT, A100, 8, [0, 1])[0] == 0


def test_head_of_one_row_reads_the_embedding_once():
    read_s = (12_288 * 50_257 / 8 * 2 + (12_288 + 50_257 / 8) * 2) / BYTES_PER_S
    assert float(gpu.head_s(GPT, A100, 8, 1)) == pytest.approx(read_s, rel=1e-12)


def test_attention_on_the_gpu_by_hand():
    """GPT-175B at TP 8: 12 heads of 128 a GPU and 96 layers; 589,824 B of KV a token."""
    assert attention.prefill_pair_s(GPT, A100, 8) == pytest.approx(96 * 4 * 12 * 128 / FLOP_PER_S, rel=1e-12)
    assert attention.kv_read_s(GPT, A100, 8) == pytest.approx(4_718_592 / 8 / BYTES_PER_S, rel=1e-12)
    assert attention.query_move_s(GPT, A100, 8) == pytest.approx(2 * 96 * 12 * 128 * 2 / BYTES_PER_S, rel=1e-12)
    assert attention.decode_token_s(GPT, A100, 8) == attention.kv_read_s(GPT, A100, 8)  # 1 FLOP a byte: memory-bound
    # 8 queries a KV head: 8 times the work on the same bytes, still memory-bound
    assert attention.decode_token_s(QWEN, A100, 4) == pytest.approx(327_680 / 4 / BYTES_PER_S, rel=1e-12)


def test_dimm_pim_streams_13_tb_per_s_through_lanes_of_equal_share():
    """1.587 GB/s a bank unit (8 B each 8 cycles of 0.63 ns) x 16 banks x 8 chips x 64 ranks."""
    unit = 8 / (8 * 0.63e-9)
    assert L3.pim.internal_bytes_per_s == pytest.approx(unit * 16 * 8 * 64, rel=1e-6)
    assert L3.pim.internal_bytes_per_s == pytest.approx(13.0e12, rel=1e-3)
    usable = L3.pim.internal_bytes_per_s * L3.pim.internal_utilisation_frac
    mha = pim.layout(L3.pim, GPT, 1)
    assert mha.lane_pool == (0,)
    assert mha.lane_bytes_per_s == pytest.approx(usable, rel=1e-12)
    gqa = pim.layout(L3.pim, QWEN, 2)  # 8 channels of 4 ranks each
    assert gqa.lane_pool == tuple(channel for channel in range(8) for _ in range(4))
    assert gqa.lane_bytes_per_s * 64 == pytest.approx(usable, rel=1e-12)
    assert sum(gqa.pool_bytes) * 2 == pytest.approx(2 * 1024**4, rel=1e-12)
    one_token = 4_718_592 / usable
    assert pim.stream_token_s(L3.pim, GPT, mha.lane_bytes_per_s) == pytest.approx(one_token, rel=1e-12)
    assert pim.lane_token_s(L3.pim, GPT, mha.lane_bytes_per_s) == pytest.approx(one_token, rel=0.01)  # the fit's


@pytest.mark.parametrize("system", [name for name in SYSTEMS if specs.load(f"system/{name}").pim])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_lanes_and_pools_of_all_replicas_add_up_to_the_whole_memory(system, model, replicas):
    device = specs.load(f"system/{system}").pim
    plan = pim.layout(device, specs.load(f"model/{model}"), replicas)
    total = plan.lane_bytes_per_s * plan.lanes_count * replicas
    assert total == pytest.approx(device.internal_bytes_per_s * device.internal_utilisation_frac, rel=1e-12)
    assert sum(plan.pool_bytes) * replicas == pytest.approx(device.capacity_bytes, rel=1e-12)
    assert set(plan.lane_pool) == set(range(plan.pools_count))


def test_channels_that_cannot_be_shared_equally_are_an_error():
    with pytest.raises(SpecError, match="16 channels cannot be shared equally by 3 replicas"):
        pim.layout(L3.pim, QWEN, 3)


def test_more_query_heads_than_multiply_accumulates_take_more_passes():
    """ceil(N_gqa / N_cmr)."""
    assert [pim.compute_passes(L3.pim, model) for model in (GPT, QWEN)] == [1, 1]
    narrow = specs.load("pim/dimm-pim-ddr4-3200", macs_per_element_count=3)
    assert pim.compute_passes(narrow, QWEN) == 3
    once = pim.lane_token_s(L3.pim, QWEN, 1e9)
    assert pim.lane_token_s(narrow, QWEN, 1e9) == pytest.approx(3 * once, rel=1e-12)


def test_a_quarter_of_the_transfers_is_exposed_with_four_ranksets_and_all_without_overlap():
    assert link.exposed_transfer_frac(L3) == 0.25
    for system in ("cpu-offload-dgx-a100", "hbm-pim-ext-dgx-a100"):
        assert link.exposed_transfer_frac(specs.load(f"system/{system}")) == 1.0


def test_transfers_move_q_k_v_and_outputs_over_the_links_but_no_faster_than_the_channels():
    assert link.decode_request_bytes(GPT) == 96 * 96 * 128 * 2 * 4  # Q, K, V and output: four of the hidden size
    assert link.decode_request_bytes(QWEN) == 80 * 128 * 2 * (64 + 64 + 8 + 8)
    links = 8 * 31.5e9 * 0.7937
    assert link.transfer_bytes_per_s(L3, 8) == pytest.approx(links, rel=1e-12)  # 200 GB/s < 406 GB/s of channels
    assert link.transfer_bytes_per_s(L3, 4) == pytest.approx(links / 2, rel=1e-12)
    fast = specs.load("system/l3-dgx-a100", pim_link__bytes_per_s=1e12, **IDEAL)
    channels = 16 * 25.39682540e9
    assert link.transfer_bytes_per_s(fast, 8) == pytest.approx(channels, rel=1e-12)
    assert link.transfer_bytes_per_s(fast, 4) == pytest.approx(channels / 2, rel=1e-12)


def test_kv_capacity_of_gpt_175b_by_hand():
    """2 TiB over 4,718,592 B a token is 466,033 tokens in PIM; HBM keeps what weights and activations leave."""
    assert GPT.kv_bytes_per_token == 4_718_592
    tables = compile_tables(L3, GPT)
    assert (tables.tp, tables.replicas_count) == (8, 1)
    assert tables.pim_tokens == 466_033 // 16 * 16 == 466_032
    weights = (96 * 12 * 12_288**2 + 50_257 * 12_288) * 2
    assert memory.weight_bytes(GPT) == weights == pytest.approx(349e9, rel=1e-2)
    activations = 8192 * (2 * 12_288 + 49_152 / 8) * 2
    assert memory.activation_bytes(GPT, 8, 8192) == activations
    free = 8 * (80 * 1024**3 - 1024**3 - activations) - weights
    assert tables.hbm_tokens == int(free // (16 * 4_718_592)) * 16
    assert 60_000 < tables.hbm_tokens < 75_000
    assert compile_tables(specs.load("system/gpu-dgx-a100", **IDEAL), GPT).hbm_tokens == tables.hbm_tokens


def test_replicas_share_the_pim_memory_and_gqa_has_a_pool_a_channel():
    """Qwen-72B, two replicas of TP 4: 8 channels of 128 GiB each; 327,680 B a token."""
    tables = compile_tables(L3, QWEN)
    assert tables.replicas_count == 2
    assert tables.arrays.pool_blocks[0, 1:].tolist() == [128 * 1024**3 // (16 * 327_680)] * 8


def test_memory_that_holds_the_weights_offers_only_what_they_leave():
    tables = compile_tables(specs.load("system/hbm-pim-dgx-a100", **IDEAL), GPT)
    gpu_only = compile_tables(specs.load("system/gpu-dgx-a100", **IDEAL), GPT)
    assert tables.arrays.pool_blocks[0].tolist() == [0, int(gpu_only.arrays.pool_blocks[0, 0])]


def test_a_model_that_does_not_fit_is_an_error():
    with pytest.raises(SpecError, match="gpt-175b does not fit on 2 x a100-80-ideal"):
        compile_tables(L3, GPT, tp=2)
    with pytest.raises(SpecError, match="tp = 3 does not divide 8 GPUs"):
        compile_tables(L3, GPT, tp=3)


def test_energy_by_hand():
    byte_j = 28.72e-12 + 3.7475e-12
    assert energy.gpu_byte_j(A100) == pytest.approx(byte_j, rel=1e-12)
    pair_j = 2 * 96 * 96 * 128 * 0.32e-12  # score and context, one multiply-accumulate an element
    assert energy.hbm_token_j(GPT, A100) == pytest.approx(4_718_592 * byte_j + pair_j, rel=1e-12)
    assert energy.pim_token_j(L3, GPT) == pytest.approx(4_718_592 * 4.4e-12 + pair_j, rel=1e-12)
    batch_j, token_j = energy.fc_j(GPT, A100, 8)
    weights = GPT.layers_count * GPT.layer_parameters_count
    assert batch_j == pytest.approx(weights * 2 * byte_j, rel=1e-9)
    assert token_j > weights * 0.32e-12  # a multiply-accumulate a weight, and the activations
    assert token_j < weights * 0.32e-12 * 1.5
    assert energy.all_reduce_token_j(L3, GPT, 1) == 0
    assert energy.all_reduce_token_j(L3, GPT, 8) == pytest.approx(2 * 96 * 14 * 12_288 * 2 * 10.4e-12, rel=1e-12)


@kernel
def busy_j(coef, work_j, busy_s):
    return price.gpu_busy_j(coef[0], work_j, busy_s)


def test_a_busy_gpu_draws_power_up_to_its_limit_by_hand():
    h200 = specs.load("gpu/h200")
    coef = np.zeros(1, COEF_DTYPE)
    coef["gpu_busy_w"], coef["gpu_most_w"] = energy.gpu_busy_w(h200, 8)
    assert coef["gpu_busy_w"][0] == pytest.approx(8 * (416.1 - 140))
    assert coef["gpu_most_w"][0] == pytest.approx(8 * (700 - 140))
    assert busy_j(coef, 5.0, 0.01) == pytest.approx(5 + 8 * 276.1 * 0.01)
    assert busy_j(coef, 50.0, 0.01) == pytest.approx(8 * 560 * 0.01)
    assert energy.gpu_busy_w(A100, 8) == (0, 0)
    assert busy_j(np.zeros(1, COEF_DTYPE), 5.0, 0.01) == 5


# --- lookups


@kernel
def fc_lookup(t, table, tokens):
    return price.fc_batch_s(t, table, tokens)


@kernel
def head_lookup(t, table, rows):
    return price.head_batch_s(t, table, rows)


@kernel
def prefill_lookup(t, table, chunk, history):
    return price.prefill_attention_s(t, table, chunk, history)


PAIRS = [
    (L3, GPT),
    (L3, QWEN),
    (specs.load("system/gpu-dgx-h100", gpu="gpu/h100-ideal", gpu_link="link/nvlink4-ideal"), LLAMA),
]
COMPILED = [compile_tables(system, model) for system, model in PAIRS]
TOGETHER = stack(COMPILED)  # tables of different machines side by side


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, len(PAIRS) - 1), st.integers(0, 4 * TABLE_TOKENS))
def test_a_lookup_is_exact_where_tabulated_and_within_a_permille_elsewhere(pair, tokens):
    (system, model), tp = PAIRS[pair], COMPILED[pair].tp
    expected = float(gpu.fc_s(model, system.gpu, system.gpu_link, tp, tokens))
    expected_head = float(gpu.head_s(model, system.gpu, tp, tokens))
    exact = tokens <= DENSE_TOKENS or (tokens <= TABLE_TOKENS and tokens % STRIDE_TOKENS == 0)
    rtol = 1e-12 if exact else 1e-3
    assert fc_lookup(TOGETHER, pair, tokens) == pytest.approx(expected, rel=rtol, abs=0)
    assert head_lookup(TOGETHER, pair, tokens) == pytest.approx(expected_head, rel=rtol, abs=0)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("model", ["gpt-175b", "qwen-72b", "llama-2-7b"])
def test_lookups_of_every_preset_are_exact_where_dense_and_within_four_percent_beyond(system, model):
    """Beyond, fitted presets rise in steps (waves of tiles) that the table's strides cut through."""
    machine, spec = specs.load(f"system/{system}"), specs.load(f"model/{model}")
    if machine.gpus_count == 1 and model != "llama-2-7b":
        pytest.skip("does not fit on one GPU")
    tables = compile_tables(machine, spec)
    grid = fc_grid_tokens()
    tokens = np.unique(np.geomspace(1, 1e6, 2000).astype(int))
    for row, slope, direct in (
        (tables.arrays.fc_s[0], "fc_slope_s", gpu.fc_s(spec, machine.gpu, machine.gpu_link, tables.tp, tokens)),
        (tables.arrays.head_s[0], "head_slope_s", gpu.head_s(spec, machine.gpu, tables.tp, tokens)),
    ):
        beyond = np.maximum(tokens - TABLE_TOKENS, 0) * tables.arrays.coef[slope][0]
        looked_up = np.interp(tokens, grid, row) + beyond
        dense = tokens <= DENSE_TOKENS
        np.testing.assert_allclose(looked_up[dense], direct[dense], rtol=1e-12)
        np.testing.assert_allclose(looked_up[~dense], direct[~dense], rtol=0.04)


@pytest.mark.parametrize(("chunk", "history"), [(1, 0), (1, 5000), (512, 0), (512, 4096), (30_000, 0)])
def test_prefill_attention_counts_every_causal_pair_once(chunk, history):
    """Larger of computing with all pairs and reading all KV."""
    pairs = sum(history + i for i in range(1, chunk + 1))
    compute_s = pairs * attention.prefill_pair_s(GPT, A100, 8)
    read_s = (history + chunk) * attention.kv_read_s(GPT, A100, 8) + chunk * attention.query_move_s(GPT, A100, 8)
    assert prefill_lookup(TOGETHER, 0, chunk, history) == pytest.approx(max(compute_s, read_s), rel=1e-12)


def test_a_prompt_prefilled_in_two_chunks_has_the_same_pairs_as_in_one():
    whole = prefill_lookup(TOGETHER, 0, 4096, 0)
    assert prefill_lookup(TOGETHER, 0, 2048, 0) + prefill_lookup(TOGETHER, 0, 2048, 2048) == pytest.approx(
        whole, rel=1e-12
    )
