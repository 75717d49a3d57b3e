"""What tuning alone gives: the best fixed knobs of each cell, and the one setting that is best for many cells.

``best-constant`` searches the knob grid (``l3env.search.tune``) on the training requests it is given, at its load, for
guarded goodput; ``best-constant?objective=plain`` for goodput alone.
``best-constant-in-order`` searches a larger grid: prompts under way may take turns with those that wait.
``best-constant-global`` holds one setting, found for plain goodput by the command that
``data/best-constant-global.json`` names.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pandas as pd

from l3env.engine.engine import Slo
from l3env.errors import PlanError, PolicyError
from l3env.knobs import ABOUT, Knobs
from l3env.machine.tables import Tables
from l3env.policy.levels import Levels
from l3env.policy.protocol import FixedKnobs, Role
from l3env.requests.workload import Workload
from l3env.search.objective import objective_of
from l3env.search.tune import GRID, Case, Tuned, tune

GLOBAL_FILE = Path(__file__).parent / "data" / "best-constant-global.json"

_found: dict[str, Tuned] = {}


class BestConstant(FixedKnobs):
    """The best fixed knobs for this machine, trace and load, searched on the training requests."""

    role = Role.TUNED

    def __init__(self, objective: str = "guarded", *, name: str = "best-constant", grid: Levels = GRID) -> None:
        super().__init__(name, Knobs())
        self.objective, self.grid = objective_of(objective), grid

    def prepare(self, system: Tables, training: Workload | None) -> None:
        if training is None:
            raise PolicyError("best-constant needs earlier requests to search on; give run_policy(training=...)")
        key = self.name + self.objective + key_of(system, training, self.slo)
        if key not in _found:
            _found[key] = tune([Case(system, training, self.slo)], grid=self.grid, objective=self.objective)
        self._tuned = _found[key]
        self.knobs = self._tuned.knobs

    @property
    def tried(self) -> pd.DataFrame:
        """The settings the search tried, as ``Tuned`` has them."""
        return self._tuned.tried

    def figures(self) -> dict[str, float]:
        """What the setting reached where it was searched."""
        met, guarded = float(self._tuned.goodput_frac[0]), float(self._tuned.guarded_frac[0])
        return {"training_slo_attainment_frac": met, "training_guarded_attainment_frac": guarded}


class BestConstantInOrder(BestConstant):
    """As ``best-constant``, with ``prefill_in_order`` among the knobs searched."""

    def __init__(self, objective: str = "guarded") -> None:
        grid = {**GRID, "prefill_in_order": ABOUT["prefill_in_order"].levels}
        super().__init__(objective, name="best-constant-in-order", grid=grid)


class BestConstantGlobal(FixedKnobs):
    """One setting for all cells, the best on average over the training grid."""

    role = Role.TUNED

    def __init__(self, path: Path = GLOBAL_FILE) -> None:
        super().__init__("best-constant-global", read_knobs(path))


def read_knobs(path: Path) -> Knobs:
    """The setting in a file that ``l3env tune --out`` wrote. Raises PolicyError for what is wrong with it."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))["knobs"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise PolicyError(f"{path}: expected JSON with an object 'knobs': {error!r}") from None
    try:
        return Knobs.from_json(raw)
    except PlanError as error:
        raise PolicyError(f"{path}: {error}") from None


def key_of(system: Tables, training: Workload, slo: Slo) -> str:
    digest = hashlib.sha256(repr((system.system, system.model, system.tp, system.block_tokens, slo)).encode())
    for column in (training.arrival_s, training.prompt_tokens, training.output_tokens, training.parent_idx):
        digest.update(column.tobytes())
    return digest.hexdigest()
