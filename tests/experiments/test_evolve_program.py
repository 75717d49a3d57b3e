"""A search over programs: what it changes, and that it keeps what is better."""

import ast
import random
from pathlib import Path

import pytest

from l3env.choices import Order
from l3env.experiments import evolve_program

SOURCE = Path(evolve_program.__file__).parents[1] / "policies" / "template.py"


def largest(source: str) -> float:
    return max(node.value for node in evolve_program.numbers(ast.parse(source)))


def budget(path: Path) -> float | None:
    """A fitness whose best is known: the larger of the two budgets of the template, up to 100,000."""
    return min(largest(path.read_text()), 100_000) / 100_000


def test_what_is_changed_is_still_a_program_with_the_same_names():
    source, rng = SOURCE.read_text(), random.Random(2)
    names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    orders, texts = set(), set()
    for _ in range(60):
        text = evolve_program.changed(source, rng)
        tree = ast.parse(text)
        assert {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} == names
        orders |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.isupper()}
        texts.add(text)
    assert len(texts) > 50
    assert len(orders) > 2
    assert orders <= {each.name for each in Order}


def test_it_climbs_and_what_fails_is_not_taken():
    tried = []

    def fitness(path: Path) -> float | None:
        tried.append(path)
        return None if len(tried) % 4 == 3 else budget(path)

    best, curve = evolve_program.evolve(SOURCE.read_text(), 40, 2, random.Random(1), fitness, say=lambda text: None)
    assert curve == sorted(curve)
    assert curve[0] == 0.04096
    assert curve[-1] > 2 * curve[0]
    assert largest(best) > 8000
    with pytest.raises(ValueError, match="has no score"):
        evolve_program.evolve("", 1, 1, random.Random(1), lambda path: None)
