"""Proof search served by each system: proofs an hour and makespan, per policy and per number of verifiers.

    # the table of docs/prover.md
    python -m l3env.experiments.reproduce.proof_serving --prefix-cache off,lru --workers -1
    python -m l3env.experiments.reproduce.proof_serving --samples 512 --policies sarathi,l3-model --mode single-pass

256 trees with 32 jobs each on deepseek-prover-v1.5-7b, one theorem a tree. Every run has the same theorems.
"""

from __future__ import annotations

import argparse
import itertools
import uuid
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from l3env.cli.shared import progress_bar, say_taken
from l3env.files import write_text
from l3env.machine.pair import compile_pair
from l3env.policy.registry import make_policy
from l3env.runs.cell import Result, job_name
from l3env.runs.content import inputs_sha256, policy_content, sources_sha256
from l3env.runs.jobs import run_jobs
from l3env.runs.reactive import run_reactive
from l3env.runs.store import Job, Store
from l3env.runs.workers import Workers
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
    "requests_count",
)


@dataclass(frozen=True)
class Search:
    """One run."""

    system: str
    policy: str
    settings: SearchSettings
    prefix_cache: str = "off"

    def job(self, log: Path | None = None) -> Job:
        """Its search, and ``log`` of every generation. One whose log is not there is not taken from a folder."""
        row: dict[str, Any] = {"system": self.system, "policy": self.policy, "prefix_cache": self.prefix_cache}
        row["verifiers_count"] = self.settings.verifiers_count
        made_of = inputs_sha256([self.system], [MODEL], []), policy_content(self.policy), sources_sha256(Path(__file__))
        missing = None if log is None or log.exists() else uuid.uuid4().hex
        parts = (self.system, self.policy, self.prefix_cache, str(self.settings.verifiers_count))
        return Job(
            job_name(self, *parts), row, {"search": self, "of": made_of, "log": missing}, partial(run, self, log)
        )


def run(search: Search, log: Path | None = None) -> Result:
    """Its figures."""
    client = ProofSearch(search.settings)
    outcome = run_reactive(
        compile_pair(search.system, MODEL),
        client,
        lambda: make_policy(search.policy),
        training=earlier_requests(client),
        record=False,
        prefix_cache=search.prefix_cache,
    )
    if log is not None:
        prover_log.write(client.log, log)
    return {name: outcome.metrics[name] for name in SHOWN}, {}


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
    parser.add_argument(
        "--out", type=Path, default=Path("runs/proof-serving"), help="folder for results, which are not run again"
    )
    asked = parser.parse_args()
    if asked.log is not None:
        asked.log.mkdir(parents=True, exist_ok=True)
    asked_for = itertools.product(
        map(int, asked.verifiers.split(",")),
        asked.systems.split(","),
        asked.policies.split(","),
        asked.prefix_cache.split(","),
    )
    jobs = []
    for verifiers, system, policy, prefix_cache in asked_for:
        settings = SearchSettings(samples_count=asked.samples, verifiers_count=verifiers, mode=asked.mode)
        name = f"{system}.{policy}.{verifiers}.{prefix_cache}.jsonl"
        jobs.append(Search(system, policy, settings, prefix_cache).job(None if asked.log is None else asked.log / name))
    store = Store(asked.out)
    store.begin()
    with progress_bar("searching") as progress:
        ended = run_jobs(jobs, store, workers=Workers(count=asked.workers), progress=progress)
    say_taken(ended.taken_count, len(jobs), asked.out)
    rows = pd.DataFrame([done.flat() for done in ended.of_all()]).drop(columns="error")
    write_text(asked.out / "rows.csv", rows.to_csv(index=False))
    print(rows.round(3).to_string())


if __name__ == "__main__":
    main()
