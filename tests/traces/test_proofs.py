"""The synthetic prover against closed forms, and what truncate-and-resume buys where it must."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from l3env.experiments.reproduce import fit_prover
from l3env.experiments.reproduce import proof_search as reproduce
from l3env.experiments.reproduce.proof_search import RMAXTS, SINGLE_PASS, Method, samples_needed
from l3env.search import tree as rmaxts
from l3env.traces.prover.model import (
    DEAD,
    MOST_STEPS,
    ProofModel,
    attempt,
    first_success,
    grow,
    hashed,
    kumaraswamy,
    unit,
)


@pytest.mark.parametrize(("steps", "right"), [(1, 0.05), (3, 0.4), (5, 0.6)])
def test_single_pass_is_geometric_where_every_state_is_live(steps: int, right: float) -> None:
    """Success needs ``steps`` right tactics in a row: 1 / right^steps samples in the mean, whatever the branching."""
    needed = [first_success(hashed(7, i), steps, 1.0, right, np.uint64(i), 1.0, 0.0, 12, 10**6) for i in range(4000)]
    mean = right**-steps
    assert np.mean(needed) == pytest.approx(mean, abs=4 * mean / np.sqrt(4000))


@pytest.mark.parametrize("tail", [0.5, 1.0, 3.0])
def test_ranks_have_the_stated_tail(tail: float) -> None:
    """P(rank > k) = (k + 1)^-tail."""
    ranks = np.zeros(MOST_STEPS, np.int64)
    first = []
    for i in range(20000):
        assert attempt(np.uint64(1), DEAD, 1.0, 1.0, hashed(5, i), tail, 1.0, 0.0, 1, ranks) == 1
        first.append(int(ranks[0]))
    for k in (1, 2, 5):
        expected = (k + 1) ** -tail
        assert np.mean(np.array(first) > k) == pytest.approx(expected, abs=4 * np.sqrt(expected / 20000))
    assert min(first) == 1


def test_errors_cut_a_proof_where_the_shares_say() -> None:
    """At dead states a tactic is right with right x dead_frac, so the mean number passed is p / (1 - p)."""
    ranks = np.zeros(MOST_STEPS, np.int64)
    passed = [attempt(np.uint64(1), DEAD, 1.0, 0.8, hashed(5, i), 1.0, 0.5, 0.0, 32, ranks) for i in range(20000)]
    p = 0.8 * 0.5
    assert np.mean(passed) == pytest.approx(p / (1 - p), abs=4 * np.sqrt(p) / (1 - p) / np.sqrt(20000))


def test_states_that_are_grown_are_those_that_were_walked() -> None:
    """A child is live as its hash says, keeps one step less, and is found again by its rank."""
    nodes = rmaxts.new_tree(64)
    states, left = np.zeros(64, np.uint64), np.zeros(64, np.int64)
    states[0], left[0] = hashed(3, 4), 5
    count = grow(nodes, 1, states, left, 0.5, np.array([2, 1, 9]), 0, 3)
    count = grow(nodes, count, states, left, 0.5, np.array([2, 7]), 0, 2)
    assert count == 5
    assert grow(nodes, count, states, left, 0.5, np.array([2, 1, 9]), 0, 3) == count  # nothing new
    for child in range(1, count):
        parent = int(nodes["parent"][child])
        assert states[child] == hashed(states[parent], int(nodes["key"][child]))
        is_live = left[parent] > 0 and unit(hashed(states[child], 3)) <= 0.5
        assert left[child] == (left[parent] - 1 if is_live else DEAD)


def test_truncate_and_resume_turns_a_product_into_a_sum() -> None:
    """Six steps, each right one time in ten, no dead ends: 10^6 whole proofs, but only some hundred resumed ones."""
    model = ProofModel()

    class Fixed(ProofModel):
        def theorems(self, count):
            drawn = model.theorems(count)
            ones = np.ones(count)
            return type(drawn)(drawn.code, np.full(count, 6), ones, 0.1 * ones)

    fixed = Fixed(tail=3.0, stuck=0.0, dead_frac=1.0)
    assert (samples_needed(fixed, 20, SINGLE_PASS, 6400) > 6400).mean() > 0.9
    for method in (RMAXTS, Method(rewarded=False), Method(gamma=1.0)):
        assert np.median(samples_needed(fixed, 20, method, 6400)) < 3000


def test_theorems_do_not_depend_on_their_number_and_results_not_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = ProofModel().theorems(10), ProofModel().theorems(50)
    for name in ("code", "steps", "live_frac", "right_frac"):
        np.testing.assert_array_equal(getattr(few, name), getattr(many, name)[:10])
    model = ProofModel()
    monkeypatch.setattr(reproduce, "THREADS", 1)
    one = samples_needed(model, 30, RMAXTS, 600, tree_samples=200)
    monkeypatch.setattr(reproduce, "THREADS", 3)
    np.testing.assert_array_equal(samples_needed(model, 30, RMAXTS, 600, tree_samples=200), one)
    shorter = samples_needed(model, 30, RMAXTS, 200, tree_samples=200)
    np.testing.assert_array_equal(np.minimum(one, 201), shorter)  # trees after the first change nothing before them


def test_kumaraswamy_quantiles() -> None:
    """CDF(x) = 1 - (1 - x^p)^q."""
    u = np.linspace(0.01, 0.99, 20)
    x = kumaraswamy(u, 0.4, 0.7)
    np.testing.assert_allclose(1 - (1 - x**0.4) ** 0.7, u)


def test_the_chance_of_a_sample_is_what_sampling_finds() -> None:
    """Closed form where every state is live: right^steps. Elsewhere the shares that sampling proves, by theorem."""
    for steps, right in ((1, 0.05), (3, 0.3)):
        chance = fit_prover.success_chance(hashed(7, 1), steps, 1.0, right, 3.0, 0.0, 10**6)
        assert chance == pytest.approx(right**steps, rel=0.02)
    model, count, samples = ProofModel(), 300, 3200
    expected = 1 - (1 - fit_prover.chances(model, count)) ** samples
    found = samples_needed(model, count, SINGLE_PASS, samples) <= samples
    error = np.sqrt((expected * (1 - expected)).sum())
    assert abs(found.sum() - expected.sum()) < 4 * error
    assert found[expected > 0.9999].all()
    assert not found[expected < 1e-5].any()


def test_the_fit_is_to_single_pass_shares_alone() -> None:
    """What single-pass cannot tell stays as it was and makes no difference."""
    model, count = ProofModel(), 60
    assert fit_prover.loss(replace(model, dead_frac=1.0), count) == fit_prover.loss(model, count)
    found = fit_prover.fit(4.0, 0, 1.0, count)
    start = replace(ProofModel(), mean_steps=4.0, **fit_prover.START)
    assert found.loss == fit_prover.loss(found.model, count) < fit_prover.loss(start, count)
    assert (found.model.mean_steps, found.model.dead_frac) == (4.0, model.dead_frac)


@pytest.mark.slow
def test_the_papers_ordering() -> None:
    """RMaxTS equals sampling at 32 to 128 samples, is above it at 4 x 6,400, and above its ablation without reward."""
    count = 488
    model = ProofModel()
    single, tree = (samples_needed(model, count, method, 4 * 6400) for method in (SINGLE_PASS, RMAXTS))
    unrewarded = samples_needed(model, count, Method(rewarded=False), 4 * 6400)
    for samples in (32, 64, 128):
        assert abs((tree <= samples).mean() - (single <= samples).mean()) < 0.02
    assert (tree <= 4 * 6400).mean() > (single <= 4 * 6400).mean()
    assert (tree <= 4 * 6400).mean() > (unrewarded <= 4 * 6400).mean()
