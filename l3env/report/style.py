"""How pictures look: one colour and line style per policy in all of them, legends below the axes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from l3env.files import whole
from l3env.report.names import policy_labels, unique
from l3env.units import MS

# Okabe and Ito 2008 without yellow, then Tol's muted scheme: told apart with any colour vision
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#000000", "#882255", "#999933", "#332288", "#777777", "#44AA99"),
)
LINE_STYLES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2, 1, 2, 1, 2)))
MARKERS = "osD^v"  # one a round of the colours
DPI = 150
MATH = r"\mathdefault"  # in matplotlib's own labels
STYLE: Any = {  # rcParams
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Look:
    """How a policy appears in every picture."""

    label: str
    colour: str
    line: Any
    marker: str

    @property
    def handle(self) -> Line2D:
        """Its entry in a legend."""
        return Line2D([], [], color=self.colour, linestyle=self.line, label=self.label)

    @property
    def dot(self) -> Line2D:
        """The same where it is a point."""
        return Line2D([], [], color=self.colour, marker=self.marker, linestyle="", label=self.label)


def looks(policies: Iterable[str]) -> dict[str, Look]:
    """A look for each policy, by its place in the comparison."""
    refs = unique(policies)
    labels = policy_labels(refs)
    return {
        ref: Look(
            labels[ref],
            COLOURS[i % len(COLOURS)],
            LINE_STYLES[i % len(LINE_STYLES)],
            MARKERS[i // len(COLOURS) % len(MARKERS)],
        )
        for i, ref in enumerate(refs)
    }


def save(draw: Callable[[], Figure], path: Path) -> None:
    """Draws in the house style and writes a whole PNG or nothing. Touches neither pyplot nor the user's settings."""
    with mpl.rc_context(), whole(path) as file:
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        figure = draw()
        for text in figure.findobj(Text):
            if text.get_text() and MATH not in text.get_text():  # names are shown as they are; ticks have no text yet
                text.set_parse_math(False)
        figure.savefig(file, format="png", dpi=DPI)


def legend_below(figure: Figure, handles: list[Any], *, columns: int = 6) -> None:
    """A legend outside the axes."""
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), columns), handlelength=3.2)


def say(axes: Axes, text: str) -> None:
    """Says in an empty panel why it is empty."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#777777")
    axes.tick_params(which="both", bottom=False, left=False, labelbottom=False, labelleft=False)


def time_text(seconds: float, _: object = None) -> str:
    """Tick label: 10 ms, 1 s, 1000 s."""
    return f"{seconds / MS:g} ms" if seconds < 1 else f"{seconds:g} s"
