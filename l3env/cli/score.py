"""``l3env score``."""

from __future__ import annotations

from typing import Annotated

import typer

from l3env.cli.columns import show_table
from l3env.cli.shared import Json, announce_compilation, fail, out, print_json
from l3env.units import GIB


def score(
    policies: Annotated[list[str], typer.Argument(help="file.py, file.py:Class, or any other policy; several.")],
    time_limit: Annotated[float, typer.Option(min=1, help="Seconds of wall time for each.")] = 60.0,
    memory_gib: Annotated[float, typer.Option(min=1, help="GiB of memory for each.")] = 4.0,
    as_json: Json = False,
) -> None:
    """One number for a policy on a small fixed set of cells, in a few seconds: a fitness function for searches.

    Each policy runs in a process of its own. Exit code 2 where one has no score; the others have theirs.
    """
    announce_compilation()
    from l3env.runs.score import SUITE, score_apart

    rows = [score_apart(each, time_limit, round(memory_gib * GIB)) for each in policies]
    if as_json:
        print_json(rows if len(rows) > 1 else rows[0])
    else:
        shown = [row for row in rows if row["error"] is None]
        if shown:
            cells = [f"{cell['system']} {cell['model']}" for cell in shown[0]["cells"]]
            show_table(
                ("policy", SUITE, *cells),
                [
                    (row["policy"], *(f"{x:.3f}" for x in (row["score"], *_guarded(row["cells"]))))
                    for row in sorted(shown, key=lambda row: -row["score"])
                ],
                (),
            )
            out.print("guarded attainment: requests within their SLO less those that waited beyond the guard")
    wrong = [row["error"] for row in rows if row["error"] is not None]
    if wrong:
        fail("\n".join(wrong))


def _guarded(cells: list[dict[str, float]]) -> list[float]:
    return [cell["guarded_attainment_frac"] for cell in cells]
