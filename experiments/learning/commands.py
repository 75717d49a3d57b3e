"""``l3env tune`` and ``l3env evaluate``."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from l3env.cli.columns import show_table
from l3env.cli.shared import (
    Fresh,
    Json,
    Results,
    announce_compilation,
    file_out,
    names,
    numbers,
    print_json,
    progress_bar,
    repeated_command,
    say,
    say_taken,
)
from l3env.cli.shared import out as stdout
from l3env.errors import L3EnvError

Names = Annotated[str, typer.Option(help="Names with commas between.")]
CELL = ("system", "model", "trace")
ObjectiveName = Annotated[
    str, typer.Option("--objective", help="guarded: who waits beyond the guard costs what a met SLO earns; or plain.")
]
Traces = Annotated[list[str], typer.Option("--trace", help="A trace spec; several times for several.")]


def tune(
    system: Names = "l3-dgx-a100",
    model: Names = "gpt-175b",
    trace: Traces = ["azure-conv-2023"],  # noqa: B006  # typer copies it
    utilization: Annotated[str, typer.Option(help="Times what the reference policy sustains; commas.")] = "0.9",
    window: Annotated[str, typer.Option(help="Part of each trace's span that is searched on.")] = "0%:60%",
    requests: Annotated[int | None, typer.Option(help="At most so many requests of each window.")] = None,
    random: Annotated[int, typer.Option(help="Random settings before the coordinate search.")] = 64,
    seed: int = 0,
    objective: ObjectiveName = "guarded",
    out: Annotated[
        Path | None, typer.Option(callback=file_out, help="JSON file for the setting, its cells and this command.")
    ] = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Searches the best fixed knobs: of one cell, or one setting for many systems, models, traces and loads."""
    announce_compilation()
    import pandas as pd

    from l3env.runs.content import sha256, sources_sha256
    from l3env.search import tune as search
    from l3env.search.objective import objective_of

    wanted = objective_of(objective)
    loads = numbers(utilization, "--utilization")
    places = itertools.product(names(system, "--system"), names(model, "--model"), trace)
    rows, cases = _cases(list(places), window, requests, loads)
    follows_from = [[case.tables.system, case.tables.model, case.workload] for case in cases], random, seed, objective
    content = sha256([*follows_from, sources_sha256(Path(search.__file__))])
    result = None if out is None or fresh else _tuned_before(out, content)
    say_taken(result is not None, 1, out)
    if result is None:
        with progress_bar("tuning") as progress:
            found = search.tune(cases, objective=wanted, random_count=random, seed=seed, progress=progress)
        earned = pd.DataFrame({"goodput_frac": found.goodput_frac, "guarded_frac": found.guarded_frac})
        result = {
            "knobs": found.knobs.to_json(),
            "objective": objective,
            "cells": [row | of for row, of in zip(rows, earned.to_dict("records"), strict=True)],
            "tried_count": len(found.tried),
            "window": window,
            "requests": requests,
            "seed": seed,
            "command": repeated_command(),
            "content": content,
        }
        if out is not None:
            _write_setting(out, result)
    if as_json:
        print_json(result)
        return
    _print_setting(result)
    say(f"{result['tried_count']} settings tried" + (f"; written: {out}" if out else ""))


def _cases(
    places: list[tuple[str, str, str]], window: str, requests_count: int | None, loads: Sequence[float]
) -> tuple[list[dict[str, Any]], list[Any]]:
    """What results say of each system, model, trace and load, and what is searched on."""
    from l3env.experiments.train.windows import in_window
    from l3env.machine.pair import compile_pair
    from l3env.requests.registry import load_trace
    from l3env.runs.saturation import load_at_capacity
    from l3env.search.tune import Case

    windows = {trace: load_trace(in_window(trace, window)) for trace in dict.fromkeys(each[2] for each in places)}
    rows: list[dict[str, Any]] = []
    cases: list[Any] = []
    for each in places:
        tables = compile_pair(each[0], each[1])
        workload = windows[each[2]] if requests_count is None else windows[each[2]].head(requests_count)
        full = load_at_capacity(tables, workload)
        cases += [Case(tables, workload.at_load(load * full)) for load in loads]
        rows += [dict(zip((*CELL, "utilization"), (*each, load), strict=True)) for load in loads]
    return rows, cases


def _tuned_before(path: Path, content: str) -> dict[str, Any] | None:
    """What a file holds, if it follows from the same."""
    try:
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return known if isinstance(known, dict) and known.get("content") == content else None


def _write_setting(path: Path, result: dict[str, Any]) -> None:
    from l3env.files import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result, indent=2) + "\n")


def _print_setting(result: dict[str, Any]) -> None:
    show_table(("knob", "value"), [(name, str(value)) for name, value in result["knobs"].items()])
    shown = (("utilization", "g"), ("goodput_frac", ".3f"), ("guarded_frac", ".3f"))
    table = [(*(row[name] for name in CELL), *(f"{row[n]:{form}}" for n, form in shown)) for row in result["cells"]]
    show_table((*CELL, "utilization", "goodput", "guarded"), table)


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
    objective: ObjectiveName = "guarded",
    jobs: Annotated[int, typer.Option("--jobs", "-j", "--workers", help="Runs at a time; -1: one a core.")] = -1,
    out: Results = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """A trained policy against heuristics and tuned constants on windows it has not seen, with confidence intervals."""
    announce_compilation()
    from l3env.experiments.learning import evaluate as evaluation
    from l3env.experiments.learning.grid import table
    from l3env.experiments.learning.scenarios import Scenario
    from l3env.runs.store import Store
    from l3env.runs.workers import Workers
    from l3env.search.objective import objective_of

    wanted = objective_of(objective)
    networks = evaluation.networks_of(",".join(names(run, "RUN")))
    opponents = evaluation.baselines_of(",".join(names(baselines, "--baselines")))
    places = _places(networks[0], system, model, trace)
    scenarios = [
        Scenario(machine, served, requests, load, training_window, window)
        for machine, served, requests in itertools.product(*places)
        for load in numbers(utilization, "--utilization")
    ]
    store = None if out is None else Store(out)
    if store is not None:
        store.begin(fresh=fresh)
    with progress_bar("evaluating") as progress:
        figures, judged = evaluation.evaluate(
            scenarios,
            networks,
            opponents,
            seeds_count=seeds,
            objective=wanted,
            store=store,
            workers=Workers(count=jobs),
            progress=progress,
        )
    say_taken(judged.taken_count, len(judged.rows), out)
    if out is not None:
        _write(judged.rows, scenarios[0], networks[0], out)
    if as_json:
        print_json(figures)
    else:
        stdout.print(table(figures), soft_wrap=True)


def _places(network: str, system: str | None, model: str | None, trace: list[str] | None) -> list[tuple[str, ...]]:
    """Systems, models and traces: those asked for, else those that a network was trained on."""
    from l3env.policies.network import load_network

    trained = load_network(Path(network)).config.get("training", {})
    found = {
        "system": trained.get("systems", ()) if system is None else names(system, "--system"),
        "model": trained.get("models", ()) if model is None else names(model, "--model"),
        "trace": trace or trained.get("traces", ()),
    }
    for name, values in found.items():
        if not values:
            raise L3EnvError(f"--{name}: the network does not say what it was trained on; expected a value")
    return [tuple(values) for values in found.values()]


def _write(rows: list[dict[str, Any]], scenario: Any, network: str, out: Path) -> None:
    """The rows as a table, and what the policy does in a scenario as a picture."""
    import pandas as pd

    from l3env.experiments.learning import pictures
    from l3env.files import write_text

    write_text(out / "results.csv", pd.DataFrame(rows).to_csv(index=False))
    pictures.policy_picture(scenario, network, out / "policy.png")
    say(f"written: {out}/results.csv, policy.png")
