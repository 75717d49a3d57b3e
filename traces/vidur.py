"""vidur and Sarathi-Serve CSVs of token counts, with arrival times (``arrived_at``) or lengths only.

Sources: github.com/microsoft/vidur (Agrawal et al., MLSys 2024; MIT), github.com/microsoft/sarathi-serve (Agrawal et
al., OSDI 2024; Apache-2.0).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from l3env.requests.workload import Workload
from l3env.traces.arrivals import with_arrivals
from l3env.traces.reading import FileFormat, has_any_column, read_table

COLUMNS = ("num_prefill_tokens", "num_decode_tokens")
OPTIONAL_COLUMNS = ("arrived_at", "num_total_tokens", "pd_ratio")


def matches(path: Path) -> bool:
    """True where the CSV header has one of the format's columns."""
    return has_any_column(path, (*COLUMNS, "arrived_at"))


def load(
    path: Path, *, arrivals: str | None = None, rate: float | None = None, cv: float | None = None, seed: int = 0
) -> Workload:
    """One request a row, in the file's order; arrival in s.

    A lengths-only file has no clock: all requests are present at 0 (``source["arrivals"]`` says so) unless ``arrivals``
    ("poisson", "gamma" with ``cv``, "closed") and ``rate`` (requests/s) lay them on one. In a spec these are the
    general options of every trace. Raises TraceError naming file, row and field.
    """
    table = read_table(path, COLUMNS, OPTIONAL_COLUMNS)
    prompt = table.tokens("num_prefill_tokens")
    output = table.tokens("num_decode_tokens")
    if "num_total_tokens" in table.columns:
        total = table.tokens("num_total_tokens")
        table.require(total == prompt + output, "num_total_tokens", "prefill + decode tokens")
    if "pd_ratio" in table.columns:
        table.floats("pd_ratio")
    clock = "in the file"
    times_s = np.zeros(len(table))
    if "arrived_at" in table.columns:
        times_s = table.floats("arrived_at")
        table.require_sorted("arrived_at", times_s)
    else:
        clock = "none in the file (lengths only): all present at 0"
    source = {"file": str(path), "format": FORMAT.name, "rows": len(table), "skipped": {}, "arrivals": clock}
    workload = Workload.build(path.stem, times_s, prompt, output, source=source)
    return workload if arrivals is None else with_arrivals(workload, arrivals, rate, cv, seed)


FORMAT = FileFormat(
    "vidur-csv", "vidur / Sarathi-Serve CSV: num_prefill_tokens, num_decode_tokens, perhaps arrived_at", matches, load
)
