"""``l3env bench``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from l3env.cli.shared import Json, announce_compilation, err, plain_table, print_json


def bench(
    as_json: Json = False,
    quick: Annotated[bool, typer.Option(help="Fewer repeats, no fresh processes.")] = False,
) -> None:
    """Speed on this machine, measured: medians, extremes beside them."""
    announce_compilation()
    from l3env.experiments import bench as measure

    figures = measure.run(
        lambda text: err.print(f"measuring: {text}", highlight=False), quick=quick, training_speed=_training_speed()
    )
    if as_json:
        print_json(figures)
        return
    table = plain_table("figure", "median", "min", "max")
    for name in [key for key in figures if not key.endswith(("_min", "_max"))]:
        table.add_row(
            name,
            *(
                f"{figures[key]:,.3g}" if figures[key] < 1e4 else f"{figures[key]:,.0f}"
                for key in (name, f"{name}_min", f"{name}_max")
            ),
        )
    err.print(table)


def _training_speed() -> Callable[[str, int], tuple[float, float]] | None:
    """How training is measured; None, and a note, where its extra is not installed."""
    try:
        from l3env.experiments.train.speed import training_speed
    except ModuleNotFoundError as error:
        err.print(f"training is not measured: {error.name} is not installed (pip install 'l3env[train]')")
        return None
    return training_speed
