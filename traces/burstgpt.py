"""BurstGPT: requests to ChatGPT and GPT-4; rows without response tokens failed, and are skipped and counted.

Source: github.com/HPMLL/BurstGPT; Wang et al., KDD 2025. Licence CC-BY-4.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from l3env.errors import TraceError
from l3env.requests.workload import Workload
from l3env.traces.containers import look, read_table
from l3env.traces.named_columns import Table
from l3env.traces.reading import FileFormat
from l3env.traces.rows import build, kept_columns, parse_names

COLUMNS = ("Timestamp", "Request tokens", "Response tokens")
KNOWN = ("Model", "Total tokens", "Log Type", "Session ID", "Elapsed time")  # the last two in BurstGPT_3
MODELS = ("ChatGPT", "GPT-4")


def matches(path: Path) -> bool:
    """True where the columns have one of the format's counts of tokens."""
    return bool(look(path).names & set(COLUMNS[1:]))


def load(path: Path, *, model: str | None = None, keep: Sequence[str] = ()) -> Workload:
    """One request a row that did not fail; arrival in s since the first.

    ``model`` keeps only ``ChatGPT`` or ``GPT-4``. BurstGPT_3's Session ID becomes ``session_idx`` (-1 where empty); its
    turns keep their recorded times. Raises TraceError naming file, row, field.
    """
    table = read_table(path)
    table.need(*COLUMNS)
    times = table.times("Timestamp")
    prompt, output = table.tokens("Request tokens"), table.tokens("Response tokens")
    if table.has("Total tokens"):
        total = table.tokens("Total tokens")
        table.require(prompt + output == total, "Total tokens", "request + response tokens")
    return build(
        path,
        FORMAT.name,
        times,
        prompt,
        output,
        name=path.stem,
        session=table.ids("Session ID") if table.has("Session ID") else None,
        extra=kept_columns(table, keep),
        chosen=None if model is None else _of_model(table, model),
        source={"model": model or "all", **table.about_unused(KNOWN)},
    )


def _of_model(table: Table, model: str) -> NDArray[np.bool_]:
    if model not in MODELS:
        raise TraceError(f"{table.file}: model {model!r}; expected one of {', '.join(MODELS)}")
    table.need("Model")
    return np.array([name == model for name in table.keys("Model")], dtype=bool)


FORMAT = FileFormat(
    "burstgpt-csv",
    "BurstGPT table; failed rows are skipped and counted",
    matches,
    load,
    {"model": str, "keep": parse_names},
)
