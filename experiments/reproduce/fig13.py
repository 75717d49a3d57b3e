"""Scaling the PIM side by eight, GPT-175B on OpenR1, from one rankset and 512 GB: bandwidth, capacity, both.

"Liebig's law": the scarcer of the two decides, and scaling the other alone buys next to nothing.
"""

from __future__ import annotations

from dataclasses import replace

from l3env.experiments.reproduce.common import DEFAULT, Assumptions, Row, machine, row, scheduler, throughput, trace
from l3env.runs.driver import run_policy
from l3env.units import GIB

BASE_BYTES = 512 * GIB
RANKSET_BYTES_PER_S = 13.0e12 / 4
SWAP = (
    "the revised text prints 2.28 and 1.01 in the order capacity, bandwidth; v1 has 1.6 for bandwidth and 1.1 for "
    "capacity, and so does the physics: with one rankset attention is what is short, and memory that cannot be read in "
    "time lies idle"
)
FLOOR = (
    "with whole lengths reserved 512 GB hold 5 requests; at 8x bandwidth reading the FC layers' weights twice for two "
    "sub-batches is the floor, so that one batch is shorter: a scheduler that always interleaves gets 1.6, as v1 has"
)
CASES = (
    ("8x bandwidth", 8, 1, 2.28, f"{SWAP}; {FLOOR}"),
    ("8x capacity", 1, 8, 1.01, SWAP),
    ("8x both", 8, 8, 8.23, ""),
)


def output_tokens_per_s(bandwidth_scale: int, capacity_scale: int, assumptions: Assumptions) -> float:
    """Throughput with the base's bandwidth and capacity scaled. A rankset comes with its bandwidth."""
    tables = machine(
        "l3",
        "gpt-175b",
        assumptions,
        pim__capacity_bytes=float(BASE_BYTES * capacity_scale),
        pim__internal_bytes_per_s=RANKSET_BYTES_PER_S * bandwidth_scale,
        pim__ranks_per_channel_count=bandwidth_scale,
    )
    outcome = run_policy(tables, trace("openr1"), scheduler(tables, assumptions), record=False)
    return throughput(outcome.metrics)


def rows() -> list[Row]:
    out = []
    others = {
        "paged": replace(DEFAULT, admission="paged"),
        "watermark": replace(DEFAULT, admission="watermark"),
        "always interleaved": replace(DEFAULT, interleave="always"),
    }
    for label, assumptions in {"": DEFAULT, **others}.items():
        base = output_tokens_per_s(1, 1, assumptions)
        kind = f" (sensitivity: {label})" if label else ""
        for name, bandwidth, capacity, paper, note in CASES:
            ratio = output_tokens_per_s(bandwidth, capacity, assumptions) / base
            case = f"gpt-175b, openr1, {name}{kind}"
            out.append(row("fig13", case, "throughput over the base", paper, ratio, "" if kind else note))
    return out
