"""RMaxTS (arXiv 2408.08152): tree search by discounted UCB on whether the tree still grows.

A node keeps two pairs (W, N) of discounted reward and visits: its own, of jobs that were expanded at it, and its
subtree's. A job walks down from the root: among "expand here" (own pair) and every child (its subtree's pair) it
takes the largest W / N + sqrt(2 ln N_total / N), and stops at "expand here" or at a leaf. While jobs run they count as
pending zero rewards (virtual loss). The tree knows nothing of what its nodes stand for: the caller keys children by a
number and keeps whatever else belongs to a node in arrays of its own.

A tree is an array of NODE_DTYPE whose first ``count`` rows are in use; row 0 is the root. ``gamma`` = 1 is plain UCB1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.jit import kernel

GAMMA = 0.99
LEAST_VISITS = 0.01  # floor of N where it divides
LEAST_TOTAL = 2.0  # floor of N_total in the logarithm
ROOT = 0
NONE = -1

NODE_DTYPE = np.dtype(
    [
        ("parent", np.int32),
        ("first_child", np.int32),
        ("last_child", np.int32),
        ("next_sibling", np.int32),
        ("key", np.int64),  # which child of its parent it is
        ("own_running", np.int32),  # jobs that run at it
        ("tree_running", np.int32),  # jobs that run at it or below
        ("own_reward", np.float64),  # W and N of what has ended
        ("own_visits", np.float64),
        ("tree_reward", np.float64),
        ("tree_visits", np.float64),
        ("own_value", np.float64),  # W / N and N with the virtual loss of what runs
        ("own_count", np.float64),
        ("tree_value", np.float64),
        ("tree_count", np.float64),
    ],
    align=True,
)


def new_tree(capacity_count: int) -> NDArray[np.void]:
    """An array for a tree of that many nodes, the root in place."""
    nodes = np.zeros(capacity_count, NODE_DTYPE)
    clear_node(nodes, ROOT, NONE, 0)
    return nodes


@kernel
def clear_node(nodes: Any, node: int, parent: int, key: int) -> None:
    """A node without children or visits."""
    row = nodes[node]
    row["parent"] = parent
    row["key"] = key
    row["first_child"], row["last_child"], row["next_sibling"] = NONE, NONE, NONE
    row["own_running"], row["tree_running"] = 0, 0
    row["own_reward"], row["own_visits"], row["tree_reward"], row["tree_visits"] = 0.0, 0.0, 0.0, 0.0
    row["own_value"], row["own_count"], row["tree_value"], row["tree_count"] = 0.0, 0.0, 0.0, 0.0


@kernel
def with_virtual_loss(reward: float, visits: float, running: int, gamma: float) -> tuple[float, float]:
    """(W / N, N) with r running jobs: W gamma^r and N gamma^r + (1 - gamma^r) / (1 - gamma), r pending zero rewards."""
    if gamma == 1.0:
        kept, count = 1.0, visits + running
    else:
        kept = gamma**running
        count = visits * kept + (1.0 - kept) / (1.0 - gamma)
    return reward * kept / max(count, LEAST_VISITS), count


@kernel
def refresh(nodes: Any, node: int, gamma: float) -> None:
    """Brings a node's values up to date with its pairs and its running jobs."""
    row = nodes[node]
    value, count = with_virtual_loss(row["own_reward"], row["own_visits"], row["own_running"], gamma)
    row["own_value"], row["own_count"] = value, count
    value, count = with_virtual_loss(row["tree_reward"], row["tree_visits"], row["tree_running"], gamma)
    row["tree_value"], row["tree_count"] = value, count


@kernel
def find_child(nodes: Any, node: int, key: int) -> int:
    """The child of that key, or NONE."""
    child = nodes[node]["first_child"]
    while child != NONE and nodes[child]["key"] != key:
        child = nodes[child]["next_sibling"]
    return child


@kernel
def add_child(nodes: Any, count: int, node: int, key: int) -> int:
    """Makes row ``count`` the last child of a node; returns it. The caller keeps the count and looks after the room."""
    clear_node(nodes, count, node, key)
    last = nodes[node]["last_child"]
    if last == NONE:
        nodes[node]["first_child"] = count
    else:
        nodes[last]["next_sibling"] = count
    nodes[node]["last_child"] = count
    return count


@kernel
def best_choice(nodes: Any, node: int) -> int:
    """The child with the largest upper confidence bound, or the node itself for "expand here", which wins ties."""
    total = nodes[node]["own_count"]
    child = nodes[node]["first_child"]
    while child != NONE:
        total += nodes[child]["tree_count"]
        child = nodes[child]["next_sibling"]
    width = 2.0 * np.log(max(total, LEAST_TOTAL))
    chosen = node
    most = nodes[node]["own_value"] + np.sqrt(width / max(nodes[node]["own_count"], LEAST_VISITS))
    child = nodes[node]["first_child"]
    while child != NONE:
        bound = nodes[child]["tree_value"] + np.sqrt(width / max(nodes[child]["tree_count"], LEAST_VISITS))
        if bound > most:
            chosen, most = child, bound
        child = nodes[child]["next_sibling"]
    return chosen


@kernel
def start_job(nodes: Any, node: int, gamma: float) -> None:
    """A job runs at a node: virtual loss on its own pair and on the subtree pairs up to the root."""
    nodes[node]["own_running"] += 1
    while node != NONE:
        nodes[node]["tree_running"] += 1
        refresh(nodes, node, gamma)
        node = nodes[node]["parent"]


@kernel
def select(nodes: Any, gamma: float) -> int:
    """The node to expand next; a job runs at it from here on."""
    node = ROOT
    while nodes[node]["first_child"] != NONE:
        chosen = best_choice(nodes, node)
        if chosen == node:
            break
        node = chosen
    start_job(nodes, node, gamma)
    return node


@kernel
def end_job(nodes: Any, node: int, reward: float, gamma: float) -> None:
    """Backup of a job that ran at a node: W <- gamma W + R, N <- gamma N + 1 on its own pair and subtree pairs up."""
    row = nodes[node]
    row["own_running"] -= 1
    row["own_reward"] = gamma * row["own_reward"] + reward
    row["own_visits"] = gamma * row["own_visits"] + 1.0
    while node != NONE:
        row = nodes[node]
        row["tree_running"] -= 1
        row["tree_reward"] = gamma * row["tree_reward"] + reward
        row["tree_visits"] = gamma * row["tree_visits"] + 1.0
        refresh(nodes, node, gamma)
        node = row["parent"]
