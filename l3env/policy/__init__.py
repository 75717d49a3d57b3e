"""The contract with policies: a Policy looks at a View and returns Knobs, a Plan or scores."""

from l3env.knobs import Knobs, knob_names
from l3env.policy.plan import Plan, Scored
from l3env.policy.protocol import BasePolicy, FixedKnobs, LengthPredictor, Policy
from l3env.policy.registry import (
    check_policy,
    make_policy,
    policy_factories,
    policy_files,
    policy_names,
    register_policy,
)
from l3env.policy.view import PoolView, View

__all__ = [
    "BasePolicy",
    "FixedKnobs",
    "Knobs",
    "LengthPredictor",
    "Plan",
    "Policy",
    "PoolView",
    "Scored",
    "View",
    "check_policy",
    "knob_names",
    "make_policy",
    "policy_factories",
    "policy_files",
    "policy_names",
    "register_policy",
]
