"""The prefix cache of the kernels against the dictionaries of the reference simulator, request by request."""

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from l3env.choices import Budget, Eviction
from l3env.engine.engine import Slo, Stop, Until
from l3env.knobs import Knobs
from l3env.requests.workload import Workload
from tests.engine.beside_reference import SLOW_OK, STOPS, compare, start
from tests.engine.engine_cases import Case, cases, compiled, knobs, with_memory


def compare_caches(engine, reference):
    """The same hits, and the same copies in every pool with the same numbers of holders."""
    prefix, cache = engine.state.prefix, reference.cache
    if prefix == ():  # a workload without ids
        assert (reference.totals.prefix_ids, reference.totals.prefix_hits, cache.evictions) == (0, 0, 0)
        return
    env, req = prefix.env[0], prefix.req[0]
    assert env["ids_count"] == reference.totals.prefix_ids
    assert env["hits_count"] == reference.totals.prefix_hits
    assert env["evictions_count"] == cache.evictions
    assert req["hit_tokens"].tolist() == [r.hit_tokens for r in reference.requests]
    assert req["moving_tokens"].tolist() == [r.moving for r in reference.requests]
    for pool, entries in enumerate(cache.pools):
        assert prefix.pool["cached"][0, pool] == cache.idle(pool)
        assert copies(engine, pool) == sorted((e.depth, e.tokens, len(e.users), e.uses) for e in entries.values())


def copies(engine, pool):
    """(depth, tokens, holders, uses) of what a pool holds, from the lists of copies."""
    prefix, found = engine.state.prefix, []
    pools = prefix.pool.shape[1]
    for segment in prefix.segment[0]:
        copy = int(segment["first_copy"]) if segment["tokens"] else -1
        while copy >= 0:
            slot = prefix.slot[0, copy % pools, copy // pools]
            if copy % pools == pool:
                found.append((int(segment["depth"]), int(segment["tokens"]), int(slot["refs"]), int(slot["uses"])))
            copy = int(slot["next_copy"])
    return sorted(found)


@settings(SLOW_OK, max_examples=250)
@given(case=cases(shared=True), held=knobs())
def test_whole_runs_with_shared_prompts_agree_with_the_reference(case, held):
    engine, reference = start(case)
    held.write(engine.knobs, 0)
    assert engine.run(0) == STOPS[reference.run(held)]
    compare(engine, reference)
    compare_caches(engine, reference)
    event(f"hits: {reference.totals.prefix_hits > 0}")
    event(f"evictions: {reference.cache.evictions > 0}")
    event(f"preemptions: {reference.totals.preemptions > 0}")


@settings(SLOW_OK, max_examples=120)
@given(
    case=cases(shared=True, max_requests=20),
    choices=st.lists(st.tuples(knobs(), st.sampled_from(list(Eviction))), min_size=2, max_size=5),
    seed=st.integers(0, 2**32 - 1),
)
def test_rules_and_knobs_that_change_at_every_iteration_agree_with_the_reference(case, choices, seed):
    engine, reference = start(case)
    rng = np.random.default_rng(seed)
    stalls = 0
    for _ in range(3000):
        chosen, rule = choices[rng.integers(len(choices))]
        chosen.write(engine.knobs, 0)
        engine.knobs["eviction"][0] = rule
        reference.cache.rule = rule or reference.cache.rule
        stop = reference.step(chosen)
        assert engine.run(0, Until.ITERATIONS, 1) == STOPS[stop]
        compare_caches(engine, reference)
        stalls = stalls + 1 if stop == "stalled" else 0
        if stop == "done" or stalls > 20:
            break
    compare(engine, reference)


@pytest.mark.parametrize("rule", list(Eviction)[1:])
@pytest.mark.parametrize("budget", [48, Budget.ALIGN])
@pytest.mark.parametrize("pair", [("gpu-dgx-a100", "llama-2-7b"), ("l3-dgx-a100", "llama-3-8b")])
def test_under_memory_pressure_each_rule_agrees_with_the_reference(pair, budget, rule):
    """Conversations that come back: hits, evictions, copies between pools and preemptions in one run."""
    rng = np.random.default_rng(3)
    count, size = 60, 8
    talk = rng.integers(0, 6, count)  # six conversations on one system prompt
    turn = [int((talk[:i] == talk[i]).sum()) for i in range(count)]
    prompt = np.array([16 + 16 * (t % 5) + 3 for t in turn])
    rows = [[0, 0, *([int(k) + 1] * (p // size - 2))] for k, p in zip(talk, prompt, strict=True)]
    workload = Workload.build(
        "talks",
        np.sort(rng.random(count)) * 2.0,
        prompt,
        rng.integers(5, 60, count),
        prefix_ids=[i for row in rows for i in row],
        prefix_offsets=np.concatenate([[0], np.cumsum([len(row) for row in rows])]),
        prefix_block_tokens=size,
    )
    tables = compiled(*pair)
    tables = with_memory(tables, 4, [70] * tables.arrays.pool_blocks.shape[1])
    case = Case(tables, workload, workload.output_tokens, Slo(), eviction=rule)
    engine, reference = start(case)
    held = Knobs(prefill_budget_tokens=budget, headroom_frac=0.0, hbm_share_frac=0.2)
    held.write(engine.knobs, 0)
    assert engine.run(0) == STOPS[reference.run(held)] == Stop.DONE
    compare(engine, reference)
    compare_caches(engine, reference)
    assert reference.totals.prefix_hits > 50
    assert reference.cache.evictions > 20
