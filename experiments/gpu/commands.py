"""``l3env calibrate`` and ``l3env validate gpu``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from l3env.cli.columns import show_table
from l3env.cli.shared import Json, file_out, print_json, progress_bar, say
from l3env.errors import L3EnvError

validate = typer.Typer(help="Hold the model against measurements.", no_args_is_help=True)
calibrate = typer.Typer(help="Measure the GPU at hand, or fit presets to tables of operators.")


@calibrate.callback(invoke_without_command=True)
def calibrate_here(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="A preset (l3env models): the shapes to measure.")] = "llama-3-8b",
    tp: Annotated[int | None, typer.Option(help="Tensor-parallel degree, by default the model's.")] = None,
    out: Annotated[
        Path, typer.Option(callback=file_out, help="The preset to write; raw measurements go beside it.")
    ] = Path("my-gpu.toml"),
    base: Annotated[
        str | None, typer.Option(help="Preset with the GPU's data-sheet values; by default by its name.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measures one shard of a layer on the GPU at hand and writes a GPU preset; resumes. Needs a CUDA torch."""
    if context.invoked_subcommand is not None:
        return
    try:
        from l3env.experiments.gpu import calibrate as calibration
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise L3EnvError("calibrate needs a CUDA build of torch: none is installed (https://pytorch.org)") from None
    with progress_bar("measuring") as progress:
        figures = calibration.calibrate(model, tp, out, base, lambda done, what: progress(done, 0, what))
    _print_errors(figures, as_json)
    say(f"written: {out}; try: l3env validate gpu --gpu {out}")


@validate.command("engine")
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
    from l3env.experiments.gpu import serving_check
    from l3env.experiments.gpu.serving_run import read_run

    measured = read_run(run, run_id)
    limits = {"kv_blocks": kv_blocks, "budget_tokens": budget, "max_num_seqs": seqs}
    outcome = serving_check.simulate(measured, system, model, engine=engine, tp=tp, **limits)
    figures = serving_check.figures(outcome, measured)
    if plot is not None:
        from l3env.experiments.gpu.serving_plot import draw

        draw(outcome, measured, run.name, plot)
    if as_json:
        print_json(figures)
        return
    rows = [
        (name.replace("_", " "), f"{value:,.3f}" if value != int(value) else f"{value:,.0f}")
        for name, value in figures.items()
    ]
    show_table(("figure", "ours / measured"), rows)


@calibrate.command("gpu")
def calibrate_gpu(
    folder: Annotated[Path, typer.Argument(help="Tables <gpu>_sxm_<backend>-<version>_<table>.csv.gz.")],
    out: Annotated[Path, typer.Option(help="Where presets (gpu/, link/) and gpu_fit.json are written.")] = Path(
        "presets"
    ),
    as_json: Json = False,
) -> None:
    """Fits GPU and link presets to measured operator times; a third of the shapes is held out."""
    from l3env.experiments.gpu import fit

    with progress_bar("fitting") as progress:
        report = fit.refit_folder(folder, out, lambda what: progress(0, 0, what))
    if as_json:
        print_json(report)
        return
    for kind in ("gpus", "links"):
        for name, each in report[kind].items():
            for part in ("fitted", "held_out"):
                rows = {f"{name} {op}, {part}": row[part] for op, row in each["residuals"].items() if part in row}
                _print_errors(rows, as_json=False)
    say(f"written: {out}")


@validate.command("gpu")
def validate_gpu(
    folder: Annotated[
        Path | None,
        typer.Argument(help="Tables <gpu>_sxm_<backend>-<version>_<table>.csv.gz, each on its GPU's preset."),
    ] = None,
    gpu: Annotated[str, typer.Option(help="A GPU preset's name, or gpu:file.toml.")] = "h200",
    profile: Annotated[
        Path | None, typer.Option(help="CSV op,model,tp,tokens,batch,kv_len,ms; by default the repository's own.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(callback=file_out, help="Where to draw measured against predicted (PNG).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measured GPU times against predicted ones: errors by operation, a scatter plot."""
    if folder is not None:
        _validate_folder(folder, as_json)
        return
    from l3env.experiments.gpu import raw, validation
    from l3env.machine import specs

    ref = gpu if gpu.startswith(("gpu/", "gpu:")) else f"gpu:{gpu}" if gpu.endswith(".toml") else f"gpu/{gpu}"
    device = specs.load(ref)
    if profile is None:
        table = raw.read_raw(validation.default_profile(device.name))
        points = raw.points(table)
        figures = validation.validate(device, points) | raw.validate_stacks(device, table)
    else:
        points = validation.read_profile(profile)
        figures = validation.validate(device, points)
    _print_errors(figures, as_json)
    if plot is None and not as_json:
        plot = Path("runs") / f"validate-gpu-{device.name}.png"
    if plot is not None:
        from l3env.experiments.gpu.plot import scatter

        scatter(device, points, plot)
        say(f"drawn: {plot}")


@validate.command("rates")
def validate_rates(
    file: Annotated[Path, typer.Argument(help="Table of published rates of whole models, as rates_silicon.csv.gz.")],
    as_json: Json = False,
) -> None:
    """Published times per output token of whole models at a constant concurrency against predicted ones."""
    from l3env.experiments.gpu import rates

    found = rates.validate_rates(file)
    if as_json:
        print_json(found)
        return
    for name, models in found["tpot"].items():
        _print_errors({f"{name} {model}": row for model, row in models.items()}, as_json=False)
    show_table(("left out", "rows"), [(why, f"{count:,}") for why, count in found["left_out"].items()])


def _validate_folder(folder: Path, as_json: bool) -> None:
    from l3env.experiments.gpu.operator_errors import validate_folder

    with progress_bar("comparing") as progress:
        figures = validate_folder(folder, lambda what: progress(0, 0, what))
    if as_json:
        print_json(figures)
        return
    for name, operations in figures.items():
        rows = {f"{name} {op}": row for op, row in operations.items()}
        rows |= {f"{name} {op}, joules": row["energy"] for op, row in operations.items() if "energy" in row}
        _print_errors(rows, as_json=False)


def _print_errors(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(figures)
        return
    table = [
        (op, f"{row['n']:,}", *(f"{row[key]:.1%}" for key in ("median", "p90", "worst"))) for op, row in figures.items()
    ]
    show_table(("operation", "measurements", "median error", "p90", "worst"), table)
