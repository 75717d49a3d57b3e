"""Knobs: the settings that the engine decodes into a legal plan at every iteration."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from l3env.choices import Budget, Eviction, Order, PimForm, SubBatching, Victim
from l3env.engine.state import KNOB_DTYPE
from l3env.errors import PlanError

UNLIMITED = 1 << 30


@dataclass(frozen=True)
class Knobs:
    """Settings that the engine decodes into a legal plan at every iteration, until the policy decides anew.

    Attributes:
        admit_max_count: new requests an iteration, at most.
        prefill_budget_tokens: prompt tokens an iteration, at most; or a ``Budget``.
        budget_counts_decodes: decoding requests use up the budget first, one token each.
        prefill_first: an iteration with prefill stalls all decoding.
        hbm_share_frac: share of resident KV to hold in HBM on systems that also have PIM.
        order: queue order.
        headroom_frac: share of each pool that new requests must leave free.
        reserve_predicted: admit only what fits together with the predicted growth of all residents.
        sub_batching: two interleaved sub-batches (systems with PIM): off, on, or adaptive (whichever is shorter).
        victim: who is preempted when a pool runs over.
        pim_form: how new KV lies on the PIM side, for models that store a latent.
        multi_token: verify a guessed token in each decode step, for models that guess; off, one token a step.
        eviction: which cached segment of a prompt goes first, where the prefix cache is on; OFF keeps the rule in use.
        prefill_in_order: prompts under way take turns with waiting requests in the queue's order, so that a short
            prompt need not wait until a long one is done; off, they come first, in order of admission. For budgets in
            tokens.
    """

    admit_max_count: int = UNLIMITED
    prefill_budget_tokens: int = Budget.UNLIMITED
    budget_counts_decodes: bool = False
    prefill_first: bool = False
    hbm_share_frac: float = 0.0
    order: Order = Order.FCFS
    headroom_frac: float = 0.01
    reserve_predicted: bool = False
    sub_batching: SubBatching | bool = SubBatching.ON
    victim: Victim = Victim.NEWEST_ADMITTED
    pim_form: PimForm = PimForm.STORED
    multi_token: bool = True
    eviction: Eviction = Eviction.OFF
    prefill_in_order: bool = False

    def __post_init__(self) -> None:
        if self.admit_max_count < 0:
            raise PlanError(f"knobs: admit_max_count = {self.admit_max_count}; expected at least 0")
        if self.prefill_budget_tokens < 1 and self.prefill_budget_tokens not in list(Budget):
            raise PlanError(f"knobs: prefill_budget_tokens = {self.prefill_budget_tokens}; expected >= 1 or a Budget")
        for name in ("hbm_share_frac", "headroom_frac"):
            if not 0 <= getattr(self, name) <= 1:
                raise PlanError(f"knobs: {name} = {getattr(self, name)}; expected 0 to 1")
        if self.order not in list(Order):
            raise PlanError(f"knobs: order = {self.order}; expected one of {', '.join(o.name for o in Order)}")
        if self.sub_batching not in list(SubBatching):
            raise PlanError(f"knobs: sub_batching = {self.sub_batching}; expected off (0), on (1) or adaptive (2)")
        if self.pim_form not in list(PimForm):
            raise PlanError(f"knobs: pim_form = {self.pim_form}; expected stored (0) or decompressed (1)")
        if self.victim not in list(Victim):
            raise PlanError(f"knobs: victim = {self.victim}; expected one of {', '.join(v.name for v in Victim)}")
        if self.eviction not in list(Eviction):
            raise PlanError(f"knobs: eviction = {self.eviction}; expected one of {', '.join(v.name for v in Eviction)}")

    def write(self, row: NDArray[np.void], e: int | slice) -> None:
        """Puts the settings into row (or rows) ``e`` of a KNOB_DTYPE array."""
        row[e] = tuple(getattr(self, name) for name in KNOB_DTYPE.names or ())


def knob_names() -> list[str]:
    """Fields of Knobs in order."""
    return [field.name for field in fields(Knobs)]
