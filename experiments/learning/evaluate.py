"""``l3env evaluate``: a trained policy against heuristics and tuned constants on windows it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l3env.errors import L3EnvError
from l3env.experiments.learning.iqm import summarise
from l3env.experiments.learning.scenarios import Judged, Scenario, judge, tuned_for
from l3env.policies.learned_ppo import FILE
from l3env.policy.protocol import Role
from l3env.policy.registry import policies_of, policy_names
from l3env.runs.jobs import Progress
from l3env.runs.store import Store
from l3env.runs.workers import HERE, Workers
from l3env.search.objective import Objective

BASELINES = ("best-constant", "best-constant-global")  # constants besides the heuristics
LEARNED = "learned"


def heuristics() -> tuple[str, ...]:
    """The shipped policies that nothing was tuned or trained for: no oracles, and no planner."""
    return policies_of(Role.HEURISTIC)


def baselines_of(text: str) -> tuple[str, ...]:
    """``best``: all heuristics and the tuned constants; otherwise names with commas between."""
    if text == "best":
        return (*heuristics(), *BASELINES)
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if unknown := [name for name in names if name not in policy_names() and ".py:" not in name]:
        raise L3EnvError(f"--baselines: unknown {', '.join(unknown)}; expected best, or some of {policy_names()}")
    return names


def networks_of(ref: str) -> tuple[str, ...]:
    """What to run for a trained policy: a run folder's network, ``.npz`` files with commas between, or a policy by name
    or ``file.py:Class``."""
    if ref == "learned-ppo":
        return (str(FILE),)
    if ref in policy_names() or ".py:" in ref:
        return (ref,)
    files = []
    for part in ref.split(","):
        path = Path(part)
        file = path / "best_model.npz" if path.is_dir() else path
        if not file.is_file():
            raise L3EnvError(
                f"{part}: no such file, or a run folder without best_model.npz (train it with l3env train)"
            )
        files.append(str(file))
    return tuple(files)


def evaluate(
    scenarios: Sequence[Scenario],
    networks: Sequence[str],
    baselines: Sequence[str],
    *,
    seeds_count: int = 5,
    objective: Objective = Objective.GUARDED,
    store: Store | None = None,
    workers: Workers = HERE,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], Judged]:
    """(figures as ``--json`` prints them, all rows)."""
    if len({scenario.key for scenario in scenarios}) != len(scenarios):
        raise L3EnvError("evaluation: a scenario is there twice")
    policies = {LEARNED: tuple(networks)} | {name: (tuned_for(name, objective),) for name in baselines}
    found = judge(scenarios, policies, seeds_count, store=store, workers=workers, progress=progress)
    return summarise(found.rows, LEARNED, [name for name in baselines if name in heuristics()], objective), found
