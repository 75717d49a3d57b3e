"""``python -m tests.campaigns.fuzz engine|inputs|views [--count N] [--seed N]``: figures; exit code 1 for a fault."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.campaigns import bombs, fuzz_engine, fuzz_inputs, views

COUNTS = {"engine": 10_000_000, "inputs": 100_000, "views": 1000}


def say(text: str) -> None:
    print(text, flush=True)


def engine(count: int, seed: int) -> int:
    """Iterations with all that is conserved checked at each."""
    say("\n".join(fuzz_engine.campaign(count, seed, say=lambda text: print(text, file=sys.stderr)).lines()))
    return 0


def inputs(count: int, seed: int) -> int:
    """So many damaged files of each kind, and small files that would be large in memory."""
    with tempfile.TemporaryDirectory() as folder:
        faults = fuzz_inputs.campaign(count, Path(folder), seed, say=say)
    with tempfile.TemporaryDirectory() as folder:
        real = count >= COUNTS["inputs"]
        size, most = (bombs.REAL_BYTES + 2**28, bombs.REAL_BYTES) if real else (2**29, 2**27)
        return faults + bombs.campaign(Path(folder), size, most, say=say)


def views_of(count: int, seed: int) -> int:
    """Decisions at which all that a View shows was searched for what a policy may not know."""
    say(views.campaign(count, seed))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.fuzz")
    parser.add_argument("what", choices=sorted(COUNTS))
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    campaign = {"engine": engine, "inputs": inputs, "views": views_of}[chosen.what]
    return min(campaign(chosen.count or COUNTS[chosen.what], chosen.seed), 1)


if __name__ == "__main__":
    sys.exit(main())
