"""The residuals of the fits as tables of a page: ``python -m l3env.experiments.gpu.report``."""

from __future__ import annotations

import json
from typing import Any

from l3env.experiments.gpu.fit import REPORT
from l3env.experiments.gpu.validation import DATA_DIR


def cells(part: dict[str, Any] | None) -> str:
    if part is None:
        return "- | - | - | -"
    return f"{part['n']:,} | {part['median']:.1%} | {part['p90']:.1%} | {part['worst']:.0%}"


def main() -> None:
    report = json.loads((DATA_DIR / REPORT).read_text(encoding="utf-8"))
    print("| preset | operation | n | median | p90 | worst | held out: n | median | p90 | worst |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for kind in ("gpus", "links"):
        for name, each in report[kind].items():
            for operation, row in sorted(each["residuals"].items()):
                parts = " | ".join(cells(row.get(part)) for part in ("fitted", "held_out"))
                print(f"| {name} | {operation} | {parts} |")


if __name__ == "__main__":
    main()
