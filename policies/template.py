"""A template for a heuristic of your own: copy, change, run.

    l3env compare --policies fcfs,sarathi,my_policy.py:MyPolicy --trace azure-conv-2023

``decide`` sees a View (what a real scheduler could know) and returns Knobs, settings that the engine decodes into
a legal plan at every iteration, or a Plan, the iteration itself.
"""

from __future__ import annotations

from l3env import BasePolicy, Knobs, Order, View


class MyPolicy(BasePolicy):
    """Small prefill chunks while the machine is busy, large ones while it is not."""

    name = "my-policy"
    decision_interval_s = 0.5  # 0 would ask at every iteration, infinity once

    def decide(self, view: View) -> Knobs:
        free_frac = view.pools.free_tokens.sum() / (view.pools.capacity_blocks.sum() * view.pools.block_tokens)
        busy = view.running_count > 32
        return Knobs(
            prefill_budget_tokens=512 if busy else 4096,
            headroom_frac=0.1 if free_frac < 0.2 else 0.01,
            order=Order.SHORTEST_PROMPT_HOPELESS_LAST,
        )
