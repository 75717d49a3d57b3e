"""What a policy sees of vLLM: its requests and memory as the present of one of l3env's environments.

A View is cheap until it is looked at: then the present is written into an environment, and everything that reads one
(rows, features, scorers) works on it as in a simulation.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from l3env.choices import Status
from l3env.engine import state as st
from l3env.engine.engine import Engine, Slo
from l3env.engine.kernels import present
from l3env.errors import PolicyError
from l3env.machine.tables import Tables
from l3env.policy.view import FINISHED_DTYPE, View
from l3env.requests.workload import Workload
from l3env.vllm.entries import Entry, entry_of

FIRST_ROOM = 1024  # requests
FINISHED_KEPT, NEWS_KEPT = 10_000, 4_096


class Totals(dict[str, float]):
    """Measured figures by name. Raises PolicyError for one that vLLM does not measure."""

    def __missing__(self, name: str) -> NoReturn:
        raise PolicyError(f"view: {name!r} is not known under vLLM; expected one of {', '.join(self)}")


@dataclass
class Counts:
    """What happened since the start; times in seconds."""

    arrived: int = 0
    finished: int = 0
    preempted: int = 0
    admitted: int = 0
    busy_s: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    last_s: float = 0.0
    last_prefill_tokens: int = 0
    last_decode_tokens: int = 0

    new: deque[Entry] = field(default_factory=lambda: deque(maxlen=NEWS_KEPT))  # not shown yet: arrivals,
    ended: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=NEWS_KEPT))  # (outputs, 1: SLO met)
    rows: deque[tuple[int, float, int, int]] = field(default_factory=lambda: deque(maxlen=FINISHED_KEPT))

    @property
    def events(self) -> int:
        """Arrivals, finishes and preemptions so far."""
        return self.arrived + self.finished + self.preempted

    def arrive(self, entry: Entry) -> None:
        """A request has come."""
        self.arrived += 1
        self.new.append(entry)

    def finish(self, entry: Entry, output_tokens: int, now_s: float) -> None:
        """A request has got its last token."""
        self.finished += 1
        in_time = entry.first_token_s <= entry.arrival_s + entry.ttft_slo_s
        met = in_time and now_s - entry.first_token_s <= max(output_tokens - 1, 1) * entry.tbt_slo_s
        self.ended.append((output_tokens, float(met)))
        self.rows.append((entry.slot, entry.arrival_s, entry.prompt_tokens, output_tokens))


@dataclass
class Present:
    """vLLM's state now: its own requests, and blocks in use."""

    now_s: float
    waiting: Sequence[Any]
    running: Sequence[Any]
    used_blocks: int


def with_memory(tables: Tables, blocks_count: int, block_tokens: int) -> Tables:
    """The same machine with as many KV blocks as vLLM has."""
    coef, blocks = tables.arrays.coef.copy(), tables.arrays.pool_blocks.copy()
    coef["block_tokens"], blocks[0, 0] = block_tokens, blocks_count
    return dataclasses.replace(tables, arrays=tables.arrays._replace(coef=coef, pool_blocks=blocks))


class Mirror:
    """One environment that shows what is present.

    Args:
        tables: the machine; see ``with_memory``.
    """

    def __init__(self, tables: Tables, slo: Slo, counts: Counts) -> None:
        self.tables, self.slo, self.counts = tables, slo, counts
        self.engine = Engine(self.tables, 1, FIRST_ROOM)
        self._free: deque[int] = deque()
        self._reset()

    def _reset(self) -> None:
        one = Workload.build("made up", [0.0], [st.NOMINAL_PROMPT_TOKENS], [2])
        self.engine.reset(0, one, slo=dataclasses.replace(self.slo, form="mean-tbt"))
        self.engine.state.req["status"][0, 0] = Status.FINISHED
        for name in ("frontend_s", "arrived_count", "last_arrival_s"):
            self.engine.state.env[name][0] = 0
        self._free = deque(range(self.engine.state.req.shape[1]))

    def score_with(self, weights: NDArray[np.float64]) -> None:
        """A compiled scorer decides from here on."""
        self.engine.score_with(0, weights)

    def limits(self, entry: Entry) -> None:
        """Its SLO, and what it takes alone on the machine."""
        ttft_s, tbt_s = self.engine.alone_latencies(np.array([max(entry.prompt_tokens, 1)]))
        slo = self.slo
        entry.ttft_alone_s = float(ttft_s[0])
        entry.ttft_slo_s = slo.ttft_s if slo.ttft_s is not None else slo.ttft_scale * entry.ttft_alone_s
        entry.tbt_slo_s = slo.tbt_s if slo.tbt_s is not None else slo.tbt_scale * float(tbt_s[0])

    def leave(self, entry: Entry) -> None:
        """A request is gone; its slot may be given to another, the longest unused first."""
        if entry.slot >= 0:
            self.engine.state.req["status"][0, entry.slot] = Status.FINISHED
            self._free.append(entry.slot)

    def _seat(self, entries: Iterable[Entry]) -> None:
        """Slots for those who have none, and what of them never changes."""
        req = self.engine.state.req
        for entry in entries:
            if entry.slot >= 0:
                continue
            if not self._free:
                self._grow()
                req = self.engine.state.req
            entry.slot = self._free.popleft()
            for name, value in (
                ("arrival_s", entry.arrival_s),
                ("ttft_alone_s", entry.ttft_alone_s),
                ("ttft_slo_s", entry.ttft_slo_s),
                ("tbt_slo_s", entry.tbt_slo_s),
                ("prompt_tokens", entry.prompt_tokens),
                ("predicted_tokens", entry.predicted_tokens),
            ):
                req[name][0, entry.slot] = value

    def _grow(self) -> None:
        """Twice the room; observers hold on to the engine, so it stays."""
        old, count = self.engine.state, self.engine.state.req.shape[1]
        fresh = Engine(self.tables, 1, 2 * count).state
        for name in ("env", "pool", "sub"):
            getattr(fresh, name)[...] = getattr(old, name)
        fresh.req[0, :count] = old.req[0]
        self.engine.state = fresh._replace(scorer=old.scorer)
        self._free.extend(range(count, 2 * count))

    def show(self, now: Present) -> None:
        """Writes the present into the environment."""
        running = sorted(now.running, key=lambda request: entry_of(request).admitted_seq)
        entries = [entry_of(request) for request in (*now.waiting, *running)]
        self._seat(entries)
        engine, counts, waits = self.engine, self.counts, len(now.waiting)
        req, env = engine.state.req, engine.state.env
        slots = np.array([entry.slot for entry in entries], np.int64)
        env["requests_count"][0] = req.shape[1]
        self._write(slots, (*now.waiting, *running), waits)
        for name, value in (
            ("clock_s", now.now_s),
            ("seen_s", now.now_s),
            ("preemptions_count", counts.preempted),
            ("admitted_seq", counts.admitted),
            ("admitted_count", counts.admitted),
            ("busy_s", counts.busy_s),
            ("gpu_busy_s", counts.busy_s),
            ("output_tokens", counts.decode_tokens),
            ("prefill_tokens", counts.prefill_tokens),
            ("decode_tokens", counts.decode_tokens),
            ("last_iteration_s", counts.last_s),
            ("last_prefill_tokens", counts.last_prefill_tokens),
            ("last_decode_tokens", counts.last_decode_tokens),
        ):
            env[name][0] = value
        arrived = np.array([entry.slot for entry in counts.new if entry.slot >= 0], np.int64)
        tokens = np.array([each[0] for each in counts.ended], np.int64)
        met = np.array([each[1] for each in counts.ended], np.float64)
        counts.new.clear()
        counts.ended.clear()
        present.show(
            engine.tables, engine.state, 0, slots[:waits], slots[waits:], now.used_blocks, arrived, tokens, met
        )
        env["arrived_count"][0], env["finished_count"][0] = counts.arrived, counts.finished

    def _write(self, slots: NDArray[np.int64], requests: Sequence[Any], waits: int) -> None:
        """What changes of those present."""
        req = self.engine.state.req
        entries = [entry_of(request) for request in requests]
        emitted = np.array([request.num_output_tokens for request in requests], np.int32)
        # what async scheduling has planned ahead counts as computed
        computed = np.array([request.num_computed_tokens for request in requests], np.int32)
        prompt = np.array([entry.prompt_tokens for entry in entries], np.int32)
        begun = np.array([request.is_prefill_chunk or request.num_computed_tokens == 0 for request in requests], bool)
        target = prompt + emitted
        computed[:waits] = 0
        prefilled = np.where(begun, np.minimum(computed, target), target)
        req["target_tokens"][0, slots] = target
        req["prefilled_tokens"][0, slots] = prefilled
        req["held_tokens"][0, slots] = prefilled
        req["emitted_tokens"][0, slots] = emitted
        req["kv_tokens"][0, slots] = np.where(begun, 0, computed)
        req["chunk_tokens"][0, slots] = 0
        req["preemptions_count"][0, slots] = [request.num_preemptions for request in requests]
        for name in ("first_token_s", "score", "hopeless", "admitted_seq"):
            req[name][0, slots] = [getattr(entry, name) for entry in entries]


class ServingView(View):
    """What a policy may look at under vLLM; ``idx`` names a request while it is present. Raises PolicyError for what a
    running server cannot give."""

    def __init__(self, made: Callable[[], Mirror], system: Tables, counts: Counts, now: Present) -> None:
        self._made, self._system, self._counts, self._now = made, system, counts, now
        self._shown: Engine | None = None

    @property
    def _engine(self) -> Engine:  # type: ignore[override]
        if self._shown is None:
            mirror = self._made()
            mirror.show(self._now)
            self._shown = mirror.engine
        return self._shown

    _e = 0

    @property
    def _env(self) -> Any:
        return self._engine.state.env[0]

    @property
    def system(self) -> Tables:
        return self._system

    @property
    def now_s(self) -> float:
        """Seconds since the scheduler began."""
        return self._now.now_s

    @property
    def waiting_count(self) -> int:
        return len(self._now.waiting)

    @property
    def running_count(self) -> int:
        return len(self._now.running)

    def imagine(self, *args: Any, **kwargs: Any) -> None:
        """Refused."""
        raise PolicyError("view.imagine: a server that runs cannot wait for imagined futures")

    @property
    def finished(self) -> NDArray[np.void]:
        """The last 10,000 finished requests as FINISHED_DTYPE rows; ``idx`` may have been given to others since."""
        return np.array(list(self._counts.rows), FINISHED_DTYPE)

    @property
    def last_iteration(self) -> dict[str, float]:
        """Duration of the last iteration and its tokens; times of phases are not measured."""
        counts = self._counts
        found = {f"{side}_{sub}_s": 0.0 for side in ("pim", "transfer") for sub in (0, 1)}
        found |= {"iteration_s": counts.last_s, "gpu_0_s": counts.last_s, "gpu_1_s": 0.0}
        return Totals(
            found | {"prefill_tokens": counts.last_prefill_tokens, "decode_tokens": counts.last_decode_tokens}
        )

    @property
    def totals(self) -> dict[str, float]:
        """Sums since the start. Busy is all time with a request present."""
        counts = self._counts
        return Totals(
            busy_s=counts.busy_s,
            gpu_busy_s=counts.busy_s,
            pim_busy_s=0.0,
            output_tokens=counts.decode_tokens,
            prefill_tokens=counts.prefill_tokens,
            preemptions_count=counts.preempted,
        )
