"""The command line. Results for machines go to stdout (``--json``), tables and progress to stderr."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from l3env.errors import L3EnvError

app = typer.Typer(
    help="Scheduling of LLM serving on heterogeneous memory: compare policies on real traces.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
traces_app = typer.Typer(help="Traces: what is there, what is in them, convert, fetch.", no_args_is_help=True)
app.add_typer(traces_app, name="traces")
validate_app = typer.Typer(help="Hold the model against measurements.", no_args_is_help=True)
app.add_typer(validate_app, name="validate")

PIPED_WIDTH = 140  # columns where stderr is no terminal
err = Console(stderr=True, width=None if sys.stderr.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH)

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else there.")]
DEFAULT_POLICIES = (
    "fcfs,sarathi,fill-capacity,l3,l3-model,edf,sjf-prompt,srtf-predicted,oracle-srtf,hybrid-greedy,random"
)
DEMO_POLICIES = "fcfs,sarathi,l3,edf,sjf-prompt,srtf-predicted"


def main() -> None:
    """Entry point: user errors become one line, an interrupt is quiet."""
    warnings.showwarning = _show_warning
    try:
        app()
    except L3EnvError as error:
        err.print(f"[bold red]error:[/] {error}", soft_wrap=True, highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        err.print("interrupted; what was finished is kept")
        sys.exit(130)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    err.print(f"[yellow]note:[/] {message}", soft_wrap=True, highlight=False)


def print_json(value: Any) -> None:
    """Strict JSON on stdout."""
    print(json.dumps(value, indent=2, allow_nan=False))


def announce_compilation() -> None:
    """Says so before the first use compiles the kernels, which takes half a minute."""
    from l3env.jit import is_compiled

    if not is_compiled():
        err.print("compiling the simulator for this machine: first use only, about half a minute ...")


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Gives a function (done, total, what) that moves a bar on stderr."""
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.description}"),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total, what: progress.update(task, completed=done, total=total, description=what)


def numbers(text: str, option: str) -> list[float]:
    """Comma-separated positive numbers of an option."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise L3EnvError(f"{option} {text!r}; expected a number, or several with commas between") from None
    if not all(0 < value < float("inf") for value in values):
        raise L3EnvError(f"{option} {text!r}; expected numbers > 0")
    return values


@app.command()
def compare(
    system: Annotated[str, typer.Option(help="A preset (l3env systems) or a TOML file.")] = "l3-dgx-a100",
    model: Annotated[str, typer.Option(help="A preset (l3env models) or a TOML file.")] = "gpt-175b",
    trace: Annotated[str, typer.Option(help="A name (l3env traces list), a file, or a spec.")] = "azure-conv-2023",
    policies: Annotated[str, typer.Option(help="Names with commas between, or file.py:Class.")] = DEFAULT_POLICIES,
    load: Annotated[str, typer.Option(help="Times the trace's own arrival rate; several with commas.")] = "1.0",
    utilization: Annotated[
        str | None, typer.Option(help="Instead of --load: times what the reference policy serves at saturation.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seed 0 is the trace itself, the others are resampled.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder for results and pictures; resumes what is there.")] = None,
    tp: Annotated[int | None, typer.Option(help="Tensor-parallel degree, by default the model's.")] = None,
    ttft_scale: Annotated[float, typer.Option(help="SLO: TTFT, times the request's own uncontended one.")] = 5.0,
    tbt_scale: Annotated[float, typer.Option(help="SLO: mean time between tokens, likewise.")] = 5.0,
    ttft_s: Annotated[float | None, typer.Option(help="SLO: TTFT in seconds instead.")] = None,
    tbt_s: Annotated[float | None, typer.Option(help="SLO: mean time between tokens in seconds instead.")] = None,
    config: Annotated[Path | None, typer.Option(help="A config.json of an earlier run: repeats it.")] = None,
    as_json: Json = False,
) -> None:
    """Compares scheduling policies on the same workloads."""
    announce_compilation()
    from l3env.engine import Slo
    from l3env.runner import CompareConfig

    if config is not None:
        wanted = CompareConfig.from_json(_read_config(config))
    else:
        wanted = CompareConfig(
            tuple(name.strip() for name in policies.split(",") if name.strip()),
            system,
            model,
            trace,
            () if utilization else tuple(numbers(load, "--load")),
            tuple(numbers(utilization, "--utilization")) if utilization else (),
            seeds,
            tp,
            slo=Slo(ttft_scale, tbt_scale, ttft_s, tbt_s),
        )
    run_and_report(wanted, out, as_json)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise L3EnvError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise L3EnvError(f"{path}: expected an object, as in the config.json that a comparison writes")
    return raw


def run_and_report(config: Any, out: Path | None, as_json: bool) -> None:
    """Runs a comparison with a progress bar; prints the table or JSON; writes the folder."""
    from l3env import report
    from l3env.runner import run_comparison

    with progress_bar("comparing") as progress:
        comparison = run_comparison(config, out=out, progress=progress)
    if as_json:
        print_json(report.to_json(comparison))
    else:
        report.terminal_table(comparison, err)
    if out is not None:
        with err.status("drawing ..."):
            report.write_results(comparison, out)
        err.print(f"written: {out}/results.csv, config.json, requests/*.parquet and pictures (*.png)", highlight=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for results and pictures.")] = Path("runs/demo"),
    as_json: Json = False,
) -> None:
    """The main job in a minute: six policies on an embedded trace profile, three loads, GPT-175B on GPUs + DIMM-PIM."""
    announce_compilation()
    from l3env.runner import CompareConfig

    err.print(
        "Workload: profile:azure-conv-2023, 1,500 requests drawn from fitted statistics of the Azure conversation "
        "trace (not the trace itself; `l3env traces list` shows the real ones and how to get them).",
        highlight=False,
    )
    config = CompareConfig(
        tuple(DEMO_POLICIES.split(",")),
        "l3-dgx-a100",
        "gpt-175b",
        "profile:azure-conv-2023?n=1500",
        (),
        (0.5, 0.8, 1.1),
        3,
    )
    run_and_report(config, out, as_json)


@app.command()
def systems(as_json: Json = False) -> None:
    """Systems there are: GPUs and places for KV."""
    from l3env import specs

    loaded = [specs.load(f"system/{name}") for name in specs.names("system")]
    if as_json:
        print_json([_plain(spec) for spec in loaded])
        return
    table = _table("system", "GPUs", "HBM GB", "HBM TB/s", "PFLOP/s", "PIM", "PIM GB", "PIM TB/s", "GPU-PIM GB/s")
    for spec in loaded:
        n, pim = spec.gpus_count, spec.pim
        link = spec.pim_link.bytes_per_s * spec.pim_link.utilisation_frac * n / 1e9 if spec.pim_link else None
        table.add_row(
            spec.name,
            f"{n} x {spec.gpu.name}",
            f"{n * spec.gpu.hbm_bytes / 1e9:,.0f}",
            f"{n * spec.gpu.hbm_bytes_per_s / 1e12:.1f}",
            f"{n * spec.gpu.fp16_flop_per_s / 1e15:.1f}",
            pim.kind if pim else "-",
            f"{pim.capacity_bytes / 1e9:,.0f}" if pim else "-",
            f"{pim.internal_bytes_per_s / 1e12:.1f}" if pim else "-",
            f"{link:,.0f}" if link else "-",
        )
    err.print(table)


@app.command()
def models(as_json: Json = False) -> None:
    """Models there are: sizes and KV bytes."""
    from l3env import specs

    loaded = [specs.load(f"model/{name}") for name in specs.names("model")]
    if as_json:
        print_json([_plain(spec) for spec in loaded])
        return
    table = _table("model", "params", "layers", "hidden", "heads", "KV heads", "FFN", "KV B/token", "TP")
    for spec in loaded:
        table.add_row(
            spec.name,
            f"{spec.parameters_count / 1e9:.1f} B",
            str(spec.layers_count),
            f"{spec.hidden_size:,}",
            str(spec.heads_count),
            str(spec.kv_heads_count),
            f"{spec.ffn_size:,}" + (" g" if spec.gated_ffn else ""),
            f"{spec.kv_bytes_per_token:,.0f}",
            str(spec.tensor_parallel_count),
        )
    err.print(table)
    err.print("g: gated FFN (three matrices); TP: GPUs a replica spans by default", highlight=False)


@app.command()
def policies(as_json: Json = False) -> None:
    """Policies known by name."""
    import inspect

    from l3env.policy import make_policy, policy_factories

    rows = []
    for name, factory in sorted(policy_factories().items()):
        summary = (inspect.getdoc(factory) or "").split("\n")[0]
        every = make_policy(name).decision_interval_s
        decides = "once" if every == float("inf") else "every iteration" if every == 0 else f"every {every:g} s"
        rows.append({"policy": name, "decides": decides, "what": summary, "module": factory.__module__})
    if as_json:
        print_json(rows)
        return
    table = _table("policy", "decides", "what", "module")
    for row in rows:
        table.add_row(*row.values())
    err.print(table)
    err.print("your own: --policies my_policy.py:MyClass")


def _plain(spec: Any) -> Any:
    import dataclasses

    plain = dataclasses.asdict(spec)
    if "parameters_count" in dir(spec):
        plain |= {"parameters_count": spec.parameters_count, "kv_bytes_per_token": spec.kv_bytes_per_token}
    return plain


TEXT_COLUMNS = ("what", "module", "licence", "decides", "GPUs", "PIM", "here", "profile", "value")


def _table(*columns: str) -> Table:
    """A plain table: the first column and texts to the left, numbers to the right and never broken."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        text = column in TEXT_COLUMNS
        table.add_column(column, justify="left" if i == 0 or text else "right", no_wrap=not text, overflow="fold")
    return table


@app.command()
def bench(
    as_json: Json = False,
    quick: Annotated[bool, typer.Option(help="Fewer repeats, no fresh processes.")] = False,
) -> None:
    """Speed on this machine, measured: medians, extremes beside them."""
    announce_compilation()
    from experiments import bench as measure

    figures = measure.run(lambda text: err.print(f"measuring: {text}", highlight=False), quick=quick)
    if as_json:
        print_json(figures)
        return
    table = _table("figure", "median", "min", "max")
    for name in [key for key in figures if not key.endswith(("_min", "_max"))]:
        table.add_row(
            name,
            *(
                f"{figures[key]:,.3g}" if figures[key] < 1e4 else f"{figures[key]:,.0f}"
                for key in (name, f"{name}_min", f"{name}_max")
            ),
        )
    err.print(table)


@app.command()
def reproduce(
    figure: Annotated[str, typer.Argument(help="fig11 to fig16, energy, or all.")] = "all",
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("runs/reproduce"),
    as_json: Json = False,
) -> None:
    """The L3 paper's results, side by side with this model's."""
    announce_compilation()
    from experiments.reproduce import common, run

    with progress_bar("reproducing") as progress:
        rows = run.rows_of(figure, progress)
    run.draw(rows, out)
    if as_json:
        print_json([{key: _finite(value) for key, value in row.items()} for row in rows])
        return
    err.print(f"Assumed: {common.DEFAULT.text()}.", highlight=False)
    table = _table("figure", "what", "paper", "here", "ratio")
    for row in rows:
        numbers = ["-" if row[key] is None else f"{row[key]:.3g}" for key in ("paper", "ours", "ratio")]
        note = f"[dim]{row['note']}" if row["note"] else ""
        table.add_row(row["figure"], f"{row['case']}: {row['quantity']}" + (f"\n{note}" if note else ""), *numbers)
    err.print(table)
    err.print(f"drawn: {out}/*.png", highlight=False)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@app.command()
def roofline(
    system: Annotated[str, typer.Option(help="The system whose lines are drawn.")] = "l3-dgx-a100",
    model: Annotated[str, typer.Option(help="A preset.")] = "gpt-175b",
    trace: Annotated[str, typer.Option(help="Gives the mean context.")] = "openr1",
    out: Annotated[Path, typer.Option(help="Picture to write.")] = Path("runs/roofline.png"),
    as_json: Json = False,
) -> None:
    """The disaggregated roofline: throughput over capacity and bandwidth, the A100 systems marked."""
    from experiments import roofline as drawing
    from l3env.runner import compile_pair
    from l3env.trace_registry import load_trace

    tables = compile_pair(system, model)
    context = drawing.mean_context_tokens(load_trace(trace))
    lines = drawing.Roofline(tables.model, tables.system, tables.tp, context)
    marks = drawing.points(model)
    if system not in [name for name, _, _ in marks]:
        raise L3EnvError(f"system {system!r} is not drawn; expected one of {', '.join(name for name, _, _ in marks)}")
    path = drawing.draw(lines, marks, system, out)
    rows: list[dict[str, Any]] = [
        {
            "system": name,
            "kv_bytes": capacity,
            "bytes_per_s": rate,
            "tokens_per_s": float(lines.tokens_per_s(capacity, rate)),
        }
        for name, capacity, rate in marks
    ]
    if as_json:
        print_json({"model": model, "context_tokens": context, "systems": rows})
        return
    table = _table("system", "KV GB", "TB/s", "batch", "tokens/s")
    for row in rows:
        batch = float(lines.batch(row["kv_bytes"]))
        kv_gb, rate = row["kv_bytes"] / 1e9, row["bytes_per_s"] / 1e12
        table.add_row(row["system"], f"{kv_gb:,.0f}", f"{rate:.1f}", f"{batch:,.0f}", f"{row['tokens_per_s']:,.0f}")
    err.print(table)
    err.print(f"drawn: {path}", highlight=False)


@app.command()
def calibrate(
    model: Annotated[str, typer.Option(help="A preset (l3env models): the shapes to measure.")] = "llama-3-8b",
    tp: Annotated[int | None, typer.Option(help="Tensor-parallel degree, by default the model's.")] = None,
    out: Annotated[Path, typer.Option(help="The preset to write; raw measurements go beside it.")] = Path(
        "my-gpu.toml"
    ),
    base: Annotated[
        str | None, typer.Option(help="Preset with the GPU's data-sheet values; by default by its name.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measures one shard of a layer on the GPU at hand and writes a GPU preset; resumes. Needs a CUDA torch."""
    try:
        from experiments import calibrate as calibration
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise L3EnvError("calibrate needs a CUDA build of torch: none is installed (https://pytorch.org)") from None
    with progress_bar("measuring") as progress:
        figures = calibration.calibrate(model, tp, out, base, lambda done, what: progress(done, 0, what))
    _print_errors(figures, as_json)
    err.print(f"written: {out}; try: l3env validate gpu --gpu {out}", highlight=False, soft_wrap=True)


@validate_app.command("gpu")
def validate_gpu(
    gpu: Annotated[str, typer.Option(help="A GPU preset's name, or gpu:file.toml.")] = "h200",
    profile: Annotated[
        Path | None, typer.Option(help="CSV op,model,tp,tokens,batch,kv_len,ms; by default the repository's own.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Where to draw measured against predicted (PNG).")] = None,
    as_json: Json = False,
) -> None:
    """Measured GPU times against predicted ones: errors by operation, a scatter plot."""
    from experiments import gpu_profile, gpu_raw
    from l3env import specs

    ref = gpu if gpu.startswith(("gpu/", "gpu:")) else f"gpu:{gpu}" if gpu.endswith(".toml") else f"gpu/{gpu}"
    device = specs.load(ref)
    if profile is None:
        table = gpu_raw.read_raw(gpu_profile.default_profile(device.name))
        points = gpu_raw.points(table)
        figures = gpu_profile.validate(device, points) | gpu_raw.validate_stacks(device, table)
    else:
        points = gpu_profile.read_profile(profile)
        figures = gpu_profile.validate(device, points)
    _print_errors(figures, as_json)
    if plot is None and not as_json:
        plot = Path("runs") / f"validate-gpu-{device.name}.png"
    if plot is not None:
        from experiments.gpu_plot import scatter

        scatter(device, points, plot)
        err.print(f"drawn: {plot}", highlight=False)


def _print_errors(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(figures)
        return
    table = _table("operation", "measurements", "median error", "p90", "worst")
    for op, row in figures.items():
        table.add_row(op, f"{row['n']:,}", *(f"{row[key]:.1%}" for key in ("median", "p90", "worst")))
    err.print(table)


@traces_app.command("list")
def traces_list(as_json: Json = False) -> None:
    """Traces by name: real ones, synthetic ones, embedded profiles."""
    from traces.catalog import listing

    rows = listing()
    if as_json:
        print_json(rows)
        return
    table = _table("trace", "requests", "licence", "here", "profile", "what")
    for row in rows:
        here = "generated" if row["where"] == "generated" else "no" if row["where"] == "not here" else "yes"
        count = f"{row['requests']:,}" if row["requests"] else "-"
        table.add_row(row["name"], count, row["licence"] or "-", here, "yes" if row["profile"] else "-", row["what"])
    err.print(table)


@traces_app.command("stats")
def traces_stats(trace: str, seed: int = 0, as_json: Json = False) -> None:
    """Statistics of a trace: rates, burstiness, lengths, shared prefixes."""
    from l3env.trace_registry import load_trace
    from traces.stats import describe

    workload = load_trace(trace, seed=seed)
    figures = describe(workload)
    if as_json:
        print_json({**figures, "source": {key: _json_safe(value) for key, value in workload.source.items()}})
        return
    table = _table("statistic", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.4g}" if isinstance(value, float) else str(value))
    err.print(table)
    for key, value in workload.source.items():
        err.print(f"[dim]{key}: {value}", highlight=False)


def _json_safe(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | type(None) | list | dict) else str(value)


@traces_app.command("convert")
def traces_convert(trace: str, target: Path, seed: int = 0) -> None:
    """Writes any trace in the canonical form: TARGET ends in .parquet or .csv."""
    from l3env.trace_registry import load_trace
    from traces.canonical import save

    workload = load_trace(trace, seed=seed)
    path = save(workload, target)
    err.print(f"{len(workload):,} requests written to {path}", highlight=False)


@traces_app.command("fetch")
def traces_fetch(name: str) -> None:
    """Downloads a real trace from its publisher into the user's cache and checks it."""
    from traces.fetch import fetch

    with progress_bar(f"fetching {name}") as progress:
        path = fetch(name, lambda done, total: progress(done, total or 0, ""))
    err.print(f"fetched: {path}", highlight=False)


if __name__ == "__main__":
    main()
