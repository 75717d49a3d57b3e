"""Overlap of transfers with computing, rankset by rankset: see ``ablation``."""

from __future__ import annotations

from experiments.reproduce import ablation
from experiments.reproduce.common import Row


def rows() -> list[Row]:
    return ablation.overlap_rows()
