"""Azure LLM inference traces (2023, 2024, and 2025 with images): UTC times and token counts.

Source: github.com/Azure/AzurePublicDataset; Patel et al., "Splitwise", ISCA 2024. Licence CC-BY-4.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from l3env.requests.workload import Workload
from l3env.traces.containers import look, read_table
from l3env.traces.reading import FileFormat
from l3env.traces.rows import build, kept_columns, parse_names

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
IMAGES = "NumImages"


def matches(path: Path) -> bool:
    """True where the columns have one of the format's counts of tokens."""
    return bool(look(path).names & set(COLUMNS[1:]))


def load(path: Path, *, keep: Sequence[str] = ()) -> Workload:
    """One request a row; arrival in s since the first, to the last digit of the file.

    ``NumImages`` of the multimodal trace is kept in ``extra``. Raises TraceError naming file, row and field.
    """
    table = read_table(path)
    table.need(*COLUMNS)
    times = table.times("TIMESTAMP")
    prompt, output = table.tokens("ContextTokens"), table.tokens("GeneratedTokens")
    extra = kept_columns(table, keep, always=[IMAGES])
    return build(path, FORMAT.name, times, prompt, output, name=path.stem, extra=extra, source=table.about_unused())


FORMAT = FileFormat(
    "azure-csv",
    "Azure LLM inference table: TIMESTAMP, ContextTokens, GeneratedTokens, perhaps NumImages",
    matches,
    load,
    {"keep": parse_names},
)
