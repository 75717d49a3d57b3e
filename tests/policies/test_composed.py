"""Policies that put iterations together themselves: who is served, who gives way, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from l3env.policies.fastserve import FastServe
from l3env.policies.trail import Rest
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
