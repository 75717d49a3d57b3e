"""``python -m tests.campaigns.fuzz engine|inputs|bombs|views [--count N] [--seed N]``: figures; a fault is exit code 1.

Parts of a campaign run side by side with other seeds; ``--names`` takes those kinds of files whose name holds it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.campaigns import bombs, fuzz_engine, fuzz_inputs, views

COUNTS = {"engine": 10_000_000, "inputs": 100_000, "bombs": 100_000, "views": 1000}


def say(text: str) -> None:
    print(text, flush=True)


def engine(count: int, seed: int, names: str) -> int:
    """Iterations with all that is conserved checked at each."""
    say("\n".join(fuzz_engine.campaign(count, seed, say=lambda text: print(text, file=sys.stderr)).lines()))
    return 0


def inputs(count: int, seed: int, names: str) -> int:
    """So many damaged files of each kind."""
    with tempfile.TemporaryDirectory() as folder:
        return fuzz_inputs.campaign(count, Path(folder), seed, names, say=say)


def large(count: int, seed: int, names: str) -> int:
    """Small files that would be large in memory, at the real limits if ``count`` is that of a long run."""
    with tempfile.TemporaryDirectory() as folder:
        real = count >= COUNTS["bombs"]
        size, most = (bombs.REAL_BYTES + 2**28, bombs.REAL_BYTES) if real else (2**29, 2**27)
        return bombs.campaign(Path(folder), size, most, say=say)


def views_of(count: int, seed: int, names: str) -> int:
    """Decisions at which all that a View shows was searched for what a policy may not know."""
    say(views.campaign(count, seed))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.fuzz")
    parser.add_argument("what", choices=sorted(COUNTS))
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--names", default="")
    chosen = parser.parse_args()
    campaign = {"engine": engine, "inputs": inputs, "bombs": large, "views": views_of}[chosen.what]
    return min(campaign(chosen.count or COUNTS[chosen.what], chosen.seed, chosen.names), 1)


if __name__ == "__main__":
    sys.exit(main())
