"""Whole files or nothing."""

from __future__ import annotations

from pathlib import Path

import pandas as pd


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or nothing."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """Writes a whole Parquet file or nothing."""
    part = path.with_name(path.name + ".part")
    frame.to_parquet(part)
    part.replace(path)
