"""One formula: whoever prices an iteration says what the engine then takes, on every system with every model.

A batch is set up in the engine by real requests, the engine runs the step, and its time is compared with the formula
under Python's own face (``Tables.iteration_s``), with the other callers, and with a slow restatement.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from l3env import Plan, View, Workload, compile_pair
from l3env.choices import Status, SubBatching
from l3env.engine.engine import Engine
from l3env.engine.kernels.iteration import gather_decodes, queries_now
from l3env.engine.kernels.scorer import prompt_batch
from l3env.errors import SpecError
from l3env.jit import kernel
from l3env.machine import specs
from l3env.machine.batch import CHUNK_DTYPE, LOAD_DTYPE, Chunk, Decodes
from l3env.machine.iteration import price, price_batch
from l3env.machine.tables import Tables
from l3env.policies import placement
from tests.engine.engine_cases import compiled, with_arrays, with_coef
from tests.engine.reference_simulator import Prices

EXACT = 1e-12
EQUAL_PAIRS = [
    ("gpu-dgx-a100", "gpt-175b"),
    ("l3-dgx-a100", "gpt-175b"),
    ("l3-dgx-a100", "qwen-72b"),
    ("l3-dgx-h200", "deepseek-v3"),
    ("h800-ep144-decode", "deepseek-v3"),
]


@dataclass
class Step:
    """Requests of an iteration: (lane, sub-batch, KV) of those that decode, (lane, sub-batch, tokens, history, ends) of
    those that prefill."""

    decodes: list[tuple[int, int, int]]
    chunks: list[tuple[int, int, int, int, bool]]
    queries: int
    interleaved: bool


def places_of(tables: Tables, tokens: int) -> list[str]:
    """Where so much KV fits."""
    found = ["hbm"] if tables.hbm_tokens > tokens else []
    found += ["pim"] if tables.pim_tokens > 8 * tokens else []
    own = int(tables.arrays.coef["decompressed_pool"][0])
    if own and tables.arrays.pool_blocks[0, own] * tables.block_tokens > tokens:
        found.append("pim-decompressed")
    return found


def take(engine: Engine, plan: Plan) -> float:
    """One iteration under a plan; how long it took."""
    engine.step_plan(
        0,
        plan.operations(),
        prefill_all=plan.prefill is None,
        decode=plan.decode,
        interleaved=plan.interleave,
        multi_token=plan.multi_token,
    )
    return float(engine.state.env["last_iteration_s"][0])


def random_step(tables: Tables, rng: np.random.Generator) -> tuple[Step, Engine, float]:
    """A batch of requests that decode in all places and prompts new, under way and ending; and what it takes."""
    count, longest = 24, 900
    while longest > 1 and not places_of(tables, 2 * count * longest):
        longest //= 2
    places = places_of(tables, 2 * count * longest)
    workload = Workload.build("batch", np.zeros(count), rng.integers(1, longest + 1, count), np.full(count, 60))
    engine = Engine(tables, 1, count)
    engine.reset(0, workload)
    interleaved, guess = bool(rng.integers(2)), bool(rng.integers(2))
    old, new = range(count // 2), range(count // 2, count)
    admit = {r: str(rng.choice(places)) for r in range(count)}
    subs = {r: int(rng.integers(2)) for r in range(count)}
    take(engine, Plan({r: admit[r] for r in old}, sub_batch={r: subs[r] for r in old}, interleave=interleaved))
    begun = {r: int(rng.integers(0, workload.prompt_tokens[r])) for r in new}
    take(engine, Plan({r: admit[r] for r in new}, begun, {r: subs[r] for r in new}, interleave=interleaved))
    running = View(engine, 0).running
    decodes = [
        (int(row["lane"]), int(row["sub_batch"]), int(row["kv_tokens"]))
        for row in running[running["status"] == Status.DECODE]
    ]
    chunks, planned = [], {}
    for row in running[running["status"] == Status.PREFILL]:
        left = int(row["prefill_left_tokens"])
        history = int(row["prompt_tokens"]) - left
        tokens = left if rng.random() < 0.5 else int(rng.integers(0, left + 1))
        planned[int(row["idx"])] = tokens
        if tokens:
            chunks.append((int(row["lane"]), int(row["sub_batch"]), tokens, history, tokens == left))
    queries = 2 if guess and tables.model.draft_modules_count else 1
    step = Step(decodes, chunks, queries, interleaved and tables.has_pim)
    plan = Plan(prefill=planned, decode=bool(rng.integers(4)), interleave=interleaved, multi_token=guess)
    if not plan.decode:
        step.decodes = []
    return step, engine, take(engine, plan)


def formula_s(tables: Tables, step: Step, mode: SubBatching) -> float:
    """What Python's face of the formula prices, request by request."""
    lanes = np.zeros((2, int(tables.arrays.coef["lanes_count"][0])), LOAD_DTYPE)
    for lane, sub, kv in step.decodes:
        lanes["count"][sub, lane] += 1
        lanes["kv"][sub, lane] += kv
    rows = [(sub, tokens, history, lane, ends) for lane, sub, tokens, history, ends in step.chunks]
    return float(price_batch(tables.arrays, 0, lanes, np.array(rows, CHUNK_DTYPE), step.queries, int(mode)).duration_s)


def slow_s(tables: Tables, step: Step) -> float:
    """The published formulas, in sums over requests."""
    prices, queries, total_s = Prices(tables), step.queries, 0.0
    own = int(prices.coef["decompressed_lane"])
    for sub in (0, 1) if step.interleaved else (None,):
        mine = {0, 1} if sub is None else {sub}
        other = {0, 1} if sub is None else {1 - sub}
        chunks = [each for each in step.chunks if each[1] in mine]
        attends = [(lane, kv + queries) for lane, at, kv in step.decodes if at in mine]
        joins = sum(at in other for _, at, _ in step.decodes)
        hbm = [kv for lane, kv in attends if lane == 0]
        front_s = prices.prefill_s(*((tokens, history) for _, _, tokens, history, _ in chunks))
        front_s += prices.hbm_s(sum(hbm), len(hbm), queries)
        tokens = sum(each[2] for each in chunks) + queries * joins
        rows = sum(each[4] for each in chunks) + queries * joins
        back_s = prices.fc_s(tokens) + prices.head_s(rows) + (prices.guessing_s(joins) if queries == 2 else 0.0)
        by_lane: dict[int, list[int]] = {}
        for lane, kv in attends:
            if lane > 0:
                by_lane.setdefault(lane, []).append(kv)
        apart = by_lane.pop(own, []) if own else []
        read_s = max((prices.lane_s(sum(kv), len(kv), queries) for kv in by_lane.values()), default=0.0)
        read_s += prices.decompressed_s(sum(apart), queries)
        moved = queries * (sum(map(len, by_lane.values())) + len(apart) * prices.coef["decompressed_request_ratio"])
        ratio = prices.coef["decompressed_token_ratio"]
        pushed = sum(
            tokens * (ratio if own and lane == own else 1.0)
            for lane, at, tokens, _, _ in step.chunks
            if lane > 0 and at in other
        )
        pim_s = prices.pim_s(read_s, moved, pushed)
        if sub is None:
            total_s += prices.gpu_s(max(front_s, pim_s) + back_s, tokens)
        else:
            total_s += max(prices.gpu_s(front_s + back_s, tokens), pim_s)
    return total_s


@pytest.mark.parametrize("system", specs.names("system"))
def test_formula_engine_and_slow_version_agree_on_random_batches_of_every_model(system: str) -> None:
    priced = 0
    for model in specs.names("model"):
        try:
            tables = compile_pair(system, model)
        except SpecError:
            continue  # does not fit
        rng = np.random.default_rng([len(system), priced])
        for _ in range(3):
            step, _, engine_s = random_step(tables, rng)
            mode = SubBatching.ON if step.interleaved else SubBatching.OFF
            assert formula_s(tables, step, mode) == pytest.approx(engine_s, rel=EXACT), model
            assert slow_s(tables, step) == pytest.approx(engine_s, rel=EXACT), model
            shorter_s = min(formula_s(tables, step, SubBatching.OFF), formula_s(tables, step, SubBatching.ON))
            assert formula_s(tables, step, SubBatching.ADAPTIVE) == shorter_s
            priced += 1
    assert priced > 0


@pytest.mark.parametrize("pair", EQUAL_PAIRS)
@pytest.mark.parametrize("count", [1, 7, 40])
def test_requests_in_a_place_are_dealt_as_the_engine_deals_them(pair: tuple[str, str], count: int) -> None:
    """Equal requests, by place: Python's face, and the policy that chooses places by it."""
    tables = compiled(*pair)
    for place in places_of(tables, 40 * 700):
        for interleave in (False, True):
            for guess in (False, True):
                engine = Engine(tables, 1, count)
                engine.reset(0, Workload.build("equal", np.zeros(count), np.full(count, 600), np.full(count, 9)))
                take(engine, Plan(dict.fromkeys(range(count), place), interleave=interleave))
                engine_s = take(engine, Plan(interleave=interleave, multi_token=guess))
                mode = SubBatching.ON if interleave else SubBatching.OFF
                decodes = [Decodes(count, 600, place)]
                found_s = tables.iteration_s(decodes, sub_batching=mode, multi_token=guess)
                assert found_s == pytest.approx(engine_s, rel=EXACT), (place, interleave, guess)
        form = placement.PimForm.DECOMPRESSED if place == "pim-decompressed" else placement.PimForm.STORED
        chosen = placement.Place(1.0 if place == "hbm" else 0.0, form)
        fastest_s = tables.iteration_s([Decodes(count, 600, place)], sub_batching=SubBatching.ADAPTIVE)
        assert placement.tokens_per_s(tables, chosen, count, 600) == pytest.approx(count / fastest_s, rel=EXACT)


def test_an_iteration_worked_out_by_hand() -> None:
    """Two requests of 100 tokens in sub-batch 0 with a chunk of 10, one of 300 in sub-batch 1, one PIM lane.

    T_GPU_0 = 55 pairs x 10 ms + FC of 10 + 1 tokens = 561 ms; T_PIM_0 = 202 + 2 x 10 + 50 + half of 2 x 2 = 274 ms;
    T_GPU_1 = FC of 2 = 2 ms; T_PIM_1 = 301 + 10 + 50 + half of (2 + 10) = 367 ms. As one batch the PIM side takes
    222 + 311 + 50 + half of (6 + 10) = 591 ms, longer than 550 ms of prefill, and FC of 13 follows.
    """
    tables = compiled("l3-dgx-a100", "gpt-175b")
    names = [name for name in tables.arrays.coef.dtype.names if name.endswith(("_s", "_j")) or "hbm_" in name]
    chosen = dict.fromkeys(names, 0.0) | {
        "prefill_pair_s": 10e-3,
        "prefill_tile_tokens": 1.0,
        "prefill_history_tokens": 1.0,
        "pim_token_s": 1e-3,
        "pim_request_s": 10e-3,
        "pim_batch_s": 50e-3,
        "transfer_request_s": 2e-3,
        "transfer_token_s": 1e-3,
        "transfer_exposed_frac": 0.5,
    }
    rows_s = np.zeros_like(tables.arrays.rows_s)
    rows_s[0, 0] = 1e-3 * np.arange(rows_s.shape[2])
    tables = with_arrays(with_coef(tables, **chosen), rows_s=rows_s)
    batch = [Decodes(2, 100, "pim", 0), Decodes(1, 300, "pim", 1)], [Chunk(10, place="pim")]
    assert tables.iteration_s(*batch, sub_batching=SubBatching.ON) == pytest.approx(0.561 + 0.367, rel=EXACT)
    assert tables.iteration_s(*batch) == pytest.approx(0.591 + 0.013, rel=EXACT)
    assert tables.iteration_s(*batch, sub_batching=SubBatching.ADAPTIVE) == pytest.approx(0.604, rel=EXACT)


def test_places_that_a_system_does_not_have() -> None:
    tables = compiled("gpu-dgx-a100", "gpt-175b")
    for place in ("pim", "pim-decompressed", "disk", 3):
        with pytest.raises(SpecError, match="not on this system"):
            tables.iteration_s([Decodes(1, 10, place)])


@kernel
def scorers_s(t, s, tokens, history, mode):
    steps = gather_decodes(t, s, 0)
    return price(t, 0, prompt_batch(t, 0, steps, queries_now(s, 0), tokens, history), mode).duration_s


@pytest.mark.parametrize("pair", EQUAL_PAIRS)
def test_a_scorers_iteration_is_the_engines(pair: tuple[str, str]) -> None:
    """A prompt's chunk beside 20 decoding requests: whole in one batch, in halves beside two sub-batches."""
    tables, tokens = compiled(*pair), 512
    place = "pim" if tables.has_pim else "hbm"
    for guess in (False, True):
        engine = Engine(tables, 1, 22)
        prompts = np.r_[np.full(20, 600), tokens, tokens]
        engine.reset(0, Workload.build("scored", np.zeros(22), prompts, np.full(22, 60)))
        take(engine, Plan(dict.fromkeys(range(20), place), interleave=tables.has_pim, multi_token=guess))
        expected_s = {mode: scorers_s(engine.tables, engine.state, tokens, 0, int(mode)) for mode in list(SubBatching)}
        halves = {20: tokens // 2, 21: tokens // 2}
        assert expected_s[SubBatching.ADAPTIVE] == min(expected_s[SubBatching.OFF], expected_s[SubBatching.ON])
        if tables.has_pim:
            half_s = take(engine, Plan({20: place, 21: place}, halves, {20: 0, 21: 1}, multi_token=guess))
            assert expected_s[SubBatching.ON] == pytest.approx(half_s, rel=EXACT)
        else:
            whole_s = take(engine, Plan({20: place}, interleave=False, multi_token=guess))
            assert expected_s[SubBatching.OFF] == pytest.approx(whole_s, rel=EXACT)
