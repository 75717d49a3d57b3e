"""A small multilayer perceptron in NumPy: how a trained policy runs without torch. One ``.npz`` file holds it whole."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.envs.observe.features import columns_of
from l3env.errors import L3EnvError, PolicyError
from l3env.files import whole

Array = NDArray[np.float32]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"tanh": np.tanh, "relu": lambda x: np.maximum(x, 0.0)}
ILLEGAL = np.float32(-1e8)  # logit of what the mask forbids, as sb3-contrib has it


@dataclass(frozen=True)
class Network:
    """Layers (weights (out, in), biases (out,)), the last one without activation, and how they came about.

    Attributes:
        config: as JSON: ``features`` and ``levels`` (what goes in and out, by name), ``masked``, ``activation``,
            ``interval_s``, ``predictor``, ``settings`` (the action of each output, for Discrete spaces), seed and
            training command.
    """

    layers: Sequence[tuple[Array, Array]]
    config: Mapping[str, Any]

    @cached_property
    def columns(self) -> NDArray[np.int64]:
        """(inputs,) where an observation has the features that the network was trained on."""
        return columns_of(self.config["features"])

    def logits(self, features: Array) -> Array:
        """(..., F) an observation -> (..., outputs)."""
        activation = ACTIVATIONS[self.config["activation"]]
        x = features[..., self.columns]
        for weight, bias in self.layers[:-1]:
            x = activation(x @ weight.T + bias)
        weight, bias = self.layers[-1]
        return x @ weight.T + bias

    def act(self, features: Array, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        """(..., F) features -> (..., knobs) most likely level of each knob; of the legal ones if trained with masks."""
        logits = self.logits(features)
        settings = self.config.get("settings")
        if settings is not None:
            return np.array(settings, dtype=np.int64)[np.argmax(logits, axis=-1)]
        if self.config["masked"]:
            logits = np.where(mask, logits, ILLEGAL)
        ends = np.cumsum([len(levels) for levels in self.config["levels"].values()])
        return np.stack([np.argmax(head, axis=-1) for head in np.split(logits, ends[:-1], axis=-1)], axis=-1)

    def save(self, path: Path) -> None:
        """Writes the whole file or nothing."""
        arrays = {f"weight_{i}": weight for i, (weight, _) in enumerate(self.layers)}
        arrays |= {f"bias_{i}": bias for i, (_, bias) in enumerate(self.layers)}
        with whole(path) as file:
            np.savez_compressed(file, config=np.array(json.dumps(self.config)), **arrays)  # type: ignore[arg-type]


def load_network(path: Path) -> Network:
    """Reads what ``Network.save`` wrote. Raises PolicyError naming the file."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            config = json.loads(str(arrays["config"]))
            count = sum(name.startswith("weight_") for name in arrays.files)
            layers = [(arrays[f"weight_{i}"], arrays[f"bias_{i}"]) for i in range(count)]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise PolicyError(f"{path}: not a policy network: {error!r}") from None
    if not layers or config.get("activation") not in ACTIVATIONS:
        raise PolicyError(f"{path}: expected layers and an activation of {', '.join(ACTIVATIONS)}")
    network, inputs = Network(layers, config), layers[0][0].shape[1]
    try:
        named = network.columns.size
    except (L3EnvError, KeyError, TypeError) as error:
        raise PolicyError(f"{path}: {error}") from None
    if named != inputs:
        raise PolicyError(f"{path}: {inputs} inputs, and names of {named} features")
    return network
