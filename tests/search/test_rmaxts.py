"""RMaxTS by hand: selection, virtual loss, backup; and a slow search written with plain objects."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from l3env.search.tree import (
    GAMMA,
    NONE,
    ROOT,
    add_child,
    best_choice,
    end_job,
    find_child,
    new_tree,
    select,
    start_job,
)


def finished(nodes, node, *rewards, gamma=GAMMA):
    """Jobs that ran at a node one after the other."""
    for reward in rewards:
        start_job(nodes, node, gamma)
        end_job(nodes, node, reward, gamma)


def test_backup_discounts_reward_and_visits() -> None:
    """Two jobs with rewards 1 then 0: W = 0.99, N = 0.99 + 1, on its own pair and all subtree pairs above."""
    nodes = new_tree(4)
    child = add_child(nodes, 1, ROOT, 7)
    leaf = add_child(nodes, 2, child, 8)
    finished(nodes, leaf, 1.0, 0.0)
    for node in (ROOT, child, leaf):
        assert nodes["tree_reward"][node] == pytest.approx(0.99)
        assert nodes["tree_visits"][node] == pytest.approx(1.99)
        assert nodes["tree_running"][node] == 0
    assert nodes["own_visits"][leaf] == pytest.approx(1.99)
    assert nodes["own_reward"][leaf] == pytest.approx(0.99)
    assert not nodes["own_visits"][[ROOT, child]].any()


def test_virtual_loss_is_pending_zero_rewards() -> None:
    """Three running jobs count as three that ended with nothing; when they end so, nothing is left of the loss."""
    nodes, other = new_tree(2), new_tree(2)
    for tree in (nodes, other):
        finished(tree, ROOT, 1.0, 1.0)
    for _ in range(3):
        start_job(nodes, ROOT, GAMMA)
    finished(other, ROOT, 0.0, 0.0, 0.0)
    w, n = (0.99 + 1) * 0.99**3, (0.99 + 1) * 0.99**3 + 0.99**2 + 0.99 + 1
    assert nodes["own_value"][0] == pytest.approx(w / n)
    assert nodes["own_count"][0] == pytest.approx(n)
    assert nodes["own_value"][0] == pytest.approx(other["own_value"][0])
    assert nodes["own_count"][0] == pytest.approx(other["own_count"][0])
    assert nodes["own_visits"][0] == pytest.approx(1.99)  # the pair itself waits for the results


def test_ucb1_counts_plainly() -> None:
    nodes = new_tree(2)
    finished(nodes, ROOT, 1.0, 0.0, 1.0, gamma=1.0)
    start_job(nodes, ROOT, 1.0)
    assert nodes["own_value"][0] == pytest.approx(2 / 4)
    assert nodes["own_count"][0] == 4


def test_selection_by_hand() -> None:
    """Root with 3 own visits (W 1), children with 2 (W 2) and 1 (W 0): N_total = 6, at gamma = 1.

    Bounds: 1/3 + sqrt(2 ln 6 / 3) = 1.426, 1 + sqrt(2 ln 6 / 2) = 2.339, 0 + sqrt(2 ln 6 / 1) = 1.893.
    """
    nodes = new_tree(4)
    good, bad = add_child(nodes, 1, ROOT, 0), add_child(nodes, 2, ROOT, 1)
    finished(nodes, ROOT, 1.0, 0.0, 0.0, gamma=1.0)
    finished(nodes, good, 1.0, 1.0, gamma=1.0)
    finished(nodes, bad, 0.0, gamma=1.0)
    assert best_choice(nodes, ROOT) == good
    # a pending job on it: N 3, N_total 7: 2/3 + sqrt(2 ln 7 / 3) = 1.806 < sqrt(2 ln 7) = 1.973
    assert select(nodes, 1.0) == good
    assert best_choice(nodes, ROOT) == bad


def test_floors_and_ties() -> None:
    """Without visits N is 0.01 and N_total 2: bounds are sqrt(2 ln 2 / 0.01); equal ones go to "expand here"."""
    nodes = new_tree(4)
    child = add_child(nodes, 1, ROOT, 0)
    assert best_choice(nodes, ROOT) == ROOT
    # one pending job at the root: its bound is sqrt(2 ln 2), the child's sqrt(2 ln 2 / 0.01), ten times larger
    assert select(nodes, GAMMA) == ROOT
    assert nodes["own_count"][ROOT] == pytest.approx(1)
    assert select(nodes, GAMMA) == child
    second = add_child(nodes, 2, ROOT, 1)
    third = add_child(nodes, 3, ROOT, 2)
    assert select(nodes, GAMMA) == second  # equal children: the first
    assert select(nodes, GAMMA) == third


def test_children_are_found_by_key() -> None:
    nodes = new_tree(8)
    keys = [5, -3, 2**40]
    children = [add_child(nodes, 1 + i, ROOT, key) for i, key in enumerate(keys)]
    assert [find_child(nodes, ROOT, key) for key in keys] == children
    assert find_child(nodes, ROOT, 6) == NONE
    assert find_child(nodes, children[0], 5) == NONE


class SlowNode:
    """The method's definition with objects, recomputed from lists of rewards each time."""

    def __init__(self, parent=None):
        self.parent, self.children = parent, []
        self.own, self.tree = [], []  # rewards in order of backup
        self.own_running = self.tree_running = 0

    @staticmethod
    def figures(rewards, running, gamma):
        everything = rewards + [0.0] * running
        weights = [gamma ** (len(everything) - 1 - i) for i in range(len(everything))]
        w, n = sum(x * y for x, y in zip(weights, everything, strict=True)), sum(weights)
        return w / max(n, 0.01), n

    def up(self):
        node = self
        while node is not None:
            yield node
            node = node.parent

    def best(self, gamma):
        """All choices whose bound is the largest; several where they are equal but for rounding."""
        rows = [(self, *self.figures(self.own, self.own_running, gamma))]
        rows += [(c, *self.figures(c.tree, c.tree_running, gamma)) for c in self.children]
        total = max(sum(n for _, _, n in rows), 2.0)
        bounds = [value + math.sqrt(2 * math.log(total) / max(n, 0.01)) for _, value, n in rows]
        return [row[0] for row, bound in zip(rows, bounds, strict=True) if bound > max(bounds) - 1e-9]


@pytest.mark.parametrize("gamma", [GAMMA, 0.9, 1.0])
def test_a_whole_search_against_the_definition(gamma: float) -> None:
    """Random growth with several jobs in flight: the same node is chosen every time."""
    rng = np.random.default_rng(3)
    nodes = new_tree(2000)
    slow = [SlowNode()]
    count, flying = 1, []
    for _ in range(400):
        if flying and (len(flying) >= 6 or rng.random() < 0.3):
            node = flying.pop(int(rng.integers(len(flying))))
            new = int(rng.integers(0, 3)) if rng.random() < 0.7 else 0
            for _ in range(new):
                slow[node].children.append(SlowNode(slow[node]))
                slow.append(slow[node].children[-1])
                count = add_child(nodes, count, node, count) + 1
            reward = float(new > 0)
            end_job(nodes, node, reward, gamma)
            slow[node].own_running -= 1
            slow[node].own.append(reward)
            for each in slow[node].up():
                each.tree_running -= 1
                each.tree.append(reward)
        else:
            node = select(nodes, gamma)
            path = [*slow[node].up()][::-1]
            if slow[node].children:
                assert slow[node] in slow[node].best(gamma)
            for above, below in pairwise(path):
                assert below in above.best(gamma)
            slow[node].own_running += 1
            for each in path:
                each.tree_running += 1
            flying.append(node)
    assert count > 100
