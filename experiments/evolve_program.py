"""A search over programs, small on purpose: ``python -m l3env.experiments.evolve_program START.py OUT.py``.

Changes one to three things in a policy's source: a number (times a lognormal factor) or a member of an enumeration
that it names (another member). What scores higher (``l3env score``) is kept: a (1 + n) evolution strategy whose fitness
is the process that ``runs.score`` starts. A language model that writes programs would take the place of ``changed``.
"""

from __future__ import annotations

import argparse
import ast
import enum
import random
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from l3env import choices, files
from l3env.runs.score import score_apart

MOST_CHANGES, SPREAD = 3, 0.7
ENUMS: dict[str, type[enum.Enum]] = {
    name: each for name, each in vars(choices).items() if isinstance(each, type) and issubclass(each, enum.Enum)
}
Fitness = Callable[[Path], float | None]


def numbers(tree: ast.AST) -> list[ast.Constant]:
    """The numbers of a program but 0."""
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [node for node in nodes if type(node.value) in (int, float) and node.value]


def members(tree: ast.AST) -> list[tuple[ast.Attribute, type[enum.Enum]]]:
    """The members of the engine's enumerations that a program names."""
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    named = ((node, node.value.id) for node in nodes if isinstance(node.value, ast.Name))
    return [(node, ENUMS[name]) for node, name in named if name in ENUMS]


def changed(source: str, rng: random.Random) -> str:
    """The same program with one to three places changed; its comments are lost."""
    tree = ast.parse(source)
    changes = [partial(_scale, node, rng) for node in numbers(tree)]
    changes += [partial(_swap, node, each, rng) for node, each in members(tree)]
    for change in rng.sample(changes, min(rng.randint(1, MOST_CHANGES), len(changes))):
        change()
    return ast.unparse(tree) + "\n"


def _scale(node: ast.Constant, rng: random.Random) -> None:
    assert isinstance(node.value, int | float)
    value = node.value * rng.lognormvariate(0, SPREAD)
    node.value = max(round(value), 1) if isinstance(node.value, int) else float(f"{value:.3g}")


def _swap(node: ast.Attribute, each: type[enum.Enum], rng: random.Random) -> None:
    node.attr = rng.choice([member.name for member in each])


def scored(path: Path) -> float | None:
    """The score of a policy's file; None where it has none."""
    found: Any = score_apart(str(path))["score"]
    return None if found is None else float(found)


def evolve(
    source: str,
    steps: int,
    children: int,
    rng: random.Random,
    fitness: Fitness = scored,
    say: Callable[[str], None] = print,
) -> tuple[str, list[float]]:
    """The best program found, and its score after each step. Raises ValueError where the first one has no score."""
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(children) as pool:

        def score_of(place: int, text: str) -> float | None:
            path = Path(name) / f"policy_{place}.py"
            path.write_text(text)
            return fitness(path)

        first = score_of(0, source)
        if first is None:
            raise ValueError("the first program has no score; l3env score says why")
        curve = [first]
        for step in range(steps):
            texts = [changed(source, rng) for _ in range(children)]
            scores = [float("-inf") if found is None else found for found in pool.map(score_of, range(children), texts)]
            best = scores.index(max(scores))
            if scores[best] >= curve[-1]:
                source = texts[best]
            curve.append(max(curve[-1], scores[best]))
            say(f"step {step + 1}: {curve[-1]:.3f}")
        return source, curve


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m l3env.experiments.evolve_program")
    parser.add_argument("start", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--children", type=int, default=2, help="programs a step, side by side")
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args(arguments)
    best, curve = evolve(chosen.start.read_text(), chosen.steps, chosen.children, random.Random(chosen.seed))
    files.write_text(chosen.out, best)
    print(f"{curve[0]:.3f} -> {curve[-1]:.3f} in {chosen.steps * chosen.children} programs; written to {chosen.out}")


if __name__ == "__main__":
    main()
