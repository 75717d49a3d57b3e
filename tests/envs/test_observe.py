"""Observations: every feature that the state keeps up to date against a recount from the requests themselves."""

from __future__ import annotations

import dataclasses
import inspect

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from l3env import Knobs, View, Workload
from l3env.choices import Budget, Order, Status, SubBatching
from l3env.engine.engine import Engine, Slo, Until
from l3env.envs.observe.feature import Feature
from l3env.envs.observe.features import FEATURES, FEATURES_COUNT, GROUPS
from l3env.envs.observe.observer import Observer
from l3env.envs.observe.request_rows import Request
from l3env.policy.levels import LEVELS, action_of, knobs_of
from tests.engine.engine_cases import cases, compiled, knobs

NAMES = [name for name, _ in FEATURES]
SLOW_OK = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def squash(value: float, scale: float) -> float:
    return value / (value + scale)


def recount(engine: Engine, view: View) -> dict[str, float]:
    """Features of the present requests, one by one."""
    req, env, now_s = engine.state.req[0], engine.state.env[0], view.now_s
    waiting, running = view.waiting(limit=10_000), view.running
    decoding = running[running["status"] == Status.DECODE]
    prefilling = running[running["status"] == Status.PREFILL]
    pair, pools = view.system, view.pools
    hbm_blocks, pim_blocks, hbm_used, pim_used = held_blocks(engine, view)
    capacity = (hbm_blocks + pim_blocks) * pools.block_tokens
    ttft_slo_s, tbt_slo_s = float(env["ttft_slo_s"]), float(env["tbt_slo_s"])
    pace_s = float(engine.alone_latencies(np.array([2048]))[0][0]) / 2048
    seen: dict[str, float] = {
        "waiting_count": squash(len(waiting), 16),
        "waiting_many": squash(len(waiting), 256),
        "prefilling_count": squash(len(prefilling), 8),
        "prefill_left_work": squash(float(prefilling["prefill_left_tokens"].sum()) * pace_s, ttft_slo_s),
        "paused_count": 0.0,
        "has_pim": float(pair.has_pim),
        "has_hbm_kv": float(pair.has_hbm_kv),
        "hbm_capacity": squash(pair.hbm_tokens, 64 * 1280),
        "pim_capacity": squash(pair.pim_tokens, 64 * 1280),
    }
    if len(waiting):
        free = capacity - (hbm_used + pim_used) * pools.block_tokens
        seen |= recount_waiting(waiting, now_s, free, pace_s, ttft_slo_s)
    for sub in (0, 1):
        seen[f"decoding_{sub}_count"] = squash(float((decoding["sub_batch"] == sub).sum()), 64)
    if len(decoding):
        emitted, kv = decoding["emitted_tokens"].astype(float), decoding["kv_tokens"].astype(float)
        idx = decoding["idx"]
        due_s = req["first_token_s"][idx] + emitted * decoding["tbt_slo_s"]
        tbt_slo_s = float(decoding["tbt_slo_s"].mean())
        ahead = float((due_s - now_s).sum() / decoding["tbt_slo_s"].sum())
        late = req["first_token_s"][idx] > req["arrival_s"][idx] + req["ttft_slo_s"][idx]
        seen |= {
            "decoded_mean": squash(emitted.mean(), 256),
            "decoded_spread": emitted.std() / (emitted.std() + emitted.mean()),
            "kv_mean": squash(kv.mean(), 2048),
            "kv_spread": kv.std() / (kv.std() + kv.mean()),
            "late_share": float(late.mean()),
            "ahead": 0.5 + 0.5 * ahead / (abs(ahead) + 16),
            "predicted_left": squash(max(float((decoding["predicted_tokens"] - emitted).mean()), 0.0), 256),
        }
        free_blocks = hbm_blocks + pim_blocks - hbm_used - pim_used
        seen["next_growth"] = squash(next_growth_blocks(engine, view, decoding), free_blocks + 1)
    last_s = view.last_iteration["iteration_s"]
    seen["last_iteration"] = squash(last_s, tbt_slo_s)
    seen["kv_hbm_share"] = hbm_used / max(hbm_blocks, 1)
    seen["kv_pim_share"] = pim_used / max(pim_blocks, 1)
    return seen


def recount_waiting(
    waiting: np.ndarray, now_s: float, free: float, pace_s: float, ttft_slo_s: float
) -> dict[str, float]:
    """Of those that wait."""
    tokens = waiting["prefill_left_tokens"]
    slack_s = waiting["ttft_deadline_s"] - waiting["ttft_alone_s"] - now_s
    started = ~np.isnan(waiting["first_token_s"])
    slack_s = np.where(started, np.where(waiting["first_token_s"] <= waiting["ttft_deadline_s"], np.inf, -1), slack_s)
    feasible_s = slack_s[slack_s >= 0]
    least_s = float(feasible_s.min()) if feasible_s.size else np.inf
    return {
        "waiting_work": squash(float(tokens.sum()) * pace_s, 4 * ttft_slo_s),
        "waiting_over_free": squash(float(tokens.sum()), free + 1),
        "waiting_age": squash(now_s - float(waiting["arrival_s"].mean()), ttft_slo_s),
        "waiting_feasible_share": float((slack_s >= 0).mean()),
        "waiting_predicted": squash(float(waiting["predicted_tokens"].mean()), 256),
        "least_slack": squash(least_s, ttft_slo_s) if np.isfinite(least_s) else 1.0,
    }


def decompressed(engine: Engine) -> tuple[int, float]:
    """(pool of decompressed KV, or a number past the last; blocks of all other PIM pools that one of its takes)."""
    coef = engine.tables.coef[0]
    pool = int(coef["decompressed_pool"])
    return (pool, float(coef["decompressed_share"]) * (pool - 1)) if pool else (int(coef["pools_count"]), 0.0)


def held_blocks(engine: Engine, view: View) -> tuple[int, int, int, int]:
    """Blocks of HBM and of the PIM side, and how many of each are held; decompressed KV lies in the PIM pools' own."""
    stored_end, taken = decompressed(engine)
    capacity, used = view.pools.capacity_blocks.tolist(), view.pools.used_blocks.tolist()
    shared = int(sum(used[stored_end:]) * taken)
    return capacity[0], sum(capacity[1:stored_end]), used[0], sum(used[1:stored_end]) + shared


def next_growth_blocks(engine: Engine, view: View, decoding: np.ndarray) -> float:
    """Blocks that the next decode step takes: a token for each request, and a second where its guess holds (eighths,
    evenly spread over the steps of its sub-batch)."""
    block, state = view.pools.block_tokens, engine.state
    stored_end, taken = decompressed(engine)
    grown = {"stored": 0, "decompressed": 0}
    for row in decoding:
        tokens = 1
        if state.env["drafting"][0]:
            steps, eighths = int(state.sub["drafts"][0, row["sub_batch"]]), int(state.req["draft_class"][0, row["idx"]])
            tokens += (steps + 1) * eighths // 8 - steps * eighths // 8
        kind = "decompressed" if row["pool"] == stored_end else "stored"
        grown[kind] += -(-(int(row["kv_tokens"]) + tokens) // block) - -(-int(row["kv_tokens"]) // block)
    return grown["stored"] + int(grown["decompressed"] * taken)


def running_means(values: np.ndarray, weight: float) -> float:
    mean = 0.0
    for i, value in enumerate(values, start=1):
        mean += max(weight, 1 / i) * (value - mean)
    return mean


def arrivals_seen(engine: Engine) -> dict[str, float]:
    """Estimates from the times of all arrivals, in order."""
    req, env = engine.state.req[0], engine.state.env[0]
    came = np.flatnonzero(req["status"] != Status.FUTURE)
    times_s = np.sort(req["arrival_s"][came])
    gaps_s = np.diff(times_s)
    if gaps_s.size == 0:
        return {}
    found = {}
    for name, weight in (("short", 1 / 8), ("long", 1 / 128)):
        mean_s, square = running_means(gaps_s, weight), running_means(gaps_s**2, weight)
        found[name] = mean_s
        if square > 0 and (times_s > 0).any():
            found[f"burst_{name}"] = max(1 - mean_s**2 / square, 0.0)
    seen = {f"burstiness_{name}": found[f"burst_{name}"] for name in ("short", "long") if f"burst_{name}" in found}
    if found["short"] + found["long"] > 0:
        seen["arrival_surge"] = squash(found["long"], found["short"])
    since_s = float(env["clock_s"]) - times_s[-1]
    if since_s + found["long"] > 0:
        seen["since_arrival"] = squash(since_s, found["long"])
    return seen


@settings(SLOW_OK, max_examples=60)
@given(case=cases(max_requests=40), choices=st.lists(knobs(), min_size=2, max_size=5), seed=st.integers(0, 2**32 - 1))
def test_features_agree_with_a_recount(case, choices, seed) -> None:
    compare_with_recounts(case, choices, seed)


@settings(SLOW_OK, max_examples=30)
@given(
    case=cases(pairs=[("l3-dgx-h200", "deepseek-v3")], max_requests=40),
    choices=st.lists(knobs(), min_size=2, max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
def test_features_agree_with_a_recount_of_two_forms_of_kv(case, choices, seed) -> None:
    engine = compare_with_recounts(case, choices, seed)
    event(f"decompressed: {engine.state.pool['used'][0, int(engine.tables.coef['decompressed_pool'][0])] > 0}")


def compare_with_recounts(case, choices, seed) -> Engine:
    """Serves the case under settings that change at every iteration; looks before each."""
    engine = case.engine()
    engine.await_work(0, 1)
    observer = Observer(engine)
    rng = np.random.default_rng(seed)
    for _ in range(60):
        row = dict(zip(NAMES, observer.look()[0].astype(float), strict=True))
        expected = recount(engine, View(engine, 0)) | arrivals_seen(engine)
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        assert all(0 <= value <= 1 for value in row.values())
        if engine.stop(0) != 0:
            break
        choices[rng.integers(len(choices))].write(engine.knobs, 0)
        engine.run(0, Until.ITERATIONS, 1)
        engine.await_work(0, 1)
    event(f"waiting: {row['waiting_count'] > 0}, decoding: {row['decoding_0_count'] > 0}")
    return engine


def test_features_are_told_apart_by_name() -> None:
    assert len(set(NAMES)) == FEATURES_COUNT == len(NAMES)
    assert [name for group in GROUPS for name in group.__members__] == NAMES
    assert all([*group] == [*range(len(group))] for group in GROUPS)


@pytest.mark.parametrize("group", [*GROUPS, Request])
def test_every_feature_is_filled_in_and_its_scale_is_the_one_that_its_text_says(group: type[Feature]) -> None:
    formulas = inspect.getsource(inspect.getmodule(group))
    for each in group:
        assert f"row[{group.__name__}.{each.name}]" in formulas
        assert (f"SCALE.{each.name}" in formulas) == (each.scale is not None)
        assert each.scale is None or f" {each.scale:,g}" in each.text
        assert "{" not in each.text


def served(system: str, model: str, workload: Workload, held: Knobs, iterations: int, slo: Slo | None = None):
    engine = Engine(compiled(system, model), 1, len(workload))
    engine.reset(0, workload, slo=slo)
    engine.await_work(0, 1)
    observer = Observer(engine)
    held.write(engine.knobs, 0)
    observer.look()
    engine.run(0, Until.ITERATIONS, iterations)
    engine.await_work(0, 1)
    return engine, dict(zip(NAMES, observer.look()[0].astype(float), strict=True))


@pytest.mark.parametrize("mode", [SubBatching.OFF, SubBatching.ON])
@pytest.mark.parametrize(
    ("system", "model"),
    [("l3-dgx-a100", "gpt-175b"), ("l3-dgx-a100", "qwen-72b"), ("gpu-dgx-a100", "qwen-72b")],
)
def test_prices_of_the_next_step_are_what_it_then_takes(system: str, model: str, mode: SubBatching) -> None:
    """A decode-only step predicted, then run: the engine takes as long as the feature said."""
    rng = np.random.default_rng(0)
    workload = Workload.build("burst", np.zeros(24), rng.integers(50, 900, 24), np.full(24, 500))
    held = Knobs(sub_batching=mode)
    engine, before = served(system, model, workload, held, 40)
    assert engine.state.env["prefill_count"][0] == engine.state.env["waiting_count"][0] == 0
    slo_s = float(engine.state.req["tbt_slo_s"][0].mean())
    engine.run(0, Until.ITERATIONS, 1)
    env = engine.state.env[0]
    name = "next_interleaved" if mode == SubBatching.ON and engine.pair(0).has_pim else "next_one_batch"
    assert before[name] == pytest.approx(squash(float(env["last_iteration_s"]), slo_s), rel=1e-5)
    if mode == SubBatching.ON and engine.pair(0).has_pim:
        for part in ("gpu", "pim"):
            for sub, time_s in enumerate(engine.state.sub[f"{part}_s"][0].tolist()):
                assert before[f"next_{part}_{sub}"] == pytest.approx(squash(time_s, slo_s), rel=1e-5)


def test_quantiles_of_prompts_lie_in_the_octave_of_the_true_ones() -> None:
    rng = np.random.default_rng(1)
    prompts = rng.integers(1, 6000, 200)
    workload = Workload.build("queue", np.zeros(200), prompts, np.full(200, 5))
    _, row = served("l3-dgx-a100", "gpt-175b", workload, Knobs(admit_max_count=1), 1)
    waiting = prompts[1:]  # the first of all has started
    for name, q in (("p10", 0.1), ("p50", 0.5), ("p90", 0.9)):
        octave = np.log2(np.quantile(waiting, q, method="inverted_cdf"))
        assert int(row[f"waiting_prompt_{name}"] * 20 - 1e-6) == int(octave)


def test_unfinished_requests_look_the_same_whatever_their_true_lengths() -> None:
    """Truth of the requests that have not finished is changed at every step; nothing seen may move."""
    rng = np.random.default_rng(2)
    workload = Workload.build(
        "plain", np.sort(rng.random(60) * 20), rng.integers(10, 2000, 60), rng.integers(20, 90, 60)
    )
    engine = Engine(compiled("l3-dgx-a100", "gpt-175b"), 1, 60)
    engine.reset(0, workload)
    engine.await_work(0, 1)
    looks = [Observer(engine), Observer(engine)]
    Knobs().write(engine.knobs, 0)
    for _ in range(200):
        one = looks[0].look()
        truth = engine.state.truth.copy()
        engine.state.truth[:] = np.where(engine.state.req["status"] == Status.FINISHED, truth, truth * 7 + 3)
        np.testing.assert_array_equal(looks[1].look(), one)
        engine.state.truth[:] = truth
        engine.run(0, Until.ITERATIONS, 1)
        engine.await_work(0, 1)
    assert engine.state.env["finished_count"][0] > 5
    assert all("truth" not in inspect.getsource(inspect.getmodule(group)) for group in (*GROUPS, Request))


def test_longer_outputs_change_nothing_until_the_first_would_have_finished() -> None:
    rng = np.random.default_rng(3)
    workload = Workload.build("plain", np.sort(rng.random(40) * 5), rng.integers(10, 2000, 40), np.full(40, 60))
    longer = dataclasses.replace(workload, output_tokens=workload.output_tokens + 400)
    seen = []
    for each in (workload, longer):
        engine = Engine(compiled("l3-dgx-a100", "gpt-175b"), 1, 40)
        engine.reset(0, each)
        engine.await_work(0, 1)
        observer = Observer(engine)
        Knobs(prefill_budget_tokens=512).write(engine.knobs, 0)
        rows = []
        for _ in range(200):
            rows.append(observer.look()[0])
            engine.run(0, Until.ITERATIONS, 1)
            engine.await_work(0, 1)
            if engine.state.env["finished_count"][0]:
                break
        seen.append(rows)
    count = min(map(len, seen))
    assert count > 50
    np.testing.assert_array_equal(seen[0][:count], seen[1][:count])


@pytest.mark.parametrize(
    "held",
    [
        Knobs(prefill_budget_tokens=Budget.ALIGN_WHEN_FULL, sub_batching=SubBatching.ADAPTIVE),
        Knobs(prefill_budget_tokens=512, order=Order.EARLIEST_DEADLINE_HOPELESS_LAST, sub_batching=SubBatching.OFF),
        Knobs(prefill_budget_tokens=8192, order=Order.SHORTEST_PROMPT_HOPELESS_LAST, headroom_frac=0.1),
    ],
)
def test_settings_worth_choosing_are_levels(held: Knobs) -> None:
    """L3's own, earliest deadline with small chunks, large budgets with headroom: each is an action, exactly."""
    assert knobs_of(action_of(held)) == held
    assert all(len(levels) == len(set(levels)) for levels in LEVELS.values())
