"""What a serving engine adds to the GPUs: by hand, where vLLM's scheduler itself is no witness (``tests/vllm``)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import l3env
from l3env import Knobs, Workload
from l3env.choices import Status, Victim
from l3env.engine.engine import Engine, Slo
from l3env.engine.kernels.run import Stop, Until
from l3env.engine.rollout import Rollouts, present_idx
from l3env.machine.specs import EngineSpec
from l3env.machine.specs.serving_engine import IDEAL
from l3env.machine.tables import Tables, compile_tables
from l3env.policy.registry import make_policy
from l3env.runs.driver import run_policy
from tests.engine.engine_cases import with_memory


def machine(**changes: Any) -> Tables:
    engine = dataclasses.replace(IDEAL, name="tried", **changes)
    system = dataclasses.replace(l3env.load("system/gpu-dgx-h100", gpus_count=1), engine=engine)
    return compile_tables(system, l3env.load("model/llama-3-8b"), tp=1)


def served(tables: Tables, workload: Workload, **knobs: Any) -> Any:
    """The request table after a run under a budget of 2,048 tokens."""
    engine = Engine(tables, 1, len(workload))
    engine.reset(0, workload)
    Knobs(prefill_budget_tokens=2048, budget_counts_decodes=True, **knobs).write(engine.knobs, 0)
    engine.run(0)
    return engine.state.req[0]


def two(later_s: float) -> Workload:
    return Workload.build("two", [0.0, later_s], [1000, 100], [50, 5])


def test_the_ideal_engine_is_none() -> None:
    plain = compile_tables(l3env.load("system/gpu-dgx-h100", gpus_count=1), l3env.load("model/llama-3-8b"), tp=1)
    ideal = machine()
    preset = compile_tables(dataclasses.replace(plain.system, engine=l3env.load("engine/ideal")), plain.model, tp=1)
    for tables in (ideal, preset):
        for ours, other in zip(tables.arrays[:4], plain.arrays[:4], strict=True):
            assert ours.tobytes() == other.tobytes()


def test_the_front_end_delays_every_request() -> None:
    plain, later = served(machine(), two(0.02)), served(machine(frontend_s=0.004), two(0.02))
    for name in ("first_token_s", "finish_s"):
        np.testing.assert_allclose(later[name], plain[name] + 0.004, rtol=1e-12)


def test_who_schedules_ahead_sees_an_arrival_one_step_later() -> None:
    """The second request comes in the middle of a decode step: it joins the next one, or the one after it."""
    step_s = served(machine(), two(1e6))
    prefill_s = float(step_s["first_token_s"][0])
    gap_s = float(step_s["finish_s"][0] - prefill_s) / 49
    arrival_s = prefill_s + 3.5 * gap_s
    plain, ahead = (served(machine(schedules_ahead=flag), two(arrival_s)) for flag in (False, True))
    chunk_s = float(plain["first_token_s"][1]) - (prefill_s + 4 * gap_s)
    assert ahead["first_token_s"][1] == pytest.approx(prefill_s + 5 * gap_s + chunk_s, rel=0.01)


def test_an_idle_engine_sees_an_arrival_at_once() -> None:
    for ahead in (False, True):
        req = served(machine(schedules_ahead=ahead), two(100.0))
        assert req["first_token_s"][1] - 100.0 == pytest.approx(
            served(machine(), Workload.build("one", [0.0], [100], [5]))["first_token_s"][0], rel=1e-9
        )


def test_a_place_is_taken_until_the_finish_is_known() -> None:
    """One place: the second request starts an iteration after the first one's end, or two where that is seen late."""
    workload = Workload.build("two", [0.0, 0.0], [100, 100], [5, 5])
    plain, ahead = (served(machine(schedules_ahead=flag), workload, running_max_count=1) for flag in (False, True))
    assert ahead["finish_s"][1] == pytest.approx(plain["finish_s"][1], rel=1e-9)  # nothing runs meanwhile: it is known
    three = Workload.build("three", [0.0, 0.0, 0.0], [100, 100, 100], [5, 50, 5])
    plain, ahead = (served(machine(schedules_ahead=flag), three, running_max_count=2) for flag in (False, True))
    step_s = float(plain["finish_s"][1] - plain["first_token_s"][1]) / 49
    assert ahead["first_token_s"][2] - plain["first_token_s"][2] == pytest.approx(step_s, rel=0.05)


def test_a_copy_starts_with_those_who_finished_gone() -> None:
    """A planner's copy holds the requests that are there: who has finished keeps no block of it and no place."""
    tables = machine(schedules_ahead=True)
    engine = Engine(tables, 1, 2)
    engine.reset(0, Workload.build("two", [0.0, 0.0], [100, 200], [5, 50]))
    Knobs(prefill_budget_tokens=2048, budget_counts_decodes=True).write(engine.knobs, 0)
    state = engine.state
    while not state.env["leaving_count"][0]:
        engine.run(0, Until.EVENT, 1e9)
    leaving = state.pool["leaving"][0]
    assert leaving.sum() == -(-(100 + 4) // tables.block_tokens)
    rollouts = Rollouts(tables, 1, 1)
    rollouts.imagine(engine, 0, present_idx(engine, 0), 0, np.array([50]), None, Slo())
    rollouts.start(0, 0)
    copy = rollouts.engine.state
    assert copy.env["leaving_count"][0] == copy.pool["leaving"][0].sum() == 0
    np.testing.assert_array_equal(copy.pool["used"][0], state.pool["used"][0] - leaving)


def test_host_time_counts_before_a_step_or_hides_behind_the_last_one() -> None:
    one = Workload.build("one", [0.0], [100], [11])
    plain = served(machine(), one)
    gpu_s = float(plain["finish_s"][0] - plain["first_token_s"][0]) / 10
    for host_s in (0.2 * gpu_s, 1.5 * gpu_s):
        before, beside = (served(machine(step_host_s=host_s, schedules_ahead=flag), one) for flag in (False, True))
        for req, step_s in ((before, gpu_s + host_s), (beside, max(gpu_s, host_s))):
            assert (req["finish_s"][0] - req["first_token_s"][0]) / 10 == pytest.approx(step_s, rel=0.02)


def test_steps_beyond_the_captured_batches_are_launched_one_kernel_at_a_time() -> None:
    rules = {"captured_tokens": (8, 64), "step_host_eager_s": 0.3}
    small, large = (
        float(served(machine(**rules), Workload.build("one", [0.0], [tokens], [1]))["first_token_s"][0])
        for tokens in (60, 70)
    )
    assert large - small == pytest.approx(0.3, rel=0.02)


def test_a_step_is_padded_to_the_next_captured_batch() -> None:
    sizes = (1, 2, 4, 8, 16)
    padded, plain = machine(captured_tokens=sizes), machine()
    for tokens, size in ((1, 1), (3, 4), (9, 16), (16, 16), (17, 17)):
        assert padded.arrays.fc_s[0, tokens] == plain.arrays.fc_s[0, size]
        assert padded.system.serving.padded_tokens(tokens) == size


@pytest.mark.parametrize(("model", "blocks"), [("llama-3-8b", 28_220), ("llama-2-7b", 7_411)])
def test_blocks_are_those_that_vllm_found(model: str, blocks: int) -> None:
    """vLLM 0.22 on an H100 with 80 GB, 2,048 tokens a step: blocks of 16 that it reported."""
    tables = l3env.compile_pair("gpu-dgx-h100?gpus_count=1&engine=vllm-0.22", model, tp=1)
    assert tables.arrays.pool_blocks[0, 0] == pytest.approx(blocks, rel=1e-3)


def test_a_larger_gpu_leaves_more_blocks_by_hand() -> None:
    """An H200 has 60 GiB more; the engine takes 0.9 of what the driver shows of it, in blocks of 2 MiB."""
    small, large = (
        l3env.compile_pair(f"{system}?engine=vllm-0.22", "llama-3-8b", tp=1).arrays.pool_blocks[0, 0]
        for system in ("gpu-1xh100", "gpu-1xh200")
    )
    assert large - small == pytest.approx(0.9 * 0.98953 * 60 * 2**30 / 2**21, abs=1)


def test_blocks_by_chunk_by_hand() -> None:
    """A prompt of 100 tokens in chunks of 40: 3, 5, then 7 blocks of 16; whole at admission it takes 7."""
    for by_chunk, expected in ((True, [3, 5, 7]), (False, [7, 7, 7])):
        engine = Engine(machine(blocks_by_chunk=by_chunk), 1, 1)
        engine.reset(0, Workload.build("one", [0.0], [100], [4]))
        Knobs(prefill_budget_tokens=40).write(engine.knobs, 0)
        used = []
        for _ in range(3):
            engine.run(0, Until.ITERATIONS, 1)
            used.append(int(engine.state.pool["used"][0, 0]))
        assert used == expected


@pytest.mark.parametrize("victim", list(Victim))
def test_blocks_by_chunk_are_those_of_all_prompts_whoever_is_preempted(victim: Victim) -> None:
    """The first to be admitted has most left by its prediction: where it goes, those behind it move up."""
    tables = with_memory(machine(blocks_by_chunk=True), 1, [500])
    count = 12
    engine = Engine(tables, 1, count)
    workload = Workload.build("pressure", np.zeros(count), np.arange(count) * 10 + 40, np.full(count, 60))
    engine.reset(0, workload, predicted_tokens=np.arange(count, 0, -1) * 10)
    settings = [Knobs(prefill_budget_tokens=budget, victim=victim, headroom_frac=0.0) for budget in (7, 300)]
    settings += [dataclasses.replace(each, prefill_first=True, prefill_in_order=True) for each in settings]
    for step in range(2000):
        settings[step % 4 if step % 5 else 0].write(engine.knobs, 0)
        stop = engine.run(0, Until.ITERATIONS, 1)
        req, state = engine.state.req[0], engine.state
        held = req["held_tokens"][req["status"] == Status.PREFILL].sum()
        decoding = req[req["status"] == Status.DECODE]
        grown = state.group["clock"][0, decoding["sub"], 0] - decoding["joined_clock"]
        assert state.pool["used"][0, 0] == held + (decoding["kv_tokens"] + grown).sum()
        assert (req["held_tokens"] >= req["prefilled_tokens"])[req["status"] == Status.PREFILL].all()
        if stop != Stop.RUNNING:
            break
    assert stop == Stop.DONE
    assert state.env["preemptions_count"][0] > 5
    assert state.env["finished_count"][0] == count


def test_presets_say_what_contradicts() -> None:
    with pytest.raises(l3env.errors.SpecError, match="ascending"):
        l3env.load("engine/vllm-0.22", captured_tokens=[4, 2])
    assert isinstance(l3env.load("engine/vllm-0.22"), EngineSpec)


def test_the_policy_takes_the_engines_limits() -> None:
    engine = dataclasses.replace(IDEAL, name="narrow", max_num_seqs=2)
    system = dataclasses.replace(l3env.load("system/gpu-dgx-h100", gpus_count=1), engine=engine)
    tables = compile_tables(system, l3env.load("model/llama-3-8b"), tp=1)
    workload = Workload.build("many", np.zeros(8), np.full(8, 100), np.full(8, 40))
    batches = [
        run_policy(tables, workload, make_policy(ref)).metrics["batch_mean_count"]
        for ref in ("vllm", "vllm?running_max_count=4")
    ]
    assert batches[0] == pytest.approx(2, rel=0.05)
    assert batches[1] == pytest.approx(4, rel=0.05)
