"""What a scheduling policy is: it looks at a View and returns Knobs or a Plan. Also the registry of policies.

A policy never holds an engine array: a View gathers what it is asked for into fresh rows, of present requests only, and
true output lengths are not in it. Only a policy whose name starts with ``oracle-`` may ask for the truth
(``wants_truth``), and it gets it as its length predictor.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from l3env.engine import Engine, Slo
from l3env.errors import PlanError, PolicyError
from l3env.kernels import look
from l3env.kernels.plan import ANY_PIM, AUTO, DECOMPRESSED, Op
from l3env.rollout import Rollouts, present_idx
from l3env.state import KNOB_DTYPE, SUB_BATCHES, Budget, Eviction, Order, PimForm, Status, SubBatching, Victim
from l3env.tables import Tables
from l3env.workload import Workload

UNLIMITED = 1 << 30
PLACES = {"auto": AUTO, "pim": ANY_PIM, "pim-decompressed": DECOMPRESSED, "hbm": 0}
ENTRY_POINT_GROUP = "l3env.policies"


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


@dataclass(frozen=True)
class Plan:
    """One iteration, decided by the policy itself. Requests are named by the indices of the View.

    Decoding requests go on by themselves; blocks for their growth are taken before admissions, and where they do not
    fit the newest are preempted. An illegal plan raises PlanError.

    Attributes:
        admit: waiting requests to start; a sequence, or a mapping to a place: "auto" (PIM where there is room, else
            HBM), "hbm", "pim", "pim-decompressed" (models that store a latent) or a pool number.
        prefill: prompt tokens for each prefilling request, the new ones included; None gives all their whole rest.
        sub_batch: 0 or 1 for requests that are admitted, moved or resumed; the others stay, new ones go to the smaller.
        preempt: running requests to drop for recomputing.
        pause, resume: decoding requests that keep their KV and stop, and start again.
        decode: False stalls all decoding for this iteration.
        interleave: two interleaved sub-batches; False runs one batch. Without PIM there is always one.
        multi_token: verify a guessed token beside the next one, for models that guess.
    """

    admit: Sequence[int] | Mapping[int, str | int] = ()
    prefill: Mapping[int, int] | None = None
    sub_batch: Mapping[int, int] | None = None
    preempt: Sequence[int] = ()
    pause: Sequence[int] = ()
    resume: Sequence[int] = ()
    decode: bool = True
    interleave: bool = True
    multi_token: bool = True

    def operations(self) -> NDArray[np.int64]:
        """(M, 4) operations in the engine's order. Raises PlanError for a place that does not exist."""
        subs = dict(self.sub_batch or {})
        places = self.admit if isinstance(self.admit, Mapping) else dict.fromkeys(self.admit, "auto")
        rows: list[tuple[int, int, int, int]] = [(Op.PREEMPT, r, 0, 0) for r in self.preempt]
        rows += [(Op.PAUSE, r, 0, 0) for r in self.pause]
        resumed = [(Op.RESUME, r, subs.pop(r, AUTO), 0) for r in self.resume]
        admitted = [(Op.ADMIT, r, _pool(r, place), subs.pop(r, AUTO)) for r, place in places.items()]
        rows += [(Op.MOVE, r, sub, 0) for r, sub in subs.items()]
        rows += resumed + admitted
        rows += [(Op.PREFILL, r, tokens, 0) for r, tokens in (self.prefill or {}).items()]
        return np.array(rows, dtype=np.int64).reshape(-1, 4)


def _pool(request: int, place: str | int) -> int:
    if isinstance(place, str):
        if place not in PLACES:
            raise PlanError(f"plan: request {request}: place {place!r}; expected a pool number or {', '.join(PLACES)}")
        return PLACES[place]
    return int(place)


ROW_DTYPE = np.dtype(
    [
        ("idx", np.int64),
        ("status", np.int8),
        ("sub_batch", np.int8),
        ("pool", np.int64),  # -1 while waiting
        ("lane", np.int64),
        ("arrival_s", np.float64),
        ("ttft_deadline_s", np.float64),
        ("tbt_slo_s", np.float64),
        ("ttft_alone_s", np.float64),
        ("prompt_tokens", np.int64),
        ("prefill_left_tokens", np.int64),
        ("emitted_tokens", np.int64),
        ("kv_tokens", np.int64),
        ("predicted_tokens", np.int64),  # the policy's own prediction; 0 without a predictor
        ("first_token_s", np.float64),
        ("preemptions_count", np.int64),
        ("admitted_seq", np.int64),
    ],
    align=True,
)


FINISHED_DTYPE = np.dtype(
    [("idx", np.int64), ("arrival_s", np.float64), ("prompt_tokens", np.int64), ("output_tokens", np.int64)]
)


@dataclass(frozen=True)
class PoolView:
    """A memory pool: 0 is HBM, the others are the PIM side's."""

    capacity_blocks: NDArray[np.int64]  # (P,)
    used_blocks: NDArray[np.int64]  # (P,)
    block_tokens: int

    @property
    def free_tokens(self) -> NDArray[np.int64]:
        """(P,) tokens that still fit."""
        return (self.capacity_blocks - self.used_blocks) * self.block_tokens


class View:
    """What a real scheduler could know, at one decision. Made fresh each time; arrays handed out are copies."""

    def __init__(self, engine: Engine, e: int) -> None:
        self._engine, self._e = engine, e
        self._env = engine.state.env[e]

    @property
    def system(self) -> Tables:
        """The machine: specs, capacities, tensor-parallel degree."""
        return self._engine.pair(self._e)

    @property
    def now_s(self) -> float:
        return float(self._env["clock_s"])

    @property
    def waiting_count(self) -> int:
        return int(self._env["waiting_count"])

    @property
    def running_count(self) -> int:
        return int(self._env["running_count"])

    @property
    def arrived_count(self) -> int:
        return int(self._env["arrived_count"])

    @property
    def finished_count(self) -> int:
        return int(self._env["finished_count"])

    def waiting(self, limit: int = 64, order: Order = Order.FCFS) -> NDArray[np.void]:
        """The first ``limit`` waiting requests of an order as ROW_DTYPE rows."""
        found = np.empty(min(limit, self.waiting_count), np.int64)
        frontier = np.empty(found.size + 2, np.int64)
        count = look.peek_queue(self._engine.tables, self._engine.state, self._e, int(order), found, frontier)
        return self._rows(found[:count])

    @cached_property
    def running(self) -> NDArray[np.void]:
        """All running requests (prefilling, decoding, paused) as ROW_DTYPE rows."""
        return self._rows(self._engine.state.lists["running"][self._e, : self.running_count].astype(np.int64))

    @cached_property
    def prefilling(self) -> NDArray[np.void]:
        """The prefilling ones in order of admission."""
        count = int(self._env["prefill_count"])
        return self._rows(self._engine.state.lists["prefill"][self._e, :count].astype(np.int64))

    @property
    def present(self) -> NDArray[np.void]:
        """All requests that wait or run as ROW_DTYPE rows, by index."""
        return self._rows(present_idx(self._engine, self._e))

    def imagine(
        self,
        rollouts: Rollouts,
        scenario: int,
        output_tokens: NDArray[np.int64],
        future: Workload | None = None,
        slo: Slo | None = None,
    ) -> None:
        """Copies the present into a scenario of ``rollouts``, true output lengths and arrivals to come left out.

        Args:
            output_tokens: one for each of ``present``: imagined, and more than it has emitted.
            future: imagined arrivals.
        """
        idx = present_idx(self._engine, self._e)
        rollouts.imagine(self._engine, self._e, idx, scenario, output_tokens, future, slo or Slo())

    @property
    def finished(self) -> NDArray[np.void]:
        """All finished requests as FINISHED_DTYPE rows, by index: their lengths are known by now."""
        req = self._engine.state.req[self._e, : int(self._env["requests_count"])]
        idx = np.flatnonzero(req["status"] == Status.FINISHED)
        rows = np.empty(idx.size, FINISHED_DTYPE)
        rows["idx"] = idx
        for name, column in (("arrival_s", "arrival_s"), ("prompt_tokens",) * 2, ("output_tokens", "emitted_tokens")):
            rows[name] = req[column][idx]
        return rows

    @property
    def decoding(self) -> NDArray[np.void]:
        return self.running[self.running["status"] == Status.DECODE]

    @property
    def paused(self) -> NDArray[np.void]:
        return self.running[self.running["status"] == Status.PAUSED]

    def _rows(self, idx: NDArray[np.int64]) -> NDArray[np.void]:
        rows = np.zeros(idx.size, ROW_DTYPE)
        look.gather(self._engine.tables, self._engine.state, self._e, idx, rows)
        return rows

    @property
    def pools(self) -> PoolView:
        """Capacity and use of the KV pools."""
        tables, table = self._engine.tables, int(self._env["table_idx"])
        count = int(tables.coef["pools_count"][table])
        return PoolView(
            tables.pool_blocks[table, :count].copy(),
            self._engine.state.pool["used"][self._e, :count].copy(),
            self.system.block_tokens,
        )

    @property
    def last_iteration(self) -> dict[str, float]:
        """What was measured of the last iteration: duration, device times per phase (GPU attention apart), tokens."""
        phases = [f"{name}_{i}_s" for name in ("gpu", "attention", "pim", "transfer") for i in (0, 1)]
        names = ["iteration_s", *phases, "prefill_tokens", "decode_tokens"]
        return {name: float(self._env[f"last_{name}"]) for name in names}

    @property
    def totals(self) -> dict[str, float]:
        """Sums since the start: busy times, tokens, preemptions."""
        names = ("busy_s", "gpu_busy_s", "pim_busy_s", "output_tokens", "prefill_tokens", "preemptions_count")
        return {name: float(self._env[name]) for name in names}


LengthPredictor = Callable[[NDArray[np.int64]], NDArray[np.float64]]
"""Prompt tokens (N,) -> predicted output tokens (N,). Row by row: no request may influence another's prediction."""


class Policy(Protocol):
    """A scheduling policy. ``decide`` is all it needs; see ``BasePolicy`` for the defaults of the rest."""

    name: str
    decision_interval_s: float
    wants_truth: bool
    slo: Slo

    def prepare(self, system: Tables, training: Workload | None) -> None: ...

    def predictor(self) -> LengthPredictor | None: ...

    def decide(self, view: View) -> Knobs | Plan: ...

    def figures(self) -> dict[str, float]: ...


class BasePolicy:
    """Defaults: decide at every iteration, no length predictor, nothing to prepare.

    Attributes:
        name: what tables call it.
        decision_interval_s: simulated time for which returned Knobs hold; 0 decides at every iteration, infinity once.
            After a Plan the policy is always asked again at the next iteration.
        wants_truth: the predictor is the true output length; only for names that start with ``oracle-``.
        slo: the objective of the run; set before ``prepare``.
    """

    name = "unnamed"
    decision_interval_s = 0.0
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

    def decide(self, view: View) -> Knobs | Plan:
        raise NotImplementedError

    def score_segments(self, segments: NDArray[np.void]) -> NDArray[np.float64]:
        """What cached prompt segments are worth, -1 to 1: where room is needed the lowest goes first.

        Asked before every decision, where the prefix cache's rule is ``score``.

        Args:
            segments: (n,) rows of ``l3env.prefix.SEGMENT_ROW_DTYPE``: those that nobody holds, longest idle first.

        Returns:
            (n,) scores. They last until the next time; a segment that was never scored has 0.
        """
        return np.zeros(segments.size)

    def figures(self) -> dict[str, float]:
        """Figures of its own that a run's results should show, such as errors of its predictions."""
        return {}


class FixedKnobs(BasePolicy):
    """A policy that sets its knobs once. Runs compiled from start to end."""

    decision_interval_s = math.inf

    def __init__(self, name: str, knobs: Knobs) -> None:
        self.name = name
        self.knobs = knobs

    def decide(self, view: View) -> Knobs:
        return self.knobs


_registered: dict[str, Callable[[], Policy]] = {}


def register_policy(name: str, factory: Callable[[], Policy]) -> None:
    """Makes a policy known under a name in this process (a package would use the ``l3env.policies`` entry points)."""
    _registered[name] = factory


def policy_names() -> list[str]:
    """All policies known by name."""
    return sorted({*_registered, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def policy_factories() -> dict[str, Callable[[], Policy]]:
    """Name -> factory of every policy known."""
    found = {point.name: cast(Callable[[], Policy], point.load()) for point in entry_points(group=ENTRY_POINT_GROUP)}
    return found | _registered


def make_policy(ref: str) -> Policy:
    """A fresh policy by name, or from a file: ``my_policy.py:ClassName``.

    Raises:
        PolicyError: unknown name, file or class, or something that is no policy.
    """
    if ".py:" in ref:
        factory = _from_file(ref)
    elif ref in _registered:
        factory = _registered[ref]
    else:
        points = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
        if ref not in points:
            close = difflib.get_close_matches(ref, policy_names(), n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise PolicyError(f"unknown policy {ref!r}{hint}; there are: {', '.join(policy_names())}; or file.py:Class")
        factory = points[ref].load()
    policy = factory()
    return check_policy(policy, ref)


def check_policy(policy: Any, ref: str) -> Policy:
    """Raises PolicyError where an object does not keep the protocol, or wants the truth without saying so."""
    needed = ("name", "decision_interval_s", "wants_truth", "prepare", "predictor", "decide", "figures")
    missing = [name for name in needed if not hasattr(policy, name)]
    if missing:
        raise PolicyError(f"{ref}: not a policy: lacks {', '.join(missing)} (derive from l3env.BasePolicy)")
    if policy.wants_truth and not policy.name.startswith("oracle-"):
        raise PolicyError(
            f"{ref}: policy {policy.name!r} wants true output lengths; its name must start with 'oracle-'"
        )
    return cast(Policy, policy)


def _from_file(ref: str) -> Callable[[], Policy]:
    file, _, attribute = ref.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise PolicyError(f"{ref}: no such file {file!r}")
    spec = importlib.util.spec_from_file_location(f"l3env_user_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise PolicyError(f"{ref}: {path} fails to import: {type(error).__name__}: {error}") from error
    factory = getattr(module, attribute, None)
    if factory is None or not callable(factory):
        classes = [name for name, value in vars(module).items() if inspect.isclass(value)]
        raise PolicyError(f"{ref}: {path} has no class {attribute!r}; it has {', '.join(classes) or 'none'}")
    return cast(Callable[[], Policy], factory)


def knob_names() -> list[str]:
    """Fields of Knobs in order."""
    return [field.name for field in fields(Knobs)]


assert tuple(knob_names()) == KNOB_DTYPE.names
assert SUB_BATCHES == 2
