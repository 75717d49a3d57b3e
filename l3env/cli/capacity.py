"""``l3env capacity`` and ``l3env cost``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from l3env.cli.columns import show_table
from l3env.cli.shared import (
    Fresh,
    Jobs,
    Json,
    Model,
    Policies,
    PrefixCache,
    SloForm,
    TbtLimit,
    TbtScale,
    Trace,
    TtftLimit,
    TtftScale,
    announce_compilation,
    asked_slo,
    end,
    finite,
    folder_out,
    names,
    print_json,
    progress_bar,
    say,
    stop_at_mistake,
)
from l3env.cli.shared import out as stdout
from l3env.cli.study import plain_rows, start_backend
from l3env.errors import L3EnvError

PricesFile = Annotated[Path | None, typer.Option("--prices", help="TOML with your prices; l3env cost shows one.")]
INTERVAL = "95\N{NO-BREAK SPACE}% interval"
COST_COLUMNS = ("dollars_per_hour", "power_w", "tokens_per_dollar", "dollars_per_million_tokens", "tokens_per_joule")


def capacity(
    context: typer.Context,
    system: Annotated[str, typer.Option(help="Presets or TOML files, with commas between.")] = "l3-dgx-a100",
    model: Model = "gpt-175b",
    trace: Trace = "azure-conv-2023",
    policies: Policies = "sarathi,l3-model",
    target: Annotated[float, typer.Option(help="Share of requests that must meet the SLO.")] = 0.9,
    seeds: Annotated[int, typer.Option(help="Seed 0 is the trace itself; the spread gives the interval.")] = 5,
    tolerance: Annotated[float, typer.Option(help="Width of each seed's bracket, relative.")] = 0.02,
    ttft_scale: TtftScale = 5.0,
    tbt_scale: TbtScale = 5.0,
    ttft_s: TtftLimit = None,
    tbt_s: TbtLimit = None,
    slo_form: SloForm = "mean-tbt",
    prefix_cache: PrefixCache = "off",
    prices: PricesFile = None,
    backend: Annotated[str, typer.Option(help="loky (local processes) or ray.")] = "loky",
    address: Annotated[str | None, typer.Option(help="Ray cluster to join.")] = None,
    jobs: Jobs = -1,
    out: Annotated[
        Path | None, typer.Option(callback=folder_out, help="Folder that keeps what is found, for the next time.")
    ] = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """The highest load at which a share of requests meets the SLO, with its 95 % interval over seeds."""
    if seeds < 1:
        raise L3EnvError(f"--seeds {seeds}; expected at least 1")
    from l3env.runs.capacity import capacities
    from l3env.runs.grid import Grid
    from l3env.runs.store import Store

    lists = names(policies, "--policies"), names(system, "--system"), (model,), (trace,)
    grid = Grid(*lists, utilizations=(1.0,), seeds_count=seeds, slo=asked_slo(context), prefix_cache=prefix_cache)
    grid.check()
    costs = None if prices is None else _cost_function(prices, names(system, "--system"))
    announce_compilation(compile_now=True, prefix_cache=prefix_cache)
    workers = start_backend(backend, address, jobs)
    store = None if out is None else Store(out)
    if store is not None:
        store.begin(fresh=fresh)
    cells = [replace(cell, record=False) for cell in grid.cells()]
    asked = {"target_frac": target, "tolerance_frac": tolerance}
    with progress_bar("searching") as progress:
        rows = capacities(cells, **asked, store=store, workers=workers, progress=progress)
    if costs is not None:
        rows = [row if row["error"] else row | costs(row) for row in rows]
    stop_at_mistake(rows)
    failed = [row for row in rows if row["error"]]
    if as_json:
        print_json([{key: finite(value) for key, value in row.items() if key != "brackets"} for row in rows])
        end(failed)
        return
    _show_capacities(rows, f"{target:.0%} of requests within the SLO · {seeds} seeds", priced=costs is not None)
    end(failed)


def _show_capacities(rows: list[dict[str, Any]], goal: str, *, priced: bool) -> None:
    """The table, and below it what failed."""
    first = rows[0]
    stood_in = " (embedded profile)" if first["stands_in_for"] else ""
    stdout.print(f"{first['model']} · {first['trace']}{stood_in} · {goal}")
    heads = (
        "policy",
        "system",
        "load",
        INTERVAL,
        "requests/s",
        INTERVAL,
        "tok/s",
        "J/token",
    )
    table = []
    for row in (row for row in rows if not row["error"]):
        spans = [[row[f"capacity_{kind}{end}"] for end in ("", "_low", "_high")] for kind in ("load", "requests_per_s")]
        shown = [text for mid, low, high in spans for text in (f"{mid:.3g}", f"{low:.3g} to {high:.3g}")]
        extra = [f"{row[name]:,.3g}" for name in ("tokens_per_dollar", "tokens_per_joule")] if priced else []
        figures = f"{row['output_tokens_per_s']:,.0f}", f"{row['energy_j_per_token']:.3g}"
        table.append((row["policy"], row["system"], *shown, *figures, *extra))
    show_table((*heads, *(("tok/$", "tok/J") if priced else ())), table, ("J/token", "tok/s"))
    for row in rows:
        if row["error"]:
            say(f"on {row['system']}: {row['error']}", f"{row['policy']} ", "red")


def cost(
    run: Annotated[Path | None, typer.Argument(help="Folder of a comparison or study.")] = None,
    prices: PricesFile = None,
    as_json: Json = False,
) -> None:
    """Tokens per dollar and per joule of every run in a folder, at your prices; without any, an example of prices."""
    from l3env.runs.cost import EXAMPLE

    if run is None or prices is None:
        say("Give a folder and prices: l3env cost runs/first --prices prices.toml. Prices look like this:\n")
        print(EXAMPLE, end="")
        return
    frame = _results(run)
    costs = _cost_function(prices, sorted(set(frame["system"])))
    rows = [row | costs(row) for row in frame.to_dict("records")]
    if as_json:
        kept = ("policy", "system", "model", "trace", "load", "utilization", "seed", "output_tokens_per_s")
        print_json([{key: finite(row[key]) for key in (*kept, *COST_COLUMNS) if key in row} for row in rows])
        return
    import pandas as pd

    by = ["system", "model", "trace", "load", "policy"]
    means = pd.DataFrame(rows).groupby(by, sort=False)[["output_tokens_per_s", *COST_COLUMNS]].mean().reset_index()
    table = []
    for row in plain_rows(means):
        scaled = [row["output_tokens_per_s"], row["dollars_per_hour"], row["power_w"] / 1e3]
        scaled += [row[name] for name in COST_COLUMNS[2:]]
        names_shown = [str(row[name]) for name in by[:3]]
        table.append((*names_shown, f"{row['load']:.3g}", row["policy"], *map(_short, scaled)))
    show_table((*by, "tok/s", "$/h", "kW", "tok/$", "$/Mtok", "tok/J"), table, ("kW", "$/h", "tok/J", "tok/s"))


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _results(folder: Path) -> Any:
    import pandas as pd

    path = folder / "results.csv"
    if not path.exists():
        raise L3EnvError(f"{folder}: no results.csv; expected the folder of a finished comparison or study")
    frame = pd.read_csv(path)
    return frame[frame["error"].isna()] if "error" in frame else frame


def _cost_function(prices: Path, systems: Iterable[str]) -> Any:
    """Row -> cost figures; all prices are looked up before anything runs."""
    from l3env.machine.specs import named
    from l3env.runs.cost import Prices, cost_figures

    known = Prices.from_toml(prices)
    specs = {name: named("system", name) for name in systems}
    for spec in specs.values():
        known.dollars_per_hour(spec)
    return lambda row: cost_figures(row, specs[row["system"]], known)
