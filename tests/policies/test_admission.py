"""Policies that say who may start, and who goes when memory runs over, by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from l3env.errors import PolicyError
from l3env.policies.by_count import fitting_count, peak_tokens
from l3env.policies.past_future import PastFuture, drawn
from l3env.policies.sglang_ratio import SglangRatio
from l3env.policies.vllm_cost_aware import VllmCostAware
from l3env.policies.vllm_lcf import VllmLcf
from l3env.policy.view import ROW_DTYPE
from tests.policies.served import gpu, lengths, requests, serve

THREE = requests((0.0, 64, 40), (0.0, 64, 40), (0.0, 64, 40))  # each ends with 64 + 39 tokens: 7 blocks


def test_whoever_starts_without_eviction_fits_to_the_end() -> None:
    """A pool of 20 blocks has room for two of 7 to their ends, for three as they begin; the third waits for the first
    to end. Those that start at once run over: 21 blocks."""
    waits = serve("trtllm-no-evict?max_output_tokens=40", THREE, gpu(20))
    assert waits["preemptions_count"].sum() == 0
    assert waits["first_token_s"][2] > waits["finish_s"][:2].min()
    fits = serve("trtllm-no-evict?max_output_tokens=40", THREE, gpu(21))
    assert fits["first_token_s"].nunique() == 1
    over = serve("trtllm-max-utilization", THREE, gpu(20))
    assert over["first_token_s"].nunique() == 1
    assert over["preemptions_count"].tolist() == [0, 0, 1]


def test_the_limit_is_declared_or_the_longest_earlier_output() -> None:
    """With 5 declared nobody would wait; with the 40 of earlier requests the third does."""
    assert serve("trtllm-no-evict?max_output_tokens=5", THREE, gpu(20))["first_token_s"].nunique() == 1
    waits = serve("trtllm-no-evict", THREE, gpu(20), lengths((64, 40), (64, 3)))
    assert waits["first_token_s"][2] > waits["finish_s"][0]
    with pytest.raises(PolicyError, match="trtllm-no-evict needs max_output_tokens"):
        serve("trtllm-no-evict", THREE)


def test_orca_runs_whole_prompts_and_no_more_requests_than_its_batch() -> None:
    """Prompts of 3000 are one iteration together; the third of a batch of two starts when one has ended."""
    few = requests((0.0, 3000, 5), (0.0, 3000, 9), (0.0, 64, 5))
    served = serve("orca?max_output_tokens=100&max_batch_count=2", few)
    assert served["first_token_s"][0] == served["first_token_s"][1]
    assert served["first_token_s"][2] > served["finish_s"][0]
    together = serve("orca?max_output_tokens=100", few)
    assert together["first_token_s"].nunique() == 1


def test_least_computed_first_preempts_whom_vllm_would_keep() -> None:
    """0 came first and has computed least when 20 blocks are taken; vLLM preempts 1, which came last."""
    few = requests((0.0, 32, 60), (0.01, 240, 60))
    assert serve("vllm", few, gpu(20))["preemptions_count"].tolist() == [0, 1]
    assert serve("vllm-lcf", few, gpu(20))["preemptions_count"].tolist() == [1, 0]


def rows(*each: tuple[int, int, int]) -> np.ndarray:
    """(KV, prompt tokens left, emitted) of running requests."""
    found = np.zeros(len(each), ROW_DTYPE)
    found["kv_tokens"], found["prefill_left_tokens"], found["emitted_tokens"] = np.array(each).T
    return found


def test_victims_by_formula() -> None:
    """Of 10 blocks for 160 tokens, nearly done, 11 for 170, just begun, and 20 for 32 of 320 prompt tokens: 0.00625,
    0.0582 and 0.625 blocks a token."""
    running = rows((160, 0, 90), (170, 0, 10), (32, 288, 0))
    aware = VllmCostAware(max_output_tokens=100)
    aware.prepare(gpu(), None)
    badness = np.array([10 / 160 * 0.1, 11 / 170 * 0.9, 20 / 32])
    np.testing.assert_allclose(aware.worth(running, 16), 1 / (1 + badness))
    assert VllmLcf().worth(running, 16).argsort().tolist() == [2, 0, 1]


def test_the_cost_aware_victim_frees_most_for_what_is_lost() -> None:
    """When 1 has 256 tokens and needs a 17th block, 0 holds 4 blocks for 51: more a token than 16 for 256."""
    few = requests((0.0, 35, 60), (0.0, 240, 60))
    assert serve("vllm", few, gpu(20))["preemptions_count"].tolist() == [0, 1]
    assert serve("vllm-cost-aware?max_output_tokens=60", few, gpu(20))["preemptions_count"].tolist() == [1, 0]


def test_the_peak_is_the_largest_sum_while_requests_end() -> None:
    """Held 10, 20, 30 with 5, 1, 3 left: 60 + 3 x 1 at the first end, 40 + 2 x 3 at the second, 10 + 5 at the last;
    with 5, 9, 3 left it is at the first again, 60 + 3 x 3, and 30 + 2 x 5 later."""
    held = np.array([10, 20, 30])
    assert peak_tokens(held, np.array([5, 1, 3])) == 63
    assert peak_tokens(held, np.array([5, 9, 3])) == 69
    assert peak_tokens(held, np.array([[5, 1, 3], [5, 9, 3]])) == 69
    assert peak_tokens(held[:0], held[:0]) == 0


def test_as_many_join_as_keep_the_peak_below() -> None:
    """Beside 10 held and 5 left: one of 20 and 2 peaks at 34 = 30 + 2 x 2; another one at 56 = 50 + 3 x 2."""
    held, left = np.array([10, 20, 20, 20]), np.array([5, 2, 2, 2])
    assert [fitting_count(held, left, 1, most) for most in (34, 35, 56, 57, 1000)] == [0, 1, 1, 2, 3]


def course(served: pd.DataFrame, late: int) -> float:
    """How far the first request's output had come when a later one got its first token."""
    first_s, end_s = served["first_token_s"][0], served["finish_s"][0]
    return float((served["first_token_s"][late] - first_s) / (end_s - first_s))


def test_lightllm_starts_whom_the_ends_of_others_make_room_for() -> None:
    """28 blocks are 448 tokens; each may waste 15. Three of 64 + 15 and 40 peak at 357, four at 476: 30 blocks, 480.
    The three have 64 KV with their first token: once they have emitted k, 3 x 118 + 79 + 40 - k is below 448 from 26
    on; the fourth's first token is one more."""
    four = requests(*[(0.0, 64, 40)] * 4)
    waits = serve("lightllm?max_output_tokens=40&every_count=1", four, gpu(28))
    assert waits["first_token_s"][2] == waits["first_token_s"][0]
    assert course(waits, 3) == pytest.approx(26 / 39, abs=0.01)
    assert serve("lightllm?max_output_tokens=40&every_count=1", four, gpu(30))["first_token_s"].nunique() == 1
    assert waits["preemptions_count"].sum() == 0


def test_lightllm_expects_less_where_memory_is_ample() -> None:
    """Declared 2000, but 1024 expected while less than half of the memory, 16,000 tokens, is used: 15
    requests of 64 + 15 + 1024 peak at 16,545. With all declared, 7 peak at 14,553, 8 at 16,632."""
    many = requests(*[(0.0, 64, 3)] * 16)
    for ratio, expected in ((0.0, 7), (0.5, 14)):
        served = serve(f"lightllm?max_output_tokens=2000&router_token_ratio={ratio}&every_count=1", many, gpu(1000))
        assert (served["first_token_s"] == served["first_token_s"][0]).sum() == expected


def test_past_future_goes_by_what_ended() -> None:
    """Outputs of 8 were the last: 24 blocks, less 5 %, hold 4 of 64 + 15 + 8. With the longest, 300, among them the
    second one waits."""
    six = requests(*[(0.0, 64, 8)] * 6)
    policy = PastFuture(max_output_tokens=8, every_count=1)
    served = serve(policy, six, gpu(24), lengths((64, 8), times=200))
    assert (served["first_token_s"] == served["first_token_s"][0]).sum() == 4
    longest = serve("past-future?max_output_tokens=300", six, gpu(24))
    assert longest["first_token_s"][1] > longest["finish_s"][0]


def test_what_past_future_draws_is_longer_than_what_was_emitted() -> None:
    rng, window = np.random.default_rng(0), np.array([10, 100, 20, 40])
    found = drawn(rng, window, np.array([0, 10, 40, 100]), 1000, 500)
    low, high = found.min(axis=0), found.max(axis=0)
    np.testing.assert_allclose(low, [10, 20, 100, 500], rtol=0.05)
    np.testing.assert_allclose(high, [100, 100, 100, 500], rtol=0.05)
    assert np.median(found[:, 0]) == pytest.approx(30, rel=0.15)


def test_sglang_charges_those_who_run_a_share() -> None:
    """100 blocks, 1600 tokens, declared 1000, ratio 0.7: two of 64 need 2 x (64 + 1000 + 16); one starts. In the next
    iteration 1600 - 64 - 0.7 x 999 = 836 are left, too few; with conservativeness 0.1 it is 1600 - 64 - 70, enough."""
    two = requests((0.0, 64, 30), (0.0, 64, 30))
    waits = serve("sglang-ratio?max_output_tokens=1000", two, gpu(100))
    assert waits["first_token_s"][1] > waits["finish_s"][0]
    shares = serve("sglang-ratio?max_output_tokens=1000&conservativeness=0.1", two, gpu(100))
    assert shares["first_token_s"][0] < shares["first_token_s"][1] < shares["finish_s"][0]


def test_sglang_retracts_who_has_emitted_least_and_asks_for_more_then() -> None:
    """Both emit alike and need a 25th block at once: the longer prompt goes, where vLLM lets the newer one go. Declared
    were 30: (49 + 20) / 30 is more than 1."""
    both = requests((0.0, 240, 60), (0.0, 32, 60))
    assert serve("vllm", both, gpu(24))["preemptions_count"].tolist() == [0, 1]
    policy = SglangRatio(max_output_tokens=30, conservativeness=0.01)
    served = serve(policy, both, gpu(24))
    assert served["preemptions_count"].tolist() == [1, 0]
    assert 0.9 < policy.ratio <= 1.0


def test_mc_sf_takes_the_shortest_that_fit_at_every_end() -> None:
    """Predicted 4 (prompts of 64) and 200 (of 65), 15 wasted each: 26 blocks, 416 tokens, hold four short ones and a
    long one: 80 + 4 x 79 + 5 x 4 = 416 at the first end, 280 at the last. The other long one joins when the first has
    emitted k: 279 + 80 + 200 - k is 416 at k = 143."""
    earlier = lengths((64, 4), (65, 200))
    mixed = requests((0.0, 65, 200), (0.0, 65, 200), *[(0.0, 64, 4)] * 4)
    served = serve("mc-sf", mixed, gpu(26), earlier)
    assert (served["first_token_s"][2:] == served["first_token_s"][0]).all()
    assert course(served, 1) == pytest.approx(143 / 199, abs=0.01)
    assert served["preemptions_count"].sum() == 0
