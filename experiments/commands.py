"""``l3env bench``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from l3env.cli.columns import show_table
from l3env.cli.shared import Json, announce_compilation, print_json, say


def bench(
    as_json: Json = False,
    quick: Annotated[bool, typer.Option(help="Fewer repeats, no fresh processes.")] = False,
) -> None:
    """Speed on this machine, measured: medians, extremes beside them."""
    announce_compilation()
    from l3env.experiments import bench as measure

    figures = measure.run(lambda text: say(f"measuring: {text}"), quick=quick, training_speed=_training_speed())
    if as_json:
        print_json(figures)
        return
    table = []
    for name in [key for key in figures if not key.endswith(("_min", "_max"))]:
        each = [figures[key] for key in (name, f"{name}_min", f"{name}_max")]
        table.append((name, *(f"{value:,.3g}" if value < 1e4 else f"{value:,.0f}" for value in each)))
    show_table(("figure", "median", "min", "max"), table)


def _training_speed() -> Callable[[str, int], tuple[float, float]] | None:
    """How training is measured; None, and a note, where its extra is not installed."""
    try:
        from l3env.experiments.train.speed import training_speed
    except ModuleNotFoundError as error:
        say(f"training is not measured: {error.name} is not installed (pip install 'l3env[train]')")
        return None
    return training_speed
