"""Proof search served by each system: proofs an hour and makespan, per policy and per number of verifiers.

    python -m experiments.prover                                     # the table of docs/prover.md
    python -m experiments.prover --samples 512 --policies sarathi,l3-model --verifiers 64,1024 --mode single-pass

256 trees with 32 jobs each on deepseek-prover-v1.5-7b, one theorem a tree. Every run has the same theorems.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd

from l3env.policy import make_policy
from l3env.reactive import run_reactive
from l3env.runner import compile_pair
from traces import prover_log
from traces.prover import MODES, ProofSearch, SearchSettings, earlier_requests

SYSTEMS = ("l3-dgx-a100", "gpu-dgx-a100", "hbm-pim-dgx-a100")
MODEL = "deepseek-prover-v1.5-7b"
POLICIES = ("fcfs", "fill-capacity", "sarathi", "srtf-predicted", "l3-model")
VERIFIERS = (64, 1024)
SAMPLES = 128
SHOWN = (
    "proofs_count",
    "proofs_per_hour",
    "search_makespan_s",
    "proof_half_s",
    "samples_per_s",
    "output_tokens_per_s",
    "batch_mean_count",
    "verifier_busy_frac",
    "kv_hbm_peak_frac",
    "kv_pim_peak_frac",
    "prefix_hit_tokens_frac",
)


def searched(
    system: str, policy: str, settings: SearchSettings, log: Path | None = None, prefix_cache: str = "off"
) -> dict[str, Any]:
    """One run: what was asked and its figures."""
    client = ProofSearch(settings)
    training = earlier_requests(client)
    start = time.perf_counter()
    tables = compile_pair(system, MODEL)
    outcome = run_reactive(
        tables, client, lambda: make_policy(policy), training=training, record=False, prefix_cache=prefix_cache
    )
    if log is not None:
        prover_log.write(client.log, log)
    row: dict[str, Any] = {"system": system, "policy": policy, "verifiers_count": settings.verifiers_count}
    row |= {name: outcome.metrics[name] for name in SHOWN}
    return row | {"requests_count": outcome.metrics["requests_count"], "wall_s": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="generations a tree may use")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--verifiers", default=",".join(map(str, VERIFIERS)))
    parser.add_argument("--mode", choices=MODES, default=MODES[0])
    parser.add_argument("--log", type=Path, help="folder for a log of every run, which is a trace (format prover-log)")
    parser.add_argument("--prefix-cache", default="off", help="off, lru, lfu or tree")
    asked = parser.parse_args()
    rows = []
    if asked.log is not None:
        asked.log.mkdir(parents=True, exist_ok=True)
    for verifiers in map(int, asked.verifiers.split(",")):
        settings = SearchSettings(samples_count=asked.samples, verifiers_count=verifiers, mode=asked.mode)
        for system in asked.systems.split(","):
            for policy in asked.policies.split(","):
                name = f"{system}.{policy}.{verifiers}.jsonl"
                log = None if asked.log is None else asked.log / name
                rows.append(searched(system, policy, settings, log, asked.prefix_cache))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(pd.DataFrame(rows).round(3).to_string())


if __name__ == "__main__":
    main()
