"""What tuning alone gives: the best fixed knobs of each cell, and the one setting that is best for many cells.

``best-constant`` searches the knob grid (``l3env.search.tune``) on the training requests it is given, at its load.
``best-constant-in-order`` searches a larger grid: prompts under way may take turns with those that wait.
``best-constant-global`` holds one setting, found by the command that ``data/best-constant-global.json`` names.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd

from l3env.choices import Budget, Order, SubBatching, Victim
from l3env.engine.engine import Slo
from l3env.errors import PolicyError
from l3env.machine.tables import Tables
from l3env.policy.knobs import Knobs
from l3env.policy.protocol import FixedKnobs
from l3env.requests.workload import Workload
from l3env.search.tune import GRID, Cell, Grid, Tuned, tune

GLOBAL_FILE = Path(__file__).parent / "data" / "best-constant-global.json"
KINDS = {"order": Order, "sub_batching": SubBatching, "victim": Victim}

_found: dict[str, Tuned] = {}


class BestConstant(FixedKnobs):
    """The best fixed knobs for this machine, trace and load, searched on the training requests."""

    def __init__(self, name: str = "best-constant", grid: Grid = GRID) -> None:
        super().__init__(name, Knobs())
        self.grid = grid

    def prepare(self, system: Tables, training: Workload | None) -> None:
        if training is None:
            raise PolicyError("best-constant needs earlier requests to search on; give run_policy(training=...)")
        key = self.name + key_of(system, training, self.slo)
        if key not in _found:
            _found[key] = tune([Cell(system, training, self.slo)], grid=self.grid)
        self._tuned = _found[key]
        self.knobs = self._tuned.knobs

    @property
    def tried(self) -> pd.DataFrame:
        """The settings the search tried, as ``Tuned`` has them."""
        return self._tuned.tried

    def figures(self) -> dict[str, float]:
        """What the setting reached where it was searched."""
        return {"training_slo_attainment_frac": float(self._tuned.goodput_frac[0])}


class BestConstantInOrder(BestConstant):
    """As ``best-constant``, with ``prefill_in_order`` among the knobs searched."""

    def __init__(self) -> None:
        super().__init__("best-constant-in-order", {**GRID, "prefill_in_order": (False, True)})


class BestConstantGlobal(FixedKnobs):
    """One setting for all cells, the best on average over the training grid."""

    def __init__(self, path: Path = GLOBAL_FILE) -> None:
        super().__init__("best-constant-global", read_knobs(path))


def read_knobs(path: Path) -> Knobs:
    """The setting in a file that ``l3env tune --out`` wrote. Raises PolicyError for what is wrong with it."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))["knobs"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise PolicyError(f"{path}: expected JSON with an object 'knobs': {error!r}") from None
    if unknown := sorted(set(raw) - {each.name for each in fields(Knobs)}):
        raise PolicyError(f"{path}: unknown knobs {', '.join(unknown)}")
    try:
        values: dict[str, Any] = {name: KINDS[name][value] if name in KINDS else value for name, value in raw.items()}
    except KeyError as error:
        raise PolicyError(f"{path}: no such level {error} of a knob") from None
    budget = values.get("prefill_budget_tokens", Budget.UNLIMITED)
    if isinstance(budget, str):
        values["prefill_budget_tokens"] = Budget[budget]
    return Knobs(**values)


def knobs_to_json(knobs: Knobs) -> dict[str, object]:
    """The inverse of ``read_knobs``: numbers, and the names of what has one."""
    named = {name: kind(getattr(knobs, name)).name for name, kind in KINDS.items()}
    plain = {each.name: getattr(knobs, each.name) for each in fields(Knobs)} | named
    if knobs.prefill_budget_tokens in list(Budget):
        plain["prefill_budget_tokens"] = Budget(knobs.prefill_budget_tokens).name
    return plain


def key_of(system: Tables, training: Workload, slo: Slo) -> str:
    digest = hashlib.sha256(repr((system.system, system.model, system.tp, system.block_tokens, slo)).encode())
    for column in (training.arrival_s, training.prompt_tokens, training.output_tokens, training.parent_idx):
        digest.update(column.tobytes())
    return digest.hexdigest()
