"""Small runs of every kind whose results are kept in ``frozen.json``: a guard against unmeant changes.

    python -m tests.frozen.frozen check [PATTERN ...]    # runs the cells, compares, exits 1 on an unlisted difference
    python -m tests.frozen.frozen write [PATTERN ...]    # keeps what comes out as right
    python -m tests.frozen.frozen list [PATTERN ...]

A pattern is part of a cell's name, or a shell pattern, or ``core``. What was corrected on purpose since then stands in
 ``drifts.json``: a list of {"cell", "part", "reason"}, shell patterns of names of cells and their parts.
"""

from __future__ import annotations

import fnmatch
import json
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from l3env.files import write_text
from tests.frozen.cells import CORE, Cells, all_cells
from tests.frozen.figures import Part, Parts, same
from tests.frozen.kinds import Frozen

HERE = Path(__file__).parent
KEPT, DRIFTS = HERE / "frozen.json", HERE / "drifts.json"


def chosen(patterns: Sequence[str]) -> Cells:
    """The cells that a pattern names; all without patterns."""

    def wanted(name: str) -> bool:
        return any(name.startswith(CORE) if p == "core" else p in name or fnmatch.fnmatch(name, p) for p in patterns)

    return {name: cell for name, cell in all_cells().items() if not patterns or wanted(name)}


def kept() -> dict[str, Any]:
    """What is kept: cell -> {"rate", "parts"}."""
    return json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}


def run(cell: Frozen, rate: float) -> Parts:
    """A cell's parts; what it warns of is no matter here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cell.run(rate)


def write(patterns: Sequence[str]) -> int:
    for name, cell in chosen(patterns).items():
        start = time.perf_counter()
        known = kept()
        rate = known[name]["rate"] if name in known else cell.rate()
        known[name] = {"rate": rate, "parts": run(cell, rate)}
        lines = [f"{json.dumps(each)}: {json.dumps(known[each])}" for each in all_cells() if each in known]
        write_text(KEPT, "{\n" + ",\n".join(lines) + "\n}\n")
        print(f"{name}: {len(known[name]['parts'])} parts, {time.perf_counter() - start:.1f} s", flush=True)
    return 0


def differences(old: Parts, new: Parts) -> dict[str, tuple[Part, Part]]:
    """Parts that differ, (old, new); a part that only the new ones have is an addition, no difference."""
    return {part: (old[part], new.get(part, "none")) for part in old if not same(old[part], new.get(part))}


def is_listed(drifts: Sequence[Mapping[str, str]], cell: str, part: str) -> bool:
    return any(fnmatch.fnmatch(cell, each["cell"]) and fnmatch.fnmatch(part, each["part"]) for each in drifts)


def compared(name: str, cell: Frozen) -> tuple[dict[str, tuple[Part, Part]], list[str]]:
    """Runs a cell: (parts that differ, (old, new); those of them that are not listed)."""
    known, drifts = kept()[name], json.loads(DRIFTS.read_text(encoding="utf-8"))
    found = differences(known["parts"], run(cell, known["rate"]))
    return found, [part for part in found if not is_listed(drifts, name, part)]


def check(patterns: Sequence[str]) -> int:
    counts = {"equal": 0, "drifted as listed": 0, "DIFFERENT": 0}
    for name, cell in chosen(patterns).items():
        start = time.perf_counter()
        try:
            found, unlisted = compared(name, cell)
        except Exception:  # the other cells are to be heard, too
            print(f"{name}: FAILED\n{traceback.format_exc()}", flush=True)
            counts["DIFFERENT"] += 1
            continue
        verdict = "DIFFERENT" if unlisted else "drifted as listed" if found else "equal"
        counts[verdict] += 1
        print(f"{name}: {verdict} ({time.perf_counter() - start:.1f} s)", flush=True)
        for part, (old, new) in found.items():
            print(f"    {'!' if part in unlisted else ' '} {part}: {old} -> {new}", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return 1 if counts["DIFFERENT"] else 0


def main(arguments: Sequence[str]) -> int:
    command, patterns = arguments[0] if arguments else "", arguments[1:]
    if command == "list":
        print("\n".join(chosen(patterns)))
        return 0
    if command not in ("check", "write"):
        print(__doc__)
        return 2
    return (check if command == "check" else write)(patterns)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
