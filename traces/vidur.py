"""vidur and Sarathi-Serve tables of token counts, with arrival times (``arrived_at``) or lengths only.

Sources: github.com/microsoft/vidur (Agrawal et al., MLSys 2024; MIT), github.com/microsoft/sarathi-serve (Agrawal et
al., OSDI 2024; Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from l3env.requests.workload import Workload
from l3env.traces.arrivals import with_arrivals
from l3env.traces.containers import look, read_table
from l3env.traces.reading import FileFormat
from l3env.traces.rows import build, kept_columns, parse_names
from l3env.traces.times import Times

COLUMNS = ("num_prefill_tokens", "num_decode_tokens")
KNOWN = ("arrived_at", "num_total_tokens", "pd_ratio")


def matches(path: Path) -> bool:
    """True where the columns have one of the format's counts of tokens."""
    return bool(look(path).names & set(COLUMNS))


def load(
    path: Path,
    *,
    arrivals: str | None = None,
    rate: float | None = None,
    cv: float | None = None,
    seed: int = 0,
    keep: Sequence[str] = (),
) -> Workload:
    """One request a row; arrival in s.

    A lengths-only file has no clock: all requests are present at 0 (``source["arrivals"]`` says so) unless ``arrivals``
    ("poisson", "gamma" with ``cv``, "closed") and ``rate`` (requests/s) lay them on one. In a spec these are the
    general options of every trace. Raises TraceError naming file, row and field.
    """
    table = read_table(path)
    table.need(*COLUMNS)
    prompt, output = table.tokens(COLUMNS[0]), table.tokens(COLUMNS[1])
    if table.has("num_total_tokens"):
        total = table.tokens("num_total_tokens")
        table.require(total == prompt + output, "num_total_tokens", "prefill + decode tokens")
    has_clock = table.has("arrived_at")
    clock = "in the file" if has_clock else "none in the file (lengths only): all present at 0"
    workload = build(
        path,
        FORMAT.name,
        table.times("arrived_at") if has_clock else Times(np.zeros(len(table))),
        prompt,
        output,
        name=path.stem,
        extra=kept_columns(table, keep),
        source={"arrivals": clock, **table.about_unused(KNOWN)},
    )
    return workload if arrivals is None else with_arrivals(workload, arrivals, rate, cv, seed)


FORMAT = FileFormat(
    "vidur-csv",
    "vidur / Sarathi-Serve table: num_prefill_tokens, num_decode_tokens, perhaps arrived_at",
    matches,
    load,
    {"keep": parse_names},
)
