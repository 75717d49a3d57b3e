"""The policy under vLLM: made, prepared, asked; what it is asked with is made only once it looks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.choices import Order, Status, Victim
from l3env.engine.kernels import present as kernels
from l3env.engine.state import Score
from l3env.errors import PolicyError
from l3env.knobs import KNOB_DTYPE, Knobs
from l3env.policy.mistakes import ask, blaming, shown, wrong_answer
from l3env.policy.plan import Plan, Scored
from l3env.policy.protocol import LengthPredictor
from l3env.policy.registry import beside, make_policy
from l3env.vllm.entries import HEEDS_HOPELESS, NAME, Entry, entry_of
from l3env.vllm.honoured import check_plan
from l3env.vllm.mirror import Counts, Mirror, Present, ServingView, with_memory
from l3env.vllm.settings import Settings, machine_of, read_slo, training_of

Scores = tuple[NDArray[np.int64], NDArray[np.float64]]

MADE_UP_PROMPT_TOKENS = 16
SCORED_KNOBS = (
    "prefill_budget_tokens",
    "prefill_first",
    "headroom_frac",
    "order",
    "victim",
    "prefill_in_order",
    "budget_counts_decodes",
)
"""What a compiled scorer sets that vLLM can honour."""


class Asked:
    """A policy, the machine it is told of, and what it has been told.

    Args:
        served: vLLM's model.
        blocks_count, block_size: of vLLM's KV memory, and tokens in each.
        tell: where notes go.
    """

    def __init__(
        self, settings: Settings, served: str, blocks_count: int, block_size: int, tell: Callable[[str], None]
    ) -> None:
        self.policy = make_policy(settings.policy)
        if self.policy.wants_truth:
            raise PolicyError(f"policy {settings.policy!r}: wants true output lengths, which a server does not know")
        tables, self.about_machine = machine_of(settings, served)
        self.system = with_memory(tables, blocks_count, block_size)
        self.slo = self.policy.slo = read_slo(settings.slo)
        self.counts, self.floor, self.tell = Counts(), 0.0, tell
        self._training = training_of(settings.training)
        self._entries: dict[int, Entry] = {}  # by order of arrival: those present
        self._mirror: Mirror | None = None
        self._limits = False
        self.prepare()
        weights = ask(self.policy, "scorer")
        self.scorer = None if weights is None else np.asarray(weights, dtype=float)
        self._scored = np.zeros(1, KNOB_DTYPE)

    @property
    def watches(self) -> bool:
        """Does the policy ever look again?"""
        return self.scorer is not None or not math.isinf(self.policy.decision_interval_s)

    def prepare(self) -> None:
        """The policy begins anew."""
        with beside(self.policy):
            ask(self.policy, "prepare", self.system, self._training)
            predictor = ask(self.policy, "predictor")
        self._predictor: LengthPredictor | None = predictor

    def mirror(self) -> Mirror:
        """What a View reads, made when it is first needed."""
        if self._mirror is None:
            self._mirror = Mirror(self.system, self.slo, self.counts)
            if self.scorer is not None:
                with blaming(self.policy, "scorer"):
                    self._mirror.score_with(self.scorer)
            self._give_limits()
        return self._mirror

    def _give_limits(self) -> None:
        if not self._limits:
            self._limits = True
            mirror = self.mirror()
            for entry in self._entries.values():
                mirror.limits(entry)

    def needs_limits(self, knobs: Knobs, present: Iterable[Any]) -> None:
        """Requests get their deadlines where these knobs go by them."""
        if knobs.order in HEEDS_HOPELESS or knobs.victim == Victim.LATEST_DEADLINE:
            self._give_limits()

    def arrive(self, entry: Entry) -> None:
        """A request has come: what is predicted of it, and its limits where somebody goes by them."""
        self._entries[entry.seq] = entry
        if self._predictor is not None:
            with beside(self.policy), blaming(self.policy, "predictor"):
                predicted = float(np.asarray(self._predictor(np.array([entry.prompt_tokens]))).reshape(-1)[0])
                entry.predicted_tokens = max(round(predicted), 1)
        if self._limits:
            self.mirror().limits(entry)
        self.counts.arrive(entry)

    def leave(self, entry: Entry, output_tokens: int | None, now_s: Callable[[], float]) -> None:
        """A request is gone; without output tokens it was given up."""
        self._entries.pop(entry.seq, None)
        if output_tokens is not None:
            self.counts.finish(entry, output_tokens, now_s())
        if self._mirror is not None:
            self._mirror.leave(entry)

    def try_out(self) -> Knobs | None:
        """Asks once about a made-up request, so that what is refused is known, and kernels are compiled, before
        anything is served; then the policy begins anew. Returns its knobs, if that is what it decided."""
        entry = Entry(0, 0.0, MADE_UP_PROMPT_TOKENS)
        self._entries[0] = entry
        request = SimpleNamespace(
            num_output_tokens=0, num_computed_tokens=0, is_prefill_chunk=False, num_preemptions=0, **{NAME: entry}
        )
        request.num_tokens = MADE_UP_PROMPT_TOKENS
        here = Present(0.0, [request], [], 0)
        decision, _ = self.decide(here)
        if self.scorer is not None:
            self.score(here, Knobs())
        if isinstance(decision, Knobs):
            self.needs_limits(decision, ())
        del self._entries[0]
        if self._mirror is not None:
            self._mirror.leave(entry)
        self.prepare()
        return decision if isinstance(decision, Knobs) else None

    def decide(self, here: Present) -> tuple[Knobs | Plan, Scores | None]:
        """Asks the policy. Raises what l3env raises for its mistakes."""
        policy, now_s = self.policy, here.now_s
        with beside(policy):
            decision = ask(policy, "decide", ServingView(self.mirror, self.system, self.counts, here), at_s=now_s)
        if isinstance(decision, Plan):
            with blaming(policy, "decide", now_s):
                check_plan(decision)
            return decision, None
        if isinstance(decision, Scored):
            with blaming(policy, "decide", now_s):
                scores = decision.checked()
            return decision.knobs, scores
        if not isinstance(decision, Knobs):
            raise wrong_answer(policy, "decide", shown(decision), now_s)
        return decision, None

    def score(self, here: Present, knobs: Knobs) -> tuple[Knobs, list[Any]]:
        """Lets the compiled scorer decide: (knobs, requests that it gives up); scores are in the entries."""
        mirror = self.mirror()
        mirror.show(here)
        engine, row = mirror.engine, self._scored
        knobs.write(row, 0)
        kernels.decide(engine.tables, engine.state, row, 0)
        req = engine.state.req
        for request in (*here.waiting, *here.running):
            entry_of(request).score = float(req["score"][0, entry_of(request).slot])
        assert isinstance(engine.state.scorer, np.ndarray)
        self.floor = float(engine.state.scorer[0, Score.FLOOR])
        lost = [each for each in here.running if req["status"][0, entry_of(each).slot] == Status.WAITING]
        changes = {name: row[name][0] for name in SCORED_KNOBS}
        changes |= {"order": Order(int(changes["order"])), "victim": Victim(int(changes["victim"]))}
        return dataclasses.replace(knobs, **{name: _plain(value) for name, value in changes.items()}), lost


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
