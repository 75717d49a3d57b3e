"""DeepSeek-V3: its configuration as published, its costs by hand, its router by the rule, and every policy on it."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from l3env import FixedKnobs, Knobs, PimForm, Plan, Workload, load
from l3env.choices import Status
from l3env.engine.engine import Engine, Slo, draft_classes
from l3env.engine.kernels.run import Until
from l3env.engine.rollout import Rollouts, present_idx
from l3env.errors import PlanError, PolicyError, SpecError, WorkloadError
from l3env.experiments.gpu import attention_rows, deep_gemm
from l3env.experiments.gpu.validation import prefill_attention_s
from l3env.experiments.reproduce import deepseek_balance, deepseek_places, deepseek_prefill, deepseek_v3
from l3env.experiments.reproduce import deepseek_router as router
from l3env.machine.costs import attention, energy, experts, gpu, link, memory, pim
from l3env.machine.tables import compile_tables
from l3env.policy.registry import make_policy, policy_names
from l3env.runs.driver import run_policy

V3 = load("model/deepseek-v3")
H800 = load("gpu/h800")
NODE = load("system/l3-dgx-h200")
DECODE = load("system/h800-ep144-decode")
PLACEMENT = f"{Path(__file__).parents[2] / 'policies' / 'placement.py'}:AdaptivePlacement"
MLA_PARAMETERS = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
EXPERT_PARAMETERS = 3 * 7168 * 2048


# --- as published


def test_parameters_and_flop_as_published():
    assert V3.attention_parameters_count == MLA_PARAMETERS == pytest.approx(187.1e6, rel=1e-3)
    assert V3.expert_parameters_count == EXPERT_PARAMETERS == pytest.approx(44.04e6, rel=1e-3)
    assert V3.parameters_count == pytest.approx(671e9, rel=1e-3)
    assert V3.linear_flop_per_token == pytest.approx(73.25e9, rel=1e-3)
    assert V3.linear_flop_per_token / 2 == pytest.approx(37e9, rel=0.02)  # "37 B active", rounded
    assert memory.weight_bytes(V3) == pytest.approx(671e9, rel=1e-3)


def test_kv_and_attention_arithmetic_as_published():
    assert V3.kv_bytes_per_token == 70_272
    assert load("model/deepseek-v3", bytes_per_kv_element=1).kv_bytes_per_token == 35_136
    assert V3.decompressed_bytes_per_token == 4_997_120
    assert 2 * V3.naive_form.macs_per_pair == 81_920
    assert 2 * V3.stored_form.macs_per_pair == 278_528
    intensity = 2 * V3.stored_form.macs_per_pair / (V3.stored_form.stored_elements * 2)
    assert intensity == pytest.approx(242, rel=1e-3)
    assert 2 * V3.naive_form.macs_per_pair / (V3.naive_form.stored_elements * 2) == 1


@pytest.mark.parametrize("name", ["gpt-175b", "qwen-72b"])
def test_plain_attention_has_one_form(name):
    model = load(f"model/{name}")
    assert model.stored_form == model.naive_form
    assert model.stored_form.macs_per_pair == 2 * model.heads_count * model.head_size
    assert model.decompressed_bytes_per_token == model.kv_bytes_per_token


def test_flash_mla_on_an_h800():
    """660 TFLOP/s where 128 heads compute, 3 TB/s where 16 read; queries and outputs moved besides."""
    for tp, measured in ((1, 660e12), (8, 3.0e12)):
        time_s = attention.decode_token_s(V3, H800, tp) * 8192 + attention.query_move_s(V3, H800, tp, V3.stored_form)
        work = 2 * V3.stored_form.macs_per_pair * 61 if tp == 1 else V3.kv_bytes_per_token
        assert work * 8192 / time_s == pytest.approx(measured, rel=0.15)
    # two query tokens double the work: memory-bound with 16 heads, compute-bound with 128
    assert attention.decode_token_s(V3, H800, 1, 2) == 2 * attention.decode_token_s(V3, H800, 1)
    assert attention.decode_token_s(V3, H800, 8, 2) == attention.decode_token_s(V3, H800, 8)


def test_pim_is_bound_by_multiply_accumulates_on_the_latent_and_by_bandwidth_on_plain_kv():
    """13.0 TB/s / (242 / 8) = 430 GB/s of latent; decompressed every byte is read once."""
    device = load("pim/dimm-pim-ddr4-3200")
    effective = device.internal_bytes_per_s * V3.kv_bytes_per_token / pim.fetched_bytes(device, V3)
    assert effective == pytest.approx(430e9, rel=2e-3)
    assert pim.fetched_bytes(device, V3, V3.naive_form) == V3.decompressed_bytes_per_token
    assert pim.fetched_bytes(device, V3, query_tokens=2) == 2 * pim.fetched_bytes(device, V3)
    # 8-bit elements come twice as fast and get half the multiply-accumulates each: no gain
    small = load("model/deepseek-v3", bytes_per_kv_element=1)
    assert pim.fetched_bytes(device, small) == pim.fetched_bytes(device, V3)
    # grouped queries are as before: one pass
    qwen = load("model/qwen-72b")
    assert pim.fetched_bytes(device, qwen) == qwen.kv_bytes_per_token


def test_both_forms_share_the_memory_of_the_pim_side():
    tables = compile_tables(NODE, V3)
    assert tables.pim_tokens == pytest.approx(2 * 1024**4 / 70_272, rel=1e-3)  # 31.3 M tokens of 2 TiB
    pool = int(tables.arrays.coef["decompressed_pool"][0])
    decompressed = int(tables.arrays.pool_blocks[0, pool]) * tables.block_tokens
    assert decompressed == pytest.approx(2 * 1024**4 / 4_997_120, rel=1e-3)
    # every GPU of a tensor-parallel replica holds the whole latent
    free = memory.free_hbm_bytes(NODE, V3, 8)
    assert tables.hbm_tokens == pytest.approx(free / 8 / 70_272, rel=1e-3)


def test_transfers_of_a_decode_step_by_hand():
    absorbed = 61 * (128 * (576 + 512) + 576) * 2
    plain = 61 * (128 * (192 + 128) + 128 * 320) * 2
    assert link.decode_request_bytes(V3) == absorbed
    assert link.decode_request_bytes(V3, V3.naive_form) == plain


# --- experts


def test_expected_experts_hit_against_counting():
    rng = np.random.default_rng(0)
    for tokens in (1, 10, 60):
        picked = np.argsort(rng.random((2000, tokens, 256)), axis=2)[:, :, :8].reshape(2000, -1)
        counted = np.mean([np.unique(row).size for row in picked[:400]])
        assert float(experts.hit_count(256, 8, 256, tokens)) == pytest.approx(counted, rel=0.01)


def test_a_decode_step_reads_the_experts_hit_and_many_tokens_compute_with_all():
    """Plain roofline: one token reads its 8 experts; a great many cost 2 FLOP a weight of the 8 each."""
    device = load("gpu/h200-ideal")
    one = float(experts.routed_s(V3, device, None, 8, np.array([1.0]))[0])
    read_s = 8 * EXPERT_PARAMETERS / 8 / (device.hbm_bytes_per_s * device.memory_utilisation_frac)
    assert one == pytest.approx(read_s, rel=0.01)
    many = float(experts.routed_s(V3, device, None, 1, np.array([1e6]))[0])
    flop_s = 1e6 * 8 * 2 * EXPERT_PARAMETERS / (device.fp8_flop_per_s * device.compute_utilisation_frac)
    assert many == pytest.approx(flop_s, rel=1e-6)


def test_the_fullest_rank_decides():
    system = load("system/h800-ep144-decode", gpu="gpu/h100-ideal", experts__imbalance_frac=0.0)
    skewed = load("system/h800-ep144-decode", gpu="gpu/h100-ideal", experts__imbalance_frac=1.0)
    many = np.array([1e5])
    even_s, skewed_s = (experts.routed_s(V3, s.gpu, s.experts, 1, many) for s in (system, skewed))
    assert float(skewed_s[0] / even_s[0]) == pytest.approx(2, rel=1e-6)
    even_s, skewed_s = (experts.all_to_all_s(s, V3, 1, many) for s in (system, skewed))
    assert float(skewed_s[0] / even_s[0]) == pytest.approx(2, rel=1e-12)


@pytest.mark.parametrize(("ranks", "measured_s"), [(64, 487e-6), (128, 561e-6), (256, 554e-6)])
def test_all_to_all_as_deep_ep_measured(ranks, measured_s):
    """128 tokens a GPU, 8 experts each: dispatch in FP8, combine in 16 bit."""
    system = load(
        "system/h800-ep144-decode",
        gpus_count=ranks,
        experts__ranks_count=ranks,
        experts__slots_count=ranks,
        experts__imbalance_frac=0.0,
    )
    assert float(experts.all_to_all_s(system, V3, 1, 128)) == pytest.approx(measured_s, rel=0.12)


def test_tokens_cross_the_network_once_per_host_when_forwarded():
    prefill = load("system/h800-ep32-prefill").experts
    network, local = experts.token_copies(V3.moe, prefill, 8)
    assert network == pytest.approx(4 * (1 - 0.75**8) * 0.75)
    assert local == pytest.approx(8 * 7 / 8)
    straight, _ = experts.token_copies(V3.moe, DECODE.experts, 8)
    assert straight == pytest.approx(8 * 17 / 18)


def test_a_gpu_of_the_decode_unit_holds_its_slots_and_all_else():
    each = 61 * MLA_PARAMETERS + 3 * 3 * 7168 * 18_432 + 58 * (7168 * 256 + 3 * EXPERT_PARAMETERS) + 2 * 129_280 * 7168
    assert memory.replica_weight_bytes(DECODE, V3, 1) == each
    assert memory.replica_weight_bytes(NODE, V3, 8) == memory.weight_bytes(V3)


def test_two_micro_batches_hide_the_all_to_all():
    one = load("system/h800-ep144-decode", experts__micro_batches_count=1)
    serial, nothing = experts.fc_and_all_to_all_s(one, V3, 1, np.array([64.0]))
    work, sending = experts.fc_and_all_to_all_s(DECODE, V3, 1, np.array([128.0]))
    assert nothing[0] == 0
    assert sending[0] > 0
    assert work[0] + sending[0] == pytest.approx(2 * serial[0], rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_taking_turns_against_two_queues_of_kernels(seed):
    """Two micro-batches, kernels in order on a compute and on a network queue, each after what it needs: a simulation
    in small steps of what ``beside_s`` gives in closed form. Sending slows computing down while it runs."""
    rng = np.random.default_rng(seed)
    attention, ffn, dispatch, combine = rng.uniform(0.2, 1.5, 4)
    share, layers = rng.uniform(0.0, 0.4), 12
    # per layer, micro-batches A and B: (queue, length, needed kernels)
    kernels: dict[tuple, tuple[str, float, list[tuple]]] = {}
    for layer in range(layers):
        for batch in "AB":
            before = [("combine", layer - 1, batch)] if layer else []
            kernels["attention", layer, batch] = ("compute", attention, before)
            kernels["dispatch", layer, batch] = ("network", dispatch, [("attention", layer, batch)])
        for batch in "AB":
            kernels["ffn", layer, batch] = ("compute", ffn, [("dispatch", layer, batch)])
            kernels["combine", layer, batch] = ("network", combine, [("ffn", layer, batch)])
    queues = {name: [key for key, kernel in kernels.items() if kernel[0] == name] for name in ("compute", "network")}
    left = {key: kernel[1] for key, kernel in kernels.items()}
    done, now_s, ends = set(), 0.0, []
    while any(queues.values()):
        running = {}
        for name, queue in queues.items():
            if queue and all(need in done for need in kernels[queue[0]][2]):
                running[name] = queue[0]
        rates = {"compute": 1 - share if "network" in running else 1.0, "network": 1.0}
        step_s = min(left[key] / rates[name] for name, key in running.items())
        now_s += step_s
        for name, key in running.items():
            left[key] -= step_s * rates[name]
            if left[key] < 1e-12:
                done.add(key)
                queues[name].pop(0)
                if key[0] == "attention" and key[2] == "A":
                    ends.append(now_s)
    steady = (ends[-1] - ends[-5]) / 4  # of one layer
    work, sent = 2 * (attention + ffn), 2 * (dispatch + combine)
    assert experts.beside_s(work, 2 * ffn, sent, dispatch / (dispatch + combine), share) == pytest.approx(steady)


def test_fine_interleaving_and_multiprocessors_taken_by_hand():
    assert experts.beside_s(3.0, 0.0, 2.0, 0.0, 0.0) == 3.0
    assert experts.beside_s(3.0, 0.0, 4.0, 0.0, 0.0) == 4.0
    assert experts.beside_s(3.0, 0.0, 2.0, 0.0, 0.25) == 3.5
    # halves: attention 1, experts 0.5, dispatch 0.75, combine 1.25, a tenth of the multiprocessors
    by_phase = (1 + 0.075) + 0.75 + 1.25 + max(1 + 0.125, 1.25)
    assert experts.beside_s(3.0, 1.0, 4.0, 0.375, 0.1) == pytest.approx(by_phase)


def test_fp8_products_as_deep_gemm_measured_them():
    """The preset holds the fit; tiles and waves, fitted to 16-bit products, do the rest."""
    assert deep_gemm.fitted_bytes_per_s(H800) == pytest.approx(H800.fp8_output_bytes_per_s, rel=2e-3)
    ratios = [(product.rows, ratio) for product, ratio in deep_gemm.ratios(H800)]
    assert len(ratios) == 28
    large = [ratio for rows, ratio in ratios if rows >= deep_gemm.FITTED_ROWS]
    assert max(abs(ratio - 1) for ratio in large) < 0.2
    assert np.mean([abs(ratio - 1) for ratio in large]) < 0.05
    assert all(0.65 < ratio < 1.1 for _, ratio in ratios)
    beside = [ratio for _, ratio in deep_gemm.ratios(load("gpu/h800", fp8_output_bytes_per_s=0.0))]
    assert min(beside) < 0.65  # what it would be if outputs were written beside computing


def test_prefill_attention_as_measured_on_an_h200():
    """Whole prompts, keys of 192 and values of 128; 16,384 tokens in all."""
    arrays = attention_rows.coefficients(SINGLE, [replace(V3, layers_count=1)])
    with (Path(__file__).parents[2] / "experiments" / "data" / "deepseek_kernels.csv").open(newline="") as file:
        found = [row for row in csv.DictReader(file) if row["operation"] == "attention"]
    assert len(found) == 6
    for row in found:
        prompts, length = (int(part) for part in row["shape"].split(" x "))
        layer_s = prefill_attention_s(arrays, prompts, length, 0)
        assert layer_s == pytest.approx(float(row["time_s"]), rel=0.07)


def test_small_kernels_of_a_prefill_layer_by_hand():
    """Bytes per token on one GPU: 16 bit in, FP8 and a scale for 128 out where a product follows."""
    quantised = 2 + 1 + 4 / 128
    attention = 4 * 7168 * 2 + 2 * (128 * 192 + 576) * 2 + (7168 + 1536 + 512 + 128 * 128) * quantised
    assert gpu.attention_elementwise_bytes(V3, H800, 1) == attention
    inner = 9 * 2048
    ffn = 4 * 7168 * 2 + 3 * inner * 2 + (7168 + inner) * quantised
    shared_sum, rows = 3 * 7168 * 2, 8 * 7168
    copied = 2 * rows * (1 + 4 / 128) + 2 * rows * 2
    prefill = load("system/h800-ep32-prefill").experts
    assert experts.expert_elementwise_bytes(V3, H800, prefill, 1) == ffn + shared_sum + copied
    assert experts.expert_elementwise_bytes(V3, H800, DECODE.experts, 1) == ffn + shared_sum  # delivered by expert
    # 16-bit products need no quantisation
    a100 = load("gpu/a100-80")
    assert gpu.attention_elementwise_bytes(V3, a100, 1) == 4 * 7168 * 2 + 2 * (128 * 192 + 576) * 2


SINGLE = replace(H800, sustained_slowdown_frac=0.0, prefill_slowdown_frac=0.0)  # at the clock of short calls
FLAT = {
    "decode_tile_s": 0.0,
    "decode_split_s": 0.0,
    "prefill_tile_s": 0.0,
    "prefill_tail_frac": 0.0,
    "fp8_utilisation_frac": 0.0,
}


def test_a_history_is_projected_from_the_latent_again():
    """2 x 512 x 32,768 FLOP a token and layer, and 65,536 bytes written after computing; nothing for plain KV."""
    ideal = load("gpu/h800", fp8_output_bytes_per_s=0.0, sm_count=0, roofline_exponent=0, **FLAT)
    flop_s = 2 * 512 * 32_768 / (ideal.fp8_flop_per_s * ideal.compute_utilisation_frac)
    assert flop_s < 65_536 / (ideal.hbm_bytes_per_s * ideal.memory_utilisation_frac)  # bound by the output
    bound = (65_536 + 512 * 2 + 512 * 32_768 / 16_384) / (ideal.hbm_bytes_per_s * ideal.memory_utilisation_frac)
    assert attention.history_token_s(V3, ideal, 1) == pytest.approx(61 * bound, rel=1e-3)
    after_s = attention.history_token_s(V3, SINGLE, 1) - 61 * 65_536 / H800.fp8_output_bytes_per_s
    assert after_s == pytest.approx(61 * flop_s, rel=0.6)
    assert attention.history_token_s(load("model/gpt-175b"), H800, 8) == 0
    assert attention.history_token_s(V3, H800, 8) == pytest.approx(attention.history_token_s(V3, H800, 1) / 8, rel=0.05)


@pytest.mark.parametrize("hit_frac", [0.0, 0.5])
def test_an_iteration_of_the_prefill_unit_is_priced_alike_in_the_engine(hit_frac):
    """Four prompts at once, in one chunk each, or in two."""
    tables = deepseek_prefill.compiled(V3)
    engine = Engine(tables, 1, 4)
    engine.reset(0, Workload.build("four", np.zeros(4), np.full(4, 4096), np.full(4, 1)))
    first = round(4096 * hit_frac) or 4096
    for chunk, history in ((first, 0), (4096 - first, first)):
        if chunk == 0:
            continue
        plan = Plan(admit=range(4) if history == 0 else (), prefill=dict.fromkeys(range(4), chunk), interleave=False)
        before_s = float(engine.state.env["clock_s"][0])
        engine.step_plan(0, plan.operations(), prefill_all=False, decode=True, interleaved=False)
        took_s = float(engine.state.env["clock_s"][0]) - before_s
        ends = history + chunk == 4096  # before that no token comes out: no head
        expected_s = deepseek_prefill.batch_s(tables, [(chunk, history)] * 4)
        assert took_s == pytest.approx(expected_s, rel=1e-9 if ends else 2e-3)


def test_prefill_at_saturation_as_published():
    """The profile within 25 % and LMSYS's figures within 35 %, at either rate of the small kernels."""
    rows = {}
    for row in deepseek_prefill.rows(V3):
        rows.setdefault(row["case"].split(",")[0], []).append(row["ratio"])
    assert len(rows["DeepSeek's profile"]) == 3
    assert all(0.8 < ratio < 1.25 for ratio in rows["DeepSeek's profile"])
    assert all(0.8 < ratio < 1.35 for ratio in rows["LMSYS prefill"])
    # misses, as the page says: a cluster on Ethernet, and a day's mean beside saturation
    assert rows["RTP-LLM prefill"][0] > 1.25
    assert rows["OI prefill"][0] == pytest.approx(rows["OI prefill"][1], rel=1e-3)
    assert rows["OI prefill"][0] > 1.25


def test_the_served_mix_follows_from_the_days_totals():
    prompt = deepseek_prefill.SERVED_PROMPT_TOKENS
    assert prompt * (1 + 168 / 608 / 2) == pytest.approx(4989)
    new, history = deepseek_prefill.whole(prompt, hit_frac=0.563)[0]
    assert new + history == 4383
    assert history / 4383 == pytest.approx(0.563, abs=1e-3)


def test_energy_counts_the_experts():
    batch_j, token_j = energy.fc_j(V3, NODE.gpu, 8)
    copied = 61 * 7 * 7168 * (1536 + 576)  # down-projections, on each of 8 GPUs
    weights = V3.layers_parameters_count() + copied
    assert batch_j == pytest.approx(weights * energy.gpu_byte_j(NODE.gpu), rel=1e-9)
    assert token_j > V3.layers_parameters_count(8) * NODE.gpu.mac_j


def test_bad_deployments_are_named():
    with pytest.raises(SpecError, match="slots_count = 288: expected a multiple of ranks_count = 100"):
        load("system/h800-ep144-decode", experts__ranks_count=100)
    with pytest.raises(SpecError, match=r"gpus_count = 96: expected a multiple of 144 ranks"):
        load("system/h800-ep144-decode", gpus_count=96)
    with pytest.raises(SpecError, match=r"moe\.chosen_count = 200: more than the chosen groups hold"):
        load("model/deepseek-v3", moe__chosen_count=200)
    with pytest.raises(SpecError, match=r"experts\.comm_sm_count = 200: expected at most the GPU's sm_count = 132"):
        load("system/h800-ep32-prefill", experts__comm_sm_count=200)
    with pytest.raises(SpecError, match="overlap_by_phase: needs micro_batches_count = 2, not 1"):
        load("system/h800-ep32-prefill", experts__micro_batches_count=1)
    with pytest.raises(SpecError, match="does not fit"):
        compile_tables(load("system/l3-dgx-a100"), V3, tp=4)


# --- the router


def test_routing_against_the_rule_token_by_token():
    rng = np.random.default_rng(1)
    scores, bias = rng.random((50, 256)), rng.normal(0, 0.1, 256)
    chosen = router.route(V3.moe, scores, bias)
    for token in range(50):
        biased = (scores[token] + bias).reshape(8, 32)
        groups = sorted(range(8), key=lambda g: -sum(sorted(biased[g])[-2:]))[:4]
        allowed = [g * 32 + i for g in groups for i in range(32)]
        best = sorted(allowed, key=lambda e: -biased.ravel()[e])[:8]
        assert sorted(chosen[token]) == sorted(best)


def test_the_bias_moves_by_gamma_against_the_load():
    moved = router.balanced(np.zeros(4), np.array([1.0, 2.0, 3.0, 2.0]), 0.001)
    assert moved.tolist() == [0.001, 0.0, -0.001, 0.0]


def test_balancing_brings_the_experts_together():
    layer = router.Layer(V3.moe, router.Popularity(), 0)
    history = layer.train(0.002, 120, 512)
    assert history[-10:].mean() < 0.6 * history[:10].mean()


def test_copies_go_to_the_most_loaded_and_every_rank_is_full():
    loads = np.ones(256)
    loads[7] = 40.0
    expert, rank = router.place(loads, 288, 32)
    assert np.bincount(rank).tolist() == [9] * 32
    assert (np.bincount(expert) >= 1).all()
    assert np.bincount(expert)[7] == 33
    shares = router.rank_loads(loads, expert, rank, 32)
    assert shares.sum() == pytest.approx(loads.sum())
    assert router.imbalance(shares) < 0.1


def test_measured_imbalance_of_r1():
    found = deepseek_balance.stored()["ranks"]["h800-ep32-prefill"]
    assert found["fixed_mean"] == pytest.approx(1.56, rel=0.2)
    assert found["rebalanced_mean"] == pytest.approx(0.11, abs=0.04)
    for name in deepseek_balance.SYSTEMS:  # the presets carry what the study found
        found = deepseek_balance.stored()["ranks"][name]["rebalanced_mean"]
        for system in (name, f"l3-{name}"):
            assert load(f"system/{system}").experts.imbalance_frac == pytest.approx(found, abs=1e-3)


# --- guessing tokens


def test_acceptance_is_kept_on_average():
    for p in (0.0, 0.3, 0.85, 1.0):
        assert draft_classes(np.full(4000, p)).mean() / 8 == pytest.approx(p, abs=1e-3)
    with pytest.raises(WorkloadError, match="acceptance_frac"):
        draft_classes(np.array([1.2]))


@pytest.mark.parametrize("acceptance_frac", [0.0, 0.25, 0.5, 0.85, 1.0])
def test_a_step_emits_one_plus_p_tokens(acceptance_frac):
    """One request: 801 tokens, one by prefill, 1 + p by each step; without guesses one by each."""
    tables = compile_tables(NODE, load("model/deepseek-v3", draft_acceptance_frac=acceptance_frac))
    workload = Workload.build("one", np.zeros(8), np.full(8, 100), np.full(8, 801))
    for on in (False, True):
        metrics = run_policy(tables, workload, FixedKnobs("x", Knobs(hbm_share_frac=1.0, multi_token=on))).metrics
        emitted = 1 + math.floor(8 * acceptance_frac) / 8 if on else 1  # of the slowest: acceptance is in eighths
        steps = metrics["iterations_count"] - 1
        assert steps == pytest.approx(800 / emitted, rel=0.03)
        assert metrics["finished_count"] == 8
        assert metrics["output_tokens_per_s"] * metrics["makespan_s"] == pytest.approx(8 * 801)


def test_guessing_gains_most_for_few_requests_and_loses_for_many():
    tables = compile_tables(DECODE, V3)
    gain = [deepseek_v3.guessing_gain(tables, n, 2048, 0.85) for n in (8, 256)]
    assert gain[0] == pytest.approx(1.8, rel=0.1)
    assert gain[1] < 1


# --- places


def test_plans_name_the_place():
    engine = Engine(compile_tables(NODE, V3), 1, 3)
    engine.reset(0, Workload.build("three", np.zeros(3), np.full(3, 64), np.full(3, 8)))
    plan = Plan(admit={0: "hbm", 1: "pim", 2: "pim-decompressed"})
    engine.step_plan(0, plan.operations(), prefill_all=True, decode=True, interleaved=False)
    lanes = engine.state.req["lane"][0].tolist()
    lane = int(engine.tables.coef["decompressed_lane"][0])
    assert lanes[0] == 0
    assert 0 < lanes[1] < lane
    assert lanes[2] == lane
    plain = Engine(compile_tables(NODE, load("model/qwen-72b")), 1, 1)
    plain.reset(0, Workload.build("one", np.zeros(1), np.full(1, 64), np.full(1, 8)))
    plan = Plan(admit={0: "pim-decompressed"})
    with pytest.raises(PlanError, match="no such pool"):
        plain.step_plan(0, plan.operations(), prefill_all=True, decode=True, interleaved=False)
    with pytest.raises(PlanError, match="pim_form"):
        Knobs(pim_form=3)


def test_choosing_by_prediction_is_never_much_worse_than_the_best_place():
    cells = list(deepseek_places.cells())
    assert {cell.model for cell in cells} == set(deepseek_places.MODELS)
    assert all(cell.rates[cell.best] > 0 for cell in cells)
    assert min(cell.adaptive_ratio for cell in cells) > 0.97
    assert len({cell.best for cell in cells}) > 1


# --- everything runs on it


@pytest.mark.parametrize("name", sorted({*policy_names(), str(PLACEMENT)}))
@pytest.mark.parametrize("system", ["l3-dgx-h200", "h800-ep144-decode"])
def test_every_policy_serves_it(name, system):
    tables = compile_tables(load(f"system/{system}"), V3)
    workload = Workload.build("mixed", np.arange(24) * 0.05, np.arange(24) * 37 + 20, np.arange(24) * 3 + 2)
    try:
        policy = make_policy(name)
    except PolicyError as error:
        pytest.skip(f"its own data is not there: {error}")
    outcome = run_policy(tables, workload, policy, training=workload)
    assert outcome.metrics["finished_count"] == 24
    assert math.isfinite(outcome.metrics["output_tokens_per_s"])


@pytest.mark.parametrize("form", list(PimForm))
def test_a_copy_of_its_present_goes_on_as_the_original(form):
    """Clocks of every draft class are in the copy that planning policies try things out on."""
    tables = compile_tables(load("system/l3-h800-ep144-decode"), V3)
    rng = np.random.default_rng(0)
    count = 60
    work = Workload.build("busy", np.zeros(count), rng.integers(20, 3000, count), rng.integers(50, 400, count))
    live = Engine(tables, 1, count)
    live.reset(0, work, acceptance_frac=rng.random(count))
    held = Knobs(pim_form=form, prefill_budget_tokens=4096)
    held.write(live.knobs, 0)
    live.run(0, Until.ITERATIONS, 60)
    idx = present_idx(live, 0)
    decoding = live.state.req["status"][0] == Status.DECODE
    assert len(set(live.state.req["draft_class"][0, decoding].tolist())) > 5
    rollouts = Rollouts(tables, 2, 1)
    rollouts.imagine(live, 0, idx, 0, live.state.truth[0, idx].astype(np.int64), None, Slo())
    for trial in (0, 1):
        rollouts.start(trial, 0)
        held.write(rollouts.engine.knobs, trial)
    rollouts.run_until(np.full(2, 1e9))
    live.run(0)
    for trial in (0, 1):
        finish_s = rollouts.engine.state.req["finish_s"][trial, : idx.size]
        np.testing.assert_array_equal(finish_s, live.state.req["finish_s"][0, idx])
        assert rollouts.env["output_tokens"][trial] == live.state.env["output_tokens"][0]


def test_decompressed_kv_takes_71_times_the_memory():
    tables = compile_tables(NODE, V3)
    workload = Workload.build("equal", np.zeros(16), np.full(16, 1000), np.full(16, 10))
    used = []
    for form in PimForm:
        knobs = Knobs(hbm_share_frac=0.0, pim_form=form, multi_token=False)
        timeline = run_policy(tables, workload, FixedKnobs("x", knobs)).timeline
        used.append(timeline["kv_pim_frac"].max())
    assert used[1] / used[0] == pytest.approx(4_997_120 / 70_272, rel=0.05)
