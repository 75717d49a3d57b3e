"""Tables of the command line, legible at any width: no name is cut."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.table import Table

from l3env.cli.shared import note, out

TEXT_COLUMNS = ("what", "module", "licence", "GPUs", "PIM", "value", "values", "levels", "model", "trace")
LEFT_COLUMNS = (*TEXT_COLUMNS, "decides", "here", "profile")
LEAST, MOST = 24, 36  # columns that a text gets at least, if it needs them, and that one word of it may ask for
FIRST = 12  # columns of names, where there is no room for more
GAP = 2  # columns between two


def show_table(heads: Sequence[str], rows: Sequence[Sequence[str]], lesser: Sequence[str] = ()) -> None:
    """Prints a plain table on stdout: the first column and texts to the left, numbers to the right and never broken.

    Where it is too wide, heads of several words are broken; then ``lesser`` columns are left out, the first one first,
    and a note says so; then names are broken, too.
    """
    shown = {head: head for head in heads}
    cells = {head: [row[place] for row in rows] for place, head in enumerate(heads)}
    kept = list(heads)

    def missing() -> int:
        needed = sum(_least(head, shown[head], cells[head]) for head in kept)
        return needed + GAP * (len(kept) - 1) - out.width

    if missing() > 0:
        shown = {head: head.replace(" ", "\n") for head in heads}
    left_out = []
    for head in lesser:
        if missing() > 0:
            kept.remove(head)
            left_out.append(head)
    widths = {head: _least(head, shown[head], cells[head]) for head in kept}
    first, spare = heads[0], -missing()
    widths[first] = max(widths[first] + min(spare, 0), FIRST)
    for head in sorted(kept, key=lambda head: _widest(shown[head], cells[head])):
        more = min(max(spare, 0), max(_widest(shown[head], cells[head]) - widths[head], 0)) if head != first else 0
        widths[head], spare = widths[head] + more, spare - more
    table = Table(box=None, header_style="bold", pad_edge=False)
    for head in kept:
        left = head == first or head in LEFT_COLUMNS
        table.add_column(shown[head], justify="left" if left else "right", overflow="fold", width=widths[head])
    for place in range(len(rows)):
        table.add_row(*(cells[head][place] for head in kept))
    out.print(table)
    if left_out:
        note(f"{out.width} columns are too few for {', '.join(left_out)}; a wider terminal or --json shows all")


def _widest(shown: str, cells: Sequence[str]) -> int:
    return max(cell_len(line) for cell in (shown, *cells) for line in cell.split("\n"))


def _least(head: str, shown: str, cells: Sequence[str]) -> int:
    """Columns that one needs: a text wraps between words."""
    if head not in TEXT_COLUMNS:
        return _widest(shown, cells)
    word = max(cell_len(word) for cell in (shown, *cells) for word in cell.split() or [""])
    return max(min(word, MOST), min(_widest(shown, cells), LEAST))
