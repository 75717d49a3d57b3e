"""Scheduling of LLM serving on heterogeneous memory: a simulator, a bench for policies, a Gymnasium environment."""

from gymnasium.envs.registration import register, registry

from l3env.engine import Slo
from l3env.policy import BasePolicy, FixedKnobs, Knobs, Plan, Policy, View, make_policy, register_policy
from l3env.runner import capacity_requests_per_s, compare, compile_pair, run_policy
from l3env.specs import load
from l3env.state import Budget, Order, PimForm, SubBatching, Victim
from l3env.trace_registry import load_trace
from l3env.workload import Workload

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

if "l3env/Serving-v0" not in registry:
    register(
        id="l3env/Serving-v0",
        entry_point="l3env.env:ServingEnv",
        vector_entry_point="l3env.vector_env:ServingVectorEnv",
    )
if "l3env/ServingRequests-v0" not in registry:
    register(
        id="l3env/ServingRequests-v0",
        entry_point="l3env.request_env:ServingRequestsEnv",
        vector_entry_point="l3env.request_env:ServingRequestsVectorEnv",
    )
