"""Runs figures by name, draws them, prints them."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from l3env.errors import L3EnvError
from l3env.experiments.reproduce.common import DEFAULT, Row
from l3env.files import whole

FIGURES = ("fig11", "fig12", "fig13", "fig14", "fig15", "fig16", "energy")
OTHER_PAPERS = {"prover": "proof_search", "deepseek-v3": "deepseek_v3"}  # not of the L3 paper, nor part of "all"
MOST_SPREAD = 1000.0  # of values that one axis can show


def rows_of(name: str, progress: Callable[[int, int, str], None], *, quick: bool = False) -> list[Row]:
    """Rows of one figure or of ``all``. Raises L3EnvError for an unknown name, or where there is no quick version."""
    if name not in (*FIGURES, *OTHER_PAPERS, "all"):
        raise L3EnvError(f"unknown figure {name!r}; expected one of {', '.join((*FIGURES, *OTHER_PAPERS))}, or all")
    if name in OTHER_PAPERS:
        return list(_module(name).rows(progress, quick=quick))
    if quick:
        raise L3EnvError(f"{name} has no quick version; expected one of {', '.join(OTHER_PAPERS)}")
    names = FIGURES if name == "all" else (name,)
    rows: list[Row] = []
    for done, each in enumerate(names):
        progress(done, len(names), each)
        rows += _module(each).rows()
    progress(len(names), len(names), "done")
    return rows


def _module(name: str) -> Any:
    return importlib.import_module(f"l3env.experiments.reproduce.{OTHER_PAPERS.get(name, name)}")


def assumed(name: str) -> str:
    """What the rows of a figure rest on, in a sentence."""
    if name in OTHER_PAPERS:
        return str(_module(name).assumptions())
    return DEFAULT.text()


def draw(rows: list[Row], out: Path) -> list[Path]:
    """One picture a figure: what the paper reports beside what comes out, sensitivities left out."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for figure in dict.fromkeys(row["figure"] for row in rows):
        mine = [row for row in rows if row["figure"] == figure]
        shown = [row for row in mine if row["paper"] and row["ours"] is not None and "sensitivity" not in row["case"]]
        if shown:
            paths.append(_draw_figure(figure, shown, out / f"{figure}.png"))
    return paths


def _draw_figure(figure: str, rows: list[Row], path: Path) -> Path:
    picture = Figure(figsize=(10, 1.2 + 0.7 * len(rows)), layout="constrained")
    axes = picture.subplots()
    values = [abs(row["paper"]) for row in rows]
    if max(values) > MOST_SPREAD * min(values):  # of many units: over the paper's
        rows = [{**row, "ours": row["ours"] / row["paper"], "paper": 1.0} for row in rows]
    for i, row in enumerate(rows):
        axes.barh(i - 0.18, row["paper"], 0.34, color="#bbbbbb", label="paper" if i == 0 else None)
        axes.barh(i + 0.18, row["ours"], 0.34, color="#0072B2", label="l3env" if i == 0 else None)
        for offset, value in ((-0.18, row["paper"]), (0.18, row["ours"])):
            axes.annotate(f" {value:.3g}", (max(value, 0), i + offset), va="center", fontsize=8)
    labels = [textwrap.fill(f"{row['case']}: {row['quantity']}", 48) for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.margins(x=0.12)
    axes.set_title(f"{figure}: the paper and this model")
    axes.legend(loc="best", fontsize=8)
    with whole(path) as file:
        picture.savefig(file, format="png", dpi=150)
    return path
