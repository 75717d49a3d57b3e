"""Tables of the command line, legible at any width: no name is cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rich.cells import cell_len
from rich.table import Table

from l3env.cli.shared import note, out

TEXT_COLUMNS = ("what", "module", "licence", "GPUs", "PIM", "value", "values", "levels", "model", "trace", "source")
LEFT_COLUMNS = (*TEXT_COLUMNS, "class", "decides", "signals", "here", "profile")
LEAST, MOST = 24, 36  # columns that a text gets at least, if it needs them, and that one word of it may ask for
FIRST = 12  # columns of names, where there is no room for more
GAP = 2  # columns between two


def show_table(heads: Sequence[str], rows: Sequence[Sequence[str]], lesser: Sequence[str] = ()) -> None:
    """Prints a plain table on stdout: the first column and texts to the left, numbers to the right and never broken.

    Where it is too wide, heads of several words are broken; then ``lesser`` columns are left out, the first one first,
    and a note says so; then names are broken, too.
    """
    columns = [Column(head, [row[place] for row in rows], place == 0) for place, head in enumerate(heads)]
    if _missing(columns) > 0:
        for column in columns:
            column.shown = column.head.replace(" ", "\n")
    left_out = []
    for head in lesser:
        if _missing(columns) > 0:
            columns = [column for column in columns if column.head != head]
            left_out.append(head)
    spare = -_missing(columns)
    widths = {id(column): column.least for column in columns}
    widths[id(columns[0])] = max(columns[0].least + min(spare, 0), FIRST)
    for column in sorted(columns[1:], key=lambda column: column.widest):
        more = min(max(spare, 0), column.widest - column.least)
        widths[id(column)], spare = column.least + more, spare - more
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        justify: Literal["left", "right"] = "left" if column.is_first or column.head in LEFT_COLUMNS else "right"
        table.add_column(column.shown, justify=justify, overflow="fold", width=widths[id(column)])
    for place in range(len(rows)):
        table.add_row(*(column.cells[place] for column in columns))
    out.print(table)
    if left_out:
        note(f"{out.width} columns are too few for {', '.join(left_out)}; a wider terminal or --json shows all")


class Column:
    """A column that is going to be shown, and how wide it may be."""

    def __init__(self, head: str, cells: Sequence[str], is_first: bool) -> None:
        self.head, self.shown, self.cells, self.is_first = head, head, cells, is_first

    @property
    def widest(self) -> int:
        return max(cell_len(line) for cell in (self.shown, *self.cells) for line in cell.split("\n"))

    @property
    def least(self) -> int:
        """Terminal columns that it needs: a text wraps between words."""
        if self.head not in TEXT_COLUMNS or self.is_first:
            return self.widest
        word = max(cell_len(word) for cell in (self.shown, *self.cells) for word in cell.split() or [""])
        return max(min(word, MOST), min(self.widest, LEAST))


def _missing(columns: Sequence[Column]) -> int:
    return sum(column.least for column in columns) + GAP * (len(columns) - 1) - out.width
