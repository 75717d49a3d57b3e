"""Which knobs vLLM can honour, which mean nothing there, and which are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from l3env.choices import Budget, Eviction
from l3env.errors import PlanError, PolicyError
from l3env.knobs import ABOUT, UNLIMITED, Knobs
from l3env.policy.plan import Plan

HONOURED = (
    "admit_max_count",
    "prefill_budget_tokens",
    "running_max_count",
    "chunk_max_tokens",
    "budget_counts_decodes",
    "prefill_first",
    "order",
    "headroom_frac",
    "reserve_predicted",
    "victim",
    "prefill_in_order",
)
"""Set in vLLM as l3env's engine has them."""

ABOUT_PIM: dict[str, Callable[[Any], bool]] = {
    "hbm_share_frac": lambda value: value != 0,
    "sub_batching": lambda value: False,  # its default is on, which one GPU takes as off
    "pim_form": lambda value: value != 0,
    "prefill_budget_tokens": lambda value: value in (Budget.ALIGN, Budget.ALIGN_WHEN_FULL),
}
"""What asks for a PIM side: without one it is as if it had not been set."""


def check_start(*, priority: bool, chunked: bool) -> None:
    """Raises PolicyError for settings of vLLM's own that leave a policy nothing to decide."""
    if priority:
        raise PolicyError("--scheduling-policy priority: expected fcfs; the order of requests is the policy's")
    if not chunked:
        raise PolicyError("--no-enable-chunked-prefill: expected chunked prefill, which budgets are about")


def refusals(knobs: Knobs, *, speculates: bool, splits_by_mamba: bool) -> list[str]:
    """What vLLM cannot do, a line each."""
    found = []
    if knobs.eviction not in (Eviction.OFF, Eviction.LRU):
        found.append(
            f"eviction = {Eviction(knobs.eviction).name}: vLLM's prefix cache gives up the least recently used"
        )
    if speculates and not knobs.multi_token:
        found.append("multi_token = off: vLLM verifies guessed tokens as it was started")
    capped = [name for name in ("prefill_in_order", "prefill_first") if getattr(knobs, name)]
    if knobs.prefill_budget_tokens > 0 and not knobs.budget_counts_decodes:
        capped.append("budget_counts_decodes = off")
    if splits_by_mamba and capped:
        found.append(f"{', '.join(capped)}: not with a model whose prompts vLLM cuts at Mamba's blocks")
    if unknown := set(ABOUT) - {*HONOURED, *ABOUT_PIM, "eviction", "multi_token"}:
        found.append(f"{', '.join(sorted(unknown))}: this adapter does not know them")
    return found


def check_knobs(knobs: Knobs, *, speculates: bool = False, splits_by_mamba: bool = False) -> None:
    """Raises PlanError that names every knob vLLM cannot honour."""
    if found := refusals(knobs, speculates=speculates, splits_by_mamba=splits_by_mamba):
        raise PlanError("knobs that vLLM cannot honour: " + "; ".join(found))


def notes(knobs: Knobs, most_tokens: int, most_running: int) -> list[str]:
    """What will be without effect, or smaller than asked for, in words."""
    without = [name for name, asks in ABOUT_PIM.items() if asks(getattr(knobs, name))]
    found = [f"{', '.join(without)}: without effect, vLLM has no PIM side"] if without else []
    if knobs.prefill_budget_tokens > most_tokens:
        found.append(
            f"prefill_budget_tokens = {knobs.prefill_budget_tokens}: steps hold at most --max-num-batched-tokens = "
            f"{most_tokens}"
        )
    if UNLIMITED > knobs.running_max_count > most_running:
        found.append(f"running_max_count = {knobs.running_max_count}: at most --max-num-seqs = {most_running} run")
    return found


def check_plan(plan: Plan) -> None:
    """Raises PlanError for parts of a plan that vLLM's scheduler has no counterpart of."""
    wrong = [name for name in ("pause", "resume", "sub_batch") if getattr(plan, name)]
    places = plan.admit.values() if hasattr(plan.admit, "values") else ()
    if any(place not in ("auto", "hbm", 0, -1) for place in places):
        wrong.append("admit to a PIM pool")
    if wrong:
        raise PlanError(f"plan: {', '.join(wrong)}: vLLM cannot do it; expected admit, prefill, preempt and decode")
