"""The hardware measures one by one and together: see ``ablation``."""

from __future__ import annotations

from experiments.reproduce import ablation
from experiments.reproduce.common import Row


def rows() -> list[Row]:
    return [row for row in ablation.rows() if row["figure"] == "fig15"]
