"""Scheduling of LLM serving on heterogeneous memory: a simulator, a bench for policies, a Gymnasium environment."""

from gymnasium.envs.registration import register, registry

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
