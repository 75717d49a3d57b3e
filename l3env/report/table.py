"""The table in the terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from l3env.report.bootstrap import GOODPUT, intervals
from l3env.report.names import has_pim, heading, load_label, loads_of, mean_of, policy_labels, unique
from l3env.runner import Comparison
from l3env.units import MS

BEST_STYLE = "bold green"


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        title: two lines; ``{unit}`` becomes s or ms.
        figure: column of the results.
        scale: what one shown unit is; 0 lets the values decide between s and ms.
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
COLUMNS = (
    Column("goodput\nreq/s", GOODPUT, better=1),
    Column("SLO\nmet %", "slo_attainment_frac", PERCENT, better=1),
    Column("output\ntok/s", "output_tokens_per_s", better=1, rank=1),
    Column("TTFT\np50 {unit}", "ttft_p50_s", 0, better=-1, rank=4),
    Column("TTFT\np99 {unit}", "ttft_p99_s", 0, better=-1, rank=2),
    Column("TBT\np50 ms", "tbt_p50_s", MS, better=-1, rank=6),
    Column("TBT\np99 ms", "tbt_p99_s", MS, better=-1, rank=3),
    Column("e2e\np50 {unit}", "e2e_p50_s", 0, better=-1, rank=8),
    Column("GPU\nbusy %", "gpu_busy_frac", PERCENT, rank=5),
    Column("PIM\nbusy %", "pim_busy_frac", PERCENT, rank=5, pim=True),
    Column("mean\nbatch", "batch_mean_count", rank=11),
    Column("HBM KV\npeak %", "kv_hbm_peak_frac", PERCENT, rank=13),
    Column("PIM KV\npeak %", "kv_pim_peak_frac", PERCENT, rank=12, pim=True),
    Column("pre-\nempted", "preemptions_count", better=-1, rank=10),
    Column("reject-\ned", "rejected_count", better=-1, rank=9),
    Column("J per\ntoken", "energy_j_per_token", better=-1, rank=7),
)


def terminal_table(comparison: Comparison, console: Console) -> None:
    """Prints the comparison; columns that do not fit the console's width are left out, the least important first."""
    results = comparison.results
    half_widths = _goodput_half_widths(intervals(results, comparison.requests))
    columns = [column for column in COLUMNS if not column.pim or has_pim(results)]
    table = _table(comparison, columns, half_widths)
    while max(column.rank for column in columns) > 0 and _width(console, table) > console.width:
        worst = max(column.rank for column in columns)
        columns = [column for column in columns if column.rank < worst]
        table = _table(comparison, columns, half_widths)
    console.print(Text(heading(comparison), style="bold"))
    console.print(Text(_facts(comparison), style="dim"))
    console.print(table)


def _width(console: Console, table: Table) -> int:
    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum


def _facts(comparison: Comparison) -> str:
    """The line below the heading: how much was run, which SLO, what ± is."""
    results, slo = comparison.results, comparison.config.slo
    seeds = int(results["seed"].nunique())
    requests = float(results["requests_count"].mean())
    limits = [
        f"{name} ≤ {limit:g} s" if limit is not None else f"{name} ≤ {scale:g}x uncontended"
        for name, limit, scale in (("TTFT", slo.ttft_s, slo.ttft_scale), ("TBT", slo.tbt_s, slo.tbt_scale))
    ]
    return (
        f"{requests:,.0f} requests, {seeds} seed{'s' if seeds > 1 else ''} · SLO: {', '.join(limits)} · "
        "± half of the bootstrap 95 % interval"
    )


def _goodput_half_widths(rows: pd.DataFrame) -> dict[tuple[str, float], float]:
    goodput = rows[rows["figure"] == GOODPUT]
    halves = (goodput["high"] - goodput["low"]) / 2
    return {(p, float(load)): float(h) for p, load, h in zip(goodput["policy"], goodput["load"], halves, strict=True)}


def _table(comparison: Comparison, columns: list[Column], half_widths: dict[tuple[str, float], float]) -> Table:
    results = comparison.results
    loads, labels = loads_of(results), policy_labels(results["policy"])
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    if len(loads) > 1:
        table.add_column("load", no_wrap=True)
    table.add_column("policy", no_wrap=True)
    units = {column.figure: _unit(results, column) for column in columns}
    for column in columns:
        name = "s" if units[column.figure] == 1 else "ms"
        table.add_column(column.title.format(unit=name), justify="right", no_wrap=True)
    for load in loads:
        policies = unique(results.loc[results["load"] == load, "policy"])
        cells = [_cells(results, column, policies, load, units[column.figure], half_widths) for column in columns]
        for i, policy in enumerate(policies):
            first = load_label(results, load).removeprefix("load ") if i == 0 else ""
            head = [Text(first)] if len(loads) > 1 else []
            table.add_row(*head, Text(labels[policy]), *(column[i] for column in cells))
        table.add_section()
    return table


def _unit(results: pd.DataFrame, column: Column) -> float:
    """Scale of a column; latencies whose every p99 is below a second are shown in ms."""
    if column.scale:
        return column.scale
    tail = results[f"{column.figure.partition('_')[0]}_p99_s"].to_numpy(dtype=float)
    return MS if np.nanmax(tail, initial=0.0) < 1 else 1.0


def _cells(
    results: pd.DataFrame,
    column: Column,
    policies: list[str],
    load: float,
    unit: float,
    half_widths: dict[tuple[str, float], float],
) -> list[Text]:
    """One column of one load; the best are highlighted unless all are equal."""
    values = [mean_of(results, policy, load, column.figure) / unit for policy in policies]
    shown = [_percent(v) if unit == PERCENT else number(v) for v in values]
    known = [v * column.better for v in values if math.isfinite(v)]
    best = {s for v, s in zip(values, shown, strict=True) if known and v * column.better == max(known)}
    highlight = column.better != 0 and len(set(shown)) > 1
    texts = [Text(s, style=BEST_STYLE if highlight and s in best else "") for s in shown]
    if column.figure == GOODPUT:
        for text, policy, value in zip(texts, policies, values, strict=True):
            half = half_widths.get((policy, load), math.nan)
            text.append(f" ±{half:.{decimals(value)}f}" if math.isfinite(half) else "", style="not bold default")
    return texts


def _percent(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "-"


def decimals(value: float) -> int:
    """Digits behind the point that show three significant ones."""
    size = abs(value)
    if not math.isfinite(size) or size == 0:
        return 0
    return int(np.clip(2 - math.floor(math.log10(size)), 0, 4))


def number(value: float) -> str:
    """Three significant digits, thousands marked; ``-`` for NaN."""
    return f"{value:,.{decimals(value)}f}" if math.isfinite(value) else "-"
