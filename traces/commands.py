"""``l3env traces``: list, stats, convert, fetch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from l3env.cli.columns import show_table
from l3env.cli.shared import Json, out, print_json, progress_bar, say

app = typer.Typer(help="Traces: what is there, what is in them, convert, fetch.", no_args_is_help=True)


@app.command("list")
def traces_list(as_json: Json = False) -> None:
    """Traces by name: real ones, synthetic ones, embedded profiles."""
    from l3env.traces.catalog import listing

    rows = listing()
    if as_json:
        print_json(rows)
        return
    table = []
    for row in rows:
        here = "generated" if row["where"] == "generated" else "no" if row["where"] == "not here" else "yes"
        count = f"{row['requests']:,}" if row["requests"] else "-"
        table.append((row["name"], count, row["licence"] or "-", here, "yes" if row["profile"] else "-", row["what"]))
    show_table(("trace", "requests", "licence", "here", "profile", "what"), table, ("licence", "profile"))


@app.command("stats")
def traces_stats(trace: str, seed: int = 0, as_json: Json = False) -> None:
    """Statistics of a trace: rates, burstiness, lengths, shared prefixes."""
    from l3env.requests.registry import load_trace
    from l3env.traces.stats import describe

    workload = load_trace(trace, seed=seed)
    figures = describe(workload)
    if as_json:
        print_json({**figures, "source": {key: _json_safe(value) for key, value in workload.source.items()}})
        return
    table = [(name, f"{each:,.4g}" if isinstance(each, float) else str(each)) for name, each in figures.items()]
    show_table(("statistic", "value"), table)
    for key, value in workload.source.items():
        out.print(f"{key}: {value}", style="dim", soft_wrap=True)


def _json_safe(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | type(None) | list | dict) else str(value)


@app.command("convert")
def traces_convert(trace: str, target: Path, seed: int = 0) -> None:
    """Writes any trace in the canonical form: TARGET ends in .parquet or .csv."""
    from l3env.requests.registry import load_trace
    from l3env.traces.canonical import save

    workload = load_trace(trace, seed=seed)
    path = save(workload, target)
    say(f"{len(workload):,} requests written to {path}")


@app.command("fetch")
def traces_fetch(name: str) -> None:
    """Downloads a real trace from its publisher into the user's cache and checks it."""
    from l3env.traces.fetch import fetch

    with progress_bar(f"fetching {name}") as progress:
        path = fetch(name, lambda done, total: progress(done, total or 0, ""))
    say(f"fetched: {path}")
