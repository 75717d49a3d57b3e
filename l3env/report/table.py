"""The table in the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from l3env.report.bootstrap import GOODPUT, GUARDED, intervals
from l3env.report.names import (
    contract_order,
    decimals,
    has_pim,
    heading,
    load_label,
    loads_of,
    mean_of,
    number,
    policy_labels,
    unique,
)
from l3env.runs.compare import Comparison
from l3env.units import MS

BEST_STYLE = "bold green"


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        title: two lines; ``{unit}`` becomes the unit that the values decide on.
        figure: column of the results.
        scale: what one shown unit is; 0 lets the values decide.
        better: 1 where more is better, -1 where less is, 0 where neither.
        rank: columns of the highest rank are left out first where the terminal is narrow.
        pim: only for systems with PIM.
    """

    title: str
    figure: str
    scale: float = 1.0
    better: int = 0
    rank: int = 0
    pim: bool = False


PERCENT = 0.01
HOUR_S = 3600.0
SLOW_REQUESTS_PER_S = 0.05  # below, goodput is shown per hour
COLUMNS = (
    Column("goodput\nreq/{unit}", GOODPUT, 0, better=1),
    Column("SLO\nmet %", "slo_attainment_frac", PERCENT, better=1),
    Column("guarded\nreq/{unit}", GUARDED, 0, better=1, rank=1),
    Column("output\ntok/s", "output_tokens_per_s", better=1, rank=1),
    Column("TTFT\np50 {unit}", "ttft_p50_s", 0, better=-1, rank=4),
    Column("TTFT\np99 {unit}", "ttft_p99_s", 0, better=-1, rank=2),
    Column("longest\nwait s", "longest_wait_s", better=-1, rank=3),
    Column("star-\nved %", "starved_frac", PERCENT, better=-1, rank=10),
    Column("TBT\np50 ms", "tbt_p50_s", MS, better=-1, rank=6),
    Column("TBT\np99 ms", "tbt_p99_s", MS, better=-1, rank=3),
    Column("e2e\np50 {unit}", "e2e_p50_s", 0, better=-1, rank=8),
    Column("GPU %\nbusy", "gpu_busy_frac", PERCENT, rank=5),
    Column("PIM %\nbusy", "pim_busy_frac", PERCENT, rank=5, pim=True),
    Column("mean\nbatch", "batch_mean_count", rank=11),
    Column("KV HBM\npeak %", "kv_hbm_peak_frac", PERCENT, rank=13),
    Column("KV PIM\npeak %", "kv_pim_peak_frac", PERCENT, rank=12, pim=True),
    Column("pre-\nempted", "preemptions_count", better=-1, rank=10),
    Column("rejec-\nted", "rejected_count", better=-1, rank=9),
    Column("J per\ntoken", "energy_j_per_token", better=-1, rank=7),
)


def terminal_table(comparison: Comparison, console: Console, note: Callable[[str], None] | None = None) -> None:
    """Prints the comparison; columns that do not fit the console's width are left out, the least important first.

    Args:
        note: is told which.
    """
    results = contract_order(comparison.results)
    half_widths = _goodput_half_widths(intervals(comparison.done, comparison.requests))
    wanted = columns = [column for column in COLUMNS if not column.pim or has_pim(results)]
    table = _table(comparison, columns, half_widths)
    while max(column.rank for column in columns) > 0 and _width(console, table) > console.width:
        worst = max(column.rank for column in columns)
        columns = [column for column in columns if column.rank < worst]
        table = _table(comparison, columns, half_widths)
    console.print(Text(heading(comparison), style="bold"))
    console.print(Text(_facts(comparison), style="dim"))
    console.print(table)
    if note is not None and len(columns) < len(wanted):
        left_out = ", ".join(_one_line(column) for column in wanted if column not in columns)
        note(f"{console.width} columns are too few for {left_out}; a wider terminal, --out or --json shows all")


def _one_line(column: Column) -> str:
    return column.title.replace("-\n", "").replace("\n", " ").replace(" {unit}", "")


def _width(console: Console, table: Table) -> int:
    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum


def _facts(comparison: Comparison) -> str:
    """The line below the heading: how much was run, which SLO, what ± is."""
    results, slo = comparison.results, comparison.config.slo
    seeds = int(results["seed"].nunique())
    counts = contract_order(comparison.done)["requests_count"].dropna()
    requests = f"{float(counts.mean()):,.0f}" if len(counts) else "no"
    limits = [
        f"{name} ≤ {limit:g} s" if limit is not None else f"{name} ≤ {scale:g}x uncontended"
        for name, limit, scale in (("TTFT", slo.ttft_s, slo.ttft_scale), ("TBT", slo.tbt_s, slo.tbt_scale))
    ]
    patience_s = comparison.config.patience_s
    left = "" if patience_s is None else f" · clients leave after {patience_s:g} s without a first token"
    form = "" if slo.form == "mean-tbt" else f" ({slo.form})"
    return (
        f"{requests} requests, {seeds} seed{'s' if seeds > 1 else ''} · SLO: {', '.join(limits)}{form}{left}\n"
        "rates over the steady window · ± half the bootstrap 95 % interval"
    )


def _goodput_half_widths(rows: pd.DataFrame) -> dict[tuple[str, float], float]:
    goodput = rows[rows["figure"] == GOODPUT]
    halves = (goodput["high"] - goodput["low"]) / 2
    return {(p, float(load)): float(h) for p, load, h in zip(goodput["policy"], goodput["load"], halves, strict=True)}


def _table(comparison: Comparison, columns: list[Column], half_widths: dict[tuple[str, float], float]) -> Table:
    results = contract_order(comparison.results)
    loads, labels = loads_of(results), policy_labels(comparison.config.policies)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    if len(loads) > 1:
        table.add_column("load", no_wrap=True)
    table.add_column("policy", overflow="fold")
    units = [unit_of(results, column) for column in columns]
    for column, (_, name) in zip(columns, units, strict=True):
        table.add_column(column.title.format(unit=name), justify="right", no_wrap=True)
    for load in loads:
        policies = unique(results.loc[results["load"] == load, "policy"])
        cells = [
            _cells(results, column, policies, load, scale, half_widths)
            for column, (scale, _) in zip(columns, units, strict=True)
        ]
        for i, policy in enumerate(policies):
            first = load_label(results, load).removeprefix("load ") if i == 0 else ""
            head = [Text(first)] if len(loads) > 1 else []
            table.add_row(*head, Text(labels[policy]), *(column[i] for column in cells))
        table.add_section()
    return table


def unit_of(results: pd.DataFrame, column: Column) -> tuple[float, str]:
    """Scale and name of a column's unit: ms where every p99 is below 1 s, requests per hour where few are met."""
    if column.scale:
        return column.scale, ""
    if column.figure in (GOODPUT, GUARDED):
        most = np.nanmax(results[GOODPUT].to_numpy(dtype=float), initial=0.0)
        return (1 / HOUR_S, "h") if 0 < most < SLOW_REQUESTS_PER_S else (1.0, "s")
    tail = results[f"{column.figure.partition('_')[0]}_p99_s"].to_numpy(dtype=float)
    return (MS, "ms") if np.nanmax(tail, initial=0.0) < 1 else (1.0, "s")


def _cells(
    results: pd.DataFrame,
    column: Column,
    policies: list[str],
    load: float,
    scale: float,
    half_widths: dict[tuple[str, float], float],
) -> list[Text]:
    """One column of one load; the best are highlighted unless all are equal."""
    values = [mean_of(results, policy, load, column.figure) / scale for policy in policies]
    shown = [_text(v, column) for v in values]
    known = [v * column.better for v in values if math.isfinite(v)]
    best = {s for v, s in zip(values, shown, strict=True) if known and v * column.better == max(known)}
    highlight = column.better != 0 and len(set(shown)) > 1
    texts = [Text(s, style=BEST_STYLE if highlight and s in best else "") for s in shown]
    if column.figure == GOODPUT:
        for text, policy, value in zip(texts, policies, values, strict=True):
            half = half_widths.get((policy, load), 0.0) / scale
            text.append(f" ±{half:.{decimals(value)}f}" if half > 0 else "", style="not bold default")
    return texts


def _text(value: float, column: Column) -> str:
    if not math.isfinite(value):
        return "-"
    if column.scale == PERCENT:
        return f"{value:.1f}"
    return f"{value:,.0f}" if column.figure.endswith("_count") and value == round(value) else number(value)
