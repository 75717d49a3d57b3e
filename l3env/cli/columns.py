"""Tables of the command line, legible at any width: no name is cut."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.table import Table

from l3env.cli.shared import note, out

TEXT_COLUMNS = ("what", "module", "licence", "decides", "GPUs", "PIM", "here", "profile", "value", "model", "trace")
TEXT_CHARS = 24  # a column of texts is not made narrower, lest it become a tower
GAP = 2  # columns between two


def show_table(heads: Sequence[str], rows: Sequence[Sequence[str]], lesser: Sequence[str] = ()) -> None:
    """Prints a plain table on stdout: the first column and texts to the left, numbers to the right and never broken.

    Where it is too wide, heads of several words are broken; then ``lesser`` columns are left out, the first one first,
    and a note says so; then names are broken, too.
    """
    kept = list(range(len(heads)))
    shown = list(heads)
    if _width(shown, rows, kept) > out.width:
        shown = [head.replace(" ", "\n") for head in heads]
    left_out = []
    for name in lesser:
        if _width(shown, rows, kept) <= out.width:
            break
        kept.remove(heads.index(name))
        left_out.append(name)
    fits = _width(shown, rows, kept) <= out.width
    table = Table(box=None, header_style="bold", pad_edge=False)
    for place in kept:
        text = heads[place] in TEXT_COLUMNS
        whole = not text and (fits or place > 0)
        table.add_column(
            shown[place], justify="left" if place == 0 or text else "right", no_wrap=whole, overflow="fold"
        )
    for row in rows:
        table.add_row(*(row[place] for place in kept))
    out.print(table)
    if left_out:
        note(f"{out.width} columns are too few for {', '.join(left_out)}; a wider terminal or --json shows all")


def _width(heads: Sequence[str], rows: Sequence[Sequence[str]], kept: Sequence[int]) -> int:
    """Columns that are needed, those of texts as narrow as may be."""
    total = GAP * (len(kept) - 1)
    for place in kept:
        lines = [line for cell in (heads[place], *(row[place] for row in rows)) for line in cell.split("\n")]
        widest = max(map(cell_len, lines))
        total += min(widest, TEXT_CHARS) if heads[place] in TEXT_COLUMNS else widest
    return total
