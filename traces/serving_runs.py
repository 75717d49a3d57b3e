"""Measured serving runs with a row per request: what was sent, when, and how long it took.

Recognised are tables of several runs (``run_id``; arrivals ``client_arrival_s``, where it is there, else
``arrival_s``), tables of one (``sent_s`` beside the planned ``arrival_s``) and the inputs of runs (``workload``,
``arrival_ms``, ``block_ids``). ``client_arrival_s`` is the client's clock; the other times of such a table are the
engine's. What was measured is kept in ``Workload.extra``, NaN where it was not recorded.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from l3env.errors import TraceError, TraceWarning
from l3env.requests.workload import Workload
from l3env.traces.containers import look, read_table
from l3env.traces.named_columns import Table, shown
from l3env.traces.reading import FileFormat
from l3env.traces.rows import Prefix, build, kept_columns, parse_names

BLOCK_TOKENS = 16
RUN_COLUMNS = ("run_id", "workload")
ARRIVALS = {"client_arrival_s": "s", "arrival_s": "s", "arrival_ms": "ms"}  # the first that is there
MEASURED = (
    *("sent_s", "queued_s", "scheduled_s", "first_token_s", "last_token_s", "finish_s", "gap_p99_s"),
    *("ttft_ms", "tpot_ms", "e2e_ms"),
)
KNOWN = ("id", "request_id", "user_id", "question_id", *ARRIVALS, *RUN_COLUMNS, *MEASURED, "block_ids")
RUNS_FILE = "runs_requests.csv"  # beside a table of runs: a row about each


def matches(path: Path) -> bool:
    """True for a table of runs, of one run, or of the inputs of runs."""
    found = look(path)
    names = found.names
    if found.is_own or not names >= {"prompt_tokens", "output_tokens"}:
        return False
    return bool(
        ("run_id" in names and names & {"client_arrival_s", "arrival_s"})
        or names >= {"arrival_s", "sent_s"}
        or names >= {"workload", "arrival_ms"}
    )


def load(path: Path, *, run: str | None = None, keep: Sequence[str] = ()) -> Workload:
    """The requests of one run; ``run`` names it where there are several.

    ``source["run"]`` holds what ``runs_requests.csv`` beside the table says of it; where that says that the run's table
    is not complete, a warning and ``source["complete"]`` say so: requests without a record loaded the system too.
    Raises TraceError naming file, row and field.
    """
    table = read_table(path)
    table.need("prompt_tokens", "output_tokens")
    column = next((name for name in RUN_COLUMNS if table.has(name)), None)
    name = path.name.partition(".requests")[0].partition(".csv")[0]
    about: dict[str, Any] = {}
    if column is not None:
        table, name = _of_run(table, column, run)
        about = _about(path, name)
    elif run is not None:
        raise TraceError(f"{path}: run={run}: the table is of one run; expected no run=")
    arrival = next((each for each in ARRIVALS if table.has(each)), None)
    if arrival is None:
        table.need(next(iter(ARRIVALS)))
    assert arrival is not None
    times = table.times(arrival, ARRIVALS[arrival])
    prompt, output = table.tokens("prompt_tokens"), table.tokens("output_tokens")
    has_users = table.has("user_id") and bool(table.present("user_id").any())
    prefix = None
    if table.has("block_ids"):
        prefix = Prefix(*table.id_lists("block_ids"), BLOCK_TOKENS)
        table.require(
            prefix.lengths <= prompt // BLOCK_TOKENS, "block_ids", "at most one id a whole block of 16 tokens"
        )
    measured = {each: table.measured(each) for each in MEASURED if table.has(each)}
    return build(
        path,
        FORMAT.name,
        times,
        prompt,
        output,
        name=name,
        session=table.ids("user_id") if has_users else None,
        prefix=prefix,
        extra={**measured, **kept_columns(table, keep)},
        source={"prefix_scope": "trace", "arrivals": arrival, **about, **table.about_unused(KNOWN)},
    )


def _of_run(table: Table, column: str, run: str | None) -> tuple[Table, str]:
    """The rows of a run and its name."""
    runs = [str(key) for key in table.keys(column)]
    known = list(dict.fromkeys(runs))
    if run is None and len(known) > 1:
        raise TraceError(f"{table.file}: {len(known)} runs; expected ?run= with one of {shown(known)}")
    chosen = known[0] if run is None else run
    if chosen not in known:
        raise TraceError(f"{table.file}: run={chosen}: no such run; expected one of {shown(known)}")
    return table.take(np.flatnonzero(np.array([each == chosen for each in runs]))), chosen


def _about(path: Path, run: str) -> dict[str, Any]:
    """What the table of runs beside a file says of a run; empty where there is none."""
    beside = next((each for each in sorted(path.parent.glob(f"{RUNS_FILE}*")) if each != path), None)
    if beside is None or not look(beside).names >= {"run_id"}:
        return {}
    runs = read_table(beside)
    row = next((row for row, key in enumerate(runs.keys("run_id")) if str(key) == run), None)
    if row is None:
        return {}
    cells = {name: values[row] for name, values in runs.columns.items() if name != "run_id"}
    texts = {name: str(cell.as_py() if hasattr(cell, "as_py") else cell) for name, cell in cells.items()}
    about: dict[str, Any] = {"run": {name: text for name, text in texts.items() if text not in ("", "None")}}
    if "complete" in texts:
        about["complete"] = texts["complete"] not in ("0", "0.0", "False", "false")
        if not about["complete"]:
            text = f"{path}: run {run} is not complete: requests that left no record loaded the system too"
            warnings.warn(text, TraceWarning, stacklevel=3)
    return about


FORMAT = FileFormat(
    "serving-runs",
    "measured serving runs, a row per request (?run= chooses one)",
    matches,
    load,
    {"run": str, "keep": parse_names},
)
