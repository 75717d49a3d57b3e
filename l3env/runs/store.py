"""Results on disk, found again by what they follow from.

A folder has ``cells/NAME.json``, a row each: what it is called, what it follows from (SHA-256 of files, specs and
requests), its figures or the error it ended with, how long it took and where. ``requests/`` and ``timelines/`` hold its
frames as Parquet. A name says which job it is, so a result of other content takes its place; all else in the folder
stays. Each file is whole or absent, and several processes may write at once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from l3env.errors import L3EnvError
from l3env.files import read_json, remove_parts, write_frame, write_text
from l3env.runs.content import plain, sha256

ROWS = "cells"
REQUESTS, TIMELINES = "requests", "timelines"  # kinds of frames
CONFIG = "config.json"


@dataclass(frozen=True)
class Job:
    """Work whose result is kept.

    Attributes:
        name: of its files; says which job it is.
        row: what its row says besides figures.
        depends: all that the result follows from, as content: the same for the same result.
        work: gives figures and frames by kind; a picklable function without arguments.
    """

    name: str
    row: Mapping[str, Any]
    depends: Mapping[str, Any]
    work: Callable[[], tuple[dict[str, Any], dict[str, pd.DataFrame]]]

    @property
    def content(self) -> str:
        """One hash for ``depends``."""
        return sha256(self.depends)


@dataclass(frozen=True)
class Done:
    """What a job gave: figures, or an error in one line with its traceback where it was none of bad input."""

    row: Mapping[str, Any]
    figures: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    traceback: str = ""
    wall_s: float = 0.0
    host: str = ""
    frames: Mapping[str, pd.DataFrame] = field(default_factory=dict)  # none once they are on disk

    def flat(self) -> dict[str, Any]:
        """The row of a table."""
        return {**self.row, **self.figures, "wall_s": self.wall_s, "error": self.error}


class Store:
    """The folder of results."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def begin(self, *, fresh: bool = False) -> None:
        """Makes the folder ready to be written to; ``fresh`` forgets all results in it."""
        for kind in (ROWS, REQUESTS, TIMELINES):
            if fresh:
                shutil.rmtree(self.folder / kind, ignore_errors=True)
            try:
                (self.folder / kind).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise L3EnvError(f"{self.folder}: {error.strerror}; expected a folder that can be written to") from None
        remove_parts(self.folder)

    def find(self, job: Job) -> Done | None:
        """The job's result from an earlier run; None where there is none, or of other content, or it failed."""
        record = self._record(job.name)
        if record is None or record["content"] != job.content or record["error"] is not None:
            return None
        return replace(_done(record), row=job.row)

    def write(self, job: Job, done: Done) -> None:
        """The row comes last: a job with a row is whole."""
        found = self._record(job.name)
        if found is not None:
            if found["content"] == job.content and found["error"] is None:
                return  # somebody else was quicker
            self._path(ROWS, job.name).unlink(missing_ok=True)
        for kind, frame in done.frames.items():
            write_frame(self._path(kind, job.name), frame)
        record = plain(replace(done, frames={})) | {"content": job.content, "depends": plain(job.depends)}
        del record["frames"]
        write_text(self._path(ROWS, job.name), json.dumps(record, indent=1) + "\n")

    def rows(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """Rows of those jobs that have one, with their names as ``key``."""
        records = ((name, self._record(name)) for name in names)
        return [_done(record).flat() | {"key": name} for name, record in records if record is not None]

    def _record(self, name: str) -> dict[str, Any] | None:
        try:
            record = json.loads(self._path(ROWS, name).read_text(encoding="utf-8"))
            return record if {"row", "figures", "error", "content"} <= set(record) else None
        except (OSError, ValueError, TypeError):
            return None

    def _path(self, kind: str, name: str) -> Path:
        return self.folder / kind / f"{name}.{'json' if kind == ROWS else 'parquet'}"

    def frame(self, kind: str, name: str) -> pd.DataFrame:
        return pd.read_parquet(self._path(kind, name))

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Says what the folder shows."""
        write_text(self.folder / CONFIG, json.dumps(config, indent=2) + "\n")

    def config(self) -> dict[str, Any] | None:
        """What it shows so far; None where nothing says so."""
        path = self.folder / CONFIG
        return read_config(path) if path.exists() else None


class Frames(Mapping[str, pd.DataFrame]):
    """A folder's frames of one kind by key, read when they are asked for."""

    def __init__(self, store: Store, kind: str, keys: Iterable[str]) -> None:
        self._store, self._kind, self._keys = store, kind, tuple(keys)

    def __getitem__(self, key: str) -> pd.DataFrame:
        if key not in self._keys:
            raise KeyError(key)
        return self._store.frame(self._kind, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _done(record: Mapping[str, Any]) -> Done:
    return Done(**{name: value for name, value in record.items() if name not in ("content", "depends")})


def read_config(path: Path) -> dict[str, Any]:
    """A ``config.json``. Raises L3EnvError where it cannot be read."""
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise L3EnvError(f"{path}: expected an object, as in the config.json that a comparison writes")
    return raw
