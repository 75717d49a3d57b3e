"""What a system serves at saturation, and the load that equals it."""

from __future__ import annotations

import math

import numpy as np

from l3env.errors import L3EnvError
from l3env.machine.tables import Tables
from l3env.policy.protocol import Policy
from l3env.policy.registry import make_policy, reference_policy
from l3env.requests.workload import Workload
from l3env.runs.driver import run_policy


def capacity_requests_per_s(
    tables: Tables, workload: Workload, policy: Policy | None = None, *, prefix_cache: str = "off"
) -> float:
    """What a system serves at saturation: all requests present at once, rate at which the first 90 % finish.

    Requests that depend on others follow them without think time.
    """
    chosen = policy or make_policy(reference_policy(tables.has_pim))
    outcome = run_policy(tables, workload.all_at_once(), chosen, record=False, prefix_cache=prefix_cache)
    finish_s = np.sort(outcome.requests["finish_s"].dropna().to_numpy())
    if finish_s.size == 0:
        raise L3EnvError(f"{workload.name}: no request ever fits on {tables.system.name} with {tables.model.name}")
    count = max(math.ceil(0.9 * finish_s.size), 1)
    return count / float(finish_s[count - 1])


def load_at_capacity(tables: Tables, workload: Workload, *, prefix_cache: str = "off") -> float:
    """The load at which a trace's arrival rate equals the capacity: utilization 1.

    Raises:
        L3EnvError: all requests arrive at once.
    """
    if not math.isfinite(workload.rate_per_s):
        raise L3EnvError(
            f"{workload.name}: all requests that depend on no other arrive at once, so utilization has no meaning; "
            "use load"
        )
    return capacity_requests_per_s(tables, workload, prefix_cache=prefix_cache) / workload.rate_per_s
