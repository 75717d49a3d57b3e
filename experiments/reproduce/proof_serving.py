"""Proof search served by each system: proofs an hour and makespan, per policy and per number of verifiers.

    # the table of docs/prover.md
    python -m l3env.experiments.reproduce.proof_serving --prefix-cache off,lru --workers -1
    python -m l3env.experiments.reproduce.proof_serving --samples 512 --policies sarathi,l3-model --mode single-pass

256 trees with 32 jobs each on deepseek-prover-v1.5-7b, one theorem a tree. Every run has the same theorems.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import joblib
import pandas as pd

from l3env.files import write_text
from l3env.machine.pair import compile_pair
from l3env.policy.registry import make_policy
from l3env.runs.reactive import run_reactive
from l3env.traces.prover import log as prover_log
from l3env.traces.prover.search import MODES, ProofSearch, SearchSettings, earlier_requests

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
    row: dict[str, Any] = {"system": system, "policy": policy, "prefix_cache": prefix_cache}
    row["verifiers_count"] = settings.verifiers_count
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
    parser.add_argument("--prefix-cache", default="off", help="off, lru, lfu or tree, or several")
    parser.add_argument("--workers", type=int, default=1, help="runs side by side; -1: one a core")
    parser.add_argument("--out", type=Path, help="a CSV file of all rows")
    asked = parser.parse_args()
    if asked.log is not None:
        asked.log.mkdir(parents=True, exist_ok=True)
    runs = list(
        itertools.product(
            map(int, asked.verifiers.split(",")),
            asked.systems.split(","),
            asked.policies.split(","),
            asked.prefix_cache.split(","),
        )
    )
    rows = []
    work = (joblib.delayed(one)(asked.samples, asked.mode, asked.log, *run) for run in runs)
    for row in joblib.Parallel(asked.workers, return_as="generator")(work):
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        if asked.out is not None:
            write_text(asked.out, pd.DataFrame(rows).to_csv(index=False))
    print(pd.DataFrame(rows).round(3).to_string())


def one(
    samples: int, mode: str, logs: Path | None, verifiers: int, system: str, policy: str, prefix_cache: str
) -> dict[str, Any]:
    """A row of the table."""
    settings = SearchSettings(samples_count=samples, verifiers_count=verifiers, mode=mode)
    log = None if logs is None else logs / f"{system}.{policy}.{verifiers}.{prefix_cache}.jsonl"
    return searched(system, policy, settings, log, prefix_cache)


if __name__ == "__main__":
    main()
