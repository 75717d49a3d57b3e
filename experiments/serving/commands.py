"""``l3env validate engine``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from l3env.cli.columns import show_table
from l3env.cli.shared import Json, print_json


def validate_engine(
    run: Annotated[
        Path, typer.Argument(help="Table of a measured run, a row a request; see docs/serving-validation.md.")
    ],
    system: Annotated[str, typer.Option(help="A system preset or TOML file.")],
    model: Annotated[str, typer.Option(help="A model preset or TOML file.")],
    engine: Annotated[
        str | None, typer.Option(help="A serving engine's preset or TOML file; by default the system's.")
    ] = None,
    kv_blocks: Annotated[
        int | None, typer.Option(help="KV blocks of a replica; by default the engine's formula.")
    ] = None,
    budget: Annotated[int | None, typer.Option(help="Tokens a step, at most; by default the engine's.")] = None,
    seqs: Annotated[int | None, typer.Option(help="Running requests, at most; by default the engine's.")] = None,
    tp: Annotated[int | None, typer.Option(help="Tensor-parallel degree, by default the model's.")] = None,
    run_id: Annotated[str | None, typer.Option("--run", help="Which run, where the table holds several.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Where to draw measured and simulated distributions (PNG).")] = None,
    as_json: Json = False,
) -> None:
    """A measured run of a real serving engine against the simulated one: TTFT, TPOT, E2E, makespan."""
    from l3env.experiments.serving import validate
    from l3env.experiments.serving.measured import read_run

    measured = read_run(run, run_id)
    limits = {"kv_blocks": kv_blocks, "budget_tokens": budget, "max_num_seqs": seqs}
    outcome = validate.simulate(measured, system, model, engine=engine, tp=tp, **limits)
    figures = validate.figures(outcome, measured)
    if plot is not None:
        from l3env.experiments.serving.plot import draw

        draw(outcome, measured, run.name, plot)
    if as_json:
        print_json(figures)
        return
    rows = [
        (name.replace("_", " "), f"{value:,.3f}" if value != int(value) else f"{value:,.0f}")
        for name, value in figures.items()
    ]
    show_table(("figure", "ours / measured"), rows)
