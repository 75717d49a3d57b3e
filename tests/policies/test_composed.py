"""Policies that put iterations together themselves: who is served, who gives way, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from l3env import Slo, Workload
from l3env.machine.pair import compile_pair
from l3env.policies.andes import Andes
from l3env.policies.fastserve import FastServe
from l3env.policies.trail import Rest
from l3env.policy.registry import make_policy
from l3env.policy.view import ROW_DTYPE
from l3env.runs.driver import run_policy
from tests.policies.served import gpu, lengths, requests, serve

EARLIER = lengths((600, 10), (500, 400))  # what outputs of these prompts were


def test_who_has_run_long_pauses_for_a_newcomer() -> None:
    """One at a time. 0 has used up 20 ms of its first level and 40 ms of the next when 1 comes at 0.1 s, which joins
    the level of its prefill, 20 ms, and ends before it gets as low."""
    assert [FastServe().level_of(s) for s in (0.004, 0.01, 0.015, 0.04, 0.041)] == [0, 0, 1, 2, 3]
    two = requests((0.0, 64, 100), (0.1, 64, 4))
    alone = serve("fastserve", two.head(1))["finish_s"][0]
    served = serve("fastserve?batch_count=1", two)
    assert served["finish_s"][1] < 0.1 + 0.09
    assert served["finish_s"][0] == pytest.approx(alone + served["finish_s"][1] - 0.1, abs=0.03)
    assert served["preemptions_count"].sum() == 0
    together = serve("fastserve?batch_count=2", two)
    assert together["finish_s"][0] < served["finish_s"][0]


def test_a_request_sinks_below_those_that_came_later_but_not_for_ever() -> None:
    """Newcomers every 0.05 s keep 0 from its end, but not with a first level of 1 s, or a rescue after 0.02 s."""
    stream = requests((0.0, 64, 60), *[(0.1 + 0.05 * k, 64, 4) for k in range(40)])
    sinks = serve("fastserve?batch_count=1", stream)["finish_s"]
    assert sinks[0] == sinks.max()
    stays = serve("fastserve?batch_count=1&quantum_s=1", stream)["finish_s"]
    assert stays[0] == stays.min()
    rescued = serve("fastserve?batch_count=1&rescue_every_count=1&starved_s=0.02", stream)["finish_s"]
    assert stays[0] < rescued[0] < sinks[0]


def test_the_shorter_prediction_takes_the_turn_or_the_memory_of_the_longer() -> None:
    """32 blocks for a prompt of 500, 38 for one of 600: of 80 both have room and 0 pauses; of 50 it is preempted."""
    two = requests((0.0, 500, 60), (0.1, 600, 20))
    for policy in ("vllm-ltr?batch_count=1", "trail?batch_count=1"):
        served = serve(policy, two, gpu(80), EARLIER)
        assert served["finish_s"][1] < served["finish_s"][0]
        assert served["preemptions_count"].tolist() == [0, 0]
    for policy in ("vllm-ltr", "trail"):
        served = serve(policy, two, gpu(50), EARLIER)
        assert served["finish_s"][1] < served["finish_s"][0]
        assert served["preemptions_count"].tolist() == [1, 0]
        backwards = requests((0.0, 600, 20), (0.1, 500, 60))
        assert serve(policy, backwards, gpu(50), EARLIER)["preemptions_count"].tolist() == [0, 0]


def test_where_memory_runs_over_the_longer_prediction_goes() -> None:
    """0 came first and needs its 33rd block after 12 tokens, 1 its 39th after 8: 70 blocks hold both prompts only. vLLM
    preempts the newest."""
    two = requests((0.0, 500, 30), (0.0, 600, 30))
    assert serve("vllm-ltr", two, gpu(70), EARLIER)["preemptions_count"].tolist() == [1, 0]
    assert serve("vllm", two, gpu(70))["preemptions_count"].tolist() == [0, 1]


def test_the_starved_get_turns() -> None:
    """One at a time: 0 is behind 1 for all of its 60 tokens. If it goes to the front after 5 iterations, for 3, that
    costs 1 about three iterations in eight: 60 of its own, 33 of 0's."""
    two = requests((0.0, 500, 60), (0.02, 600, 60))
    never = serve("vllm-ltr?batch_count=1", two, training=EARLIER)
    turns = serve("vllm-ltr?batch_count=1&starved_count=5&period_count=3", two, training=EARLIER)
    step_s = never["tpot_s"][1]
    assert turns["finish_s"][1] - never["finish_s"][1] == pytest.approx(33 * step_s, rel=0.15)


def test_who_is_far_enough_is_no_longer_preempted() -> None:
    """0, of 400 predicted, has emitted at least two tokens by 0.1 s: not 0.8 of them, but more than 0.001."""
    two = requests((0.0, 500, 60), (0.1, 600, 20))
    assert serve("trail", two, gpu(50), EARLIER)["preemptions_count"].tolist() == [1, 0]
    pinned = serve("trail?preemptible_frac=0.001", two, gpu(50), EARLIER)
    assert pinned["preemptions_count"].tolist() == [0, 0]
    assert pinned["finish_s"][0] < pinned["first_token_s"][1]


def test_what_is_left_is_the_mean_of_those_that_went_on() -> None:
    """Outputs of 10 and 30 alike: 20 at first, 15 after 5, 20 more once the short ones have ended, 1 at the end."""
    rest = Rest(np.full(40, 100), np.repeat([10, 30], 20))
    prompts = np.full(6, 100)
    np.testing.assert_allclose(rest.of(prompts, np.array([0, 5, 9, 10, 29, 30])), [20, 15, 11, 20, 1, 1])


def test_apt_serve_decodes_after_a_prompt_that_made_many_wait() -> None:
    """Eight wait through the prefill of 8's 4000 tokens, together eight times as long as 9 has waited: they get a token
    before 9 is prefilled, and then are worth nothing. fcfs prefills 9 first."""
    rows = requests(*[(0.0, 64, 60)] * 8, (0.2, 4000, 3), (0.21, 64, 3))
    found = {}
    for policy in ("apt-serve", "fcfs"):
        served = serve(policy, rows)
        found[policy] = served["first_token_s"][9] - served["first_token_s"][8]
    step_s = served["tpot_s"][9]
    assert found["apt-serve"] == pytest.approx(found["fcfs"] + step_s, rel=0.2)


def test_apt_serve_takes_the_greatest_worth_a_block_of_those_within_the_limit() -> None:
    """When 0 ends, at about 0.3 s, 1 has waited for 0.25 s and needs 38 blocks, 2 for 0.1 s and 40; one fits."""
    three = requests((0.0, 500, 20), (0.05, 600, 5), (0.2, 640, 5))
    first = serve("apt-serve", three, gpu(50))["first_token_s"]
    assert first[0] < first[1] < first[2]
    late = serve("apt-serve?limit_s=0.2", three, gpu(50))["first_token_s"]
    assert late[0] < late[2] < late[1]


def test_andes_gains_by_formula() -> None:
    """Expected from 1 s on, 10 a second; it is 2 s, and for 2.5 s 50 ms a token may give 20 a second. With none so
    far: 20 a up to 1 s ahead, then all that is expected: 10 + 41.25 of 61.25. Who is ahead gains nothing."""
    rows = np.zeros(2, ROW_DTYPE)
    rows["ttft_deadline_s"], rows["tbt_slo_s"], rows["emitted_tokens"] = 1.0, 0.1, [0, 40]
    np.testing.assert_allclose(Andes().gains(rows, 2.0, 0.05), [51.25 / 61.25, 0.0], rtol=0.01)


def test_andes_gives_the_memory_of_who_is_ahead_to_who_is_late() -> None:
    """0 is far ahead of a reader of two tokens a second and holds 32 of 50 blocks; 1 needs 38. Over 90 % nobody is."""
    two = requests((0.0, 500, 60), (0.1, 600, 20))
    slo = Slo(ttft_s=0.2)
    shared = serve("andes?reading_tokens_per_s=2&scarce_frac=0.5", two, gpu(50), slo=slo)
    assert shared["preemptions_count"].tolist() == [1, 0]
    assert shared["finish_s"][1] < shared["finish_s"][0]
    ample = serve("andes?reading_tokens_per_s=2", two, gpu(50), slo=slo)
    assert ample["preemptions_count"].tolist() == [0, 0]
    assert ample["first_token_s"][1] > ample["finish_s"][0]


def test_s3_packs_the_longest_first_and_then_whatever_fits() -> None:
    """Buckets of 16: prompts of 64 are allotted 16 tokens, 5 blocks, those of 65 are allotted 208, 18. 30 blocks hold
    one of 18, not two, and two of 5 beside it, though they came last."""
    earlier = lengths((64, 4), (65, 200))
    mixed = requests((0.0, 65, 200), (0.0, 65, 200), *[(0.0, 64, 4)] * 4)
    first = serve("s3?bucket_tokens=16", mixed, gpu(30), earlier)["first_token_s"]
    assert (first[[0, 2, 3]] == first[0]).all()
    assert first[1] > first[[4, 5]].max() > first[0]


def test_s3_gives_twice_as_much_to_who_outgrows_its_room() -> None:
    """Allotted 16, 32 and 64 tokens in turn, 50 are had by then: computed again twice."""
    served = serve("s3?bucket_tokens=16", requests((0.0, 64, 50)), gpu(30), lengths((64, 4)))
    assert served["preemptions_count"].tolist() == [2]


@pytest.mark.parametrize("name", ["andes", "apt-serve", "fastserve", "l3", "s3", "trail", "vllm-ltr"])
def test_plans_go_with_a_prefix_cache(name: str) -> None:
    """Prompts share up to nine blocks with others of their session; a plan names tokens before it knows of hits."""
    rng, count, block = np.random.default_rng(3), 40, 16
    rows = [[*range(100 * (i % 4), 100 * (i % 4) + int(rng.integers(1, 10))), 10_000 + i] for i in range(count)]
    sizes = [len(row) for row in rows]
    workload = Workload.build(
        "shared",
        np.sort(rng.random(count)),
        [size * block - int(rng.integers(0, block)) for size in sizes],
        rng.integers(1, 30, count),
        prefix_ids=[each for row in rows for each in row],
        prefix_offsets=np.concatenate([[0], np.cumsum(sizes)]),
        prefix_block_tokens=block,
    )
    tables = compile_pair("l3-dgx-a100", "llama-3-8b")
    metrics = run_policy(tables, workload, make_policy(name), training=workload, prefix_cache="lru").metrics
    assert metrics["finished_count"] == count
    assert metrics["prefix_hit_tokens_frac"] > 0.2
