"""What a policy adds to a step of vLLM's scheduler: ``python -m tests.vllm.overhead [POLICY ...]``, with vLLM's Python.

Median CPU time of ``schedule()`` with 64 decoding requests and 16 waiting ones, microseconds; 500 steps each.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import json

from tests.vllm import real

RUNNING, WAITING, STEPS = 64, 16, 500
POLICIES = ("vllm", "sarathi", "edf", "requests-agent", "request-score")


def step_us(policy: str | None, folder: str) -> float:
    """The median over steps."""
    case = {"blocks": 20_000, "budget": 2048, "seqs": RUNNING, "threshold": 0, "prefix": False, "ahead": True}
    case |= {"length": 1 << 20}
    if policy is not None:
        case["policy"] = policy
    scheduler = real.scheduler_of(case, folder)
    for index in range(RUNNING + WAITING):
        scheduler.add_request(real.request_of(index, {"prompt": 200, "output": 5000}, 0.0, None))
    took, pending = [], []
    for step in range(STEPS):
        real.CLOCK[0] = step * 0.01
        began_s = time.thread_time()
        planned = scheduler.schedule()
        took.append(time.thread_time() - began_s)
        planned.middle = {name: scheduler.requests[name].is_prefill_chunk for name in planned.num_scheduled_tokens}
        pending.append(planned)
        if len(pending) > 1:
            last = pending.pop(0)
            scheduler.update_from_output(last, real.made_up(scheduler, last))
    return statistics.median(took[50:]) * 1e6


def main(policies: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(real.TINY))
        for policy in policies:
            alone = [step_us(None, folder) for _ in range(2)]
            within = [step_us(policy, folder) for _ in range(2)]
            print(f"{policy}: {min(within):.0f} us a step, vLLM's own {min(alone):.0f}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    main(sys.argv[1:] or list(POLICIES))
