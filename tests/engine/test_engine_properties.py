"""What must hold in every run: nothing lost, nothing overfull, nothing faster on a slower machine; and two toy
machines whose answers are worked out by hand."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l3env.choices import ORDERS_COUNT, Budget, Order, Status, SubBatching, Victim
from l3env.engine.engine import Engine, Slo, Stop, Until
from l3env.engine.state import ADDED, ARRIVAL_HEAP, DRAFT_CLASSES, FINISH_HEAP, NOWHERE, PrefixArrays, arrays, copy
from l3env.errors import PlanError, WorkloadError
from l3env.knobs import Knobs
from l3env.machine import specs
from l3env.machine.tables import compile_tables
from l3env.policy.plan import Plan
from l3env.policy.view import View
from l3env.requests.workload import Workload
from tests.engine.engine_cases import Case, cases, compiled, knobs, with_coef, with_memory
from tests.engine.prefix_checks import check_prefix

PROFILE = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
RUNNING = (Status.PREFILL, Status.DECODE, Status.PAUSED)


def decoded_since_joining(state, e, r):
    """Tokens emitted by decode steps since a request joined its sub-batch."""
    req = state.req[e, r]
    clock = state.group["clock"][e, req["sub"], req["draft_class"]]
    return int(clock - req["joined_clock"]) if req["status"] == Status.DECODE else 0


def check(engine, e=0):
    """All that is kept up to date step by step equals what it stands for, summed anew."""
    state = engine.state
    req = state.req[e, : state.env["requests_count"][e]]
    running = np.flatnonzero(np.isin(req["status"], RUNNING)).tolist()
    steps = np.zeros(len(req), int)
    steps[running] = [decoded_since_joining(state, e, r) for r in running]
    check_places(state, e, req, running)
    check_memory_and_lanes(engine, e, req, running, steps)
    check_tokens_and_times(state, e, req, running, req["emitted_tokens"] + steps)
    check_heaps(state, e, req, req["emitted_tokens"] + steps)


def check_places(state, e, req, running):
    """Every request is somewhere."""
    env, status = state.env[e], req["status"]
    assert env["running_count"] == len(running)
    assert env["waiting_count"] == (status == Status.WAITING).sum()
    assert env["finished_count"] == (status == Status.FINISHED).sum()
    assert env["rejected_count"] == (status == Status.REJECTED).sum()
    assert env["arrived_count"] == (status != Status.FUTURE).sum()
    assert len(running) + env["waiting_count"] + env["finished_count"] + env["rejected_count"] == env["arrived_count"]
    assert sorted(state.lists["running"][e, : len(running)].tolist()) == running
    assert state.lists["running"][e, req["running_pos"][running]].tolist() == running
    prefilling = sorted(np.flatnonzero(status == Status.PREFILL).tolist(), key=lambda r: req["admitted_seq"][r])
    assert state.lists["prefill"][e, : env["prefill_count"]].tolist() == prefilling


def check_memory_and_lanes(engine, e, req, running, steps_of):
    """Blocks by pool, sums by lane, phases of growth: from the running requests one by one."""
    tables, state = engine.pair(e), engine.state
    coef, status = tables.arrays.coef[0], req["status"]
    block, lanes, pools = int(coef["block_tokens"]), int(coef["lanes_count"]), int(coef["pools_count"])
    lane_pool, capacity = tables.arrays.lane_pool[0], tables.arrays.pool_blocks[0]
    used, promised = check_prefix(state, lane_pool, e)[:pools], np.zeros(pools, int)
    lane = {name: np.zeros((2, lanes)) for name in ("count", "kv", "pending")}
    phase = np.zeros_like(state.phase[e])
    lane_class = np.zeros((2, state.lane.shape[2], state.group.shape[2]), int)
    members = [0, 0]
    emitted = req["emitted_tokens"].astype(int)
    for r in running:
        steps = steps_of[r]
        kv, pool, sub = int(req["kv_tokens"][r]) + steps, lane_pool[req["lane"][r]], req["sub"][r]
        emitted[r] += steps
        members[sub] += 1
        promised[pool] += req["promised_blocks"][r]
        if status[r] == Status.PREFILL:
            assert req["target_tokens"][r] == req["prompt_tokens"][r] + emitted[r]
            assert 0 <= req["prefilled_tokens"][r] < req["target_tokens"][r]
            used[pool] += own_blocks(state, e, r, req["target_tokens"][r], block)
            lane["pending"][sub, req["lane"][r]] += req["target_tokens"][r]
            continue
        assert kv == req["prompt_tokens"][r] + emitted[r] - 1
        used[pool] += own_blocks(state, e, r, kv, block)
        if status[r] == Status.PAUSED:
            lane["pending"][sub, req["lane"][r]] += kv
            continue
        assert emitted[r] < state.truth[e, r]
        lane["count"][sub, req["lane"][r]] += 1
        lane["kv"][sub, req["lane"][r]] += kv
        draft = req["draft_class"][r]
        lane_class[sub, req["lane"][r], draft] += 1
        own = kv - prefix_column(state, e, "ids_tokens")[r]
        phase[sub, pool, draft, (state.group["clock"][e, sub, draft] - own) % block] += 1
    assert state.pool["used"][e, :pools].tolist() == used.tolist()
    assert state.pool["promised"][e, :pools].tolist() == promised.tolist()
    assert (state.pool["used"][e, :pools] <= state.pool["peak"][e, :pools]).all()
    assert (state.pool["peak"][e, :pools] <= capacity[:pools]).all()
    if isinstance(state.prefix, PrefixArrays):
        full = state.pool["used"][e, :pools] + state.prefix.pool["cached"][e, :pools]
        assert (full <= capacity[:pools]).all()
    for name, expected in lane.items():
        assert state.lane[name][e, :, :lanes].tolist() == expected.tolist(), name
    assert (state.phase[e] == phase).all()
    guesses = bool((engine.tables.coef["drafts_count"] > 0).any())
    assert lane_class.shape[2] == (DRAFT_CLASSES if guesses else 1)
    assert (state.lane_class[e] == lane_class).all() if guesses else state.lane_class == ()
    if coef["decompressed_pool"]:  # both forms of KV fit in the same memory
        taken = used[coef["decompressed_pool"]] * coef["decompressed_share"]
        assert (used[1 : coef["decompressed_pool"]] + taken <= capacity[1 : coef["decompressed_pool"]] + 1e-6).all()
    assert state.sub["members"][e].tolist() == members


def check_tokens_and_times(state, e, req, running, emitted):
    """Sums of tokens, and the order of a request's times."""
    env, status, truth = state.env[e], req["status"], state.truth[e, : len(req)]
    prefilling = np.flatnonzero(status == Status.PREFILL)
    assert env["output_tokens"] == emitted.sum()
    done = status == Status.FINISHED
    assert (emitted[done] == truth[done]).all()
    assert (np.isnan(req["finish_s"]) == ~done).all()
    assert (np.isnan(req["first_token_s"]) == (emitted == 0)).all()
    assert (req["first_token_s"][done] <= req["finish_s"][done]).all()
    seen = emitted > 0
    assert (req["first_token_s"][seen] > req["arrival_s"][seen]).all()
    assert (req["finish_s"][done] <= env["clock_s"]).all()
    straight = seen & (req["preemptions_count"] == 0)  # others may have found more at a later admission
    assert env["prefill_tokens"] >= (req["prompt_tokens"] - prefix_column(state, e, "hit_tokens"))[straight].sum()
    assert env["prefill_left_tokens"] == (req["target_tokens"] - req["prefilled_tokens"])[prefilling].sum()
    assert env["slo_met_count"] == req["slo_met"].sum()
    assert env["preemptions_count"] == req["preemptions_count"].sum()
    assert env["admitted_count"] == env["preemptions_count"] + len(running) + env["finished_count"]
    assert env["decode_tokens"] <= env["output_tokens"]  # requests in decode steps: each emits a token or two
    if state.gap_hist.shape[1] > 1:
        assert state.gap_hist[e].sum() == np.maximum(emitted - 1, 0).sum()


def check_heaps(state, e, req, emitted):
    """Who waits in which heap, and under which key."""
    env, status = state.env[e], req["status"]
    waiting = np.flatnonzero(status == Status.WAITING).tolist()
    for order in range(ORDERS_COUNT):
        if env["heaps_built"] >> order & 1:
            length = state.heap_len[e, order]
            assert sorted(state.heap["item"][e, order, :length].tolist()) == waiting
    for sub in (0, 1):
        mine = (status == Status.DECODE) & (req["sub"] == sub)
        assert state.sub["decoding"][e, sub] == mine.sum()
        for draft in range(state.group.shape[2]):
            inside = np.flatnonzero(mine & (req["draft_class"] == draft)).tolist()
            place = FINISH_HEAP + sub + 2 * draft
            heap = state.heap[e, place]
            assert sorted(heap["item"][: state.heap_len[e, place]].tolist()) == inside
            left = state.truth[e, inside] - emitted[inside]
            assert (heap["key"][inside] == state.group["clock"][e, sub, draft] + left).all()
    dependent = [r for r in np.flatnonzero(status == Status.FUTURE).tolist() if req["parent_idx"][r] != NOWHERE]
    ended = (Status.FINISHED, Status.REJECTED)
    known = [r for r in dependent if req["parent_idx"][r] == ADDED or status[req["parent_idx"][r]] in ended]
    assert sorted(state.heap["item"][e, ARRIVAL_HEAP, : state.heap_len[e, ARRIVAL_HEAP]].tolist()) == known


def prefix_column(state, e, name):
    """A column of the prefix cache's requests, zero where there is no cache."""
    count = int(state.env["requests_count"][e])
    return state.prefix.req[name][e, :count] if isinstance(state.prefix, PrefixArrays) else np.zeros(count, int)


def own_blocks(state, e, r, tokens, block):
    """Blocks that only this request holds, for so many tokens of KV: segments it has not shared, and the rest."""
    if not isinstance(state.prefix, PrefixArrays):
        return math.ceil(tokens / block)
    row = state.prefix.req[e, r]
    held = state.prefix.ids[e, row["ids_first"] : row["ids_first"] + row["held_count"]]
    shared = state.prefix.segment["blocks"][e, held].sum()
    return row["ids_blocks"] - shared + math.ceil((tokens - row["ids_tokens"]) / block)


def with_and_without_prefixes(**sizes):
    return cases(**sizes) | cases(shared=True, **sizes)


def same_bits(first, second):
    """Field by field, since the bytes between fields mean nothing."""

    def bits(array):
        if isinstance(array, tuple):
            return list(array)
        return [array[name].tobytes() for name in array.dtype.names] if array.dtype.names else [array.tobytes()]

    return all(bits(a) == bits(b) for a, b in zip(first, second, strict=True))


def run_to_end(case, held, *, record=True):
    engine = case.engine(record=record)
    held.write(engine.knobs, 0)
    return engine, engine.run(0)


# --- every run


@settings(PROFILE, max_examples=120)
@given(case=with_and_without_prefixes(max_requests=20, max_output=40), held=knobs(), others=knobs())
def test_every_request_block_lane_and_token_is_accounted_for_after_each_iteration(case, held, others):
    engine = case.engine()
    before_s, stop, stalls = 0.0, Stop.RUNNING, 0
    for i in range(5000):
        (others if i % 3 == 2 else held).write(engine.knobs, 0)
        stop = engine.run(0, Until.ITERATIONS, 1)
        check(engine)
        assert engine.state.env["clock_s"][0] >= before_s
        before_s = float(engine.state.env["clock_s"][0])
        stalls = stalls + 1 if stop == Stop.STALLED else 0
        if stop == Stop.DONE or stalls == 3:
            break
    env = engine.state.env[0]
    if stop == Stop.DONE:
        assert env["finished_count"] + env["rejected_count"] == len(case.workload)
        assert engine.run(0) == Stop.DONE  # and stays so
        assert engine.state.env["clock_s"][0] == before_s
    # busy time, idle time and nothing else
    assert env["busy_s"] <= env["clock_s"] * (1 + 1e-12)


@settings(PROFILE, max_examples=150)
@given(case=cases(), held=knobs())
def test_all_that_was_not_rejected_finishes_under_any_knobs(case, held):
    """On PIM machines HBM is no larger than a PIM pool here: what fits only there waits for ever at a share of 0."""
    tables = case.tables
    if tables.has_pim:
        sizes = tables.arrays.pool_blocks[0].copy()
        sizes[0] = min(sizes[0], sizes[1:].max())
        tables = with_memory(tables, tables.block_tokens, sizes)
    engine, stop = run_to_end(Case(tables, case.workload, case.predicted_tokens, case.slo), held)
    assert stop == Stop.DONE
    check(engine)


def test_a_request_that_outgrows_hbm_while_prefill_comes_first_goes_on_in_pim():
    """The only one that decodes is preempted, and nothing else would ever wake the machine."""
    workload = Workload.build("grows", 0.0, 5, 9)
    tables = with_memory(compiled("l3-dgx-a100", "llama-2-7b"), 1, [6, 20])
    held = Knobs(prefill_first=True, hbm_share_frac=1.0)
    engine, stop = run_to_end(Case(tables, workload, workload.output_tokens, Slo()), held)
    assert stop == Stop.DONE
    assert engine.state.req["preemptions_count"][0].tolist() == [1]
    assert engine.state.req["lane"][0].tolist() == [1]


@settings(PROFILE, max_examples=60)
@given(case=with_and_without_prefixes(), held=knobs(), seed=st.integers(0, 2**32 - 1))
def test_a_run_in_pieces_of_any_kind_is_the_run_in_one_piece_bit_for_bit(case, held, seed):
    whole, stop = run_to_end(case, held)
    pieces = case.engine()
    held.write(pieces.knobs, 0)
    rng = np.random.default_rng(seed)
    end_s = float(whole.state.env["clock_s"][0])
    for _ in range(100_000):
        until = Until(int(rng.integers(1, 4)))
        clock_s = float(pieces.state.env["clock_s"][0])
        limit = float(rng.integers(1, 9)) if until == Until.ITERATIONS else clock_s + rng.random() * end_s / 5
        if (piece := pieces.run(0, until, limit)) != Stop.RUNNING:
            break
        if until == Until.TIME:
            assert pieces.state.env["clock_s"][0] >= limit
    assert piece == stop
    assert same_bits(arrays(whole.state), arrays(pieces.state))


@settings(PROFILE, max_examples=40)
@given(case=with_and_without_prefixes(), held=knobs(), start=st.integers(0, 60))
def test_a_copied_state_goes_on_as_the_original_does(case, held, start):
    original = case.engine()
    held.write(original.knobs, 0)
    original.run(0, Until.ITERATIONS, start)
    twin = case.engine()
    twin.state, twin.knobs = copy(original.state), original.knobs.copy()
    snapshot = copy(original.state)
    original.run(0)
    assert same_bits(arrays(twin.state), arrays(snapshot))  # nothing is shared
    twin.run(0)
    assert same_bits(arrays(twin.state), arrays(original.state))


@settings(PROFILE, max_examples=40)
@given(first=cases(), second=cases(), held=knobs(), others=knobs())
def test_machines_side_by_side_in_one_engine_do_not_touch_each_other(first, second, held, others):
    engine = Engine([first.tables, second.tables], 3, 60)
    for e, (case, setting) in enumerate([(second, others), (first, held), (second, others)]):
        engine.reset(e, first.workload, slo=first.slo)  # a used environment is cleared by the next reset
        engine.run(e, Until.ITERATIONS, 5)
        table_idx = 0 if case is first else 1
        engine.reset(
            e,
            case.workload,
            table_idx=table_idx,
            slo=case.slo,
            predicted_tokens=case.predicted_tokens,
            acceptance_frac=case.acceptance_frac,
        )
        setting.write(engine.knobs, e)
    for e in range(3):
        engine.run(e, Until.ITERATIONS, 7)
    for e in range(3):
        engine.run(e)
    for e, (case, setting) in enumerate([(second, others), (first, held), (second, others)]):
        alone, _ = run_to_end(case, setting, record=False)
        count = len(case.workload)
        assert same_bits([engine.state.req[e, :count]], [alone.state.req[0]])
        assert [engine.state.env[name][e] for name in ("clock_s", "iterations_count", "energy_j")] == [
            alone.state.env[name][0] for name in ("clock_s", "iterations_count", "energy_j")
        ]
        check(engine, e)


@settings(PROFILE, max_examples=40)
@given(case=cases(max_requests=20), held=knobs(), rows=st.sampled_from([2, 4, 6, 64]))
def test_the_time_line_sums_to_the_totals_however_often_rows_were_merged(case, held, rows):
    engine = case.engine()
    engine.state = engine.state._replace(log=np.zeros((1, rows), engine.state.log.dtype))
    held.write(engine.knobs, 0)
    engine.run(0)
    env = engine.state.env[0]
    log = engine.state.log[0, : env["log_count"]]
    for column, total in {
        "duration_s": "busy_s",
        "gpu_busy_s": "gpu_busy_s",
        "pim_busy_s": "pim_busy_s",
        "iterations_count": "iterations_count",
        "decode_tokens": "decode_tokens",
        "prefill_tokens": "prefill_tokens",
    }.items():
        assert log[column].sum() == pytest.approx(env[total], rel=1e-9), column
    assert (np.diff(log["end_s"]) > 0).all()
    assert (log["iterations_count"][:-1] == env["log_stride"]).all()
    if log.size:
        assert (log["running_count"][-1], log["hbm_blocks"][-1]) == (
            env["running_count"],
            engine.state.pool["used"][0, 0],
        )


# --- physics


FASTER = {
    "GPU memory": ("gpu", "hbm_bytes_per_s"),
    "GPU compute": ("gpu", "fp16_flop_per_s"),
    "GPU link": ("gpu_link", "bytes_per_s"),
    "PIM memory": ("pim", "internal_bytes_per_s"),
    "PCIe": ("pim_link", "bytes_per_s"),
}


@pytest.mark.parametrize("part", list(FASTER))
def test_a_faster_part_never_lengthens_an_iteration_of_the_same_plan(part):
    @settings(PROFILE, max_examples=25)
    @given(case=cases(), held=knobs(align=False), start=st.integers(0, 80))
    def from_any_state(case, held, start):
        slow, fast = case.engine(), case.engine()
        system = case.tables.system
        device, rate = FASTER[part]
        if getattr(system, device) is None:
            return
        changes = {f"{device}__{rate}": 1.5 * getattr(getattr(system, device), rate)}
        if part == "PIM memory":  # a fit is of one memory: the faster one follows the closed form, which is no slower
            changes["pim__fit"] = None
        upgraded = compile_tables(specs.load(f"system/{system.name}", **changes), case.tables.model).arrays
        tables = case.tables.arrays
        coef = upgraded.coef.copy()
        for name in ("block_tokens", "decompressed_share"):  # as the case drew them
            coef[name] = tables.coef[name]
        fast.tables = upgraded._replace(coef=coef, pool_blocks=tables.pool_blocks)
        held.write(slow.knobs, 0)
        held.write(fast.knobs, 0)
        slow.run(0, Until.ITERATIONS, start)
        fast.state = copy(slow.state)
        slow.run(0, Until.ITERATIONS, 1)
        fast.run(0, Until.ITERATIONS, 1)
        ours, theirs = fast.state.env[0], slow.state.env[0]
        for name in ("last_prefill_tokens", "last_decode_tokens", "preemptions_count", "admitted_count"):
            assert ours[name] == theirs[name]
        assert ours["last_iteration_s"] <= theirs["last_iteration_s"] * (1 + 1e-12)
        for name in ("gpu_s", "pim_s"):
            assert (fast.state.sub[name][0] <= slow.state.sub[name][0] * (1 + 1e-12)).all()

    from_any_state()


FREE_PIM = dict.fromkeys(("pim_token_s", "pim_request_s", "pim_batch_s"), 0.0)
FREE_PIM |= dict.fromkeys(("pim_verify_s", "decompressed_token_s", "decompressed_verify_s"), 0.0)
FREE_PIM |= dict.fromkeys(("transfer_token_s", "transfer_request_s", "transfer_latency_s"), 0.0)
FREE_GPU = dict.fromkeys(
    [
        "fc_slope_s",
        "head_slope_s",
        "comm_slope_s",
        "draft_slope_s",
        "prefill_pair_s",
        "prefill_kv_s",
        "prefill_query_s",
        "prefill_fixed_s",
        "prefill_tile_s",
        "prefill_tail_s",
        "prefill_tail_token_s",
        "prefill_history_token_s",
        "prefill_new_s",
        "hbm_token_s",
        "hbm_verify_s",
        "hbm_request_s",
        "hbm_fixed_s",
        "hbm_split_s",
        "hbm_regroup_s",
        "hbm_tile_s",
        "hbm_mean_token_s",
    ],
    0.0,
)


@settings(PROFILE, max_examples=50)
@given(case=cases(), held=knobs(), start=st.integers(0, 80))
def test_adaptive_sub_batching_is_the_shorter_of_both_in_every_iteration(case, held, start):
    real = case.engine()
    held.write(real.knobs, 0)
    real.run(0, Until.ITERATIONS, start)
    durations = {}
    for mode in SubBatching:
        engine = case.engine()
        engine.state = copy(real.state)
        # the same plan for all three: aligned prefill and lanes follow the knob, so decode alone is compared
        dataclasses.replace(held, sub_batching=mode, admit_max_count=0, prefill_budget_tokens=1).write(engine.knobs, 0)
        engine.run(0, Until.ITERATIONS, 1)
        durations[mode] = engine.state.env["last_iteration_s"][0]
        if engine.state.env["admitted_count"][0] != real.state.env["admitted_count"][0]:
            return  # an idle machine starts a request whatever the knobs say
    shorter = min(durations[SubBatching.ON], durations[SubBatching.OFF])
    assert durations[SubBatching.ADAPTIVE] == pytest.approx(shorter, rel=1e-12)


@settings(PROFILE, max_examples=50)
@given(case=cases(), held=knobs(align=False), start=st.integers(0, 80))
def test_one_device_infinitely_fast_leaves_the_other_devices_time(case, held, start):
    real = case.engine()
    held.write(real.knobs, 0)
    real.run(0, Until.ITERATIONS, start)
    free_pim, free_gpu = case.engine(), case.engine()
    for engine in (free_pim, free_gpu):
        engine.state, engine.knobs = copy(real.state), real.knobs
    free_pim.tables = with_coef(case.tables, **FREE_PIM).arrays
    idle = with_coef(case.tables, **FREE_GPU).arrays
    free_gpu.tables = idle._replace(rows_s=0 * idle.rows_s)
    before = int(real.state.env["iterations_count"][0])
    real.run(0, Until.ITERATIONS, 1)
    if real.state.env["iterations_count"][0] == before:
        return  # there was nothing left to do
    free_pim.run(0, Until.ITERATIONS, 1)
    free_gpu.run(0, Until.ITERATIONS, 1)
    env = real.state.env[0]
    gpu_s, pim_s = real.state.sub["gpu_s"][0].sum(), real.state.sub["pim_s"][0].sum()
    assert free_pim.state.env["last_iteration_s"][0] == pytest.approx(gpu_s, rel=1e-12)
    assert free_gpu.state.env["last_iteration_s"][0] == pytest.approx(pim_s, rel=1e-12, abs=1e-300)
    # an iteration lasts at least as long as either device is busy, and no longer than both in turn
    assert max(gpu_s, pim_s) * (1 - 1e-12) <= env["last_iteration_s"] <= (gpu_s + pim_s) * (1 + 1e-12)


def test_interleaving_overlaps_the_devices():
    """Long contexts, both devices busy: two sub-batches hide one behind the other, one batch hides nothing of FC."""
    workload = Workload.build("batch", np.zeros(64), np.full(64, 2000), np.full(64, 50))
    case = Case(compiled("l3-dgx-a100", "gpt-175b"), workload, workload.output_tokens, Slo())
    spans = {on: run_to_end(case, Knobs(sub_batching=on))[0].state.env["clock_s"][0] for on in (True, False)}
    assert spans[True] < spans[False]


# --- hand-written plans


def legal_plan(view, rng):
    """A random plan that is legal by what the view shows; preemptions by growth make it illegal at times."""
    waiting, running = view.waiting(8)["idx"].tolist(), view.running

    def some(values, share):
        return [int(v) for v in values if rng.random() < share]

    preempt = some(running["idx"], 0.05)
    rest = running[~np.isin(running["idx"], preempt)]
    pause = some(rest["idx"][rest["status"] == Status.DECODE], 0.1)
    resume = some(rest["idx"][rest["status"] == Status.PAUSED], 0.5)
    chunks = {
        int(row["idx"]): int(rng.integers(0, row["prefill_left_tokens"] + 1))
        for row in rest[rest["status"] == Status.PREFILL]
        if rng.random() < 0.8
    }
    places = {r: rng.choice(["auto", "pim" if view.system.has_pim else "hbm"]) for r in some(waiting, 0.3)}
    subs = {r: int(rng.integers(0, 2)) for r in [*some(rest["idx"], 0.2), *places] if rng.random() < 0.7}
    return Plan(
        admit=places,
        prefill=None if rng.random() < 0.4 else chunks,
        sub_batch=subs,
        preempt=preempt,
        pause=pause,
        resume=resume,
        decode=bool(rng.random() < 0.9),
        interleave=bool(rng.random() < 0.8),
    )


def apply(engine, plan):
    return engine.step_plan(
        0, plan.operations(), prefill_all=plan.prefill is None, decode=plan.decode, interleaved=plan.interleave
    )


@settings(PROFILE, max_examples=150)
@given(case=with_and_without_prefixes(max_requests=20), seed=st.integers(0, 2**32 - 1))
def test_any_plan_keeps_all_accounts_and_an_illegal_one_names_a_request_of_it(case, seed):
    engine, rng = case.engine(), np.random.default_rng(seed)
    stop = engine.await_work(0, 1)
    for _ in range(80):
        if stop == Stop.DONE:
            break
        plan = legal_plan(View(engine, 0), rng)
        try:
            stop = apply(engine, plan)
        except PlanError as error:
            named = int(str(error).split("request ")[1].split(":")[0])
            assert named in plan.operations()[:, 1]
            engine.await_work(0, 1)
        check(engine)
    # whatever plans have left behind, knobs bring to an end (paused ones must be resumed first)
    paused = View(engine, 0).paused["idx"].tolist()
    if paused and stop != Stop.DONE:
        apply(engine, Plan(resume=paused))
    engine.state.env["stop"][0] = Stop.RUNNING
    Knobs(hbm_share_frac=0.5, headroom_frac=0.0).write(engine.knobs, 0)
    engine.run(0)
    check(engine)
    assert engine.state.env["waiting_count"][0] + engine.state.env["running_count"][0] == 0


def engine_with_all_kinds():
    """Requests 0 waiting, 1 prefilling, 2 decoding, 3 paused, 4 finished, 5 not arrived; one PIM pool and HBM."""
    workload = Workload.build("kinds", [0, 0, 0, 0, 0, 1e6], [90, 50, 20, 20, 20, 20], [30, 30, 30, 30, 1, 30])
    tables = with_memory(compiled("l3-dgx-a100", "llama-2-7b"), 16, [6, 12])
    engine = Case(tables, workload, workload.output_tokens, Slo()).engine()
    apply(engine, Plan(admit=[2, 3, 4]))
    apply(engine, Plan(admit=[1], pause=[3], prefill={1: 10}))
    check(engine)
    expected = [Status.WAITING, Status.PREFILL, Status.DECODE, Status.PAUSED, Status.FINISHED, Status.FUTURE]
    assert engine.state.req["status"][0].tolist() == expected
    return engine


ILLEGAL = {
    "request 0: it is not running": Plan(preempt=[0]),
    "request 4: it is not running": Plan(preempt=[4]),
    "request 5: it is not running": Plan(sub_batch={5: 1}),
    "request 1: it is not decoding": Plan(pause=[1]),
    "request 3: it is not decoding": Plan(pause=[3]),
    "request 2: it is not paused": Plan(resume=[2]),
    "request 1: it is not waiting": Plan(admit=[1]),
    "request 5: it is not waiting": Plan(admit=[5]),
    "request 2: it is not prefilling": Plan(prefill={2: 1}),
    "request 1: prefill tokens out of range": Plan(prefill={1: 41}),
    "request 1: prefill tokens out of range; expected 0": Plan(prefill={1: -1}),
    "request 0: no room": Plan(admit={0: "pim"}),
    "request 0: no such pool": Plan(admit={0: 2}),
    "request 2: sub-batch out of range": Plan(sub_batch={2: 2}),
    "request 0: sub-batch out of range": Plan(admit=[0], sub_batch={0: -2}),
    "request 6: there is no such request": Plan(admit=[6]),
    "request -1: there is no such request": Plan(preempt=[-1]),
}


@pytest.mark.parametrize("message", list(ILLEGAL))
def test_each_illegal_operation_is_named_and_leaves_all_accounts_right(message):
    engine = engine_with_all_kinds()
    with pytest.raises(PlanError, match=message):
        apply(engine, ILLEGAL[message])
    check(engine)
    for _ in range(40):  # growth across blocks, after the error
        apply(engine, Plan())
        check(engine)


def test_an_unknown_place_is_an_error():
    with pytest.raises(PlanError, match="request 3: place 'disk'"):
        Plan(admit={3: "disk"}).operations()


def test_a_paused_request_keeps_its_memory_and_emits_nothing_until_it_is_resumed():
    engine = engine_with_all_kinds()
    emitted = View(engine, 0).paused["emitted_tokens"].tolist()
    used = int(engine.state.pool["used"][0, 1])
    apply(engine, Plan(decode=False, prefill={1: 5}))
    assert View(engine, 0).paused["emitted_tokens"].tolist() == emitted
    assert engine.state.pool["used"][0, 1] == used
    apply(engine, Plan(resume=[3]))
    row = View(engine, 0).running
    assert row["emitted_tokens"][row["idx"] == 3] == emitted[0] + 1


def test_a_plan_decides_places_and_sub_batches():
    workload = Workload.build("places", np.zeros(3), [20, 20, 20], [5, 5, 5])
    tables = with_memory(compiled("l3-dgx-a100", "llama-3-8b"), 16, [6, 6, 6])
    engine = Case(tables, workload, workload.output_tokens, Slo()).engine()
    apply(engine, Plan(admit={0: "hbm", 1: 2, 2: "pim"}, sub_batch={0: 1, 1: 1, 2: 0}))
    rows = View(engine, 0).running
    assert rows["pool"].tolist() == [0, 2, 1]
    assert rows["sub_batch"].tolist() == [1, 1, 0]
    apply(engine, Plan(sub_batch={0: 0}))
    assert View(engine, 0).running["sub_batch"].tolist() == [0, 1, 0]


def test_a_workload_larger_than_the_engine_is_an_error():
    engine = Engine(compiled("gpu-dgx-a100", "llama-2-7b"), 1, 2)
    with pytest.raises(WorkloadError, match="3 requests; this engine was made for at most 2"):
        engine.reset(0, Workload.build("three", np.zeros(3), [1, 1, 1], [1, 1, 1]))


# --- compiled or not


def fingerprint():
    """Times and counts of short runs under memory pressure, exactly."""
    found = []
    rng = np.random.default_rng(1)
    for system, model in (("l3-dgx-a100", "llama-3-8b"), ("gpu-dgx-a100", "llama-2-7b")):
        tables = compiled(system, model)
        tables = with_memory(tables, 8, [24] * tables.arrays.pool_blocks.shape[1])
        count = 12
        parent = [-1] * 8 + [0, 1, 2, 8]
        workload = Workload.build(
            "short",
            np.sort(rng.random(count)) * 0.2,
            rng.integers(1, 90, count),
            rng.integers(1, 30, count),
            parent_idx=parent,
            think_s=np.where(np.array(parent) >= 0, 0.03, 0.0),
        )
        case = Case(tables, workload, workload.output_tokens, Slo(2.0, 2.0))
        for budget in (20, Budget.UNLIMITED, Budget.ALIGN):
            for order in Order:
                held = Knobs(prefill_budget_tokens=budget, order=order, victim=Victim(order % 3), hbm_share_frac=0.3)
                engine, _ = run_to_end(case, held)
                req, env = engine.state.req[0], engine.state.env[0]
                found.append([t.hex() for name in ("first_token_s", "finish_s") for t in req[name].tolist()])
                found.append([env[name].item().hex() for name in ("clock_s", "energy_j", "pim_busy_s")])
                found.append([*engine.state.gap_hist[0].nonzero()[0].tolist(), env["preemptions_count"].item()])
        engine = case.engine()
        engine.await_work(0, 1)
        steps = np.random.default_rng(2)
        for _ in range(25):
            try:
                apply(engine, legal_plan(View(engine, 0), steps))
            except PlanError as error:
                found.append([str(error)])
        found.append([t.hex() for t in engine.state.req["first_token_s"][0].tolist()])
    return found


def test_kernels_run_as_plain_python_give_the_same_bits():
    here = Path(__file__).parent
    command = "import json, test_engine_properties as t; print(json.dumps(t.fingerprint()))"
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": str(here), "PYTHONWARNINGS": "ignore"}
    plain = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, timeout=300
    )
    assert plain.returncode == 0, plain.stderr
    assert json.loads(plain.stdout) == json.loads(json.dumps(fingerprint()))


# --- toy machines, worked out by hand

TOY_MODEL = specs.from_mapping(
    "model",
    {
        "name": "toy",
        "layers_count": 1,
        "hidden_size": 2,
        "heads_count": 1,
        "kv_heads_count": 1,
        "head_size": 2,
        "ffn_size": 4,
        "vocab_size": 8,
        "context_tokens": 100,
        "tensor_parallel_count": 1,
        "bytes_per_parameter": 2,
        "bytes_per_kv_element": 2,
    },
    "toy",
)
# A token costs 2 x (2 x 6 + 2 x 2 + 2 x 4 + 4 x 2) = 64 FLOP in the FC layers and 2 x 2 x 8 = 32 in the head; a
# (query, key) pair 4 x 2 = 8. At 64 FLOP/s: FC 1 s a token, head 1/2 s a row, 1/8 s a pair. Memory takes no time.
# Weights are (32 + 2 x 16) x 2 = 128 B, activations 20 B; KV is 8 B a token, 32 B a block of 4.
TOY_GPU = {
    "name": "toy",
    "fp16_flop_per_s": 64,
    "hbm_bytes_per_s": 1e14,
    "compute_utilisation_frac": 1,
    "memory_utilisation_frac": 1,
    "reserved_bytes": 0,
    "power_w": 1,
    "idle_power_w": 0,
    "mac_j": 0,
    "hbm_j_per_byte": 0,
    "cache_j_per_byte": 0,
}
# K, V, Q and output of a decoding request are 16 B, 1 s over the link; KV of a prefilled token is 8 B, 1/2 s.
# Two transfers of one layer wait 2 x 0.1 s.
TOY_LINK = {"name": "toy", "bytes_per_s": 16, "utilisation_frac": 1, "latency_s": 0.1, "j_per_byte": 0}
# 16 B/s: 1/2 s a KV token; four ranksets, so a quarter of the transfers is in the way.
TOY_PIM = {
    "name": "toy",
    "kind": "dimm-bank",
    "capacity_bytes": 1024,
    "channels_count": 1,
    "ranks_per_channel_count": 4,
    "chips_per_rank_count": 1,
    "banks_per_chip_count": 1,
    "channel_bytes_per_s": 1e15,
    "internal_bytes_per_s": 16,
    "internal_utilisation_frac": 1,
    "macs_per_element_count": 1,
    "rankset_overlap": True,
    "cell_j_per_byte": 0,
    "mac_j": 0,
    "io_j_per_byte": 0,
    "static_power_w": 0,
}


def toy_engine(requests, *, hbm_blocks, pim=False):
    """``requests``: (arrival, prompt, output)."""
    system = {
        "name": "toy",
        "gpu": {**TOY_GPU, "hbm_bytes": 128 + 20 + 32 * hbm_blocks},
        "gpus_count": 1,
        "gpu_link": TOY_LINK,
        "max_batched_tokens": 1,
    }
    if pim:
        system |= {"pim": TOY_PIM, "pim_link": TOY_LINK}
    tables = compile_tables(specs.from_mapping("system", system, "toy"), TOY_MODEL, block_tokens=4)
    assert tables.arrays.pool_blocks.tolist() == ([[hbm_blocks, 32]] if pim else [[hbm_blocks]])
    arrival, prompt, output = zip(*requests, strict=True)
    engine = Engine(tables, 1, len(requests), record=True)
    engine.reset(0, Workload.build("toy", arrival, prompt, output))
    return engine


def assert_times(engine, first_token_s, finish_s):
    req = engine.state.req[0]
    np.testing.assert_allclose(req["first_token_s"], first_token_s, rtol=0, atol=1e-9)
    np.testing.assert_allclose(req["finish_s"], finish_s, rtol=0, atol=1e-9)


def test_toy_gpu_by_hand():
    """Three blocks. A: 4 + 3 tokens at 0, B: 2 + 2 at 1, D: needs 4 blocks, C: 1 + 1 at 100."""
    engine = toy_engine([(0, 4, 3), (1, 2, 2), (2, 12, 2), (100, 1, 1)], hbm_blocks=3)
    Knobs(headroom_frac=0).write(engine.knobs, 0)
    assert engine.run(0) == Stop.DONE
    # 0:     A prefills 4: 10 pairs 1.25 + FC 4 + head 0.5 = 5.75
    # 5.75:  A grows into its 2nd block, B prefills 2: 3 pairs 0.375 + A's 5 KV tokens 0.625 + FC 3 + head 1 = 5
    # 10.75: A reads 6 and B 3 tokens: 1.125 + FC 2 + head 1 = 4.125; both done at 14.875
    # 100:   C prefills 1: 0.125 + 1 + 0.5
    nan = np.nan
    assert_times(engine, [5.75, 10.75, nan, 101.625], [14.875, 14.875, nan, 101.625])
    assert engine.state.req["status"][0, 2] == Status.REJECTED
    assert engine.state.pool["peak"][0, 0] == 3


def test_toy_gpu_with_a_preemption_by_hand():
    """Two blocks. A: 3 + 4 tokens and B: 3 + 3 at 0; both need a second block after their second token."""
    engine = toy_engine([(0, 3, 4), (0, 3, 3)], hbm_blocks=2)
    Knobs(headroom_frac=0).write(engine.knobs, 0)
    assert engine.run(0) == Stop.DONE
    # 0:      both prefill: 12 pairs 1.5 + FC 6 + head 1 = 8.5
    # 8.5:    both decode: 4 + 4 KV tokens 1 + FC 2 + head 1 = 4
    # 12.5:   B, the newest, is preempted; A reads 5: 0.625 + 1.5 = 2.125, then 6: 0.75 + 1.5 = 2.25
    # 16.875: A is done; B prefills its 3 + 2: 15 pairs 1.875 + FC 5 + head 0.5 = 7.375, its third token
    assert_times(engine, [8.5, 8.5], [16.875, 24.25])
    env = engine.state.env[0]
    assert (env["preemptions_count"], env["recomputed_tokens"], env["prefill_tokens"]) == (1, 5, 11)


def test_toy_l3_with_two_sub_batches_by_hand():
    """A: 2 + 3 tokens in sub-batch 0, B: 4 + 2 in sub-batch 1, both at 0, KV in PIM."""
    engine = toy_engine([(0, 2, 3), (0, 4, 2)], hbm_blocks=0, pim=True)
    Knobs().write(engine.knobs, 0)
    assert engine.run(0) == Stop.DONE
    # 0:      GPU 0: A's 3 pairs 0.375 + FC 2 + head 0.5 = 2.875; PIM 0: B's 4 tokens arrive, 2
    #         GPU 1: B's 10 pairs 1.25 + FC 4 + head 0.5 = 5.75;  PIM 1: A's 2 tokens arrive, 1;  in all 8.625
    # 8.625:  GPU 0: FC and head of B 1.5; PIM 0: A reads 3, 1.5 + 1/4 + 0.2 = 1.95
    #         GPU 1: FC and head of A 1.5; PIM 1: B reads 5, 2.5 + 1/4 + 0.2 = 2.95;  in all 4.9
    # 13.525: GPU 0: nothing;               PIM 0: A reads 4, 2 + 1/4 + 0.2 = 2.45
    #         GPU 1: FC and head of A 1.5;  PIM 1: nothing;  in all 3.95
    assert_times(engine, [8.625, 8.625], [17.475, 13.525])
    env = engine.state.env[0]
    assert env["gpu_busy_s"] == pytest.approx(2.875 + 5.75 + 3 + 1.5, abs=1e-9)
    assert env["pim_busy_s"] == pytest.approx(3 + 1.95 + 2.95 + 2.45, abs=1e-9)


def test_toy_l3_with_one_batch_by_hand():
    """The same requests without sub-batches: attention on both sides, then FC."""
    engine = toy_engine([(0, 2, 3), (0, 4, 2)], hbm_blocks=0, pim=True)
    Knobs(sub_batching=False).write(engine.knobs, 0)
    assert engine.run(0) == Stop.DONE
    # 0:    13 pairs 1.625 beside 6 tokens' transfer 3; FC 6 + head 1 = 10
    # 10:   8 KV tokens 4 + 2/4 + 0.2 = 4.7; FC 2 + head 1 = 7.7
    # 17.7: 4 KV tokens 2.45; FC and head 1.5
    assert_times(engine, [10, 10], [21.65, 17.7])


def test_toy_hybrid_plan_by_hand():
    """A's KV in HBM, B's in PIM."""
    engine = toy_engine([(0, 2, 3), (0, 4, 2)], hbm_blocks=2, pim=True)
    apply(engine, Plan(admit={0: "hbm", 1: "pim"}))
    # 0:     as above (A's KV stays, PIM 1 does nothing): 2.875 + 5.75
    # 8.625: GPU 0: A's 3 KV tokens 0.375 + 1.5; GPU 1: 1.5 beside PIM 1: B 2.95;  in all 4.825
    # 13.45: GPU 0: A's 4 KV tokens 0.5; GPU 1: 1.5
    apply(engine, Plan())
    assert apply(engine, Plan()) == Stop.DONE
    assert_times(engine, [8.625, 8.625], [15.45, 13.45])
