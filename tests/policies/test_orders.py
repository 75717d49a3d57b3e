"""Policies that order the queue: who is served first, by hand."""

from __future__ import annotations

import pytest

from l3env import Slo
from l3env.errors import PolicyError
from tests.policies.served import lengths, order, requests, serve

BUSY = (0.0, 4096, 1)  # eight chunks of 512 tokens, 0.34 s in all


def test_the_shortest_prompt_is_first_even_when_it_is_hopeless() -> None:
    """1 and 2 come while the machine is busy; the deadlines of both, and only of them, are lost by then."""
    few = requests(BUSY, (0.001, 450, 1), (0.002, 400, 1), (0.33, 500, 1))
    slo = Slo(ttft_s=0.2)
    assert order(serve("sjf-plain", few, slo=slo)) == [0, 2, 1, 3]
    assert order(serve("sjf-prompt", few, slo=slo)) == [0, 3, 2, 1]
    assert order(serve("sarathi", few, slo=slo)) == [0, 1, 2, 3]


def test_the_earliest_deadline_is_first_even_when_it_is_missed() -> None:
    """Five times their prefill alone after their arrival: 2's is before 1's, both before 3's."""
    few = requests(BUSY, (0.001, 800, 1), (0.002, 400, 1), (0.33, 700, 1))
    assert order(serve("edf-plain", few)) == [0, 2, 1, 3]
    assert order(serve("edf", few, slo=Slo(ttft_s=0.2))) == [0, 3, 1, 2]
    assert order(serve("edf-plain", few, slo=Slo(ttft_s=0.2))) == [0, 1, 2, 3]


def test_the_shortest_predicted_output_is_first_and_age_counts_where_asked_for() -> None:
    """Prompts of 600 had 10 tokens, those of 500 had 400; 1 waits 0.1 s longer than 2: 500 tokens at 5000 a second."""
    earlier = lengths((600, 10), (500, 400))
    few = requests(BUSY, (0.1, 500, 3), (0.2, 600, 3))
    assert order(serve("ssjf", few, training=earlier)) == [0, 2, 1]
    assert order(serve("ssjf?aging_tokens_per_s=3000", few, training=earlier)) == [0, 2, 1]
    assert order(serve("ssjf?aging_tokens_per_s=5000", few, training=earlier)) == [0, 1, 2]
    with pytest.raises(PolicyError, match="ssjf needs a training window"):
        serve("ssjf", few)


def test_true_lengths_change_no_order() -> None:
    """Until the first of them ends, nothing depends on how long the others are."""
    earlier = lengths((600, 10), (500, 400))
    few = requests(BUSY, (0.1, 500, 3), (0.2, 600, 3))
    longer = requests(BUSY, (0.1, 500, 90), (0.2, 600, 300))
    first, second = (serve("ssjf", each, training=earlier)["first_token_s"] for each in (few, longer))
    assert first.equals(second)
