"""A study's results on disk: Parquet datasets that grow cell by cell, each cell complete or absent.

``cells/`` has one row a run (figures, or the error it ended with), ``requests/`` and ``timelines/`` what the run did.
Nothing in them depends on when, where or in which order the cells ran: ``log.jsonl`` says that. ``config.json`` says
what the folder belongs to.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from l3env.errors import L3EnvError
from l3env.files import write_frame, write_text
from l3env.study.config import StudyCell, StudyConfig

FRAMES = ("requests", "timelines")


@dataclass(frozen=True)
class CellResult:
    """What one run gave.

    Attributes:
        row: identity and figures; ``error`` is None, or says in one line why there are no figures.
        requests, timeline: None for a failed run.
        traceback: of a run that failed for another reason than bad input, else empty.
        wall_s: what it took.
        host: where it ran.
    """

    row: dict[str, Any]
    requests: pd.DataFrame | None
    timeline: pd.DataFrame | None
    traceback: str
    wall_s: float
    host: str


class StudyStore:
    """The folder of a study. Raises L3EnvError where it belongs to another one."""

    def __init__(self, folder: Path, config: StudyConfig) -> None:
        self.folder = folder
        self.config = config
        path = folder / "config.json"
        if path.exists() and read_config(path) != config.to_json():
            raise L3EnvError(f"{folder} holds results of another study; remove it or choose another --out")
        for name in ("cells", *FRAMES):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for part in folder.glob("*/*.part"):  # of a sweep that was killed while it wrote
            part.unlink()
        write_text(path, json.dumps(config.to_json(), indent=2) + "\n")

    @classmethod
    def open(cls, folder: Path) -> StudyStore:
        """A study that is there. Raises L3EnvError where there is none."""
        path = folder / "config.json"
        if not path.exists():
            raise L3EnvError(f"{folder}: no study here (no config.json)")
        return cls(folder, StudyConfig.from_json(read_config(path)))

    def _path(self, kind: str, cell: StudyCell) -> Path:
        return self.folder / kind / f"{cell.key}.parquet"

    def missing(self, *, retry_failed: bool = False) -> list[StudyCell]:
        """Cells that have not run yet, in the study's order; with ``retry_failed`` also those that failed."""
        done = {path.stem for path in (self.folder / "cells").glob("*.parquet")}
        if retry_failed:
            results = self.results()
            done -= set(results.loc[results["error"].notna(), "key"])
        return [cell for cell in self.config.cells() if cell.key not in done]

    def write(self, cell: StudyCell, result: CellResult) -> None:
        """The row comes last: a cell with a row is whole."""
        for kind, frame in zip(FRAMES, (result.requests, result.timeline), strict=True):
            if frame is not None:
                write_frame(self._path(kind, cell), frame)
        trace = self.folder / "errors" / f"{cell.key}.txt"
        trace.unlink(missing_ok=True)
        if result.traceback:
            trace.parent.mkdir(exist_ok=True)
            write_text(trace, result.traceback)
        write_frame(self._path("cells", cell), pd.DataFrame([{"key": cell.key} | result.row]))
        entry = {"key": cell.key, "wall_s": result.wall_s, "host": result.host, "error": result.row["error"]}
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")

    def results(self) -> pd.DataFrame:
        """A row per cell that has run, in the study's order, whatever order they ran in."""
        frames = [pd.read_parquet(path) for path in self._present("cells", self.config.cells())]
        if not frames:
            return pd.DataFrame({"key": pd.Series(dtype=str), "error": pd.Series(dtype=str)})
        records = [record for frame in frames for record in frame.to_dict("records")]
        return pd.DataFrame(records)

    def _present(self, kind: str, cells: Iterable[StudyCell]) -> list[Path]:
        return [path for path in (self._path(kind, cell) for cell in cells) if path.exists()]

    def requests(self, key: str) -> pd.DataFrame:
        """Requests of a run that did not fail, by its key."""
        return pd.read_parquet(self.folder / "requests" / f"{key}.parquet")

    def timeline(self, key: str) -> pd.DataFrame:
        """Time line of a run that did not fail, by its key."""
        return pd.read_parquet(self.folder / "timelines" / f"{key}.parquet")


def read_config(path: Path) -> dict[str, Any]:
    """A ``config.json``. Raises L3EnvError where it cannot be read."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise L3EnvError(
            f"{path}: cannot be read as JSON: {error}; remove the folder or choose another --out"
        ) from None
    if not isinstance(raw, dict):
        raise L3EnvError(f"{path}: expected an object")
    return raw
