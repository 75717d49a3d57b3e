"""Hyperparameters by search: ``l3env train --tune-trials N``. Needs optuna."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import yaml

from l3env.errors import L3EnvError
from l3env.experiments.train.config import TrainConfig
from l3env.experiments.train.run import CHOOSES, evaluations, train
from l3env.files import write_text
from l3env.search.objective import objective_of

STEPS_FRAC = 0.1  # of the run's steps, in each trial
SPACE: dict[str, Callable[[optuna.Trial], Any]] = {
    "learning_rate": lambda trial: f"lin_{trial.suggest_float('learning_rate', 3e-5, 3e-3, log=True):.3g}",
    "ent_coef": lambda trial: trial.suggest_float("ent_coef", 1e-4, 3e-2, log=True),
    "gamma": lambda trial: 1 - trial.suggest_float("one_minus_gamma", 1e-3, 0.1, log=True),
    "gae_lambda": lambda trial: trial.suggest_float("gae_lambda", 0.8, 1.0),
    "clip_range": lambda trial: trial.suggest_float("clip_range", 0.1, 0.4),
    "n_epochs": lambda trial: trial.suggest_int("n_epochs", 2, 10),
    "kl_coef": lambda trial: trial.suggest_float("kl_coef", 1e-4, 0.1, log=True),
    "group_size": lambda trial: trial.suggest_categorical("group_size", [4, 8, 16]),
}
NUMBERS_ONLY = {"dqn": ("learning_rate",)}  # algorithms whose learning rate is not scheduled


def optimise(
    config: TrainConfig, out: Path, trials_count: int, progress: Callable[[int, int, str], None]
) -> TrainConfig:
    """The configuration with the best hyperparameters of short runs, by goodput on the validation window.

    Trials are kept in ``out/trials.db`` and go on where they stopped; the best go to ``out/hyperparams.yml``.
    """
    names = [name for name in SPACE if name in config.hyperparams]
    if not names:
        raise L3EnvError(f"{config.algo} has none of the hyperparameters that are searched: {', '.join(SPACE)}")
    out.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{out / 'trials.db'}",
        study_name=config.algo,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=config.seed),
        load_if_exists=True,
    )
    steps = max(int(STEPS_FRAC * config.total_steps), 1)

    def objective(trial: optuna.Trial) -> float:
        done = len([each for each in study.trials if each.state.is_finished()])
        progress(done, trials_count, f"best {study.best_value:.3f}" if done else "")
        changed = _chosen(config, names, trial)
        short = replace(config, total_steps=steps, eval_steps=steps, checkpoint_steps=steps, hyperparams=changed)
        train(short, out / "trials" / str(trial.number))
        column = CHOOSES[objective_of(config.objective)]
        return max(row[column] for row in evaluations(out / "trials" / str(trial.number)))

    left = trials_count - len([each for each in study.trials if each.state.is_finished()])
    if left > 0:
        study.optimize(objective, n_trials=left)
    best = _chosen(config, names, study.best_trial)
    write_text(out / "hyperparams.yml", yaml.safe_dump({name: best[name] for name in names}))
    return replace(config, hyperparams=best)


def _chosen(config: TrainConfig, names: list[str], trial: Any) -> dict[str, Any]:
    """The hyperparameters with the trial's values."""
    values = {name: SPACE[name](_replayed(trial)) for name in names}
    if config.algo in NUMBERS_ONLY:
        values |= {
            name: float(values[name].removeprefix("lin_")) for name in NUMBERS_ONLY[config.algo] if name in values
        }
    return config.hyperparams | values


def _replayed(trial: Any) -> Any:
    """A finished trial's values through the same functions that drew them."""
    return trial if isinstance(trial, optuna.Trial) else optuna.trial.FixedTrial(trial.params)
