"""Azure LLM inference traces (2023, and 2024 in the same columns): CSV of UTC times and token counts.

Source: github.com/Azure/AzurePublicDataset; Patel et al., "Splitwise", ISCA 2024. Licence CC-BY-4.0.
"""

from __future__ import annotations

from pathlib import Path

from l3env.requests.workload import Workload
from l3env.traces.reading import FileFormat, has_any_column, read_table

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def matches(path: Path) -> bool:
    """True where the CSV header has one of the format's columns."""
    return has_any_column(path, COLUMNS)


def load(path: Path) -> Workload:
    """One request a row; arrival in s since the first row, to 100 ns. Raises TraceError naming file, row and field."""
    table = read_table(path, COLUMNS)
    times_ns = table.times_ns("TIMESTAMP")
    table.require_sorted("TIMESTAMP", times_ns)
    return Workload.build(
        path.stem,
        (times_ns - times_ns[0]) / 1e9,
        table.tokens("ContextTokens"),
        table.tokens("GeneratedTokens"),
        source={
            "file": str(path),
            "format": FORMAT.name,
            "rows": len(table),
            "skipped": {},
            "clock_start": table.columns["TIMESTAMP"][0].as_py(),
        },
    )


FORMAT = FileFormat("azure-csv", "Azure LLM inference CSV: TIMESTAMP, ContextTokens, GeneratedTokens", matches, load)
