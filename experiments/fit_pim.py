"""Fits the engine's linear model of a DIMM-PIM rank to the command-level simulator and stores it with the presets.

    python -m l3env.experiments.fit_pim            # simulate the whole grid, print coefficients and residuals
    python -m l3env.experiments.fit_pim --write    # and store them in l3env/presets/pim_fit/

The grid is every length of 128 to 128k in ``l3env.machine.dimm.fit.LENGTHS`` with every batch of 1 to 512 in
``BATCHES``.
"""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from l3env.machine import specs
from l3env.machine.dimm.fit import QUERIES, equal_batches, fitted_kind, mixed_batches, rank_setup, run_grid
from l3env.machine.dimm.stored import FIT_DIR, Kind, RankFit, to_toml

PRESETS = ("dimm-pim-ddr4-3200", "rank-pim-ddr4-3200")
HEADER = "Fitted to l3env.machine.dimm by experiments/fit_pim.py (there: over what grid); seconds per layer in one rank"
UNSEEN_BATCHES = 40


def fit_preset(name: str) -> RankFit:
    pim = specs.load(f"pim/{name}")
    kinds = []
    for kind in QUERIES:
        setup, _ = rank_setup(kind, pim.kind == "dimm-bank", pim.macs_per_element_count)
        grid, check = run_grid(setup, equal_batches()), run_grid(setup, mixed_batches(UNSEEN_BATCHES))
        kinds.append(fitted_kind(kind, setup, grid, check))
    rank_bytes_per_s = pim.internal_bytes_per_s / (pim.channels_count * pim.ranks_per_channel_count)
    return RankFit(name, rank_bytes_per_s, pim.macs_per_element_count, tuple(kinds))


def show(console: Console, fit: RankFit) -> None:
    table = Table(title=f"{fit.pim}: t = a tokens + b jobs + c, per layer in one rank")
    for column in ("kind", "N_hc", "split", "heads a job", "a ns", "b ns", "c ns", "points"):
        table.add_column(column, justify="right")
    for column in ("median", "p99", "worst", "unseen median", "unseen worst"):
        table.add_column(f"{column} %", justify="right")
    for kind in fit.kinds:
        table.add_row(*row(kind))
    console.print(table)


def row(kind: Kind) -> list[str]:
    counts = (kind.chips_per_head_count, kind.token_split_count, kind.heads_per_job_count)
    times = (kind.token_s, kind.job_s, kind.batch_s)
    off = (kind.error_median_frac, kind.error_p99_frac, kind.error_worst_frac)
    unseen = (kind.unseen_error_median_frac, kind.unseen_error_worst_frac)
    return [
        kind.name,
        *(str(count) for count in counts),
        *(f"{time * 1e9:.3f}" for time in times),
        str(kind.points_count),
        *(f"{100 * error:.2f}" for error in off + unseen),
    ]


def main() -> None:
    console = Console()
    for name in PRESETS:
        fit = fit_preset(name)
        show(console, fit)
        if "--write" in sys.argv[1:]:
            FIT_DIR.mkdir(exist_ok=True)
            (FIT_DIR / f"{name}.toml").write_text(to_toml(fit, HEADER), encoding="utf-8")


if __name__ == "__main__":
    main()
