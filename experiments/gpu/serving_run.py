"""Serving runs that were measured on real GPUs: what was asked, and when its tokens came."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from l3env.errors import ProfileError
from l3env.requests.workload import Workload

MS = 1e-3


@dataclass(frozen=True)
class Measured:
    """One run: (N,) arrays in order of arrival, times in seconds from the first arrival.

    Attributes:
        tpot_s: NaN for requests of one token.
    """

    workload: Workload
    ttft_s: NDArray[np.float64]
    tpot_s: NDArray[np.float64]
    e2e_s: NDArray[np.float64]

    @property
    def makespan_s(self) -> float:
        """From the first arrival to the last token."""
        return float((self.workload.arrival_s + self.e2e_s).max())


def read_run(path: Path, run: str | None = None) -> Measured:
    """A run from a table with a row a request; of several runs in one file the one called ``run`` (column ``run_id``).

    Columns: ``prompt_tokens, output_tokens``, an arrival (``arrival_s`` or ``client_arrival_s``), and either
    ``first_token_s, last_token_s`` on the arrivals' clock or ``ttft_ms`` with ``e2e_ms`` or ``tpot_ms``.

    Raises:
        ProfileError: no such file, run or columns, or a row that cannot be.
    """
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise ProfileError(f"{path}: cannot be read as CSV: {error}") from None
    if "run_id" in table:
        table = _run_of(table, path, run)
    arrival = next((name for name in ("client_arrival_s", "arrival_s") if name in table), "arrival_s")
    _need(table, path, arrival, "prompt_tokens", "output_tokens")
    table = table.sort_values(arrival, kind="stable", ignore_index=True)
    arrival_s = table[arrival].to_numpy(dtype=float)
    output = table["output_tokens"].to_numpy(dtype=np.int64)
    ttft_s, e2e_s = _latencies(table, path, arrival_s, output)
    wrong = ~((ttft_s > 0) & (e2e_s >= ttft_s))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ProfileError(
            f"{path}: request {row} in order of arrival: first token after {ttft_s[row]:.6g} s, last after "
            f"{e2e_s[row]:.6g} s; expected both after its arrival, in this order"
        )
    workload = Workload.build(path.name, arrival_s - arrival_s[0], table["prompt_tokens"].to_numpy(), output)
    tpot_s = np.where(output > 1, (e2e_s - ttft_s) / np.maximum(output - 1, 1), np.nan)
    return Measured(workload, ttft_s, tpot_s, e2e_s)


def _run_of(table: pd.DataFrame, path: Path, run: str | None) -> pd.DataFrame:
    names = list(dict.fromkeys(table["run_id"].astype(str)))
    if run is None and len(names) == 1:
        return table
    if run not in names:
        raise ProfileError(
            f"{path}: run {run!r}; expected one of {', '.join(names[:12])}{' ...' if len(names) > 12 else ''}"
        )
    return table[table["run_id"].astype(str) == run]


def _latencies(
    table: pd.DataFrame, path: Path, arrival_s: NDArray[np.float64], output: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(TTFT, time to the last token), from what the file has of them."""

    def column(name: str) -> NDArray[np.float64]:
        return table[name].to_numpy(dtype=float)

    ways: dict[tuple[str, str], Callable[[], tuple[NDArray[np.float64], NDArray[np.float64]]]] = {
        ("ttft_ms", "e2e_ms"): lambda: (column("ttft_ms") * MS, column("e2e_ms") * MS),
        ("ttft_ms", "tpot_ms"): lambda: (
            column("ttft_ms") * MS,
            column("ttft_ms") * MS + np.where(output > 1, column("tpot_ms") * MS, 0.0) * (output - 1),
        ),
        ("first_token_s", "last_token_s"): lambda: (
            column("first_token_s") - arrival_s,
            column("last_token_s") - arrival_s,
        ),
    }
    for names, latencies in ways.items():
        if set(names) <= set(table):
            return latencies()
    wanted = "; or ".join(", ".join(names) for names in ways)
    raise ProfileError(f"{path}: row 1: no latencies; expected columns {wanted}")


def _need(table: pd.DataFrame, path: Path, *names: str) -> None:
    missing = [name for name in names if name not in table]
    if missing:
        raise ProfileError(f"{path}: row 1: missing column {', '.join(missing)}; it has {', '.join(map(str, table))}")
