"""Whole files or nothing, however a process ends, with several processes writing side by side; and documents (JSON,
TOML, YAML) that somebody brings, read within bounds."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import platform
import re
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd
import yaml

from l3env.errors import L3EnvError

PART = re.compile(r"\.(?P<host>.*)-(?P<pid>\d+)-\d+\.part")
FOREIGN_S = 86_400.0  # parts that another host began are left alone for so long
MOST_DOCUMENT_BYTES = 2**24
MOST_YAML_BYTES = 2**20  # its parser is slow
MOST_YAML_VALUES = 10**5  # with what aliases stand for

_numbers = itertools.count()


def is_file(path: Path) -> bool:
    """Whether there is such a file; False where no file can be called so (``Path.is_file`` raises for a long name)."""
    return _answered(path.is_file)


def is_dir(path: Path) -> bool:
    """Whether there is such a folder; False where no folder can be called so."""
    return _answered(path.is_dir)


def _answered(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except OSError:
        return False


@contextmanager
def whole(path: Path, *, sync: bool = False) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of ``path`` once all has gone well; otherwise nothing is left of it.

    Args:
        sync: wait until it is on the disk, so that a power cut cannot take it either.
    """
    part = path.with_name(f".{platform.node()[:40]}-{os.getpid()}-{next(_numbers)}.part")
    try:
        with part.open("wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error  # a full disk, say
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or nothing."""
    with whole(path) as file:
        file.write(text.encode())


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """Writes a whole Parquet file or nothing."""
    with whole(path) as file:
        frame.to_parquet(file)


def remove_parts(folder: Path) -> None:
    """Removes what killed processes have left half-written in a folder and below; not what others are writing."""
    for part in folder.rglob("*.part"):
        with contextlib.suppress(FileNotFoundError):
            if not _being_written(part):
                part.unlink()


def _being_written(part: Path) -> bool:
    found = PART.fullmatch(part.name)
    if found is None:
        return False
    if found["host"] != platform.node()[:40]:
        return time.time() - part.stat().st_mtime < FOREIGN_S
    try:
        os.kill(int(found["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is somebody else's
    return True


def read_json(path: Path, error: type[L3EnvError] = L3EnvError) -> Any:
    """What a JSON file says. Raises ``error`` where it cannot be read, is too large or nested too deep."""
    return _document(path, "JSON", error)


def read_toml(path: Path, error: type[L3EnvError] = L3EnvError) -> dict[str, Any]:
    """What a TOML file says. Raises ``error`` where it cannot be read, is too large or nested too deep."""
    return _document(path, "TOML", error)


def read_yaml(path: Path, error: type[L3EnvError] = L3EnvError) -> Any:
    """What a YAML file says. Raises ``error`` where it cannot be read, is too large or nested too deep, or where its
    aliases stand for too much or for themselves."""
    return _document(path, "YAML", error)


def _document(path: Path, kind: str, error: type[L3EnvError]) -> Any:
    most = MOST_YAML_BYTES if kind == "YAML" else MOST_DOCUMENT_BYTES
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise error(f"{path}: more than {most:,} bytes; expected a shorter {kind} file")
        text = data.decode("utf-8")
        return PARSERS[kind](text)
    except L3EnvError:
        raise
    except RecursionError:
        raise error(f"{path}: cannot be read as {kind}: nested too deep") from None
    except (OSError, ValueError, yaml.YAMLError) as problem:  # also numbers of more digits than Python reads
        raise error(f"{path}: cannot be read as {kind}: {problem}") from None


def _parse_yaml(text: str) -> Any:
    """Raises ValueError for what a tag says and is not, and for aliases that would multiply into too much."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > MOST_YAML_VALUES:
            raise ValueError(f"more than {MOST_YAML_VALUES:,} values, with what aliases stand for")
        return loader.construct_document(node)
    except (AttributeError, LookupError, TypeError) as problem:  # the library's own, for a tag over a wrong value
        raise ValueError(f"a value that is not what its tag says ({problem})") from None
    finally:
        loader.dispose()


PARSERS: dict[str, Callable[[str], Any]] = {"JSON": json.loads, "TOML": tomllib.loads, "YAML": _parse_yaml}


def _values(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Values below a node, counted again for every alias. Raises ValueError for one that contains itself."""
    if id(node) in known:
        count = known[id(node)]
        if count is None:
            raise ValueError("an alias that contains itself")
        return count
    known[id(node)] = None
    below = [each for pair in node.value for each in pair] if isinstance(node, yaml.MappingNode) else node.value
    found = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(_values(each, known) for each in below))
    known[id(node)] = found
    return found
