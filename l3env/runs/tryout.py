"""A policy on trial: two small runs that must be the same, and how long its decisions take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from l3env.machine.tables import Tables
from l3env.policy.protocol import Policy
from l3env.policy.registry import make_policy
from l3env.requests.workload import Workload
from l3env.runs.driver import run_policy
from l3env.runs.metrics import Outcome

WHAT_DIFFERS = ("finish_s", "first_token_s")  # of a request, looked at first


@dataclass(frozen=True)
class Trial:
    """What was found.

    Attributes:
        finished_count: requests of the first run that got all their tokens.
        leak: how the second run of the same object differs from the first, where it does and a fresh object's does not.
        chance: how a fresh object's run differs from the first, where it does.
        decided_s: wall time of each decision of the first run.
    """

    requests_count: int
    finished_count: int
    slo_attainment_frac: float
    leak: str | None
    chance: str | None
    decided_s: list[float]


def try_out(ref: str, tables: Tables, workload: Workload, training: Workload) -> Trial:
    """Runs a policy twice, and a fresh one where they differ. Raises L3EnvError for its author's mistakes."""
    policy = make_policy(ref)
    decided_s: list[float] = []
    first = run_policy(tables, workload, policy, training=training, decided_s=decided_s)
    again = difference(first, _run(tables, workload, policy, training))
    afresh = difference(first, _run(tables, workload, make_policy(ref), training))
    return Trial(
        len(workload),
        int(first.metrics["finished_count"]),
        float(first.metrics["slo_attainment_frac"]),
        again if afresh is None else None,
        afresh,
        decided_s,
    )


def _run(tables: Tables, workload: Workload, policy: Policy, training: Workload) -> Outcome:
    return run_policy(tables, workload, policy, training=training)


def difference(one: Outcome, other: Outcome) -> str | None:
    """The first thing in which two runs differ, None where they are the same to the last bit."""
    for name in dict.fromkeys((*WHAT_DIFFERS, *one.requests.columns)):
        if name in one.requests and not _same(one.requests[name], other.requests[name]):
            left, right = one.requests[name].to_numpy(), other.requests[name].to_numpy()
            row = next(
                i for i in range(len(left)) if left[i] != right[i] and not (pd.isna(left[i]) and pd.isna(right[i]))
            )
            return f"request {row}: {name} = {left[row]}, then {right[row]}"
    for name, value in one.metrics.items():
        then = other.metrics.get(name)
        if then is None or not np.array_equal(value, then, equal_nan=True):
            return f"{name} = {value}, then {then}"
    return None


def _same(one: pd.Series, other: pd.Series) -> bool:
    return bool(one.equals(other))
