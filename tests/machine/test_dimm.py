"""The rank simulator against closed forms, DDR4's rules and hand calculation; the fit against the simulator."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

from l3env.errors import SpecError
from l3env.experiments.reproduce import ablation
from l3env.machine import specs
from l3env.machine.costs import pim as costs
from l3env.machine.dimm import fit
from l3env.machine.dimm.bus import Command
from l3env.machine.dimm.setup import RankSetup, best_mapping, ddr4, params
from l3env.machine.dimm.simulate import expand, host_relayout_s, job_transfer_bytes, simulate
from l3env.machine.dimm.stored import RankFit, load_fit, to_toml
from l3env.machine.tables import compile_tables
from tests.machine.dram_rules import broken_rules

DDR4 = ddr4()
NS = 1e-9
CASES = {
    "mha": {},
    "mha-serial": {"pipelined": False},
    "gqa8": {"queries_per_kv_head": 8, "chips_per_head": 1},
    "gqa8-spread": {"queries_per_kv_head": 8, "chips_per_head": 8},
    "gqa8-serial": {"queries_per_kv_head": 8, "chips_per_head": 8, "pipelined": False},
    "gqa16": {"queries_per_kv_head": 16, "chips_per_head": 1},
    "gqa4": {"queries_per_kv_head": 4, "chips_per_head": 2},
    "mqa32": {"queries_per_kv_head": 32, "chips_per_head": 2, "token_split": 4},
    "rank": {"bank_level": False},
    "rank-gqa8": {"bank_level": False, "queries_per_kv_head": 8},
}
TIMINGS = [f.name for f in dataclasses.fields(specs.DramSpec) if f.name.endswith("_cycles")]
GEOMETRY = ("bl_cycles", "ccd_s_cycles", "ccd_l_cycles")  # fixed by the slots of the command bus
MIXED = [700, 33, 1, 2500, 16, 16, 129]


def token_ns(length: int = 64 * 512, jobs: int = 2, **changes) -> float:
    """Time per token and KV head in a long run."""
    setup = RankSetup(**changes)
    return simulate(setup, [length] * jobs).seconds / (length * jobs * setup.heads_per_job) / NS


# --- closed forms


def test_row_streaming_efficiency():
    """128 reads at tCCD_L a row, then tRP + tRCD: 1024 / 1068; we also wait tRTP for the precharge."""
    got = 2 * 256 / token_ns(refresh=False) / (8 * 16 * 8 / (8 * 0.63))
    assert got == pytest.approx(128 * 8 / (128 * 8 + 22 + 22), rel=0.01)
    assert got == pytest.approx(128 * 8 / (127 * 8 + 12 + 22 + 22), rel=0.002)


@pytest.mark.parametrize("faw", [34, 40, 64, 100])
def test_opening_all_banks_takes_four_activation_windows(faw):
    """16 tokens open 16 rows for 4 column reads each: activations are all that counts."""
    setup = RankSetup(dram=dataclasses.replace(DDR4, faw_cycles=faw), refresh=False, host_input=False)
    outcome = simulate(setup, [16] * 200)
    assert outcome.activations_count == 200 * 2 * 16
    # up to a cycle is lost to runs on the command bus, once or twice a window
    assert outcome.cycles / (200 * 2) == pytest.approx(4 * faw, rel=0.025)


def test_staggered_activations_are_hidden_behind_long_rows():
    slow = RankSetup(dram=dataclasses.replace(DDR4, faw_cycles=200), refresh=False)
    assert simulate(slow, [64 * 512]).seconds == pytest.approx(
        simulate(RankSetup(refresh=False), [64 * 512]).seconds, rel=0.02
    )


@pytest.mark.parametrize("case", ["mha", "gqa8", "rank", "mha-serial"])
def test_refresh_takes_trfc_of_every_trefi(case):
    setup = RankSetup(**CASES[case])
    length = 4096 * 32 // setup.heads_per_job
    outcome = simulate(setup, [length] * 4)
    assert outcome.refreshes_count == pytest.approx(outcome.cycles / 12480, abs=5)  # up to 4 are owed at the end
    still = simulate(dataclasses.replace(setup, refresh=False), [length] * 4)
    share = 1 - still.cycles / outcome.cycles
    assert share == pytest.approx(560 / 12480, abs=0.005)  # of the whole time; draining and opening rows cost the rest


@pytest.mark.parametrize(("case", "heads"), [("mha", 1), ("gqa8", 8)])
def test_a_rank_streams_its_share_of_13_tb_per_s(case, heads):
    """13.0 TB/s over 64 ranks times the closed form in the preset (row switches and refresh)."""
    pim = specs.load("pim/dimm-pim-ddr4-3200")
    per_rank = pim.internal_bytes_per_s / 64
    assert per_rank == pytest.approx(13.0e12 / 64, rel=1e-3)
    got = 2 * 256 / (token_ns(length=64 * 1024 // heads, **CASES[case]) * NS)
    assert got == pytest.approx(per_rank * pim.internal_utilisation_frac, rel=0.012)


def test_rank_level_units_stream_at_the_rate_of_the_bus():
    pim = specs.load("pim/rank-pim-ddr4-3200")
    got = 2 * 256 / (token_ns(bank_level=False) * NS)
    assert got == pytest.approx(pim.internal_bytes_per_s / 64 * pim.internal_utilisation_frac, rel=0.01)


def test_bounds_of_chips_per_head():
    """E_h B_rk ceil(N_gqa / N_cmr) / (B_bk N_bk N_gqa N_chips): 16 for MHA, 2 for GQA-8; the paper takes 8 and 1."""
    assert RankSetup().chips_per_head_bound == pytest.approx(16, rel=1e-9)
    assert RankSetup(queries_per_kv_head=8).chips_per_head_bound == pytest.approx(2, rel=1e-9)
    assert best_mapping(1, 96) == (8, 1)
    assert best_mapping(8, 8) == (1, 1)
    assert best_mapping(32, 1) == (2, 4)  # one KV head: up to the bound, then its tokens over the other chips


@pytest.mark.parametrize("queries", [1, 2, 4, 8])
@pytest.mark.parametrize("chips", [1, 2, 4, 8])
def test_communication_is_hidden_up_to_the_bound_and_decides_beyond(queries, chips):
    setup = RankSetup(queries_per_kv_head=queries, chips_per_head=chips, refresh=False)
    got = token_ns(64 * 512, queries_per_kv_head=queries, chips_per_head=chips, refresh=False)
    computing = 2 * 256 / (203.17e9 * 0.9552) / NS
    moving = 2 * queries * chips * 2 / 25.397e9 / NS  # partial scores of N_hc chips out, probabilities to them in
    if chips < setup.chips_per_head_bound / 1.1:
        assert got == pytest.approx(computing, rel=0.02)
    elif chips > setup.chips_per_head_bound * 1.1:
        assert got == pytest.approx(moving, rel=0.03)  # turning the bus round twice a tile, rescaling factors
    else:
        assert got == pytest.approx(max(computing, moving), rel=0.08)  # turning the bus round shows


def test_pipelining_by_hand():
    """MHA: 1.26 ns computing, 0.63 moving, twice a token: 3.8 in series, 2.5 overlapped. GQA-8: 2 x 6.3, 2 x 1.26."""
    rows = 1068 / 1024
    assert token_ns(refresh=False, pipelined=False) == pytest.approx(2 * (1.26 + 0.63), rel=0.03)
    assert token_ns(refresh=False) == pytest.approx(2 * 1.26 * rows, rel=0.01)
    assert token_ns(refresh=False, **CASES["gqa8-serial"]) == pytest.approx(2 * (1.26 + 5.04), rel=0.02)
    assert token_ns(refresh=False, **CASES["gqa8"]) == pytest.approx(2 * 1.26 * rows, rel=0.01)


def test_one_tile_by_hand():
    """512 tokens of MHA: rows, K, the last scores, softmax, first probabilities, V, output; the rest is hidden."""
    d = DDR4
    last_bank = 3 * d.faw_cycles + 3 * d.rrd_s_cycles + d.rcd_cycles  # the 16th row is open
    scores = last_bank + 127 * 8 + 8 + d.cl_cycles + d.bl_cycles
    first_part = -(-129 // 8) * 4  # an eighth of 128 bursts of probabilities and one of factors
    probabilities = scores + 64 + first_part + d.wl_cycles + d.bl_cycles
    context = probabilities + 8 + 8 + 127 * 8 + 8  # operands, rescaling, columns, result
    output = context + 16 * 4 + d.cl_cycles + d.bl_cycles
    assert simulate(RankSetup(host_input=False, refresh=False), [512]).cycles == pytest.approx(output, rel=0.015)


def test_host_relayout_is_two_passes_over_the_channel_for_four_ranks():
    """MHA: Q, K, V and output of 256 B each."""
    assert job_transfer_bytes(RankSetup()) == 1024
    assert job_transfer_bytes(RankSetup(**CASES["gqa8"])) == (64 + 8 + 8 + 64) * 256
    assert host_relayout_s(RankSetup(), 3) == pytest.approx(3 * 2 * 1024 * 4 / 25.397e9, rel=1e-4)
    with_it, without = (simulate(RankSetup(hardware_relayout=h), [512] * 3).seconds for h in (True, False))
    assert without - with_it == pytest.approx(host_relayout_s(RankSetup(), 3))


# --- DDR4's rules


@pytest.mark.parametrize("case", CASES)
def test_every_command_obeys_ddr4(case):
    setup = RankSetup(**CASES[case])
    outcome = simulate(setup, MIXED, trace_rows=60_000)
    assert broken_rules(expand(outcome.trace), DDR4, refresh_until=outcome.cycles) == []


@pytest.mark.parametrize("case", ["mha", "mha-serial"])
def test_refreshes_keep_up_in_a_longer_run(case):
    setup = RankSetup(**CASES[case])
    outcome = simulate(setup, [9000, 5000], trace_rows=20_000)
    assert outcome.refreshes_count >= 4
    assert broken_rules(expand(outcome.trace), DDR4, refresh_until=outcome.cycles) == []


@pytest.mark.parametrize(
    ("field", "rule", "case"),
    [
        ("rp_cycles", "tRP", "mha"),
        ("rcd_cycles", "tRCD", "mha"),
        ("faw_cycles", "tFAW", "mha"),
        ("rtp_cycles", "tRTP", "mha"),
        ("rrd_s_cycles", "tRRD_S", "mha"),
        ("rfc_cycles", "tRFC", "mha"),
        ("wtr_l_cycles", "tWTR_L", "mha"),
        ("ras_cycles", "tRAS", "short"),
        ("rc_cycles", "tRC", "short"),
        ("rrd_l_cycles", "tRRD_L", "short"),
    ],
)
def test_the_rules_notice_a_controller_that_breaks_them(field, rule, case):
    """A die that were faster in one parameter breaks exactly that rule of the real one."""
    changes = {field: getattr(DDR4, field) // 2}
    if case == "short":  # where other rules leave room for this one to bind
        changes = {"rp_cycles": 8, "rtp_cycles": 4, "faw_cycles": 4, "rrd_s_cycles": 1} | changes
    fast = dataclasses.replace(DDR4, **changes)
    real = dataclasses.replace(fast, **{field: getattr(DDR4, field)})
    lengths = [4, 4, 16, 16] * 3 if case == "short" else [9000, 5000]
    trace = simulate(RankSetup(dram=fast), lengths, trace_rows=40_000).trace
    rules = {text.split(":")[0].removesuffix(" before REF") for text in broken_rules(expand(trace), real)}
    assert rules == {rule}


# --- conservation, order, monotonicity


@pytest.mark.parametrize("case", CASES)
def test_columns_read_are_the_bytes_of_kv(case):
    setup = RankSetup(**CASES[case])
    p = params(setup)
    tokens = p.tile_tokens * setup.token_split if setup.bank_level else 128
    lengths = [tokens, 3 * tokens, 2 * tokens]
    outcome = simulate(setup, lengths, trace_rows=60_000)
    kv_bytes = sum(lengths) * 2 * 256 * setup.heads_per_job
    assert outcome.columns_count * 8 * setup.chips == kv_bytes * setup.passes
    done = expand(outcome.trace)
    reads = np.isin(done[:, 1], (Command.MAC, Command.RD))
    assert reads.sum() == outcome.columns_count
    if setup.bank_level:
        scores = (done[:, 1] == Command.RD_RB).sum() - p.output_bursts * len(lengths)
        per_token = 2 * setup.queries_per_kv_head * setup.chips / setup.token_split
        assert scores * 64 == sum(lengths) * per_token
        queries = setup.queries_per_kv_head * setup.head_size * 2 * setup.heads_per_job * setup.token_split
        written = (done[:, 1] == Command.WR_SB).sum() * 64 - queries * len(lengths)
        assert written >= sum(lengths) * per_token


@pytest.mark.parametrize("case", [name for name, kw in CASES.items() if kw.get("bank_level", True)])
@pytest.mark.parametrize("fill", [1.0, 0.6])
def test_nothing_is_used_before_it_is_there(case, fill):
    """One tile: scores are read after the columns that make them, probabilities come before the columns that need
    them, the softmax lies between, the output last."""
    setup = RankSetup(refresh=False, **CASES[case])
    p = params(setup)
    tokens = int(p.tile_tokens * fill)
    done = expand(simulate(setup, [tokens * setup.token_split], trace_rows=20_000).trace)
    macs = {b: done[(done[:, 1] == Command.MAC) & (done[:, 2] == b), 0] for b in range(16)}
    per_bank = -(-tokens // 16)
    k_columns = per_bank * p.k_columns * setup.passes
    reads, writes = (done[done[:, 1] == kind, 0] for kind in (Command.RD_RB, Command.WR_SB))
    scores, output = reads[: -p.output_bursts], reads[-p.output_bursts :]
    queries, probabilities = writes[: p.query_bursts], writes[p.query_bursts :]
    assert min(macs[b][0] for b in range(16)) > queries[-1] + DDR4.wl_cycles + DDR4.bl_cycles
    for i, cycle in enumerate(scores):  # a round of one burst (4 scores) per bank after the other
        token = min(-(-(i // 16 + 1) * 4 // setup.queries_per_kv_head), per_bank)
        assert cycle >= macs[i % 16][token * p.k_columns * setup.passes - 1] + setup.result_cycles
    assert probabilities[0] >= scores[-1] + DDR4.cl_cycles + DDR4.bl_cycles + setup.softmax_cycles
    factors = -(-setup.queries_per_kv_head // 4)
    sets = 16 // p.v_banks
    for i in range(tokens):
        burst = factors + (i * setup.queries_per_kv_head) // 4
        column = k_columns + i // sets * p.v_columns * setup.passes
        assert macs[0][column] >= probabilities[burst] + DDR4.wl_cycles + DDR4.bl_cycles
    assert output[0] > max(macs[b][-1] for b in range(16))


@pytest.mark.parametrize("case", ["mha", "mha-serial", "gqa8", "rank"])
@pytest.mark.parametrize("field", [name for name in TIMINGS if name not in GEOMETRY])
def test_slower_memory_is_never_faster(case, field):
    """A quarter more of one parameter; 1 % is left for what scheduling makes of it."""
    factor = 0.8 if field == "refi_cycles" else 1.25
    slower = dataclasses.replace(DDR4, **{field: int(getattr(DDR4, field) * factor)})
    setup = RankSetup(**CASES[case])
    base = simulate(setup, [3000, 700, 9000]).cycles
    assert simulate(dataclasses.replace(setup, dram=slower), [3000, 700, 9000]).cycles >= base * 0.99


@pytest.mark.parametrize("queries", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("chips", [1, 2, 8])
@pytest.mark.parametrize("length", [1, 100, 513, 5000])
def test_pipelined_is_never_slower_than_serial(queries, chips, length):
    changes = {"queries_per_kv_head": queries, "chips_per_head": chips, "refresh": False}
    fast, slow = (simulate(RankSetup(pipelined=on, **changes), [length] * 3).cycles for on in (True, False))
    assert fast <= slow


@pytest.mark.parametrize("case", CASES)
def test_more_tokens_and_more_jobs_take_longer(case):
    setup = RankSetup(refresh=False, **CASES[case])
    times = [simulate(setup, [n]).cycles for n in (1, 16, 64, 200, 512, 700, 1024, 4096)]
    assert times == sorted(times)
    assert simulate(setup, [700] * 3).cycles > simulate(setup, [700] * 2).cycles


def test_compiled_and_interpreted_kernels_agree():
    script = "from l3env.machine.dimm.simulate import RankSetup, simulate; "
    script += "print([simulate(RankSetup(**k), [700, 16]).cycles "
    script += "for k in ({}, {'pipelined': False}, {'queries_per_kv_head': 8, 'chips_per_head': 1}, "
    script += "{'bank_level': False})])"
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    told = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    cases = ({}, CASES["mha-serial"], CASES["gqa8"], CASES["rank"])
    assert told.stdout.strip() == str([simulate(RankSetup(**case), [700, 16]).cycles for case in cases])


def test_bad_input_is_named():
    with pytest.raises(SpecError, match="expected at least one job"):
        simulate(RankSetup(), [])
    with pytest.raises(SpecError, match="expected at least one job"):
        simulate(RankSetup(), [0])
    with pytest.raises(SpecError, match="trace_rows = 3: the run has"):
        simulate(RankSetup(), [512], trace_rows=3)
    with pytest.raises(SpecError, match="divides 8 chips"):
        RankSetup(chips_per_head=3)


def test_a_long_context_takes_seconds_at_most():
    """128k tokens of 64 requests in one rank: a hundred thousand tiles."""
    outcome = simulate(RankSetup(**CASES["gqa8"]), np.full(64, 131_072))
    assert outcome.seconds == pytest.approx(64 * 131_072 * 8 * 2.77e-9, rel=0.01)


# --- the linear model

STORED = {name: load_fit(f"pim_fit/{name}") for name in ("dimm-pim-ddr4-3200", "rank-pim-ddr4-3200")}
SHORT_GRID = fit.equal_batches(lengths=(128, 300, 777, 2048, 10_000), batches=(1, 3, 16, 64))


@pytest.mark.parametrize("name", STORED)
def test_stored_fits_cover_the_whole_grid_within_2_and_5_percent(name):
    stored = STORED[name]
    assert {kind.name for kind in stored.kinds} == set(fit.QUERIES)
    assert (min(fit.LENGTHS), max(fit.LENGTHS)) == (128, 128 * 1024)
    assert (min(fit.BATCHES), max(fit.BATCHES)) == (1, 512)
    for kind in stored.kinds:
        assert kind.points_count == len(fit.LENGTHS) * len(fit.BATCHES)
        assert kind.error_median_frac <= 0.02
        assert kind.error_p99_frac <= 0.05
        assert kind.unseen_error_median_frac <= 0.02


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("kind_name", fit.QUERIES)
def test_stored_fits_predict_what_the_simulator_says_now(name, kind_name):
    """A change of the simulator that moves its times shows here: run experiments/fit_pim.py --write."""
    stored = STORED[name].find(fit.QUERIES[kind_name][0])
    setup, _ = fit.rank_setup(kind_name, "rank" not in name, STORED[name].macs_per_element_count)
    assert (setup.chips_per_head, setup.token_split) == (stored.chips_per_head_count, stored.token_split_count)
    assert (setup.heads_per_job, setup.passes) == (stored.heads_per_job_count, stored.passes_count)
    off = fit.errors(fit.run_grid(setup, SHORT_GRID), stored.token_s, stored.job_s, stored.batch_s)
    assert np.median(off) <= 0.02
    assert off.max() <= stored.error_worst_frac + 0.005


def test_fitting_a_line_gives_the_line():
    tokens, jobs = np.array([1e3, 5e3, 9e3, 9e3]), np.array([1.0, 2.0, 3.0, 8.0])
    grid = fit.Grid(tokens, jobs, 3e-9 * tokens + 2e-7 * jobs + 1e-6)
    assert fit.fit(grid) == pytest.approx((3e-9, 2e-7, 1e-6))
    assert fit.errors(grid, 3e-9, 2e-7, 1e-6) == pytest.approx(np.zeros(4), abs=1e-12)


def test_a_stored_fit_reads_back(tmp_path, monkeypatch):
    monkeypatch.setattr("l3env.machine.dimm.stored.FIT_DIR", tmp_path)
    whole = STORED["dimm-pim-ddr4-3200"]
    mine = RankFit("mine", whole.rank_bytes_per_s, 8, whole.kinds[:2])
    (tmp_path / "mine.toml").write_text(to_toml(mine, "a test"))
    assert load_fit("pim_fit/mine") == load_fit(str(tmp_path / "mine.toml")) == mine
    with pytest.raises(
        SpecError, match=r"unknown fit 'pim_fit/min' \(did you mean 'pim_fit/mine'\?\); there are: mine"
    ):
        load_fit("pim_fit/min")
    (tmp_path / "other.toml").write_text('pim = "mine"\n')
    with pytest.raises(SpecError, match=r"other\.toml: not a fit .*rank_bytes_per_s|other\.toml: not a fit .*kind"):
        load_fit(str(tmp_path / "other.toml"))


@pytest.mark.parametrize("model_name", ["gpt-175b", "qwen-72b", "llama-3-8b"])
@pytest.mark.parametrize("system_name", ["l3-dgx-a100", "rank-pim-dgx-a100"])
def test_the_engines_coefficients_are_the_simulated_attention_of_all_layers(system_name, model_name):
    """What a lane of one replica takes for a mixed batch, against simulating one layer of it rank by rank."""
    system, model = specs.load(f"system/{system_name}"), specs.load(f"model/{model_name}")
    tables = compile_tables(system, model)
    coef = tables.arrays.coef[0]
    lengths = np.array([900, 4000, 2500, 12_000, 7000, 3100, 640, 5200] * 4)
    predicted_s = coef["pim_token_s"] * lengths.sum() + coef["pim_request_s"] * len(lengths) + coef["pim_batch_s"]
    queries = model.gqa_group_count
    setup = RankSetup(queries_per_kv_head=queries, host_input=False, bank_level=system.pim.kind == "dimm-bank")
    if setup.bank_level:
        setup = dataclasses.replace(setup, chips_per_head=best_mapping(queries, model.kv_heads_count)[0])
    jobs = np.repeat(lengths, model.kv_heads_count // setup.heads_per_job)
    if queries == 1:  # a request's heads spread over the replica's ranks
        ranks = 64 // tables.replicas_count
        jobs = np.random.default_rng(1).permutation(jobs)
        layer_s = np.mean([fit.mean_seconds(setup, jobs[rank::ranks]) for rank in range(ranks)])
    else:
        layer_s = fit.mean_seconds(setup, jobs)
    assert predicted_s == pytest.approx(model.layers_count * layer_s, rel=0.02)


def test_a_fit_is_of_one_memory_and_without_one_there_is_the_closed_form():
    device, model = specs.load("pim/dimm-pim-ddr4-3200"), specs.load("model/qwen-72b")
    rate = costs.layout(device, model, 2).lane_bytes_per_s
    twice = dataclasses.replace(device, internal_bytes_per_s=2 * device.internal_bytes_per_s)
    for times in (costs.lane_token_s, costs.lane_request_s):
        with pytest.raises(
            SpecError, match=r"is of dimm-pim-ddr4-3200, whose ranks stream 2\.032e\+11 bytes/s; these stream 4"
        ):
            times(twice, model, 2 * rate)
    closed = dataclasses.replace(twice, fit=None)
    assert costs.lane_token_s(closed, model, 2 * rate) == model.kv_bytes_per_token / (2 * rate)
    assert costs.lane_request_s(closed, model, 2 * rate) == costs.batch_s(closed, model) == 0
    small = dataclasses.replace(model, head_size=64)
    assert costs.lane_token_s(device, small, rate) == costs.stream_token_s(device, small, rate)
    assert costs.lane_request_s(device, small, rate) == costs.batch_s(device, small) == 0
    hbm = specs.load("pim/hbm-pim-a100")
    assert costs.lane_token_s(hbm, model, 1e12) == model.kv_bytes_per_token / 1e12
    assert costs.lane_request_s(hbm, model, 1e12) == 0


def test_ablation_is_within_a_fifth_of_the_paper_or_says_why():
    rows = ablation.rows()
    assert len(rows) >= 9
    for row in rows:
        assert set(row) == {"figure", "case", "quantity", "paper", "ours", "ratio", "note"}
        assert row["ratio"] == pytest.approx(row["ours"] / row["paper"])
        limit = "at least" in row["quantity"]
        assert row["note"] or row["ratio"] > 0.8 if limit else abs(row["ratio"] - 1) < 0.2
