"""Overlap of transfers with computing, rankset by rankset: see ``ablation``."""

from __future__ import annotations

from l3env.experiments.reproduce import ablation
from l3env.experiments.reproduce.common import Row


def rows() -> list[Row]:
    return ablation.overlap_rows()
