"""What a scheduling policy is: it looks at a View and returns Knobs, with scores of requests if it likes, or a Plan.

Only a policy whose name starts with ``oracle-`` may ask for the truth (``wants_truth``), and it gets it as its length
predictor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from l3env.engine.engine import Slo
from l3env.knobs import Knobs
from l3env.machine.tables import Tables
from l3env.policy.plan import Plan, Scored
from l3env.policy.view import View
from l3env.requests.workload import Workload

LengthPredictor = Callable[[NDArray[np.int64]], NDArray[np.float64]]


class Role(StrEnum):
    """What a policy is in a comparison."""

    HEURISTIC = "heuristic"  # rules; nothing of it was searched or trained
    PUBLISHED = "published"  # rules of a paper or an engine, as near to them as the engine here allows
    TUNED = "tuned"  # fixed settings that a search found
    PLANNER = "planner"  # tries its decisions out on imagined futures
    LEARNED = "learned"  # trained beforehand
    ORACLE = "oracle"  # knows the truth: an upper reference
    FLOOR = "floor"  # a lower one


class Policy(Protocol):
    """A scheduling policy: everything that may be asked of one. ``BasePolicy`` has defaults for all but ``decide``."""

    name: str
    role: Role
    decision_interval_s: float
    decides_at_events: bool
    wants_truth: bool
    slo: Slo

    def prepare(self, system: Tables, training: Workload | None) -> None: ...

    def predictor(self) -> LengthPredictor | None: ...

    def scorer(self) -> NDArray[np.float64] | None: ...

    def decide(self, view: View) -> Knobs | Scored | Plan: ...

    def score_segments(self, segments: NDArray[np.void]) -> NDArray[np.float64]: ...

    def figures(self) -> dict[str, float]: ...


HOOKS = tuple(name for name in (*Policy.__annotations__, *vars(Policy)) if not name.startswith("_"))
"""Names of all that ``Policy`` asks for."""


class BasePolicy:
    """Defaults: decide at every iteration, no length predictor, nothing to prepare.

    Attributes:
        name: what tables call it.
        role: what it is in a comparison; lists of policies go by it.
        source: the paper or code that it follows, in a few words; none where it is our own.
        signals: what it goes by besides arrivals, prompts and free memory, in a few words.
        reference_with_pim: True, False: ``utilization`` refers to its capacity on systems with, without a PIM side.
        decision_interval_s: simulated time for which returned Knobs hold; 0 decides at every iteration, infinity once.
            After a Plan the policy is always asked again at the next iteration.
        decides_at_events: it is asked at every arrival, finish and preemption, too.
        wants_truth: the predictor is the true output length; only for names that start with ``oracle-``.
        slo: the objective of the run; set before ``prepare``.
    """

    name = "unnamed"
    role = Role.HEURISTIC
    source = ""
    signals = ""
    reference_with_pim: bool | None = None
    decision_interval_s = 0.0
    decides_at_events = False
    wants_truth = False
    slo = Slo()

    def prepare(self, system: Tables, training: Workload | None) -> None:
        """Called before each replica's run: the machine, and earlier requests to learn from, None without.

        What a policy has seen of another run is forgotten here.
        """

    def predictor(self) -> LengthPredictor | None:
        """Predicts output lengths from prompts, for orders and reservations that use them."""
        return None

    def scorer(self) -> NDArray[np.float64] | None:
        """(len(Score),) weights of a compiled scorer that sets scores and iteration lengths beside the knobs; see
        ``kernels.scorer``. Asked for once, after ``prepare``."""
        return None

    def decide(self, view: View) -> Knobs | Scored | Plan:
        """The one method a policy must have: settings that hold until the next decision, or the next iteration."""
        raise NotImplementedError

    def score_segments(self, segments: NDArray[np.void]) -> NDArray[np.float64]:
        """What cached prompt segments are worth, -1 to 1: where room is needed the lowest goes first.

        Asked before every decision, where the prefix cache's rule is ``score``.

        Args:
            segments: (n,) rows of ``SEGMENT_ROW_DTYPE`` (``l3env.engine.segments``): those that nobody holds, longest
                idle first.

        Returns:
            (n,) scores. They last until the next time; a segment that was never scored has 0.
        """
        return np.zeros(segments.size)

    def figures(self) -> dict[str, float]:
        """Figures of its own that a run's results should show, such as errors of its predictions."""
        return {}


class FixedKnobs(BasePolicy):
    """A policy that sets its knobs once. Runs compiled from start to end.

    Args:
        changes: fields of ``knobs`` that differ, as in ``sarathi?prefill_budget_tokens=2048``.
    """

    decision_interval_s = math.inf

    def __init__(self, name: str, knobs: Knobs, **changes: Any) -> None:
        self.name = name
        self.knobs = dataclasses.replace(knobs, **changes)

    def decide(self, view: View) -> Knobs:
        return self.knobs
