"""The hardware measures one by one and together: see ``ablation``."""

from __future__ import annotations

from l3env.experiments.reproduce import ablation
from l3env.experiments.reproduce.common import Row


def rows() -> list[Row]:
    return [row for row in ablation.rows() if row["figure"] == "fig15"]
