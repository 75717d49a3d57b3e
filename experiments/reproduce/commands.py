"""``l3env reproduce`` and ``l3env roofline``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from l3env.cli.columns import show_table
from l3env.cli.shared import Json, announce_compilation, file_out, finite, folder_out, print_json, progress_bar, say
from l3env.cli.shared import out as stdout
from l3env.errors import L3EnvError


def reproduce(
    figure: Annotated[
        str, typer.Argument(help="fig11 to fig16, energy, all of these, prover, or deepseek-v3.")
    ] = "all",
    out: Annotated[Path, typer.Option(callback=folder_out, help="Folder for the pictures.")] = Path("runs/reproduce"),
    quick: Annotated[bool, typer.Option(help="Fewer theorems (prover).")] = False,
    as_json: Json = False,
) -> None:
    """The L3 paper's results, side by side with this model's; or DeepSeek-Prover's, with the synthetic prover's."""
    announce_compilation()
    from l3env.experiments.reproduce import run

    with progress_bar("reproducing") as progress:
        rows = run.rows_of(figure, progress, quick=quick)
    run.draw(rows, out)
    if as_json:
        print_json([{key: finite(value) for key, value in row.items()} for row in rows])
        return
    stdout.print(f"Assumed: {run.assumed(figure)}.")
    table = []
    for row in rows:
        numbers = ["-" if row[key] is None else f"{row[key]:.3g}" for key in ("paper", "ours", "ratio")]
        what = f"{row['case']}: {row['quantity']}" + (f"\n{row['note']}" if row["note"] else "")
        table.append((row["figure"], what, *numbers))
    show_table(("figure", "what", "paper", "here", "ratio"), table)
    say(f"drawn: {out}/*.png")


def roofline(
    system: Annotated[str, typer.Option(help="The system whose lines are drawn.")] = "l3-dgx-a100",
    model: Annotated[str, typer.Option(help="A preset.")] = "gpt-175b",
    trace: Annotated[str, typer.Option(help="Gives the mean context.")] = "openr1",
    out: Annotated[Path, typer.Option(callback=file_out, help="Picture to write.")] = Path("runs/roofline.png"),
    as_json: Json = False,
) -> None:
    """The disaggregated roofline: throughput over capacity and bandwidth, the A100 systems marked."""
    announce_compilation()
    from l3env.experiments.reproduce import roofline as drawing
    from l3env.machine.pair import compile_pair
    from l3env.requests.registry import load_trace

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
    table = []
    for row in rows:
        batch = float(lines.batch(row["kv_bytes"]))
        kv_gb, rate = row["kv_bytes"] / 1e9, row["bytes_per_s"] / 1e12
        table.append((row["system"], f"{kv_gb:,.0f}", f"{rate:.1f}", f"{batch:,.0f}", f"{row['tokens_per_s']:,.0f}"))
    show_table(("system", "KV GB", "TB/s", "batch", "tokens/s"), table)
    say(f"drawn: {path}")
