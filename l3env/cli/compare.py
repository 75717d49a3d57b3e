"""``l3env compare`` and ``l3env demo``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from l3env.cli.shared import Json, announce_compilation, err, numbers, print_json, progress_bar
from l3env.errors import L3EnvError

DEFAULT_POLICIES = (
    "fcfs,sarathi,fill-capacity,l3,l3-model,edf,sjf-prompt,srtf-predicted,oracle-srtf,hybrid-greedy,random"
)
DEMO_POLICIES = "fcfs,sarathi,l3,edf,sjf-prompt,srtf-predicted"


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
    slo_form: Annotated[str, typer.Option(help="SLO on tokens: mean-tbt, p99-gap or token-deadlines.")] = "mean-tbt",
    training: Annotated[
        str | None, typer.Option(help="Trace of earlier requests to learn from, by default the first fifth.")
    ] = None,
    prefix_cache: Annotated[
        str,
        typer.Option(
            help="Share KV of equal prompt beginnings (traces with prefix ids): off, lru, lfu, tree or score."
        ),
    ] = "off",
    config: Annotated[Path | None, typer.Option(help="A config.json of an earlier run: repeats it.")] = None,
    as_json: Json = False,
) -> None:
    """Compares scheduling policies on the same workloads."""
    announce_compilation()
    from l3env.engine.engine import Slo
    from l3env.runs.compare import CompareConfig

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
            slo=Slo(ttft_scale, tbt_scale, ttft_s, tbt_s, slo_form),
            training=training,
            prefix_cache=prefix_cache,
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
    from l3env.report import html
    from l3env.runs.compare import run_comparison

    with progress_bar("comparing") as progress:
        comparison = run_comparison(config, out=out, progress=progress)
    if as_json:
        print_json(report.to_json(comparison))
    else:
        report.terminal_table(comparison, err)
    if out is not None:
        with err.status("drawing ..."):
            report.write_results(comparison, out)
            html.write_html(html.of_comparison(comparison, f"Comparison {out.name}"), out / "report.html")
        err.print(
            f"written: {out}/results.csv, report.html, config.json, requests/*.parquet and pictures (*.png)",
            highlight=False,
        )


def demo(
    out: Annotated[Path, typer.Option(help="Folder for results and pictures.")] = Path("runs/demo"),
    as_json: Json = False,
) -> None:
    """The main job in a minute: six policies on an embedded trace profile, three loads, GPT-175B on GPUs + DIMM-PIM."""
    announce_compilation()
    from l3env.runs.compare import CompareConfig

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
