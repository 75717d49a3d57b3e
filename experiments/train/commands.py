"""``l3env train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from l3env.cli.options import options_of
from l3env.cli.shared import (
    Json,
    announce_compilation,
    folder_out,
    names,
    print_json,
    progress_bar,
    repeated_command,
    say,
)
from l3env.cli.shared import out as stdout
from l3env.errors import L3EnvError
from l3env.experiments.train.config import TrainConfig, hyperparams_of


@options_of(TrainConfig)
def train(
    out: Annotated[
        Path,
        typer.Option(
            callback=folder_out, help="Run folder; a run in it goes on from its checkpoint, to more --steps, too."
        ),
    ],
    envs: Annotated[int | None, typer.Option(help="Environments side by side, by default the algorithm's.")] = None,
    hyperparams: Annotated[Path | None, typer.Option(help="YAML with what differs from the algorithm's own.")] = None,
    episode_requests: Annotated[int, typer.Option(help="Requests of an episode.")] = 500,
    interval_s: Annotated[float, typer.Option(help="Simulated seconds between decisions.")] = 1.0,
    reward: Annotated[str, typer.Option(help="A reward by name.")] = "guarded-goodput",
    action_knobs: Annotated[
        str | None, typer.Option(help="Knobs that an action sets; commas. By default seven.")
    ] = None,
    tune_trials: Annotated[int, typer.Option(help="First search hyperparameters by so many Optuna trials.")] = 0,
    as_json: Json = False,
    **chosen: Any,
) -> None:
    """Trains a scheduler; the best model by validation runs without torch: l3env evaluate OUT."""
    announce_compilation()
    training = _training()
    known = hyperparams_of(chosen["algo"], hyperparams) | ({} if envs is None else {"num_envs": envs})
    env = {"episode_requests": episode_requests, "interval_s": interval_s, "reward": reward}
    if action_knobs is not None:
        env["action_knobs"] = list(names(action_knobs, "--action-knobs"))
    wanted = TrainConfig(**chosen, env=env, hyperparams=known)
    if tune_trials:
        wanted = _optimised(wanted, out, tune_trials)
    with progress_bar(f"training {wanted.algo}") as progress:
        best = training.train(wanted, out, command=repeated_command(), progress=progress)
    rows = training.evaluations(out)
    if as_json:
        print_json({"out": str(out), "best": str(best), "evaluations": rows})
        return
    from l3env.experiments.learning.pictures import learning_curve

    learning_curve([out], out / "learning_curve.png")
    column = training.CHOOSES[wanted.objective]
    top = max(rows, key=lambda row: row[column])
    stdout.print(
        f"best {wanted.objective} goodput on the validation window: {top[column]:.3f} "
        f"after {int(top['steps']):,} steps (untrained {rows[0][column]:.3f})",
        soft_wrap=True,
    )
    say(f"written: {best}; learning curve: {out}/learning_curve.png; curves: tensorboard --logdir {out}/tensorboard")


def _training() -> Any:
    """The module that trains. Raises L3EnvError where the extra is not installed."""
    try:
        from l3env.experiments.train import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "l3env":
            raise
        raise L3EnvError(f"train needs {error.name}: pip install 'l3env[train]'") from None
    return run


def _optimised(wanted: TrainConfig, out: Path, trials: int) -> TrainConfig:
    try:
        from l3env.experiments.train.optimise import optimise
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise L3EnvError("--tune-trials needs optuna: pip install 'l3env[tune]'") from None
    with progress_bar("searching hyperparameters") as progress:
        return optimise(wanted, out, trials, progress)
