"""The prefix cache by itself: its kernels, interpreted, against dictionaries; segments and cases worked by hand."""

import types

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from l3env.choices import Eviction, Status
from l3env.engine.engine import Engine, Slo, Stop, Until
from l3env.engine.kernels import heap, prefix
from l3env.engine.rollout import Rollouts, present_idx
from l3env.engine.segments import eviction_rule, idle_segments, score_segments, segments
from l3env.engine.state import NOWHERE, arrays, copy
from l3env.envs.episodes import Episodes
from l3env.errors import L3EnvError, PlanError, PolicyError, WorkloadError
from l3env.knobs import Knobs
from l3env.policy.plan import Plan
from l3env.policy.protocol import BasePolicy, FixedKnobs
from l3env.requests.workload import Workload
from l3env.runs.driver import drive, run_policy
from tests.engine.engine_cases import compiled, with_memory
from tests.engine.prefix_checks import check_prefix
from tests.engine.reference_prefix import PrefixCache, prompt_keys


def interpreted(*modules):
    """The functions of kernel modules as plain Python, calling each other."""
    names = {name: value for module in modules for name, value in vars(module).items()}
    for name, value in list(names.items()):
        code = getattr(getattr(value, "py_func", value), "__code__", None)
        if code is not None:
            names[name] = types.FunctionType(code, names, name)
    return types.SimpleNamespace(**names)


pool_kernels = interpreted(heap, prefix)
RULES = [Eviction.LRU, Eviction.LFU, Eviction.TREE, Eviction.SCORE]
BLOCK = 4


def prompts(rows, prompt_tokens, size, *, output=1, arrival=None):
    """A workload of prompts given by their ids."""
    return Workload.build(
        "prompts",
        np.zeros(len(rows)) if arrival is None else arrival,
        prompt_tokens,
        np.broadcast_to(output, len(rows)),
        prefix_ids=[i for row in rows for i in row],
        prefix_offsets=np.concatenate([[0], np.cumsum([len(row) for row in rows])]),
        prefix_block_tokens=size,
    )


class BlockPool(RuleBasedStateMachine):
    """Requests come into two pools, compute, grow and leave in any order; a dictionary keeps the same books."""

    @initialize(
        rows=st.lists(st.lists(st.integers(0, 1), max_size=6), min_size=2, max_size=10),
        size=st.sampled_from([3, 4, 8]),
        rest=st.integers(0, 7),
        blocks=st.integers(16, 40),
        eviction=st.sampled_from(RULES),
    )
    def open(self, rows, size, rest, blocks, eviction):
        # ``rest`` tokens more than whole ids cover, or an id for a last block in part
        prompt = [max(len(row) * size + (rest if rest < 4 else -1), 1) for row in rows]
        self.workload = prompts([*rows, [0]], [*prompt, size], size)
        tables = with_memory(compiled("l3-dgx-a100", "llama-2-7b"), BLOCK, [blocks, blocks])
        engine = Engine(tables, 1, len(self.workload), prefix_cache=eviction)
        engine.reset(0, self.workload)
        self.t, self.s, self.capacity = engine.tables, engine.state, blocks
        self.prefix = engine.state.prefix
        self.cache = PrefixCache(2, BLOCK, eviction)
        self.keys = [prompt_keys(self.workload, r) for r in range(len(self.workload))]
        self.own = {}  # running request -> blocks that only it holds
        self.pool_of = {}

    def tokens(self, r):
        return int(self.workload.prompt_tokens[r])

    def footprint(self, r):
        inside = sum(tokens for _, tokens in self.keys[r])
        return sum(-(-tokens // BLOCK) for _, tokens in self.keys[r]) + -(-(self.tokens(r) - inside) // BLOCK)

    def used(self, pool):
        return sum(own for r, own in self.own.items() if self.pool_of[r] == pool) + self.cache.in_use(pool)

    def evict_to_fit(self, pool):
        while self.used(pool) + self.cache.idle(pool) > self.capacity:
            self.cache.evict_one(pool)

    @rule(data=st.data(), pool=st.integers(0, 1))
    def admit(self, data, pool):
        waiting = [r for r in range(len(self.workload)) if r not in self.own]
        if not waiting:
            return
        r = data.draw(st.sampled_from(waiting))
        pool_kernels.ask_pools(self.prefix, 0, r)
        offer = self.prefix.pool[0, pool]
        assert offer["offer_tokens"] == self.cache.tokens_here(self.keys[r], pool)
        assert offer["offer_blocks"] == self.cache.shared_here(self.keys[r], pool)
        if self.used(pool) + self.footprint(r) - offer["offer_blocks"] > self.capacity:
            return
        hits, crossings = self.cache.hits(self.keys[r]), self.cache.crossings(self.keys[r], pool)
        here = [hit for hit in hits if hit[0] in self.cache.pools[pool]]
        self.pool_of[r] = pool
        self.own[r] = self.footprint(r) - sum(-(-tokens // BLOCK) for _, tokens in hits)
        missing = sum(-(-tokens // BLOCK) for _, tokens in hits if (_, tokens) not in here)
        self.cache.hold(r, here, pool)
        self.own[r] += missing
        self.evict_to_fit(pool)
        self.own[r] -= missing
        self.cache.hold(r, [hit for hit in hits if hit not in here], pool)

        row = self.s.req[0, r]
        row["status"], row["lane"], row["prefilled_tokens"] = Status.PREFILL, pool, 0
        self.s.pool[0, pool]["used"] += pool_kernels.blocks_of(self.prefix, 0, r, self.tokens(r), BLOCK)
        pool_kernels.hold_prefix(self.prefix, self.s.req, self.s.pool, 0, r, pool, self.capacity)
        assert self.prefix.req[0, r]["held_count"] == len(hits)
        assert self.prefix.req[0, r]["moving_tokens"] == crossings
        assert row["prefilled_tokens"] == min(sum(tokens for _, tokens in hits), self.tokens(r) - 1)

    def held(self, r):
        row = self.prefix.req[0, r]
        return self.prefix.ids[0, row["ids_first"] : row["ids_first"] + row["held_count"]]

    def running(self, data):
        return data.draw(st.sampled_from(sorted(self.own)))

    @precondition(lambda self: self.own)
    @rule(data=st.data(), tokens=st.integers(1, 30))
    def compute(self, data, tokens):
        r = self.running(data)
        pool, row = self.pool_of[r], self.s.req[0, r]
        row["prefilled_tokens"] = min(int(row["prefilled_tokens"]) + tokens, self.tokens(r))
        pool_kernels.publish(self.prefix, self.s.pool, 0, r, pool, row["prefilled_tokens"])
        end = 0
        for key, size in self.keys[r]:
            end += size
            entry = self.cache.pools[pool].get(key)
            if end <= row["prefilled_tokens"] and (entry is None or r not in entry.users):
                self.cache.hold(r, [(key, size)], pool)
                self.own[r] -= -(-size // BLOCK)

    @precondition(lambda self: self.own)
    @rule(data=st.data(), blocks=st.integers(1, 4))
    def grow(self, data, blocks):
        r = self.running(data)
        pool = self.pool_of[r]
        if self.used(pool) + blocks > self.capacity:
            return
        self.own[r] += blocks
        self.evict_to_fit(pool)
        self.s.pool[0, pool]["used"] += blocks
        pool_kernels.evict_to_fit(self.prefix, self.s.pool, 0, pool, self.capacity)

    @precondition(lambda self: self.own)
    @rule(data=st.data())
    def leave(self, data):
        r = self.running(data)
        pool, row = self.pool_of.pop(r), self.s.req[0, r]
        held = self.prefix.segment["blocks"][0, self.held(r)].sum()
        self.s.pool[0, pool]["used"] -= self.own.pop(r) + held
        self.cache.let_go(r, pool)
        pool_kernels.release_prefix(self.prefix, self.s.pool, 0, r, pool)
        row["status"] = Status.WAITING

    @rule(eviction=st.sampled_from(RULES))
    def change_rule(self, eviction):
        self.cache.rule = eviction
        pool_kernels.change_eviction(self.prefix, 0, eviction)

    @rule(data=st.data())
    def score(self, data):
        """A policy scores what is idle; it counts as soon as the rule is SCORE."""
        rows = idle_segments(self.s, 0)
        idle = [(pool, e) for pool, entries in enumerate(self.cache.pools) for e in entries.values() if not e.users]
        idle.sort(key=lambda each: each[1].idle_since)
        assert rows["pool"].tolist() == [pool for pool, _ in idle]
        assert rows["depth"].tolist() == [entry.depth for _, entry in idle]
        assert rows["tokens"].tolist() == [entry.tokens for _, entry in idle]
        assert rows["uses"].tolist() == [entry.uses for _, entry in idle]
        values = {key: data.draw(st.sampled_from([-1.0, -0.5, 0.25, 2.0])) for key in {e.key for _, e in idle}}
        score_segments(self.s, 0, rows["segment"], np.array([values[entry.key] for _, entry in idle]))
        pool_kernels.change_eviction(self.prefix, 0, Eviction.OFF)
        self.cache.scores.update({key: min(value, 1.0) for key, value in values.items()})

    @invariant()
    def same_books(self):
        if not hasattr(self, "own"):
            return
        in_use = check_prefix(self.s, [0, 1])
        for pool, entries in enumerate(self.cache.pools):
            assert in_use[pool] == self.cache.in_use(pool)
            assert self.s.pool["used"][0, pool] == self.used(pool)
            assert self.prefix.pool["cached"][0, pool] == self.cache.idle(pool)
            assert self.used(pool) + self.cache.idle(pool) <= self.capacity
            slots = self.prefix.slot[0, pool]
            there = slots[slots_in_use(self.s, pool)]
            found = sorted(
                (int(self.prefix.segment[0, row["segment"]]["end_tokens"]), int(row["refs"])) for row in there
            )
            assert found == sorted((entry.key[-1], len(entry.users)) for entry in entries.values())
        assert self.prefix.env["evictions_count"][0] == self.cache.evictions


def slots_in_use(state, pool):
    free, place = set(), int(state.prefix.pool["free_slot"][0, pool])
    while place != NOWHERE:
        free.add(place)
        place = int(state.prefix.slot["next_copy"][0, pool, place])
    return [place for place in range(state.prefix.slot.shape[2]) if place not in free]


BlockPool.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)
TestBlockPool = BlockPool.TestCase


# --- segments


def test_segments_are_equal_where_all_ids_up_to_them_and_their_tokens_are():
    found = segments(prompts([[7, 8, 9], [7, 8], [5, 8], [7, 8, 9], []], [12, 7, 8, 12, 5], 4))
    first, second, third, fourth = (found.ids[a:b].tolist() for a, b in ((0, 3), (3, 5), (5, 7), (7, 10)))
    assert first == fourth
    assert first[0] == second[0]
    assert first[1] != second[1]  # the same id, but of 3 tokens only
    assert third[1] not in first + second  # the same id on another beginning
    assert found.tokens[second].tolist() == [4, 3]
    assert found.end_tokens[first].tolist() == [4, 8, 12]
    assert found.depth[first].tolist() == [0, 1, 2]
    assert found.request_tokens.tolist() == [12, 7, 8, 12, 0]
    assert sorted(set(found.ids.tolist())) == list(range(found.tokens.size)) == list(range(6))


def test_more_ids_than_the_prompt_has_blocks_are_refused():
    with pytest.raises(
        WorkloadError, match="row 1, field prefix_ids: got 3 ids of 4 tokens; expected at most 2, for 8"
    ):
        segments(prompts([[1], [1, 2, 3]], [4, 8], 4))


def test_an_unknown_rule_is_refused():
    with pytest.raises(WorkloadError, match="prefix cache 'fifo'; expected one of off, lru, lfu, tree, score"):
        eviction_rule("fifo")


def test_two_forms_of_kv_in_the_same_memory_are_refused():
    engine = Engine(compiled("l3-dgx-h200", "deepseek-v3"), 1, 1, prefix_cache=Eviction.LRU)
    with pytest.raises(WorkloadError, match="KV may lie in two forms in the same memory is not modelled"):
        engine.reset(0, prompts([[1]], [4], 4))
    engine.reset(0, Workload.build("no ids", 0.0, 10, 10))


# --- requests that are added


def talks(count, seed=3):
    """Conversations that come back: prompts of 3 to 10 ids of 8 tokens and a rest."""
    rng = np.random.default_rng(seed)
    talk = rng.integers(0, 6, count)  # six conversations on one system prompt
    rows = [[0, 0, *([int(k) + 1] * (1 + i % 7))] for i, k in enumerate(talk)]
    return prompts(
        rows,
        [8 * len(row) + 3 for row in rows],
        8,
        output=rng.integers(5, 60, count),
        arrival=np.sort(rng.random(count)) * 2.0,
    )


@pytest.mark.parametrize("pair", [("gpu-dgx-a100", "llama-2-7b"), ("l3-dgx-a100", "llama-2-7b")])
@pytest.mark.parametrize("eviction", RULES)
@pytest.mark.parametrize("first", [1, 25])
def test_added_requests_share_as_if_they_had_been_there(pair, eviction, first):
    """A table served whole, and the same one of which all but the first rows are added before they are due, one batch
    after the other: same hits, evictions and times, with evictions and preemptions under way."""
    whole = talks(60)
    tables = compiled(*pair)
    tables = with_memory(tables, BLOCK, [90] * tables.arrays.pool_blocks.shape[1])
    one, two = (Engine(tables, 1, len(whole), prefix_cache=eviction) for _ in range(2))
    for engine in (one, two):
        Knobs(headroom_frac=0.0, prefill_budget_tokens=48, hbm_share_frac=0.2).write(engine.knobs, 0)
    one.reset(0, whole)
    assert one.run(0) == Stop.DONE
    two.reset(0, whole.head(first))
    for start in range(first, 60, 7):
        rows = np.arange(start, min(start + 7, 60))
        two.run(0, Until.TIME, float(whole.arrival_s[start - 1]))
        assert two.append(0, whole.select(rows)).tolist() == rows.tolist()
        check_prefix(two.state, tables.arrays.lane_pool[0])
    assert two.run(0) == Stop.DONE
    check_prefix(two.state, tables.arrays.lane_pool[0])
    for name in ("arrival_s", "first_token_s", "finish_s", "preemptions_count"):
        np.testing.assert_array_equal(one.state.req[name], two.state.req[name])
    np.testing.assert_array_equal(one.state.prefix.req["hit_tokens"], two.state.prefix.req["hit_tokens"])
    for name in ("hits_count", "evictions_count", "segments_count", "ids_used"):
        assert one.state.prefix.env[name][0] == two.state.prefix.env[name][0], name
    assert one.state.prefix.env["hits_count"][0] > 50
    assert one.state.prefix.env["evictions_count"][0] > 20


def test_added_requests_open_the_cache_where_the_first_had_no_ids():
    engine = Engine(compiled("gpu-dgx-a100", "llama-2-7b"), 1, 5, prefix_cache=Eviction.LRU)
    engine.reset(0, Workload.build("no ids", 0.0, 10, 10))
    Knobs().write(engine.knobs, 0)
    engine.run(0, Until.ITERATIONS, 2)
    engine.append(0, prompts([[1, 2]], [9], 4, output=3))
    engine.run(0)
    engine.append(0, Workload.build("no ids", 0.0, 10, 10))
    engine.append(0, prompts([[1, 2, 3], [1, 3]], [13, 9], 4))
    assert engine.run(0) == Stop.DONE
    check_prefix(engine.state, [0])
    assert engine.state.prefix.req["hit_tokens"][0].tolist() == [0, 0, 0, 8, 4]
    assert engine.state.env["finished_count"][0] == 5


def test_what_is_added_must_fit_its_prompt_and_the_machine():
    """And nothing of it stays."""
    engine = Engine(compiled("gpu-dgx-a100", "llama-2-7b"), 1, 5, prefix_cache=Eviction.LRU)
    engine.reset(0, prompts([[1]], [5], 4))
    before = [array.tobytes() for array in arrays(engine.state)]
    with pytest.raises(WorkloadError, match="row 0, field prefix_ids: got 3 ids of 4 tokens"):
        engine.append(0, prompts([[1, 2, 3]], [5], 4))
    assert [array.tobytes() for array in arrays(engine.state)] == before
    two_forms = Engine(compiled("l3-dgx-h200", "deepseek-v3"), 1, 2, prefix_cache=Eviction.LRU)
    two_forms.reset(0, Workload.build("no ids", 0.0, 10, 10))
    with pytest.raises(WorkloadError, match="KV may lie in two forms in the same memory is not modelled"):
        two_forms.append(0, prompts([[1]], [4], 4))


def test_requests_can_be_added_after_an_earlier_state_is_put_back():
    """Which segments there are is read from the state, not from what the engine saw last."""
    engine = Engine(compiled("gpu-dgx-a100", "llama-2-7b"), 1, 4, prefix_cache=Eviction.LRU)
    Knobs().write(engine.knobs, 0)
    engine.reset(0, prompts([[1, 2]], [9], 4))
    engine.append(0, prompts([[1, 3]], [9], 4))
    engine.run(0)
    kept = copy(engine.state)
    found = []
    for ids in ([1, 9, 8], [1, 3, 4], [1, 9, 8]):
        engine.state = copy(kept)
        engine.append(0, prompts([ids], [13], 4))
        engine.append(0, prompts([ids], [13], 4, arrival=[1e6]))
        assert engine.run(0) == Stop.DONE
        check_prefix(engine.state, [0])
        found.append(engine.state.prefix.req["hit_tokens"][0].tolist())
    assert found == [[0, 0, 4, 12], [0, 0, 8, 12], [0, 0, 4, 12]]


# --- worked by hand


def served(workload, sizes, *, pair=("gpu-dgx-a100", "llama-2-7b"), eviction=Eviction.LRU, held=None):
    tables = with_memory(compiled(*pair), BLOCK, sizes)
    engine = Engine(tables, 1, len(workload), prefix_cache=eviction)
    engine.reset(0, workload)
    (held or Knobs(headroom_frac=0.0)).write(engine.knobs, 0)
    assert engine.run(0) == Stop.DONE
    return engine


def test_a_prompt_that_is_all_cached_computes_its_last_token():
    workload = prompts([[1, 2], [1, 2]], [8, 8], 4, arrival=[0, 1e6])
    engine = served(workload, [100])
    assert engine.state.prefix.req["hit_tokens"][0].tolist() == [0, 8]
    assert engine.state.env["prefill_tokens"][0] == 8 + 1
    assert engine.state.prefix.pool["cached"][0, 0] == 2


@pytest.mark.parametrize(
    ("eviction", "kept"),
    # A = [1, 2] is used twice and least recent, B = [3] and C = [4, 5] once; D needs 2 blocks of the 5 that are full
    [
        (Eviction.LRU, {3, 4, 5}),
        (Eviction.LFU, {1, 2, 4}),
        (Eviction.TREE, {1, 3, 4}),
        (Eviction.SCORE, {3, 4, 5}),  # nobody scores: as LRU
    ],
)
def test_each_rule_gives_up_what_it_says(eviction, kept):
    rows = [[1, 2], [1, 2], [3], [4, 5], []]
    workload = prompts(rows, [8, 8, 4, 8, 8], 4, arrival=np.arange(5) * 1e6)
    engine = served(workload, [5], eviction=eviction)
    assert engine.state.prefix.env["evictions_count"][0] == 2
    names = dict(zip(engine.state.prefix.ids[0].tolist(), [i for row in rows for i in row], strict=True))
    slots = engine.state.prefix.slot[0, 0]
    assert {names[int(slots["segment"][place])] for place in slots_in_use(engine.state, 0)} == kept


def test_crossings_are_counted_by_where_kv_is_and_where_it_goes():
    """4 tokens: HBM to HBM none; HBM to PIM once; PIM to the GPU and back where it is once; PIM to HBM once."""
    workload = prompts([[1], [1], [2], [2], [3], [3], [4], [4]], [5] * 8, 4, output=3, arrival=np.arange(8) * 1e6)
    tables = with_memory(compiled("l3-dgx-a100", "llama-2-7b"), BLOCK, [50, 50])
    engine = Engine(tables, 1, 8, prefix_cache=Eviction.LRU)
    engine.reset(0, workload)
    found = []
    for r, share in enumerate([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0]):
        Knobs(hbm_share_frac=share).write(engine.knobs, 0)
        before_s = float(engine.state.env["transfer_s"][0])
        engine.run(0, Until.ITERATIONS, 1)
        token_s = tables.arrays.coef["transfer_token_s"][0]
        assert engine.state.req["lane"][0, r] == (0 if share else 1)
        found.append(round((float(engine.state.env["transfer_s"][0]) - before_s) / token_s))
        engine.run(0, Until.ITERATIONS, 2)
    # a request on the PIM side also sends what it computes: 5 tokens without a hit, 1 with
    assert found == [0, 0, 0, 4 + 1, 5, 4 + 1, 5, 4]


def test_two_that_compute_the_same_at_once_share_it_after():
    workload = prompts([[1, 2], [1, 2]], [9, 9], 4, output=5)
    tables = with_memory(compiled("gpu-dgx-a100", "llama-2-7b"), BLOCK, [20])
    engine = Engine(tables, 1, 2, prefix_cache=Eviction.LRU)
    engine.reset(0, workload)
    Knobs().write(engine.knobs, 0)
    engine.run(0, Until.ITERATIONS, 1)
    assert engine.state.prefix.req["hit_tokens"][0].tolist() == [0, 0]
    assert engine.state.pool["used"][0, 0] == 2 + 1 + 1  # two blocks shared, one each of their own
    assert engine.state.pool["peak"][0, 0] == 3 + 3
    engine.run(0)
    assert (engine.state.pool["used"][0, 0], engine.state.prefix.pool["cached"][0, 0]) == (0, 2)


def test_environments_of_one_engine_keep_caches_of_their_own_while_arrays_grow():
    small = prompts([[1], [1]], [6, 6], 4, output=40, arrival=[0, 0.5])
    large = prompts([list(range(k)) for k in (20, 20, 30)], [90, 90, 130], 4, output=5, arrival=[0, 50, 100])
    tables = with_memory(compiled("gpu-dgx-a100", "llama-2-7b"), BLOCK, [60])
    engine = Engine(tables, 3, 3, prefix_cache=Eviction.LRU)
    Knobs().write(engine.knobs, slice(None))
    engine.reset(0, small)
    engine.run(0, Until.ITERATIONS, 2)
    engine.reset(1, large)
    engine.reset(2, Workload.build("no ids", 0.0, 10, 10))
    for e, hits in enumerate([1, 20 + 20, 0]):
        assert engine.run(e) == Stop.DONE
        check_prefix(engine.state, [0], e)
        assert engine.state.prefix.env["hits_count"][e] == hits
    engine.reset(1, small)
    engine.run(1)
    assert engine.state.env["clock_s"][1] == engine.state.env["clock_s"][0]


def test_results_tell_hits_and_a_workload_without_ids_has_none():
    workload = prompts([[1, 2], [1, 2], [1, 3]], [9, 9, 9], 4, output=2, arrival=[0, 1e3, 2e3])
    tables = compiled("gpu-dgx-a100", "llama-2-7b")
    for rule_name, hits, tokens in (("off", 0, 0), ("lru", 3, 12)):
        outcome = run_policy(tables, workload, FixedKnobs("fixed", Knobs()), prefix_cache=rule_name)
        # requests are dealt to the replicas in turn, so they share only where there is one
        if tables.replicas_count > 1:
            assert outcome.metrics["prefix_hit_frac"] <= hits / 6
        else:
            assert outcome.metrics["prefix_hit_frac"] == hits / 6
            assert outcome.metrics["prefix_hit_tokens_frac"] == tokens / 27


# --- eviction by a policy's own scores


class Hoard(BasePolicy):
    """Keeps beginnings of prompts, whatever their age: the deeper a segment, the less it is worth."""

    name, decision_interval_s = "hoard", 0.0

    def __init__(self):
        self.asked = 0

    def decide(self, view):
        return Knobs(headroom_frac=0.0)

    def score_segments(self, segments):
        self.asked += 1
        return -segments["depth"] / 8.0


def test_a_policy_of_ones_own_decides_what_is_evicted():
    """Scores that fall with depth, given before every iteration, do what the rule TREE does."""
    whole = talks(80).at_load(0.05)
    tables = with_memory(compiled("gpu-dgx-a100", "llama-2-7b"), BLOCK, [60])
    found, hoard, plain = {}, Hoard(), FixedKnobs("plain", Knobs(headroom_frac=0.0))
    for name, policy in (("score", hoard), ("tree", plain), ("lru", plain)):
        engine = Engine(tables, 1, len(whole), prefix_cache=eviction_rule(name))
        engine.reset(0, whole)
        drive(engine, 0, policy)
        check_prefix(engine.state, [0])
        env = engine.state.prefix.env[0]
        found[name] = env["hits_count"], env["evictions_count"]
    assert hoard.asked > 10
    assert found["score"] == found["tree"] != found["lru"]
    assert found["score"][1] > 20


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda rows: np.zeros(rows.size + 1), "one finite number per row"),
        (lambda rows: np.full(rows.size, np.nan), "one finite number per row"),
        (None, "lacks score_segments"),
    ],
)
def test_scores_that_are_none_are_refused(scores, message):
    policy = Hoard()
    policy.score_segments = scores
    tables = compiled("gpu-dgx-a100", "llama-2-7b")
    workload = prompts([[1], [1]] * 8, [5, 5] * 8, 4, arrival=np.repeat([0.0, 100.0], 8))
    with pytest.raises(PolicyError, match=message):
        run_policy(tables, workload, policy, prefix_cache="score")
    with pytest.raises(L3EnvError, match="asks a policy for scores"):
        Episodes.build(trace="azure-conv-2023", prefix_cache="score")


# --- copies


@pytest.mark.parametrize("pair", [("gpu-dgx-a100", "llama-2-7b"), ("l3-dgx-a100", "llama-2-7b")])
@pytest.mark.parametrize("eviction", RULES)
def test_copies_of_the_present_go_on_as_the_original_and_leave_it_alone(pair, eviction):
    """Trials with the true lengths hit, evict and finish as the live run does; before that, not a bit of the live
    environment or of the scenario has changed, and a trial that ran elsewhere first makes no difference."""
    whole = talks(60)
    tables = compiled(*pair)
    tables = with_memory(tables, BLOCK, [90] * tables.arrays.pool_blocks.shape[1])
    live = Engine(tables, 1, len(whole), prefix_cache=eviction)
    held = Knobs(headroom_frac=0.0, prefill_budget_tokens=48, hbm_share_frac=0.2)
    held.write(live.knobs, 0)
    live.reset(0, whole)
    live.run(0, Until.TIME, 2.01)
    live.await_work(0, 1)
    assert live.state.env["arrived_count"][0] == 60
    score_segments(live.state, 0, np.arange(5), np.linspace(-1, 1, 5))
    before = [array.tobytes() for array in arrays(live.state)]
    idx = present_idx(live, 0)
    assert idx.size > 10
    rollouts = Rollouts(tables, 2, 2)
    rollouts.imagine(live, 0, idx, 0, live.state.truth[0, idx].astype(np.int64), None, Slo())
    rollouts.imagine(live, 0, idx, 1, live.state.truth[0, idx].astype(np.int64) + 30, None, Slo())
    kept = [array.tobytes() for array in arrays(rollouts._source.state)]
    for scenarios in ((0, 1), (1, 0), (0, 0)):
        for trial, scenario in enumerate(scenarios):
            rollouts.start(trial, scenario)
            held.write(rollouts.engine.knobs, trial)
        rollouts.run_until(np.full(2, 1e9))
    assert [array.tobytes() for array in arrays(live.state)] == before
    assert [array.tobytes() for array in arrays(rollouts._source.state)] == kept
    assert live.run(0) == Stop.DONE
    prefix, copied = live.state.prefix, rollouts.engine.state.prefix
    for trial in (0, 1):
        check_prefix(rollouts.engine.state, tables.arrays.lane_pool[0], trial)
        finish_s = rollouts.engine.state.req["finish_s"][trial, : idx.size]
        np.testing.assert_array_equal(finish_s, live.state.req["finish_s"][0, idx])
        assert copied.env[trial] == prefix.env[0]
        np.testing.assert_array_equal(copied.slot[trial], prefix.slot[0])
    assert prefix.env["evictions_count"][0] > 20


def test_a_state_that_is_put_back_repeats_the_run_to_the_bit():
    whole = talks(60)
    tables = with_memory(compiled("l3-dgx-a100", "llama-2-7b"), BLOCK, [90, 90])
    engine = Engine(tables, 1, len(whole), prefix_cache=Eviction.LFU)
    Knobs(headroom_frac=0.0, prefill_budget_tokens=48, hbm_share_frac=0.2).write(engine.knobs, 0)
    engine.reset(0, whole)
    engine.run(0, Until.TIME, 1.0)
    kept = copy(engine.state)
    ends = []
    for _ in range(2):
        engine.state = copy(kept)
        assert engine.run(0) == Stop.DONE
        ends.append([array.tobytes() for array in arrays(engine.state)])
    assert ends[0] == ends[1]


def test_who_was_in_time_after_all_thanks_to_a_hit_does_not_step_back_when_preempted():
    """Admitted after the latest start of a whole prefill, but nearly all of its prompt is cached: it is in time."""
    row = range(125)
    workload = prompts([row, row], [2000, 2000], 16, output=[400, 50], arrival=[0.0, 1e-6])
    engine = Engine(compiled("gpu-dgx-a100", "llama-2-7b"), 1, 2, prefix_cache=Eviction.LRU)
    engine.reset(0, workload, slo=Slo(3.0, 5.0))
    engine.await_work(0, 1)

    def iterate(plan: Plan) -> None:
        engine.step_plan(0, plan.operations(), prefill_all=True, decode=True, interleaved=False)

    iterate(Plan(admit=[0]))
    req, env = engine.state.req[0], engine.state.env
    latest_s = float(req["arrival_s"][1] + req["ttft_slo_s"][1] - req["ttft_alone_s"][1])
    while env["clock_s"][0] <= latest_s:
        iterate(Plan())
    iterate(Plan(admit=[1]))
    assert req["hopeless"].tolist() == [0, 1]
    assert latest_s < req["first_token_s"][1] < req["arrival_s"][1] + req["ttft_slo_s"][1]
    iterate(Plan(preempt=[1]))
    assert req["status"][1] == Status.WAITING
    assert req["hopeless"].tolist() == [0, 0]


def test_a_plan_may_give_an_admitted_prompt_more_tokens_than_a_hit_leaves():
    """The whole prompt of 40, of which 36 are found: a plan cannot know them before."""
    row = range(10)
    workload = prompts([row, row], [40, 40], 4, output=[400, 50], arrival=[0.0, 0.0])
    engine = Engine(compiled("gpu-dgx-a100", "llama-2-7b"), 1, 2, prefix_cache=Eviction.LRU)
    engine.reset(0, workload)
    engine.await_work(0, 1)

    def iterate(plan: Plan) -> None:
        engine.step_plan(0, plan.operations(), prefill_all=plan.prefill is None, decode=True, interleaved=False)

    iterate(Plan(admit=[0], prefill={0: 40}))
    iterate(Plan(admit=[1], prefill={1: 40}))
    req = engine.state.req[0]
    assert req["first_token_s"][1] > req["first_token_s"][0]
    assert engine.state.env["prefill_tokens"][0] < 80
    assert req["prefilled_tokens"].tolist() == [40, 40]
    iterate(Plan(preempt=[1]))
    with pytest.raises(PlanError, match="request 1: prefill tokens out of range"):
        iterate(Plan(admit=[1], prefill={1: 60}))
