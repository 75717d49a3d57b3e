"""The trained policy that ships: one network for all systems, models and loads, run in NumPy without torch.

``data/learned-ppo.npz`` holds the weights, the training configuration, its seed and its command. ``Learned`` runs any
network that ``l3env train`` wrote.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from l3env.envs.observe.observer import ViewObserver
from l3env.errors import PlanError, PolicyError
from l3env.files import is_dir
from l3env.knobs import Knobs
from l3env.machine.tables import Tables
from l3env.policies.network import Network, load_network
from l3env.policy import LengthPredictor
from l3env.policy.levels import Levels, knobs_of, named_levels, sizes_of
from l3env.policy.protocol import BasePolicy, Role
from l3env.policy.registry import make_policy
from l3env.policy.view import View
from l3env.requests.workload import Workload

BEST = "best_model.npz"  # in the folder of a training run
FILE = Path(__file__).parent / "data" / "learned-ppo.npz"


class Learned(BasePolicy):
    """The most likely level of each knob, every ``interval_s`` seconds."""

    role = Role.LEARNED

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.name = name or path.stem
        self.network = load_network(path)
        self._levels = _checked_levels(self.network, path)
        self.decision_interval_s = float(self.network.config["interval_s"])
        trained_with = self.network.config.get("predictor")
        self._predictor_policy = None if trained_with is None else make_policy(trained_with)

    def prepare(self, system: Tables, training: Workload | None) -> None:
        if self._predictor_policy is not None:
            self._predictor_policy.prepare(system, training)
        self._observer = ViewObserver(has_predictor=self._predictor_policy is not None, levels=self._levels)

    def predictor(self) -> LengthPredictor | None:
        return None if self._predictor_policy is None else self._predictor_policy.predictor()

    def decide(self, view: View) -> Knobs:
        features, mask = self._observer.look(view)
        return knobs_of(self.network.act(features, mask), self._levels)


class LearnedPpo(Learned):
    """Trained over systems, models, traces and loads; not tuned for any."""

    def __init__(self, path: Path = FILE) -> None:
        super().__init__(path, "learned-ppo")


def resolve(base: str) -> Callable[..., Learned] | None:
    """A training run's folder, or an exported network (``.npz``), as a policy; None for anything else.

    Raises PolicyError for a folder without a network.
    """
    path = Path(base).expanduser()
    if is_dir(path):
        if not (path / BEST).is_file():
            raise PolicyError(f"policy {base!r}: a folder without {BEST}; expected one that l3env train wrote")
        return functools.partial(Learned, path=path / BEST, name=path.resolve().name)
    return functools.partial(Learned, path=path) if path.suffix == ".npz" else None


def _checked_levels(network: Network, path: Path) -> Levels:
    """The knobs that the network sets and their levels. Raises PolicyError for what it cannot set (any more)."""
    try:
        levels = named_levels(network.config["levels"])
    except (PlanError, KeyError, AttributeError) as error:
        raise PolicyError(f"{path}: {error}") from None
    outputs = network.layers[-1][0].shape[0]
    wanted = len(network.config["settings"]) if network.config.get("settings") else int(sizes_of(levels).sum())
    if outputs != wanted:
        raise PolicyError(f"{path}: {outputs} outputs; expected {wanted}")
    for layer, (weight, bias) in enumerate(network.layers):
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise PolicyError(f"{path}: layer {layer} has weights that are no finite numbers")
    return levels
