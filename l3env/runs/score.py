"""One number for a policy on a small fixed set of cells, in a process of its own: the fitness that a search over
programs asks for again and again.

The set is frozen by its name: another set gets another name, so scores of one name compare. Requests come from
embedded profiles, so nothing is fetched. A policy that fails, hangs or takes too much memory has no score and says why.
That is a fence against accidents, not against malice: the process may do what its user may.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from typing import Any, NamedTuple

from l3env.errors import L3EnvError, PolicyError
from l3env.machine.pair import compile_pair
from l3env.policy.registry import make_policy
from l3env.requests.registry import load_trace
from l3env.runs.driver import run_policy

SUITE = "score-1"
FIGURES = ("guarded_attainment_frac", "guarded_goodput_requests_per_s", "goodput_requests_per_s", "longest_wait_s")


class Fixed(NamedTuple):
    """A cell, at about 0.9 of what the reference policy of ``utilization`` serves at saturation."""

    system: str
    model: str
    requests: str  # a trace reference; what a policy learns from is drawn with another seed


CELLS = (
    Fixed("gpu-dgx-h100", "llama-3-70b", "profile:azure-conv-2023?n=400&rate=11.5"),
    Fixed("l3-dgx-a100", "qwen-72b", "profile:azure-conv-2023?n=400&rate=4.3"),
    Fixed("l3-dgx-a100", "gpt-175b", "profile:azure-code-2023?n=400&arrivals=poisson&rate=1.4"),
    Fixed("hbm-pim-dgx-a100", "gpt-89b", "profile:sharegpt-8k?n=400&arrivals=poisson&rate=1.5"),
)


def score(ref: str) -> dict[str, Any]:
    """``score``: the mean over the cells of the share of requests that met their SLO less those that waited beyond the
    guard (``engine.guard``), -1 to 1; ``cells``: the figures of each. Raises L3EnvError for its author's mistakes."""
    rows = []
    for cell in CELLS:
        policy = make_policy(ref)
        outcome = run_policy(
            compile_pair(cell.system, cell.model),
            load_trace(cell.requests),
            policy,
            training=load_trace(f"{cell.requests}&seed=1"),
            record=False,
        )
        rows.append(cell._asdict() | {name: float(outcome.metrics[name]) for name in FIGURES})
    return {"score": sum(row[FIGURES[0]] for row in rows) / len(rows), "cells": rows}


def score_apart(ref: str, limit_s: float = 60.0, memory_bytes: int = 4 * 2**30) -> dict[str, Any]:
    """The same from a process of its own: ``suite, policy, score, cells, error``; without a score there is an error.

    Args:
        limit_s: wall time, the start of the process included.
        memory_bytes: what it may take (where the system heeds RLIMIT_DATA, as Linux does).
    """
    told: dict[str, Any] = {"suite": SUITE, "policy": ref, "score": None, "cells": [], "error": None}
    with subprocess.Popen(
        [sys.executable, "-m", "l3env.runs.score", ref, str(memory_bytes)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            found, said = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return told | {"error": f"policy {ref!r}: no score within {limit_s:g} s"}
        finally:
            _end(process)
    try:
        return told | json.loads(found)
    except ValueError:
        last = said.strip().splitlines()[-1:] or [""]
        return told | {"error": f"policy {ref!r}: its process ended with {process.returncode}: {last[0][:500]}"}


def _end(process: subprocess.Popen[str]) -> None:
    """All that it started ends with it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def main(ref: str, memory_bytes: str) -> None:
    """That process. What a policy prints goes to stderr."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory_bytes), int(memory_bytes)))
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        answer = score(ref)
    except L3EnvError as error:
        answer = {"error": str(error)}
    except MemoryError:
        answer = {"error": str(PolicyError(f"policy {ref!r}: more than {int(memory_bytes) / 2**30:g} GiB of memory"))}
    sys.stdout.flush()
    with os.fdopen(kept, "w") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
