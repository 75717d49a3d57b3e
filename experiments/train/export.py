"""Weights from torch to NumPy and back: what ``policies/network.py`` runs without torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th

from l3env.envs.observe.features import FEATURES
from l3env.envs.sb3 import settings_of
from l3env.errors import L3EnvError
from l3env.policies.network import Network
from l3env.policy.levels import LEVELS, Levels

ACTIVATIONS = {th.nn.Tanh: "tanh", th.nn.ReLU: "relu"}


def actor_layers(model: Any) -> list[th.nn.Linear]:
    """The linear layers from observation to logits (or Q values)."""
    policy = model.policy
    if hasattr(policy, "q_net"):
        modules = list(policy.q_net.q_net)
    else:
        modules = [*policy.mlp_extractor.policy_net, policy.action_net]
    return [module for module in modules if isinstance(module, th.nn.Linear)]


def export(
    model: Any,
    config: dict[str, Any],
    *,
    masked: bool,
    discrete: list[str] | None = None,
    levels: Levels = LEVELS,
) -> Network:
    """The actor as NumPy arrays with all that running it needs; ``config`` is added as it is."""
    layers = [
        (linear.weight.detach().cpu().numpy().astype(np.float32), linear.bias.detach().cpu().numpy().astype(np.float32))
        for linear in actor_layers(model)
    ]
    activation = ACTIVATIONS[model.policy.activation_fn]
    return Network(layers, interface(activation, masked, discrete, levels) | config)


def interface(
    activation: str, masked: bool, discrete: list[str] | None = None, levels: Levels = LEVELS
) -> dict[str, Any]:
    """What goes in and out of a network, as the file says it."""
    return {
        "features": [name for name, _ in FEATURES],
        "levels": {name: [float(value) for value in values] for name, values in levels.items()},
        "activation": activation,
        "masked": masked,
        "settings": None if discrete is None else settings_of(discrete, levels).tolist(),
    }


def load_weights(model: Any, network: Network) -> None:
    """Puts a network's weights into a model's actor; features that it was not trained on start with weight 0.

    Raises L3EnvError where shapes differ.
    """
    linears, layers = actor_layers(model), list(network.layers)
    weight, bias = layers[0]
    by_name = np.zeros((weight.shape[0], len(FEATURES)), np.float32)
    by_name[:, network.columns] = weight
    layers[0] = by_name, bias
    ours = [tuple(linear.weight.shape) for linear in linears]
    theirs = [weight.shape for weight, _ in layers]
    if ours != theirs or ACTIVATIONS[model.policy.activation_fn] != network.config["activation"]:
        raise L3EnvError(f"init: layers {theirs} with {network.config['activation']} do not fit the model's {ours}")
    with th.no_grad():
        for linear, (weight, bias) in zip(linears, layers, strict=True):
            linear.weight.copy_(th.from_numpy(np.array(weight)))
            linear.bias.copy_(th.from_numpy(np.array(bias)))
