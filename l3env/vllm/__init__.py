"""Policies of l3env inside vLLM: ``vllm serve MODEL --scheduler-cls l3env.vllm.PolicyScheduler``."""

from l3env.vllm.scheduler import PolicyScheduler

__all__ = ["PolicyScheduler"]
