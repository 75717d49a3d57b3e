"""Scheduling of LLM serving on heterogeneous memory: a simulator, a bench for policies, a Gymnasium environment."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gymnasium.envs.registration import register, registry

if TYPE_CHECKING:
    from l3env.choices import Budget, Order, PimForm, SubBatching, Victim
    from l3env.engine.engine import Slo
    from l3env.knobs import Knobs
    from l3env.machine.pair import compile_pair
    from l3env.machine.specs import load
    from l3env.policy.plan import Plan, Scored
    from l3env.policy.protocol import BasePolicy, FixedKnobs, Policy
    from l3env.policy.registry import make_policy, register_policy
    from l3env.policy.view import View
    from l3env.requests.registry import load_trace
    from l3env.requests.workload import Workload
    from l3env.runs.compare import compare
    from l3env.runs.driver import run_policy
    from l3env.runs.saturation import capacity_requests_per_s

__version__ = "0.1.0"

__all__ = [
    "BasePolicy",
    "Budget",
    "FixedKnobs",
    "Knobs",
    "Order",
    "PimForm",
    "Plan",
    "Policy",
    "Scored",
    "Slo",
    "SubBatching",
    "Victim",
    "View",
    "Workload",
    "capacity_requests_per_s",
    "compare",
    "compile_pair",
    "load",
    "load_trace",
    "make_policy",
    "register_policy",
    "run_policy",
]

_HOMES = {
    "BasePolicy": "policy.protocol",
    "Budget": "choices",
    "FixedKnobs": "policy.protocol",
    "Knobs": "knobs",
    "Order": "choices",
    "PimForm": "choices",
    "Plan": "policy.plan",
    "Policy": "policy.protocol",
    "Scored": "policy.plan",
    "Slo": "engine.engine",
    "SubBatching": "choices",
    "Victim": "choices",
    "View": "policy.view",
    "Workload": "requests.workload",
    "capacity_requests_per_s": "runs.saturation",
    "compare": "runs.compare",
    "compile_pair": "machine.pair",
    "load": "machine.specs",
    "load_trace": "requests.registry",
    "make_policy": "policy.registry",
    "register_policy": "policy.registry",
    "run_policy": "runs.driver",
}


def __getattr__(name: str) -> Any:
    """What is asked for is imported then, so that the command line starts without numba and pandas."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"l3env.{_HOMES[name]}"), name)
    if ":" in name:  # vLLM asks for ``l3env.vllm:PolicyScheduler`` as an attribute of l3env
        module, _, inner = name.partition(":")
        return getattr(importlib.import_module(f"l3env.{module}"), inner)
    try:
        return importlib.import_module(f"l3env.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"l3env.{name}":
            raise
        raise AttributeError(f"module 'l3env' has no attribute {name!r}") from None


if "l3env/Serving-v0" not in registry:
    register(
        id="l3env/Serving-v0",
        entry_point="l3env.envs.serving:ServingEnv",
        vector_entry_point="l3env.envs.vector:ServingVectorEnv",
    )
if "l3env/ServingRequests-v0" not in registry:
    register(
        id="l3env/ServingRequests-v0",
        entry_point="l3env.envs.requests:ServingRequestsEnv",
        vector_entry_point="l3env.envs.requests:ServingRequestsVectorEnv",
    )
