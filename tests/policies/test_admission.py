"""Policies that say who may start, and who goes when memory runs over, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from l3env.errors import PolicyError
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
