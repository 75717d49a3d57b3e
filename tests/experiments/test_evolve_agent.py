"""The search for the requests agent's weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from l3env.experiments.learning import evolve_agent as module
from l3env.experiments.learning.evolve import Task
from l3env.experiments.learning.evolve_agent import search
from l3env.experiments.learning.scenarios import Scenario
from l3env.policies.requests_agent import GENES, START, read_agent, weights_of

SCENARIO = Scenario("l3-dgx-a100", "qwen-72b", "profile:azure-conv-2023?n=200", 1.0)


def test_the_search_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two generations in two pieces equal those in one; what is not searched stays."""
    monkeypatch.setattr(module, "tasks_of", lambda generation, seed: [Task(SCENARIO, 0.1 * generation)])
    monkeypatch.setitem(module.STRETCH_REQUESTS, "profile", 20)
    search(tmp_path / "whole", "knobs", 2, 4, 0, np.inf)
    search(tmp_path / "parts", "knobs", 1, 4, 0, np.inf)
    search(tmp_path / "parts", "knobs", 2, 4, 0, np.inf)
    whole, parts = (read_agent(tmp_path / name / "requests-agent.json") for name in ("whole", "parts"))
    np.testing.assert_array_equal(whole, parts)
    changed = {name for name, value, before in zip(GENES, whole, weights_of(START), strict=True) if value != before}
    assert changed
    assert all(name.startswith(("budget", "share")) for name in changed)
