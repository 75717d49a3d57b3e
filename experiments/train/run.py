"""A training run: build or resume, learn with checkpoints and evaluations, write the best model."""

from __future__ import annotations

import io
import json
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pandas as pd
import torch as th
import yaml
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure

from l3env.envs.sb3 import ServingVecEnv, make_vec_env
from l3env.errors import L3EnvError
from l3env.experiments.train import algorithms
from l3env.experiments.train.config import TrainConfig, read_yaml
from l3env.experiments.train.export import export
from l3env.files import whole, write_text
from l3env.policy.levels import levels_of
from l3env.search.objective import FIGURES, Objective, objective_of

CHECKPOINT = "checkpoint.pkl"
EVAL_SEED = 1_000_000  # of the validation episodes: common random numbers between evaluations and runs
Progress = Callable[[int, int, str], None]


@dataclass
class Memory:
    """What a run knows besides its model: saved with every checkpoint."""

    evaluations: list[dict[str, float]] = field(default_factory=list)
    best: float = -np.inf
    wall_s: float = 0.0
    evaluated_steps: int = -1
    saved_steps: int = 0


def train(config: TrainConfig, out: Path, *, command: str = "", progress: Progress | None = None) -> Path:
    """Trains to ``config.total_steps``, from the last checkpoint in ``out`` where there is one.

    So a run that was interrupted goes on, and one that ended goes on to more steps (a learning rate that falls to 0 is
    then that of the longer run). A start that failed leaves nothing that would stop the next one.

    The folder gets ``config.yml``, ``checkpoint.pkl``, ``evaluations.csv``, TensorBoard events, ``best_model.zip``,
    ``best_model.npz`` (runs without torch) and ``last_model.zip``.

    Returns:
        The path of ``best_model.npz``.

    Raises:
        L3EnvError: ``out`` holds another run, or the configuration is wrong.
    """
    algorithms.set_up_torch()
    _check_same(out, config)
    model, memory = _resume(out, config) or (_build(config), Memory())
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "config.yml", config.to_yaml())
    model.set_logger(configure(str(out / "tensorboard"), ["tensorboard"]))
    keeper = Keeper(config, out, memory, command, progress)
    left = config.total_steps - model.num_timesteps
    if left > 0:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*truncated mini-batch.*")
            model.learn(left, callback=keeper, reset_num_timesteps=model.num_timesteps == 0)
        keeper.finish()
    return out / "best_model.npz"


def evaluations(out: Path) -> list[dict[str, float]]:
    """Rows of ``evaluations.csv``: steps, goodput_frac, guarded_frac, standard_error (of what chooses), wall_s."""
    table = pd.read_csv(out / "evaluations.csv")
    return [{name: float(row[name]) for name in table.columns} for _, row in table.iterrows()]


def _check_same(out: Path, config: TrainConfig) -> None:
    """Raises L3EnvError where there is a checkpoint of a run that differs in more than its number of steps."""
    path = out / "config.yml"
    if not (path.exists() and (out / CHECKPOINT).exists()):
        return
    known, wanted = {"objective": "plain"} | read_yaml(path), yaml.safe_load(config.to_yaml())
    other = [
        f"{name} was {known.get(name)!r} and is {value!r}"
        for name, value in wanted.items()
        if name != "total_steps" and value != known.get(name)
    ]
    if other:
        raise L3EnvError(
            f"{out} holds a run of another configuration: {'; '.join(other)}; expected the same, remove it or choose "
            "another --out"
        )


def training_env(config: TrainConfig) -> ServingVecEnv:
    """The environments that a run learns from."""
    arguments = algorithms.env_arguments(config.hyperparams)
    return make_vec_env(**arguments, seed=config.seed * 100_000, **config.env_kwargs(config.train_window))


def _build(config: TrainConfig) -> Any:
    return algorithms.build(config.algo, training_env(config), config.hyperparams, config.seed, config.init)


# --- checkpoints


def save_checkpoint(path: Path, model: Any, memory: Memory) -> None:
    """Everything that the next step depends on, in one file, whole or not at all."""
    weights = io.BytesIO()
    model.save(weights)
    content = {
        "model": weights.getvalue(),
        "env": model.get_env(),
        "last_obs": model._last_obs,
        "last_episode_starts": model._last_episode_starts,
        "replay_buffer": getattr(model, "replay_buffer", None),
        "action_space": model.action_space,
        "random": (random.getstate(), np.random.get_state(), th.get_rng_state()),  # noqa: NPY002  # SB3 draws from it
        "memory": memory,
    }
    with whole(path, sync=True) as file:
        cloudpickle.dump(content, file)


def _resume(out: Path, config: TrainConfig) -> tuple[Any, Memory] | None:
    path = out / CHECKPOINT
    if not path.exists():
        return None
    try:
        with path.open("rb") as file:
            content = cloudpickle.load(file)
    except Exception as error:
        raise L3EnvError(f"{path}: cannot be read ({error!r}); remove the folder or choose another --out") from error
    model = algorithms.CLASSES[config.algo].load(
        io.BytesIO(content["model"]), env=content["env"], device="cpu", force_reset=False
    )
    model._last_obs = content["last_obs"]
    model._last_episode_starts = content["last_episode_starts"]
    model.action_space = content["action_space"]
    if content["replay_buffer"] is not None:
        model.replay_buffer = content["replay_buffer"]
    python_state, numpy_state, torch_state = content["random"]
    random.setstate(python_state)
    np.random.set_state(numpy_state)  # noqa: NPY002
    th.set_rng_state(torch_state)
    return model, content["memory"]


# --- during the run


class Keeper(BaseCallback):
    """Between rollouts: evaluates, keeps the best model, writes checkpoints, moves the progress bar."""

    def __init__(self, config: TrainConfig, out: Path, memory: Memory, command: str, progress: Progress | None) -> None:
        super().__init__()
        self.config, self.out, self.memory, self.command, self.progress = config, out, memory, command, progress
        arguments = algorithms.env_arguments(config.hyperparams) | {"num_envs": config.eval_episodes}
        self.eval_env = make_vec_env(**arguments, **config.env_kwargs(config.validation_window))
        self._start_s = time.perf_counter() - memory.wall_s
        self._rollouts = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        steps = self.num_timesteps
        if self.progress is not None:
            text = f"{self.config.objective} goodput {self.memory.best:.3f} at best" if self.memory.evaluations else ""
            self.progress(steps, self.config.total_steps, text)
        if self.memory.evaluated_steps < 0 or steps - self.memory.evaluated_steps >= self.config.eval_steps:
            self._evaluate()
        if steps - self.memory.saved_steps >= self.config.checkpoint_steps:
            self._checkpoint()
        self._freeze_policy(steps < self.config.value_warmup_rollouts * self._steps_a_rollout)

    @property
    def _steps_a_rollout(self) -> int:
        return int(getattr(self.model, "n_steps", 1)) * int(self.model.n_envs)

    def _freeze_policy(self, frozen: bool) -> None:
        if self.config.value_warmup_rollouts and hasattr(self.model.policy, "action_net"):
            for module in (self.model.policy.mlp_extractor.policy_net, self.model.policy.action_net):
                for parameter in module.parameters():
                    parameter.requires_grad_(not frozen)

    def finish(self) -> None:
        """After the last update."""
        if self.memory.evaluated_steps < self.num_timesteps:
            self._evaluate()
        self._checkpoint()
        self.model.save(self.out / "last_model.zip")

    def _evaluate(self) -> None:
        found = evaluate(self.model, self.eval_env)
        goodput = found[objective_of(self.config.objective)]
        memory = self.memory
        memory.evaluated_steps = self.num_timesteps
        memory.wall_s = time.perf_counter() - self._start_s
        error = float(goodput.std(ddof=1) / np.sqrt(goodput.size)) if goodput.size > 1 else 0.0
        mean = float(goodput.mean())
        row = {"steps": self.num_timesteps, "goodput_frac": float(found[Objective.PLAIN].mean())}
        row |= {"guarded_frac": float(found[Objective.GUARDED].mean())}
        row |= {"standard_error": error, "wall_s": memory.wall_s}
        memory.evaluations.append(row)
        write_text(self.out / "evaluations.csv", pd.DataFrame(memory.evaluations).to_csv(index=False))
        for name in ("goodput_frac", "guarded_frac"):
            self.logger.record(f"eval/{name}", row[name])
        if mean > memory.best:
            memory.best = mean
            self._write_best()

    def _write_best(self) -> None:
        with whole(self.out / "best_model.zip") as file:
            self.model.save(file)
        config = self.config
        about = {
            "interval_s": interval_of(config),
            "predictor": config.env.get("predictor"),
            "seed": config.seed,
            "steps": self.num_timesteps,
            "command": self.command,
            "validation_goodput_frac": self.memory.best,
            "objective": config.objective,
            "training": json.loads(json.dumps(config.__dict__)),
        }
        masked = config.algo in algorithms.MASKED
        discrete, levels = config.hyperparams.get("discrete"), levels_of(config.env.get("action_knobs"))
        network = export(self.model, about, masked=masked, discrete=discrete, levels=levels)
        network.save(self.out / "best_model.npz")

    def _checkpoint(self) -> None:
        self.memory.saved_steps = self.num_timesteps
        self.memory.wall_s = time.perf_counter() - self._start_s
        save_checkpoint(self.out / CHECKPOINT, self.model, self.memory)


def interval_of(config: TrainConfig) -> float:
    """Simulated time between decisions, as the offline runner has it: 0 stands for every iteration."""
    decision = config.env.get("decision", "interval")
    if decision == "event":
        raise L3EnvError("training: decision = 'event'; the offline runner decides by 'interval' or 'iteration'")
    return 0.0 if decision == "iteration" else float(config.env.get("interval_s", 1.0))


CHOOSES = {Objective.GUARDED: "guarded_frac", Objective.PLAIN: "goodput_frac"}
"""The column of ``evaluations.csv`` that an objective is."""


def evaluate(model: Any, env: ServingVecEnv) -> dict[Objective, Any]:
    """(E,) guarded and plain goodput of the first episode of each environment, greedy, always the same requests."""
    env.seed(EVAL_SEED)
    obs = env.reset()
    goodput = {objective: np.full(env.num_envs, np.nan) for objective in FIGURES}
    while np.isnan(goodput[Objective.PLAIN]).any():
        obs, _, dones, infos = env.step(algorithms.act(model, obs, env.action_masks()))
        for e in np.flatnonzero(dones).tolist():
            if np.isnan(goodput[Objective.PLAIN][e]):
                for objective, figure in FIGURES.items():
                    goodput[objective][e] = infos[e]["metrics"][figure]
    return goodput
