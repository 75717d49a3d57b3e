"""Random runs of the engine with all that is conserved checked at every iteration, and a sample of them run four ways.

An episode is a random machine and random requests. Knobs change at every iteration; between stretches of iterations
requests are added, running ones are preempted or paused by random plans, and states are copied, gone back to and run
twice.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from l3env.choices import Eviction, Status
from l3env.engine import state as st
from l3env.engine.engine import Stop, Until
from l3env.engine.state import PrefixArrays
from l3env.errors import PlanError
from l3env.policy.plan import Plan
from l3env.policy.view import View
from tests.campaigns import conserve
from tests.campaigns.conserve import Broken
from tests.campaigns.random_runs import Scene, knobs, rows_of, scene
from tests.engine.beside_reference import STOPS, compare
from tests.engine.engine_cases import Case
from tests.engine.reference_simulator import ReferenceSimulator
from tests.engine.test_engine_properties import check, legal_plan, same_bits

REFERENCE_EVERY = 40  # episodes
MOST_ITERATIONS = 20_000  # of an episode
GROWN = 60  # requests added to an episode, at most


@dataclass
class Tally:
    """What a campaign has done."""

    counts: Counter[str] = field(default_factory=Counter)
    wall_s: float = 0.0

    def lines(self) -> list[str]:
        """Figures, one a line."""
        return [f"{name}: {count:,}" for name, count in self.counts.items()] + [f"seconds: {self.wall_s:,.0f}"]


class Episode:
    """An engine, and the ledger beside it."""

    def __init__(self, made: Scene, capacity: int, compiled: bool = True) -> None:
        self.made, self.capacity, self.compiled = made, capacity, compiled
        self.engine = made.engine(capacity)
        self.ledger = np.zeros(capacity, conserve.LEDGER_DTYPE)
        self.sums = np.zeros(1, conserve.SUMS_DTYPE)
        self.limits = np.ones(1)

    def _scratch(self):
        prefix = self.engine.state.prefix
        slots = prefix.slot.shape[2] if isinstance(prefix, PrefixArrays) else 1
        exact = self.made.eviction == Eviction.OFF
        pools = self.engine.state.pool.shape[1]
        return self.ledger, self.sums, np.zeros(pools, np.int64), np.zeros((pools, slots), np.int64), exact

    def drive(self, settings, picks) -> Stop:
        """Iterations under rows of settings. Raises AssertionError that names what is not conserved."""
        engine = self.engine
        if not self.compiled:
            return self._drive_one_by_one(settings, picks)
        broken = conserve.drive(
            engine.tables, engine.state, engine.knobs, 0, settings, picks, self.limits, *self._scratch()
        )
        assert broken == Broken.NOTHING, f"{Broken(broken).name} after {self.sums[0]}"
        return engine.stop(0)

    def _drive_one_by_one(self, settings, picks) -> Stop:
        """Slower, without a loop that is compiled for nothing else."""
        env = self.engine.state.env[0]
        for pick in picks:
            self.engine.knobs[0] = settings[pick]
            before = int(env["iterations_count"])
            stop = self.engine.run(0, Until.ITERATIONS, 1)
            self.sums[0]["iterations"] += int(env["iterations_count"]) - before
            self.check()
            if stop != Stop.RUNNING:
                break
        return self.engine.stop(0)

    def check(self) -> None:
        """After what was done outside of ``drive``."""
        broken = conserve.check(self.engine.tables, self.engine.state, 0, *self._scratch())
        assert broken == Broken.NOTHING, Broken(broken).name

    def snapshot(self):
        """All there is, to go back to."""
        return st.copy(self.engine.state), self.engine.knobs.copy(), self.ledger.copy(), self.sums.copy()

    def restore(self, kept) -> None:
        state, held, self.ledger, self.sums = kept
        self.engine.state, self.engine.knobs = st.copy(state), held.copy()
        self.ledger, self.sums = self.ledger.copy(), self.sums.copy()


def do_plan(episode: Episode, rng: np.random.Generator) -> str:
    """A random plan: preempts, pauses, moves, admits. Who was paused goes on."""
    engine = episode.engine
    if engine.await_work(0, 1) == Stop.DONE or engine.stop(0) == Stop.DONE:
        return "plans"
    plan = legal_plan(View(engine, 0), rng)
    try:
        before = int(engine.state.env["iterations_count"][0])
        engine.step_plan(
            0, plan.operations(), prefill_all=plan.prefill is None, decode=plan.decode, interleaved=plan.interleave
        )
        episode.sums[0]["iterations"] += int(engine.state.env["iterations_count"][0]) - before
    except PlanError:
        pass
    episode.check()
    paused = View(engine, 0).paused["idx"].tolist()
    if paused and engine.stop(0) != Stop.DONE:
        engine.step_plan(0, Plan(resume=paused).operations(), prefill_all=False, decode=True, interleaved=True)
        episode.check()
    return "plans"


def do_append(episode: Episode, rng: np.random.Generator) -> str:
    """Requests that arrive about now."""
    engine, made = episode.engine, episode.made
    room = episode.capacity - int(engine.state.env["requests_count"][0])
    count = min(int(rng.integers(1, 9)), room)
    if count > 0:
        more = made.more(rng, count, float(engine.state.env["clock_s"][0]))
        engine.append(0, more, slo=made.slo, predicted_tokens=more.output_tokens)
        episode.check()
    return "appends"


def do_twice(episode: Episode, rng: np.random.Generator, settings) -> str:
    """A stretch from a copied state gives the same bits again."""
    picks = rng.integers(0, len(settings), int(rng.integers(1, 40)))
    kept = episode.snapshot()
    episode.drive(settings, picks)
    ended = st.copy(episode.engine.state)
    count = int(episode.sums[0]["iterations"])
    episode.restore(kept)
    episode.drive(settings, picks)
    assert same_bits(st.arrays(ended), st.arrays(episode.engine.state))
    episode.sums[0]["iterations"] = count
    return "copies run twice"


def run_episode(rng: np.random.Generator, tally: Tally, compiled: bool = True) -> None:
    made = scene(rng)
    episode = Episode(made, len(made.workload) + int(rng.integers(0, GROWN + 1)), compiled)
    settings = rows_of([knobs(rng) for _ in range(8)])
    kept = None
    for _ in range(400):
        stop = episode.drive(settings, rng.integers(0, len(settings), int(rng.integers(1, 120))))
        if episode.sums[0]["iterations"] > MOST_ITERATIONS:
            break
        full = int(episode.engine.state.env["requests_count"][0]) >= episode.capacity
        if stop == Stop.DONE and full:
            break
        kind = rng.random()
        if stop == Stop.DONE or kind < 0.4:
            tally.counts[do_append(episode, rng)] += 1
        elif kind < 0.55:
            tally.counts[do_plan(episode, rng)] += 1
        elif kind < 0.7:
            tally.counts[do_twice(episode, rng, settings)] += 1
        elif kind < 0.8:
            kept = episode.snapshot()
        elif kind < 0.85 and kept is not None:
            done = int(episode.sums[0]["iterations"])
            episode.restore(kept)
            episode.sums[0]["iterations"] = done
            tally.counts["states gone back to"] += 1
        elif kind < 0.9 and made.rules is None:
            check(episode.engine)  # heaps, lanes, phases of growth
            tally.counts["full checks"] += 1
    finish(episode, settings, tally)


def finish(episode: Episode, settings, tally: Tally) -> None:
    req = episode.engine.state.req[0]
    tally.counts["iterations"] += int(episode.sums[0]["iterations"])
    for name in ("preemptions", "unseen", "shared"):
        tally.counts[NAMES[name]] += int(episode.sums[0][name])
    tally.counts["requests"] += int(episode.engine.state.env["requests_count"][0])
    tally.counts["finished"] += int((req["status"] == Status.FINISHED).sum())
    tally.counts["rejected"] += int((req["status"] == Status.REJECTED).sum())
    tally.counts["episodes"] += 1


NAMES = {
    "preemptions": "preemptions",
    "unseen": "iterations with blocks of requests not known to have finished",
    "shared": "iterations with a shared segment of a prompt",
}


def run_four_ways(rng: np.random.Generator, tally: Tally) -> None:
    """Iteration by iteration, in one call, side by side with others, and (where its rules are modelled there) by the
    reference simulator: the same requests at the same times."""
    made, held = scene(rng, 25), knobs(rng)
    count = len(made.workload)
    offline = made.engine(count, record=True)
    held.write(offline.knobs, 0)
    stop = offline.run(0)
    single, batched = made.engine(count), made.engine(count, 3)
    held.write(single.knobs, 0)
    held.write(batched.knobs, slice(None))
    while (piece := single.run(0, Until.ITERATIONS, 1)) == Stop.RUNNING:
        pass
    assert piece == stop
    clock_s = float(offline.state.env["clock_s"][0])
    for part in (0.1, 0.3, 0.7):
        batched.run_all(Until.TIME, np.array([part, part / 2, part / 3]) * clock_s)
    batched.run_to_end()
    for e, engine in [(0, single), *((e, batched) for e in range(3))]:
        assert same_bits([engine.state.req[e]], [offline.state.req[0]])
        for name in ("clock_s", "energy_j", "iterations_count", "preemptions_count", "queue_s"):
            assert engine.state.env[name][e] == offline.state.env[name][0], name
    tally.counts["runs, single = batched = offline"] += 1
    if made.rules is None and made.slo.form == "mean-tbt":
        beside_reference(made, rng)
        tally.counts["runs, engine = reference simulator"] += 1


def beside_reference(made: Scene, rng: np.random.Generator) -> None:
    case = Case(made.tables, made.workload, made.workload.output_tokens, made.slo, None, made.eviction)
    engine = case.engine()
    req = engine.state.req[0]
    reference = ReferenceSimulator(
        case.tables, case.workload, case.predicted_tokens, req["ttft_slo_s"], req["ttft_alone_s"], req["draft_class"],
        case.eviction,
    )  # fmt: skip
    choices, stalls = [reference_knobs(rng) for _ in range(4)], 0
    for _ in range(1500):
        chosen = choices[rng.integers(len(choices))]
        chosen.write(engine.knobs, 0)
        stop = reference.step(chosen)
        assert engine.run(0, Until.ITERATIONS, 1) == STOPS[stop]
        stalls = stalls + 1 if stop == "stalled" else 0
        if stop == "done" or stalls > 20:
            break
    compare(engine, reference)


def reference_knobs(rng: np.random.Generator):
    """Those that the reference simulator knows."""
    import dataclasses

    from l3env.choices import SubBatching
    from l3env.knobs import UNLIMITED

    made = knobs(rng)
    on = SubBatching.OFF if made.sub_batching == SubBatching.OFF else SubBatching.ON
    return dataclasses.replace(
        made, sub_batching=on, running_max_count=UNLIMITED, chunk_max_tokens=UNLIMITED, eviction=Eviction.OFF
    )


def campaign(iterations: int, seed: int = 1, *, compiled: bool = True, say=None) -> Tally:
    """Episodes until so many iterations were checked, or an interrupt. Raises AssertionError that names the episode."""
    tally, begun_s, number = Tally(), time.perf_counter(), 0
    while tally.counts["iterations"] < iterations:
        rng = np.random.default_rng([seed, number])
        try:
            run_episode(rng, tally, compiled)
            if number % REFERENCE_EVERY == 0:
                run_four_ways(rng, tally)
        except KeyboardInterrupt:
            break
        except Exception as error:
            raise AssertionError(f"episode {number} of seed {seed}: {type(error).__name__}: {error}") from error
        number += 1
        if say is not None and number % 500 == 0:
            say(f"{tally.counts['iterations']:,} iterations, {time.perf_counter() - begun_s:,.0f} s")
    tally.wall_s = time.perf_counter() - begun_s
    return tally
