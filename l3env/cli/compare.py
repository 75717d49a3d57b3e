"""``l3env compare`` and ``l3env demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from l3env.cli.shared import (
    Fresh,
    Jobs,
    Json,
    Model,
    Patience,
    PrefixCache,
    Results,
    SloForm,
    TbtLimit,
    TbtScale,
    Trace,
    TtftLimit,
    TtftScale,
    announce_compilation,
    asked_slo,
    end,
    err,
    exclusive,
    folder_out,
    names,
    note,
    numbers,
    print_json,
    progress_bar,
    say,
    say_taken,
    stop_at_mistake,
)
from l3env.cli.shared import out as stdout
from l3env.errors import L3EnvError

DEMO_POLICIES = "fcfs,sarathi,l3,edf,sjf-prompt,srtf-predicted"


def compare(
    context: typer.Context,
    system: Annotated[str, typer.Option(help="A preset (l3env systems) or a TOML file.")] = "l3-dgx-a100",
    model: Model = "gpt-175b",
    trace: Trace = "azure-conv-2023",
    policies: Annotated[
        str | None,
        typer.Option(help="Names with commas between, or file.py:Class; by default heuristics, oracles and `random`."),
    ] = None,
    load: Annotated[str, typer.Option(help="Times the trace's own arrival rate; several with commas.")] = "1.0",
    utilization: Annotated[
        str | None, typer.Option(help="Instead of --load: times what the reference policy serves at saturation.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seed 0 is the trace itself, the others are resampled.")] = 1,
    out: Results = None,
    fresh: Fresh = False,
    jobs: Jobs = 1,
    tp: Annotated[int | None, typer.Option(help="Tensor-parallel degree, by default the model's.")] = None,
    ttft_scale: TtftScale = 5.0,
    tbt_scale: TbtScale = 5.0,
    ttft_s: TtftLimit = None,
    tbt_s: TbtLimit = None,
    slo_form: SloForm = "mean-tbt",
    training: Annotated[
        str | None, typer.Option(help="Earlier requests to learn from; by default the first fifth.")
    ] = None,
    prefix_cache: PrefixCache = "off",
    patience: Patience = None,
    config: Annotated[Path | None, typer.Option(help="A config.json of an earlier run: repeats it.")] = None,
    as_json: Json = False,
) -> None:
    """Compares scheduling policies on the same workloads."""
    exclusive(context, "load", "utilization")
    exclusive(context, "config", *(context.params.keys() - {"config", "out", "fresh", "jobs", "as_json"}))
    announce_compilation(compile_now=jobs != 1, prefix_cache=prefix_cache)
    from l3env.policy.protocol import Role
    from l3env.policy.registry import policies_of
    from l3env.runs.grid import Grid
    from l3env.runs.store import read_config

    if config is not None:
        wanted = Grid.from_json(read_config(config))
        if not wanted.one_machine:
            raise L3EnvError(f"{config}: several systems, models or traces; expected one of each, or use l3env sweep")
    else:
        wanted = Grid(
            policies_of(Role.HEURISTIC, Role.ORACLE, Role.FLOOR) if policies is None else names(policies, "--policies"),
            (system,),
            (model,),
            (trace,),
            tuple(numbers(load, "--load")) if utilization is None else (),
            () if utilization is None else tuple(numbers(utilization, "--utilization")),
            seeds,
            tp,
            slo=asked_slo(context),
            training=training,
            prefix_cache=prefix_cache,
            patience_s=patience,
        )
    run_and_report(wanted, out, as_json, fresh=fresh, jobs=jobs)


def run_and_report(grid: Any, out: Path | None, as_json: bool, *, fresh: bool = False, jobs: int = 1) -> None:
    """Runs a comparison with a progress bar; prints the table or JSON; writes the folder. A failed run: exit code 1."""
    from l3env import report
    from l3env.report import html
    from l3env.report.names import policy_labels
    from l3env.runs.compare import read_comparison, run_grid
    from l3env.runs.workers import Workers

    with progress_bar("comparing") as progress:
        comparison = run_grid(grid, out=out, fresh=fresh, workers=Workers(count=jobs), progress=progress)
    say_taken(comparison.taken_count, len(comparison.results), out)
    stop_at_mistake(comparison.results.to_dict("records"))
    if as_json:
        print_json(report.to_json(comparison))
    else:
        report.terminal_table(comparison, stdout, note)
    labels = policy_labels(comparison.config.policies)
    for row in comparison.failed.to_dict("records"):
        say(f" {row['error']}", f"{labels[row['policy']]}, load {row['load']:.3g}, seed {row['seed']}:", "red")
    if out is not None:
        with err.status("drawing ..."):
            shown = read_comparison(out)
            report.write_results(shown, out)
            html.write_html(shown, f"Comparison {out.name}", out / "report.html")
        say(f"written: {out}/results.csv, report.html, config.json, requests/*.parquet and pictures (*.png)")
    end(comparison.failed)


def demo(
    out: Annotated[Path, typer.Option(callback=folder_out, help="Folder for results and pictures.")] = Path(
        "runs/demo"
    ),
    as_json: Json = False,
) -> None:
    """The main job in a minute: six policies on an embedded trace profile, three loads, GPT-175B on GPUs + DIMM-PIM."""
    announce_compilation()
    from l3env.runs.grid import Grid

    say(
        "Workload: profile:azure-conv-2023, 1,500 requests drawn from fitted statistics of the Azure conversation "
        "trace (not the trace itself; `l3env traces list` shows the real ones and how to get them)."
    )
    grid = Grid(
        tuple(DEMO_POLICIES.split(",")),
        ("l3-dgx-a100",),
        ("gpt-175b",),
        ("profile:azure-conv-2023?n=1500",),
        (),
        (0.5, 0.8, 1.1),
        3,
    )
    run_and_report(grid, out, as_json)
