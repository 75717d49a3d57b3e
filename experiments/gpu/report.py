"""The residuals of the fits as tables of a page: ``python -m l3env.experiments.gpu.report [energy]``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from l3env.experiments.gpu.operator_errors import REPORT
from l3env.experiments.gpu.validation import DATA_DIR

PARTS = ("fitted", "held_out")


def cells(part: dict[str, Any] | None) -> str:
    if part is None:
        return "- | - | - | -"
    return f"{part['n']:,} | {part['median']:.1%} | {part['p90']:.1%} | {part['worst']:.0%}"


def times(report: dict[str, Any]) -> Iterator[str]:
    """Errors of times."""
    yield "| preset | operation | n | median | p90 | worst | held out: n | median | p90 | worst |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for kind in ("gpus", "links"):
        for name, each in report[kind].items():
            for operation, row in sorted(each["residuals"].items()):
                yield f"| {name} | {operation} | " + " | ".join(cells(row.get(part)) for part in PARTS) + " |"


def joules(report: dict[str, Any]) -> Iterator[str]:
    """Errors of joules: at measured times, in and out of the fit; at predicted times and without the harness's lag."""
    yield (
        "| preset | operation | n | median | p90 | held out: n | median | p90 | held out, predicted times: median | "
        "without the lag: median |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for name, each in report["gpus"].items():
        for operation, row in sorted(each.get("energy", {}).get("residuals", {}).items()):
            fitted, held = (row[part] for part in PARTS)
            values = [
                f"{part['energy']['n']:,} | " + shares(part["energy"], "median", "p90") for part in (fitted, held)
            ]
            values += [shares(held[key], "median") for key in ("energy_at_predicted_time", "energy_without_lag")]
            yield f"| {name} | {operation} | " + " | ".join(values) + " |"


def shares(figures: dict[str, Any], *names: str) -> str:
    return " | ".join(f"{figures[name]:.1%}" for name in names)


def main() -> None:
    report = json.loads((DATA_DIR / REPORT).read_text(encoding="utf-8"))
    for line in joules(report) if sys.argv[1:] == ["energy"] else times(report):
        print(line.replace("%", " %"))


if __name__ == "__main__":
    main()
