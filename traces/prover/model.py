"""A synthetic prover: what a whole-proof generator does to a theorem, as a seeded random process.

A theorem is a tree of tactic states that nobody ever writes down: every property of a state is a hash of where it lies.

* A generated proof is a chain of tactics. Each is wrong with probability ``error_frac``: the proof is cut there.
* A right tactic leads to the state's child of rank k, P(rank > k) = (k + 1)^-tail: few continuations are common, and
  ever rarer ones never end, so the chance that a state is new falls as n^(-tail / (1 + tail)) with n looks.
* A child of a state from which the theorem can be proved keeps that with the theorem's ``live_frac``; after the
  theorem's number of steps along such states it is proved. Elsewhere proofs go on until they err, or to ``most_steps``.

A theorem's steps are 1 + geometric, its live_frac is Kumaraswamy distributed, its right_frac 1 - u^(1 / error_p).
Nothing is published about tactic trees. The defaults were fitted to the seven shares of theorems that single-pass
sampling proves in arXiv 2408.08152 (``experiments/reproduce/fit_prover.py`` says how, and how the two parameters were
chosen that these do not tell); that proofs look like this is an assumption.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.jit import kernel
from l3env.search import tree as rmaxts

DEAD = -1
MOST_STEPS = 32
MOST_RANK = 1 << 40
JOBS = 32


@dataclass(frozen=True)
class ProofModel:
    """Parameters of the synthetic prover.

    Attributes:
        error_p: shape of a theorem's chance that a tactic is wrong.
        stuck: how unequal states are in how often tactics are right.
        dead_frac: how often tactics are right where no proof is left, relative to elsewhere.
        tail: how fast the continuations of a state thin out.
        mean_steps: mean steps of a theorem's proof.
        live_p, live_q: Kumaraswamy shape of the share of children from which the theorem can still be proved.
        most_steps: a proof is given up after that many states.
        seed: draws the theorems and everything about them.
    """

    error_p: float = 0.128
    stuck: float = 0.159
    dead_frac: float = 0.1
    tail: float = 1.317
    mean_steps: float = 4.0
    live_p: float = 0.0192
    live_q: float = 0.1649
    most_steps: int = 12
    seed: int = 0

    def theorems(self, count: int) -> Theorems:
        """Draws theorems; the first ones stay the same whatever the count."""
        rng = np.random.default_rng(self.seed)
        draws = rng.random((count, 3))
        stop = 1.0 / self.mean_steps
        steps = 1 + np.floor(np.log1p(-draws[:, 0]) / np.log1p(-stop)).astype(np.int64)
        live = kumaraswamy(draws[:, 1], self.live_p, self.live_q)
        right = 1 - kumaraswamy(draws[:, 2], self.error_p, 1.0)
        codes = np.random.SeedSequence(self.seed).generate_state(count, np.uint64).astype(np.uint64)
        return Theorems(codes, np.minimum(steps, self.most_steps), live, right)


@dataclass(frozen=True)
class Theorems:
    """What is hidden in theorems, (N,) each: hash of the root state, steps of a proof, live and right shares."""

    code: NDArray[np.uint64]
    steps: NDArray[np.int64]
    live_frac: NDArray[np.float64]
    right_frac: NDArray[np.float64]


def kumaraswamy(u: NDArray[np.float64], p: float, q: float) -> NDArray[np.float64]:
    """Quantile u of the Kumaraswamy distribution, the Beta distribution's cousin with a closed form."""
    return np.asarray((1 - (1 - u) ** (1 / q)) ** (1 / p))


@kernel
def mix(code: Any, salt: Any) -> Any:
    """A hash of two 64-bit numbers (the finaliser of splitmix64)."""
    x = np.uint64(code) ^ (np.uint64(salt) * np.uint64(0x9E3779B97F4A7C15))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@kernel
def unit(code: Any) -> float:
    """A number in (0, 1] from a hash."""
    return (float(code >> np.uint64(11)) + 1.0) / 9007199254740992.0


def hashed(code: int | np.uint64, salt: int | np.uint64) -> np.uint64:
    """``mix`` for callers in Python."""
    return np.uint64(mix(np.uint64(code), np.uint64(salt)))


@kernel
def right_tactic(code: Any, alive: bool, right: float, dead: float, stuck: float, draw: Any) -> bool:
    """Is the next tactic at a state right?"""
    chance = right * unit(mix(code, np.uint64(4))) ** stuck
    return unit(draw) <= (chance if alive else chance * dead)


@kernel
def attempt(
    code: Any,
    left: int,
    live: float,
    right: float,
    draw: Any,
    tail: float,
    dead: float,
    stuck: float,
    room: int,
    ranks: Any,
) -> int:
    """One generated proof from a state, up to its first error: writes the ranks of the states it passes.

    Args:
        left: steps left to a proof from here, or DEAD.
        draw: hash that stands for the generator's randomness.
        room: states until it is given up.

    Returns:
        How many states it passed; negative where the last one completes the proof.
    """
    for step in range(room):
        draw = mix(draw, np.uint64(1))
        if not right_tactic(code, left > 0, right, dead, stuck, draw):
            return step
        draw = mix(draw, np.uint64(2))
        rank = np.int64(min(unit(draw) ** (-1.0 / tail), float(MOST_RANK)))
        ranks[step] = rank
        code = mix(code, np.uint64(rank))
        if left > 0:
            left = left - 1 if unit(mix(code, np.uint64(3))) <= live else DEAD
            if left == 0:
                return -(step + 1)
    return room


@kernel
def first_success(
    code: Any, steps: int, live: float, right: float, seed: Any, tail: float, stuck: float, room: int, most: int
) -> int:
    """Independent whole proofs: number of the first that proves the theorem, ``most`` + 1 where none does."""
    for sample in range(1, most + 1):
        draw = mix(mix(code, seed), np.uint64(sample))
        state, left = code, steps
        for _ in range(room):
            draw = mix(draw, np.uint64(1))
            if not right_tactic(state, True, right, 1.0, stuck, draw):
                break
            draw = mix(draw, np.uint64(2))
            state = mix(state, np.uint64(min(unit(draw) ** (-1.0 / tail), float(MOST_RANK))))
            if unit(mix(state, np.uint64(3))) > live:
                break  # nothing that follows can prove it
            left -= 1
            if left == 0:
                return sample
    return most + 1


@kernel
def grow(nodes: Any, count: int, states: Any, left: Any, live: float, ranks: Any, start: int, passed: int) -> int:
    """Walks a proof's states from the node it was generated at and adds what is new; returns the new count."""
    node = start
    for i in range(passed):
        child = rmaxts.find_child(nodes, node, ranks[i])
        if child == rmaxts.NONE:
            child = rmaxts.add_child(nodes, count, node, ranks[i])
            count += 1
            states[child] = mix(states[node], np.uint64(ranks[i]))
            left[child] = DEAD
            if left[node] > 0 and unit(mix(states[child], np.uint64(3))) <= live:
                left[child] = left[node] - 1
        node = child
    return count


@kernel
def first_success_by_tree(
    code: Any,
    steps: int,
    live: float,
    right: float,
    seed: Any,
    tail: float,
    dead: float,
    stuck: float,
    room: int,
    most: int,
    gamma: float,
    rewarded: bool,
    nodes: Any,
    states: Any,
    left: Any,
    depth: Any,
    jobs: Any,
    ranks: Any,
) -> int:
    """RMaxTS with as many jobs at once as ``jobs`` has rows; they end in the order in which they began.

    Args:
        rewarded: False leaves out the intrinsic reward.
        jobs: (J, 2) int64 node and states passed of each running job; ranks: (J, steps) of each.

    Returns:
        As ``first_success``.
    """
    rmaxts.clear_node(nodes, rmaxts.ROOT, rmaxts.NONE, 0)
    states[0], left[0], depth[0] = code, steps, 0
    count = 1
    slots = jobs.shape[0]
    for sample in range(1, most + slots + 1):
        slot = sample % slots
        if sample > slots:  # the oldest job ends
            node, passed = jobs[slot, 0], jobs[slot, 1]
            if passed < 0:
                return sample - slots
            before = count
            count = grow(nodes, count, states, left, live, ranks[slot], node, passed)
            for child in range(before, count):
                depth[child] = depth[nodes[child]["parent"]] + 1
            rmaxts.end_job(nodes, node, 1.0 if rewarded and count > before else 0.0, gamma)
        if sample <= most:
            node = rmaxts.select(nodes, gamma)
            draw = mix(mix(code, seed), np.uint64(sample))
            jobs[slot, 0] = node
            jobs[slot, 1] = attempt(
                states[node], left[node], live, right, draw, tail, dead, stuck, room - depth[node], ranks[slot]
            )
    return most + 1
