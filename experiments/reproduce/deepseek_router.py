"""Which experts tokens go to, and how unequal the ranks' shares are (arXiv 2412.19437, section 2.1.2).

Routing is the model's: scores s = sigmoid(u . e); among the best groups (by the sum of a group's two best s + b), the
best experts by s + b; b serves choosing only. Balancing without auxiliary loss: after a step b_i falls by gamma where
expert i had more than the mean and rises by gamma where it had less; at inference b stands.

Popularity is a model of ours. A token's logits are normal: a part of its own, a part of its domain (all tokens of a
domain prefer the same experts), a part of the layer (preferences that all tokens share, which b learns away). b is
trained on all domains alike; a served workload has few of them (Dirichlet weights), so its loads are unequal although
training's were equal. The strength of a domain is the one number fitted: so that 32 ranks without rebalancing have the
imbalance measured on R1, 1.56. What rebalancing leaves, and the spread over layers, follow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l3env.machine.specs import MoeSpec

Array = NDArray[np.float64]

LAYER_STRENGTH = 0.5  # of logits: preferences of the layer


@dataclass(frozen=True)
class Popularity:
    """How tokens prefer experts, in logits; a token's own part has strength 1.

    Attributes:
        domain_strength: of what the tokens of a domain share; the default is fitted, see the module.
        domains_count: domains that training saw alike.
        concentration: of the Dirichlet weights of a served workload over the domains; small: few domains.
        drift: share of the weights that is drawn anew from one rebalancing interval to the next.
    """

    domain_strength: float = 2.3
    domains_count: int = 32
    concentration: float = 0.05
    drift: float = 0.05


def route(moe: MoeSpec, scores: Array, bias: Array) -> NDArray[np.int64]:
    """(T, experts) scores -> (T, chosen) experts of each token."""
    tokens = scores.shape[0]
    biased = scores + bias
    grouped = biased.reshape(tokens, moe.groups_count, -1)
    group_scores = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
    best = np.argpartition(-group_scores, moe.chosen_groups_count - 1, axis=1)[:, : moe.chosen_groups_count]
    allowed = np.zeros(group_scores.shape, dtype=bool)
    np.put_along_axis(allowed, best, True, axis=1)
    masked = np.where(allowed[:, :, None], grouped, -np.inf).reshape(tokens, -1)
    return np.argpartition(-masked, moe.chosen_count - 1, axis=1)[:, : moe.chosen_count]


def balanced(bias: Array, loads: Array, gamma: float) -> Array:
    """The update rule: down by gamma where overloaded, up where underloaded."""
    return bias - gamma * np.sign(loads - loads.mean())


def imbalance(loads: Array) -> float:
    """(largest - mean) / mean."""
    return float(loads.max() / loads.mean() - 1)


class Layer:
    """The router of one layer and the tokens that come to it."""

    def __init__(self, moe: MoeSpec, popularity: Popularity, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self.moe, self.popularity = moe, popularity
        self._layer = LAYER_STRENGTH * self._rng.standard_normal(moe.experts_count)
        shape = (popularity.domains_count, moe.experts_count)
        self._domain = popularity.domain_strength * self._rng.standard_normal(shape)
        self.bias = np.zeros(moe.experts_count)

    def scores(self, tokens: int, weights: Array) -> Array:
        """(tokens, experts) scores of a batch whose domains have these weights."""
        domain = self._rng.choice(weights.size, tokens, p=weights)
        own = self._rng.standard_normal((tokens, self.moe.experts_count), dtype=np.float32)
        return np.asarray(1 / (1 + np.exp(-(own + self._layer + self._domain[domain]))))

    def loads(self, tokens: int, weights: Array) -> Array:
        """(experts,) tokens that each expert gets of a batch."""
        chosen = route(self.moe, self.scores(tokens, weights), self.bias)
        return np.bincount(chosen.ravel(), minlength=self.moe.experts_count).astype(float)

    @property
    def uniform(self) -> Array:
        """Weights of training: all domains alike."""
        return np.full(self.popularity.domains_count, 1 / self.popularity.domains_count)

    def train(self, gamma: float, steps: int, tokens: int) -> Array:
        """Balances the bias on the training mixture; (steps,) imbalance of the experts before each update."""
        history = np.empty(steps)
        for step in range(steps):
            loads = self.loads(tokens, self.uniform)
            history[step] = imbalance(loads)
            self.bias = balanced(self.bias, loads, gamma)
        return history

    def workload(self) -> Array:
        """Weights of a served workload."""
        return self._rng.dirichlet(np.full(self.popularity.domains_count, self.popularity.concentration))

    def drifted(self, weights: Array) -> Array:
        """The weights an interval later."""
        return (1 - self.popularity.drift) * weights + self.popularity.drift * self.workload()


def contiguous(experts: int, ranks: int) -> NDArray[np.int64]:
    """(experts,) rank of each expert in order, without copies."""
    return np.arange(experts) * ranks // experts


def place(loads: Array, slots: int, ranks: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(expert of each slot, rank of each slot): copies of the most loaded experts, packed greedily.

    As EPLB's global policy: every further slot goes to the expert with the largest load per copy; slots go in falling
    load to the rank with the least load that has room.
    """
    copies = np.ones(loads.size, dtype=np.int64)
    for _ in range(slots - loads.size):
        copies[np.argmax(loads / copies)] += 1
    expert = np.repeat(np.arange(loads.size), copies)
    each = (loads / copies)[expert]
    order = np.argsort(-each, kind="stable")
    rank = np.empty(slots, dtype=np.int64)
    carried, room = np.zeros(ranks), np.full(ranks, slots // ranks)
    for slot in order:
        least = int(np.argmin(np.where(room > 0, carried, np.inf)))
        rank[slot] = least
        carried[least] += each[slot]
        room[least] -= 1
    return expert, rank


def rank_loads(loads: Array, expert: NDArray[np.int64], rank: NDArray[np.int64], ranks: int) -> Array:
    """(ranks,) tokens of each rank; an expert's tokens are dealt evenly to its copies."""
    copies = np.bincount(expert, minlength=loads.size)
    return np.bincount(rank, weights=(loads / copies)[expert], minlength=ranks).astype(float)


@dataclass(frozen=True)
class Served:
    """Imbalance between ranks of served layers: (layers,) each.

    Attributes:
        fixed: experts in order, no copies.
        rebalanced: copies and places chosen by the loads of the interval before.
    """

    fixed: Array
    rebalanced: Array


def serve(
    moe: MoeSpec,
    ranks: int,
    slots: int,
    *,
    popularity: Popularity | None = None,
    layers: int = 8,
    gamma: float = 0.01,
    steps: int = 120,
    tokens: int = 2048,
    intervals: int = 3,
    interval_tokens: int = 32_768,
    shared_is_routed: bool = False,
    seed: int = 0,
) -> Served:
    """Trains each layer's bias, then serves a workload over some rebalancing intervals.

    ``shared_is_routed``: the shared expert, which gets all tokens, has slots like the others.

    The last third of training steps at a tenth of gamma, as the bias comes to rest.
    """
    chosen = popularity or Popularity()
    fixed, rebalanced = np.empty(layers), np.empty(layers)
    for i in range(layers):
        layer = Layer(moe, chosen, seed + i)
        layer.train(gamma, 2 * steps // 3, tokens)
        layer.train(gamma / 10, steps - 2 * steps // 3, tokens)
        weights = layer.workload()
        shared = [float(interval_tokens)] * (moe.shared_count if shared_is_routed else 0)
        before = np.append(layer.loads(interval_tokens, weights), shared)
        seen: list[tuple[float, float]] = []
        for _ in range(intervals):
            weights = layer.drifted(weights)
            now = np.append(layer.loads(interval_tokens, weights), shared)
            where = place(before, slots, ranks)
            without = np.bincount(contiguous(now.size, ranks), weights=now, minlength=ranks).astype(float)
            seen.append((imbalance(without), imbalance(rank_loads(now, *where, ranks))))
            before = now
        fixed[i], rebalanced[i] = np.mean(seen, axis=0)
    return Served(fixed, rebalanced)


def over_gamma(
    moe: MoeSpec, gammas: tuple[float, ...] = (0.0, 1e-4, 1e-3, 1e-2, 1e-1), *, steps: int = 300, tokens: int = 1024
) -> dict[float, tuple[float, float]]:
    """gamma -> imbalance of the experts on the training mixture: at the start, and the mean of the last tenth."""
    found = {}
    for gamma in gammas:
        history = Layer(moe, Popularity(), 0).train(gamma, steps, tokens)
        found[gamma] = (float(history[0]), float(history[-max(steps // 10, 1) :].mean()))
    return found
