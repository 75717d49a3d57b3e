"""BurstGPT: CSV of requests to ChatGPT and GPT-4; rows without response tokens failed; they are skipped and counted.

Source: github.com/HPMLL/BurstGPT; Wang et al., KDD 2025. Licence CC-BY-4.0.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from l3env.errors import TraceError
from l3env.requests.workload import Workload
from l3env.traces.reading import FileFormat, Table, has_any_column, read_table

COLUMNS = ("Timestamp", "Model", "Request tokens", "Response tokens", "Total tokens", "Log Type")
OPTIONAL_COLUMNS = ("Session ID", "Elapsed time")  # BurstGPT_3
MODELS = ("ChatGPT", "GPT-4")
FAILED = "response tokens 0 (failed request)"


def matches(path: Path) -> bool:
    """True where the CSV header has one of the format's columns."""
    return has_any_column(path, COLUMNS)


def load(path: Path, *, model: str | None = None) -> Workload:
    """One request a row that did not fail; arrival in s since the file's first row.

    ``model`` keeps only ``ChatGPT`` or ``GPT-4``. BurstGPT_3's Session ID becomes ``session_idx`` (-1 where empty); its
    turns keep their recorded times. ``source["skipped"]`` counts failures. Raises TraceError naming file, row, field.
    """
    table = read_table(path, COLUMNS, OPTIONAL_COLUMNS)
    times_s = table.floats("Timestamp")
    table.require_sorted("Timestamp", times_s)
    prompt = table.tokens("Request tokens", low=0)
    output = table.tokens("Response tokens", low=0)
    table.require(prompt + output == table.tokens("Total tokens", low=0), "Total tokens", "request + response tokens")
    if "Elapsed time" in table.columns:
        table.floats("Elapsed time")
    failed_mask = output == 0
    table.require((prompt > 0) | failed_mask, "Request tokens", "a whole number >= 1")
    keep_mask = ~failed_mask
    if model is not None:
        keep_mask &= _of_model(table, model)
    if not keep_mask.any():
        raise TraceError(f"{path}: no request left of {len(table)} rows ({int(failed_mask.sum())} failed)")
    return Workload.build(
        path.stem,
        (times_s - times_s[0])[keep_mask],
        prompt[keep_mask],
        output[keep_mask],
        session_idx=_session_idx(table)[keep_mask],
        source={
            "file": str(path),
            "format": FORMAT.name,
            "rows": len(table),
            "skipped": {FAILED: int(failed_mask.sum())},
            "model": model or "all",
        },
    )


def _of_model(table: Table, model: str) -> NDArray[np.bool_]:
    if model not in MODELS:
        raise TraceError(f"{table.file}: model {model!r}; expected one of {', '.join(MODELS)}")
    return np.array(pc.equal(table.columns["Model"], model).to_numpy(), dtype=bool)


def _session_idx(table: Table) -> NDArray[np.int64]:
    """(N,) numbers of the session ids in order of appearance; -1 for an empty id or a file without them."""
    if "Session ID" not in table.columns:
        return np.full(len(table), -1, dtype=np.int64)
    ids = table.columns["Session ID"].to_pandas()
    codes = ids.mask(ids == "").factorize()[0]
    return np.array(codes, dtype=np.int64)


FORMAT = FileFormat("burstgpt-csv", "BurstGPT CSV; failed rows are skipped and counted", matches, load, {"model": str})
