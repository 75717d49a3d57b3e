"""TensorRT-LLM's MAX_UTILIZATION: first come, first served, whatever fits now starts; where memory runs over, the last
who started is paused, which here means that it is computed again.

Source: the documentation of TensorRT-LLM (``CapacitySchedulerPolicy``); that it is the last who goes was not verified.
A prompt's blocks are taken at once here, at its start.
"""

from __future__ import annotations

from typing import Any

from l3env.policies.trtllm_no_evict import IN_FLIGHT
from l3env.policy.protocol import FixedKnobs, Role


class TrtllmMaxUtilization(FixedKnobs):
    """TensorRT-LLM's other rule: whatever fits starts, and may be paused."""

    role = Role.PUBLISHED
    source = "TensorRT-LLM, MAX_UTILIZATION"

    def __init__(self, **knobs: Any) -> None:
        super().__init__("trtllm-max-utilization", IN_FLIGHT, **knobs)
