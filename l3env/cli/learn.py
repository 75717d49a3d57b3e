"""``l3env tune``, ``l3env train`` and ``l3env evaluate``."""

from __future__ import annotations

import itertools
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from l3env.cli.shared import Json, announce_compilation, app, err, numbers, plain_table, print_json, progress_bar
from l3env.errors import L3EnvError

Names = Annotated[str, typer.Option(help="Names with commas between.")]
Traces = Annotated[list[str], typer.Option("--trace", help="A trace spec; several times for several.")]


def _names(text: str, option: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise L3EnvError(f"{option} {text!r}; expected a name, or several with commas between")
    return names


def _command() -> str:
    """The command as a user would repeat it."""
    return shlex.join(["l3env", *sys.argv[1:]])


@app.command()
def tune(
    system: Names = "l3-dgx-a100",
    model: Names = "gpt-175b",
    trace: Traces = ["azure-conv-2023"],  # noqa: B006  # typer copies it
    utilization: Annotated[str, typer.Option(help="Times what the reference policy sustains; commas.")] = "0.9",
    window: Annotated[str, typer.Option(help="Part of each trace's span that is searched on.")] = "0%:60%",
    requests: Annotated[int | None, typer.Option(help="At most so many requests of each window.")] = None,
    random: Annotated[int, typer.Option(help="Random settings before the coordinate search.")] = 64,
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file for the setting, its cells and this command.")] = None,
    as_json: Json = False,
) -> None:
    """Searches the best fixed knobs: of one cell, or one setting for many systems, models, traces and loads."""
    announce_compilation()
    from l3env.experiments.train.windows import in_window
    from l3env.files import write_text
    from l3env.machine.pair import compile_pair
    from l3env.policies.best_constant import knobs_to_json
    from l3env.requests.registry import load_trace
    from l3env.runs.capacity import load_at_capacity
    from l3env.search.tune import Cell
    from l3env.search.tune import tune as search

    names: list[dict[str, Any]] = []
    cells = []
    loads = numbers(utilization, "--utilization")
    windows = {each: load_trace(in_window(each, window)) for each in trace}
    for each_system, each_model, each in itertools.product(_names(system, "--system"), _names(model, "--model"), trace):
        tables = compile_pair(each_system, each_model)
        workload = windows[each] if requests is None else windows[each].head(requests)
        full = load_at_capacity(tables, workload)
        for load in loads:
            cells.append(Cell(tables, workload.at_load(load * full)))
            names.append({"system": each_system, "model": each_model, "trace": each, "utilization": load})
    with progress_bar("tuning") as progress:
        found = search(cells, random_count=random, seed=seed, progress=progress)
    rows: list[dict[str, Any]] = [
        name | {"goodput_frac": float(goodput)} for name, goodput in zip(names, found.goodput_frac, strict=True)
    ]
    result: dict[str, Any] = {
        "knobs": knobs_to_json(found.knobs),
        "cells": rows,
        "tried_count": len(found.tried),
        "window": window,
        "requests": requests,
        "seed": seed,
        "command": _command(),
    }
    if out is not None:
        write_text(out, json.dumps(result, indent=2) + "\n")
    if as_json:
        print_json(result)
        return
    table = plain_table("knob", "value")
    for name, value in result["knobs"].items():
        table.add_row(name, str(value))
    err.print(table)
    table = plain_table("system", "model", "trace", "utilization", "goodput")
    for row in rows:
        table.add_row(
            row["system"], row["model"], row["trace"], f"{row['utilization']:g}", f"{row['goodput_frac']:.3f}"
        )
    err.print(table)
    err.print(f"{len(found.tried)} settings tried" + (f"; written: {out}" if out else ""), highlight=False)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Run folder; a run that was interrupted goes on from its checkpoint.")],
    algo: Annotated[str, typer.Option(help="ppo, maskable-ppo, a2c, dqn or grpo.")] = "maskable-ppo",
    system: Names = "l3-dgx-a100",
    model: Names = "gpt-175b",
    trace: Traces = ["azure-conv-2023"],  # noqa: B006
    utilization: Annotated[str, typer.Option(help="Load, times capacity: a number, or LOW,HIGH to draw from.")] = "0.9",
    steps: Annotated[int, typer.Option(help="Environment steps in all.")] = 1_000_000,
    envs: Annotated[int | None, typer.Option(help="Environments side by side, by default the algorithm's.")] = None,
    hyperparams: Annotated[Path | None, typer.Option(help="YAML with what differs from the algorithm's own.")] = None,
    init: Annotated[Path | None, typer.Option(help="Network (.npz) to start from, e.g. an imitated one.")] = None,
    value_warmup: Annotated[int, typer.Option(help="With --init: rollouts that teach the value function alone.")] = 0,
    train_window: Annotated[str, typer.Option(help="Part of each trace's span to learn from.")] = "0%:50%",
    validation_window: Annotated[str, typer.Option(help="Part that chooses the best model.")] = "50%:60%",
    episode_requests: Annotated[int, typer.Option(help="Requests of an episode.")] = 500,
    interval_s: Annotated[float, typer.Option(help="Simulated seconds between decisions.")] = 1.0,
    reward: Annotated[str, typer.Option(help="A reward by name.")] = "goodput",
    action_knobs: Annotated[
        str | None, typer.Option(help="Knobs that an action sets; commas. By default seven.")
    ] = None,
    checkpoint_steps: int = 100_000,
    eval_steps: int = 100_000,
    eval_episodes: int = 32,
    seed: int = 0,
    tune_trials: Annotated[int, typer.Option(help="First search hyperparameters by so many Optuna trials.")] = 0,
    as_json: Json = False,
) -> None:
    """Trains a scheduler; the best model by validation runs without torch: l3env evaluate OUT."""
    announce_compilation()
    training = _training("train")
    known = training.config.hyperparams(algo, hyperparams)
    if envs is not None:
        known["num_envs"] = envs
    chosen = {} if action_knobs is None else {"action_knobs": list(_names(action_knobs, "--action-knobs"))}
    wanted = training.config.TrainConfig(
        algo=algo,
        systems=_names(system, "--system"),
        models=_names(model, "--model"),
        traces=tuple(trace),
        utilization=tuple(numbers(utilization, "--utilization")),
        train_window=train_window,
        validation_window=validation_window,
        env={"episode_requests": episode_requests, "interval_s": interval_s, "reward": reward} | chosen,
        total_steps=steps,
        checkpoint_steps=checkpoint_steps,
        eval_steps=eval_steps,
        eval_episodes=eval_episodes,
        seed=seed,
        init=None if init is None else str(init),
        value_warmup_rollouts=value_warmup,
        hyperparams=known,
    )
    if tune_trials:
        wanted = _optimised(wanted, out, tune_trials)
    with progress_bar(f"training {algo}") as progress:
        best = training.run.train(wanted, out, command=_command(), progress=progress)
    rows = training.run.evaluations(out)
    if as_json:
        print_json({"out": str(out), "best": str(best), "evaluations": rows})
        return
    from l3env.experiments.learning.pictures import learning_curve

    learning_curve([out], out / "learning_curve.png")
    top = max(rows, key=lambda row: row["goodput_frac"])
    err.print(
        f"best goodput on the validation window: {top['goodput_frac']:.3f} after {int(top['steps']):,} steps "
        f"(untrained {rows[0]['goodput_frac']:.3f}); written: {best}; learning curve: {out}/learning_curve.png; "
        f"curves: tensorboard --logdir {out}/tensorboard",
        highlight=False,
        soft_wrap=True,
    )


def _training(command: str) -> Any:
    """The package ``l3env.experiments.train`` with its modules. Raises L3EnvError where the extra is not installed."""
    try:
        from l3env.experiments import train
        from l3env.experiments.train import config, run  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "l3env":
            raise
        raise L3EnvError(f"{command} needs {error.name}: pip install 'l3env[train]'") from None
    return train


def _optimised(wanted: Any, out: Path, trials: int) -> Any:
    try:
        from l3env.experiments.train.optimise import optimise
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise L3EnvError("--tune-trials needs optuna: pip install 'l3env[tune]'") from None
    with progress_bar("searching hyperparameters") as progress:
        return optimise(wanted, out, trials, progress)


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help="A run folder, .npz files with commas between, or learned-ppo.")],
    system: Annotated[str | None, typer.Option(help="Names; by default those of training.")] = None,
    model: Annotated[str | None, typer.Option(help="Names; by default those of training.")] = None,
    trace: Annotated[
        list[str] | None, typer.Option(help="Several times for several; by default as in training.")
    ] = None,
    utilization: Annotated[str, typer.Option(help="Times what the reference policy sustains; commas.")] = "0.7,0.9,1.1",
    baselines: Annotated[str, typer.Option(help="best: all heuristics and tuned constants; or names.")] = "best",
    seeds: Annotated[int, typer.Option(help="Seed 0 is the window itself, the others are resampled within it.")] = 5,
    training_window: Annotated[str, typer.Option(help="What best-constant is searched on.")] = "0%:60%",
    window: Annotated[str, typer.Option(help="Part of each trace's span that is served.")] = "60%:100%",
    workers: Annotated[int | None, typer.Option(help="Processes, by default one a core.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for rows (resumes) and pictures.")] = None,
    as_json: Json = False,
) -> None:
    """A trained policy against heuristics and tuned constants on windows it has not seen, with confidence intervals."""
    announce_compilation()
    from l3env.experiments.learning import evaluate as evaluation
    from l3env.experiments.learning.cells import Cell
    from l3env.experiments.learning.grid import table
    from l3env.policies.network import load_network

    networks = evaluation.networks_of(run)
    trained = load_network(Path(networks[0])).config.get("training", {})

    def chosen(given: str | None, option: str, key: str) -> tuple[str, ...]:
        return tuple(trained.get(key, ())) if given is None else _names(given, option)

    systems, models = chosen(system, "--system", "systems"), chosen(model, "--model", "models")
    traces = tuple(trained.get("traces", ())) if not trace else tuple(trace)
    for name, values in (("--system", systems), ("--model", models), ("--trace", traces)):
        if not values:
            raise L3EnvError(f"{name}: the network does not say what it was trained on; expected a value")
    loads = numbers(utilization, "--utilization")
    cells = [
        Cell(each_system, each_model, each, load, training_window, window)
        for each_system, each_model, each, load in itertools.product(systems, models, traces, loads)
    ]
    with progress_bar("evaluating") as progress:
        figures, _ = evaluation.evaluate(
            cells,
            networks,
            evaluation.baselines_of(baselines),
            seeds_count=seeds,
            store=None if out is None else out / "rows.jsonl",
            workers=workers,
            progress=progress,
        )
    if out is not None:
        from l3env.experiments.learning import pictures

        pictures.policy_picture(cells[0], networks[0], out / "policy.png")
        err.print(f"written: {out}/rows.jsonl, policy.png", highlight=False)
    if as_json:
        print_json(figures)
    else:
        err.print(table(figures), highlight=False, soft_wrap=True)
