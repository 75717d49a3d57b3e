"""LARS, of Medha (arXiv 2409.17264): prompts in chunks, the one with the least relative slack next, whether it waits or
is under way, so that long prompts neither block short ones nor starve.

Slack is the time to the TTFT deadline less what is left of the prefill alone on the machine, relative to all of the
prefill alone. The paper says what it is relative to; the exact formula was not verified. Its adaptive chunks and its
parallelism over sequences are left out: the budget is Sarathi-Serve's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.knobs import Knobs
from l3env.policies.by_key import ByKey
from l3env.policy.plan import Scored
from l3env.policy.view import View


class Lars(ByKey):
    """Least slack over one's own prefill time first, prompts under way included."""

    source = "Medha, arXiv 2409.17264"
    signals = "TTFT deadlines, prefill time alone"
    decision_interval_s = 0.0

    def __init__(self, **knobs: Any) -> None:
        super().__init__("lars", **{"prefill_in_order": True, **knobs})

    def decide(self, view: View) -> Knobs | Scored:
        prefilling = view.prefilling
        if view.waiting_count + prefilling.size < 2:
            return self.knobs
        rows = np.concatenate([view.waiting(view.waiting_count), prefilling])
        slack = relative_slack(rows, view.now_s)
        return Scored(self.knobs, rows["idx"], 0.5 - 0.5 * slack / (1.0 + np.abs(slack)))


def relative_slack(rows: NDArray[np.void], now_s: float) -> NDArray[np.float64]:
    """How many times its prefill alone each could still be put off."""
    left_s = rows["ttft_alone_s"] * rows["prefill_left_tokens"] / rows["prompt_tokens"]
    return (rows["ttft_deadline_s"] - now_s - left_s) / rows["ttft_alone_s"]
