"""Policies that order the queue: who is served first, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from l3env import Slo
from l3env.errors import PolicyError
from l3env.machine.batch import Chunk, Decodes
from l3env.policies.lars import relative_slack
from l3env.policies.niyama import Niyama
from l3env.policies.sarathi_slo import SarathiSlo
from l3env.policy.view import ROW_DTYPE
from tests.policies.served import gpu, lengths, order, requests, serve

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


def test_the_budget_is_the_largest_whose_iteration_is_within_the_limit() -> None:
    """By a formula of one's own: as the limit on the time between tokens rises, so does the budget, tile by tile."""
    tables = gpu()
    for limit_s in (0.03, 0.05, 0.1, 0.3):
        policy = SarathiSlo()
        policy.slo = Slo(tbt_s=limit_s)
        policy.prepare(tables, None)
        budget = policy.knobs.prefill_budget_tokens
        times = [
            tables.iteration_s([Decodes(32, 2048.0)], [Chunk(tokens - 32, max(2048 - tokens + 32, 0))])
            for tokens in (budget, budget + 128)
        ]
        assert times[0] <= limit_s or budget == 128
        assert times[1] > limit_s
    assert budget > 2048


def test_niyama_serves_by_deadline_and_work_left_and_the_late_last() -> None:
    """Deadlines 0.5 s after arrival. At 8500 tokens/s 6000 tokens take 0.7 s: 1 is relegated. 3 came 0.1 s after 2, but
    2 has 1900 tokens more to go, 15 s worth at 8 ms each."""
    few = requests(BUSY, (0.001, 6000, 1), (0.002, 2000, 1), (0.102, 100, 1))
    assert order(serve("niyama", few, slo=Slo(ttft_s=0.5))) == [0, 3, 2, 1]
    assert order(serve("niyama?left_s_per_token=0", few, slo=Slo(ttft_s=0.5))) == [0, 2, 3, 1]


def test_niyama_takes_the_budget_that_its_decodes_can_bear() -> None:
    """Predictions are near what iterations take; a strict limit makes a prompt beside a decode wait, a loose one no."""
    policy = Niyama()
    policy.prepare(gpu(), None)
    for tokens, kv in ((256, 8000), (1024, 50_000), (2048, 100)):
        priced_s = gpu().iteration_s([Decodes(4, kv / 4)], [Chunk(tokens - 4)])
        assert policy.predicted_s(tokens, kv) == pytest.approx(priced_s, rel=0.25)
    strict, loose = (
        serve("niyama", requests((0.0, 64, 40), (0.05, 4000, 1)), slo=Slo(ttft_s=0.05, tbt_s=tbt_s))
        for tbt_s in (0.03, 2.0)
    )
    assert strict["tpot_s"][0] < 0.06 < loose["tpot_s"][0] * 8
    assert strict["first_token_s"][1] > loose["first_token_s"][1]


def test_the_least_slack_over_its_own_prefill_is_first() -> None:
    """Half of a prefill of 2 s left, and 6 s to go: 2.5 times; all of one of 0.5 s left: 11 times."""
    rows = np.zeros(2, ROW_DTYPE)
    rows["ttft_deadline_s"], rows["ttft_alone_s"], rows["prompt_tokens"] = 10.0, [2.0, 0.5], 100
    rows["prefill_left_tokens"] = [50, 100]
    assert relative_slack(rows, 4.0).tolist() == [2.5, 11.0]


def test_a_short_prompt_overtakes_a_long_one_until_that_becomes_urgent() -> None:
    """Both may take five times their prefill alone: 1 loses its slack in a few hundredths of a second. With 0.5 s for
    both 0 has a third of its prefill to spare, 1 thirty times its own."""
    two = requests((0.0, 4096, 1), (0.1, 100, 1))
    assert order(serve("lars", two)) == [1, 0]
    assert order(serve("lars", two, slo=Slo(ttft_s=0.5))) == [0, 1]
    assert order(serve("sarathi", two)) == [0, 1]
