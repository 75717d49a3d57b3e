"""The trained policy that ships: one network for all systems, models and loads, run in NumPy without torch.

``data/learned-ppo.npz`` holds the weights, the training configuration, its seed and its command. ``Learned`` runs any
network that ``l3env train`` wrote.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from l3env.errors import PolicyError
from l3env.observe import FEATURES, LEVELS, ViewObserver, knobs_of
from l3env.policy import BasePolicy, Knobs, LengthPredictor, View, make_policy
from l3env.tables import Tables
from l3env.workload import Workload
from policies.network import Network, load_network

FILE = Path(__file__).parent / "data" / "learned-ppo.npz"


class Learned(BasePolicy):
    """The most likely level of each knob, every ``interval_s`` seconds."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.name = name or path.stem
        self.network = load_network(path)
        _check(self.network, path)
        self.decision_interval_s = float(self.network.config["interval_s"])
        trained_with = self.network.config.get("predictor")
        self._predictor_policy = None if trained_with is None else make_policy(trained_with)

    def prepare(self, system: Tables, training: Workload | None) -> None:
        if self._predictor_policy is not None:
            self._predictor_policy.prepare(system, training)
        self._observer = ViewObserver(has_predictor=self._predictor_policy is not None)

    def predictor(self) -> LengthPredictor | None:
        return None if self._predictor_policy is None else self._predictor_policy.predictor()

    def decide(self, view: View) -> Knobs:
        features, mask = self._observer.look(view)
        return knobs_of(self.network.act(features, mask))


class LearnedPpo(Learned):
    """Trained over systems, models, traces and loads; not tuned for any."""

    def __init__(self) -> None:
        super().__init__(FILE, "learned-ppo")


def _check(network: Network, path: Path) -> None:
    """Raises PolicyError where the network was trained on other features or levels than there are now."""
    features = [name for name, _ in FEATURES]
    levels = {name: [float(level) for level in values] for name, values in LEVELS.items()}
    for what, now in (("features", features), ("levels", levels)):
        then = network.config.get(what)
        if then != now:
            raise PolicyError(f"{path}: trained with other {what} than this version has; train it anew")
    inputs, outputs = network.layers[0][0].shape[1], network.layers[-1][0].shape[0]
    wanted = len(network.config["settings"]) if network.config.get("settings") else sum(map(len, LEVELS.values()))
    if (inputs, outputs) != (len(FEATURES), wanted):
        raise PolicyError(f"{path}: {inputs} inputs and {outputs} outputs; expected {len(FEATURES)} and {wanted}")
    for layer, (weight, bias) in enumerate(network.layers):
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise PolicyError(f"{path}: layer {layer} has weights that are no finite numbers")
