"""How many tokens each prompt gets in a step where vLLM's own rule, one budget served in order, does not say it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from l3env.choices import Order
from l3env.knobs import UNLIMITED, Knobs
from l3env.vllm.entries import entry_of, key_of


@dataclass
class Step:
    """What a step may hold.

    Attributes:
        caps: tokens of a prompt at most, by request id; others are not capped.
        stalls: nobody decodes.
        admissions: new requests at most.
        tokens: prompt tokens at most.
    """

    caps: dict[str, int] = field(default_factory=dict)
    stalls: bool = False
    admissions: int = UNLIMITED
    tokens: int = UNLIMITED

    def cap(self, request: Any, tokens: int) -> int:
        """What a request gets of the tokens vLLM would give it."""
        if request.request_id in self.caps:
            return min(tokens, self.caps[request.request_id])
        decodes = not request.is_prefill_chunk and request.num_computed_tokens > 0
        return 0 if self.stalls and decodes else tokens


def last_step_is_planned(request: Any) -> bool:
    """Scheduled ahead to its last token already: vLLM passes it over."""
    ahead = request.num_output_placeholders
    done = request.num_computed_tokens + 2 - ahead
    return bool(ahead > 0 and done >= request.num_prompt_tokens + request.max_tokens)


def rest_of(request: Any) -> int:
    """Prompt tokens (after a preemption emitted ones too) that are left to compute."""
    return int(request.num_tokens + request.num_output_placeholders - request.num_computed_tokens)


def sorted_out(running: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """(prompts under way, requests that decode in the coming step), in order of admission."""
    begun = [request for request in running if request.is_prefill_chunk]
    decoding = [request for request in running if not request.is_prefill_chunk and not last_step_is_planned(request)]
    return begun, decoding


def by_budget(begun: Iterable[Any], knobs: Knobs, left: int, *, alone: bool) -> Step:
    """Prompts under way up to a budget, in order of admission; what is left is for new ones."""
    step, most = Step(tokens=left), UNLIMITED if alone else knobs.chunk_max_tokens
    for request in begun:
        chunk = min(rest_of(request), most, left)
        step.caps[request.request_id] = chunk
        left -= chunk
    return step


def in_order(
    begun: Iterable[Any],
    waiting: Iterator[Any],
    knobs: Knobs,
    left: int,
    *,
    decoding_count: int,
    admissions: int,
    alone: bool,
    floor: float,
) -> Step:
    """Prompts under way and waiting requests up to a budget, in the queue's order.

    Under scores, those held back get nothing while anything else is planned or decodes.
    """
    order, most = knobs.order, UNLIMITED if alone else knobs.chunk_max_tokens
    keyed = sorted(((key_of(request, order), place, request) for place, request in enumerate(begun)))
    step = Step(caps={request.request_id: 0 for _, _, request in keyed}, admissions=0, tokens=left)
    places, first = iter(keyed), next(waiting, None) if admissions > 0 else None
    item, planned = next(places, None), 0
    while left > 0:
        if first is not None and (item is None or key_of(first, order) < item[0]):
            chunk = min(rest_of(first), most, left)
            step.caps[first.request_id] = chunk
            step.admissions += 1
            first = next(waiting, None) if step.admissions < admissions else None
        elif item is None:
            break
        else:
            held = order == Order.BY_SCORE and entry_of(item[2]).score < floor
            if held and planned + decoding_count > 0:
                break
            chunk = min(rest_of(item[2]), most, left)
            step.caps[item[2].request_id] = chunk
            item = next(places, None)
        planned, left = planned + chunk, left - chunk
    return step


def of_plan(prefill: Mapping[str, int] | None, begun: Iterable[Any], admitted: Sequence[Any], decode: bool) -> Step:
    """A plan's tokens, by request id; without any, prompts get their whole rest."""
    step = Step(stalls=not decode, admissions=len(admitted))
    if prefill is not None:
        step.caps = {request.request_id: prefill.get(request.request_id, 0) for request in (*begun, *admitted)}
    return step
