"""From a name and a YAML file to a Stable-Baselines3 model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch as th
from sb3_contrib import MaskablePPO
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm

from l3env.envs.sb3 import ServingVecEnv
from l3env.errors import L3EnvError
from l3env.experiments.train.export import load_weights
from l3env.experiments.train.grpo import GRPO
from l3env.policies.network import Network, load_network

CLASSES: dict[str, type[Any]] = {"ppo": PPO, "maskable-ppo": MaskablePPO, "a2c": A2C, "dqn": DQN, "grpo": GRPO}
MASKED = ("maskable-ppo", "grpo")
ACTIVATIONS = {"tanh": th.nn.Tanh, "relu": th.nn.ReLU}
OF_THE_ENVIRONMENT = ("num_envs", "reward_scale", "discrete")


def set_up_torch() -> None:
    """Small networks run fastest on one thread and without checks of every distribution's arguments."""
    th.set_num_threads(1)
    th.distributions.Distribution.set_default_validate_args(False)


def env_arguments(hyperparams: dict[str, Any]) -> dict[str, Any]:
    """The part of the hyperparameters that ``make_vec_env`` takes."""
    return {name: hyperparams[name] for name in OF_THE_ENVIRONMENT if name in hyperparams}


def build(algo: str, env: ServingVecEnv, hyperparams: dict[str, Any], seed: int, init: str | None = None) -> Any:
    """A fresh model. Raises L3EnvError for hyperparameters that the algorithm does not know."""
    arguments = {name: _value(name, value) for name, value in hyperparams.items() if name not in OF_THE_ENVIRONMENT}
    network = None if init is None else load_network(Path(init))
    if network is not None:
        arguments["policy_kwargs"] = _shaped_like(network, arguments.get("policy_kwargs", {}))
    try:
        model = CLASSES[algo]("MlpPolicy", env, seed=seed, device="cpu", **arguments)
    except TypeError as error:
        raise L3EnvError(f"hyperparameters of {algo}: {error}") from None
    if network is not None:
        load_weights(model, network)
    return model


def _shaped_like(network: Network, policy_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Hidden layers of the actor as those of the network that it starts from."""
    hidden = [bias.size for _, bias in network.layers[:-1]]
    given = policy_kwargs.get("net_arch")
    net_arch: Any = {"pi": hidden, "vf": given["vf"]} if isinstance(given, dict) else hidden
    return policy_kwargs | {"net_arch": net_arch, "activation_fn": ACTIVATIONS[network.config["activation"]]}


def _value(name: str, value: Any) -> Any:
    if name == "policy_kwargs":
        known = dict(value)
        if "activation_fn" in known:
            if known["activation_fn"] not in ACTIVATIONS:
                raise L3EnvError(f"activation_fn {known['activation_fn']!r}; expected one of {', '.join(ACTIVATIONS)}")
            known["activation_fn"] = ACTIVATIONS[known["activation_fn"]]
        return known
    if isinstance(value, str) and value.startswith("lin_"):
        return Linear(float(value.removeprefix("lin_")))
    return value


class Linear:
    """A schedule from ``initial`` to 0 over the run."""

    def __init__(self, initial: float) -> None:
        self.initial = initial

    def __call__(self, left_frac: float) -> float:
        return left_frac * self.initial


def act(model: BaseAlgorithm, obs: Any, masks: Any) -> Any:
    """Greedy actions, masked where the model was trained so."""
    known = {"action_masks": masks} if isinstance(model, MaskablePPO | GRPO) else {}
    return model.predict(obs, deterministic=True, **known)[0]
