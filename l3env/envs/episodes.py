"""What environments serve: compiled machines, traces at their loads, and episodes drawn from them.

Where a list is given, an episode draws one of its entries; where a range [low, high], a number from it. All draws of an
episode come from its environment's own random generator, so a seed repeats it, alone or among thousands.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from l3env.choices import Eviction
from l3env.engine.engine import Engine, Slo, patience_of
from l3env.engine.kernels.run import Until
from l3env.engine.segments import eviction_rule
from l3env.envs.reward import Reward, get_reward
from l3env.errors import L3EnvError
from l3env.given import reference
from l3env.machine.pair import compile_pair
from l3env.machine.specs import ModelSpec, SystemSpec
from l3env.machine.tables import Tables
from l3env.policy.protocol import Policy
from l3env.policy.registry import make_policy
from l3env.requests.registry import load_trace
from l3env.requests.workload import Workload
from l3env.runs.driver import predictions, replica_shares, training_window
from l3env.runs.saturation import load_at_capacity

DECISIONS = {"iteration": Until.ITERATIONS, "interval": Until.TIME, "event": Until.EVENT}
OPTIONS = ("workload", "start", "replica", "load", "utilization", "system", "model", "trace")

Names = str | Sequence[str]
Systems = str | SystemSpec | Sequence[str | SystemSpec]
Models = str | ModelSpec | Sequence[str | ModelSpec]
Traces = str | Workload | Sequence[str | Workload]
Range = float | Sequence[float]


class EpisodeOptions(TypedDict, total=False):
    """What every environment may be told of its episodes; the defaults are those of ``Episodes.build``."""

    system: Systems
    """Preset name, TOML file or spec; a list draws one for each episode."""
    model: Models
    """Likewise; every pair of a system and a model is compiled."""
    trace: Traces
    """A trace spec, a workload, or a list of them; a trace's requests are shared by the system's replicas in turn, this
    one gets its part."""
    load: Range
    """Arrival rate as a multiple of the trace's own; a range [low, high] draws it for each episode."""
    utilization: Range | None
    """Instead, as a multiple of what the reference policy sustains; or a range."""
    decision: str
    """Where a step ends: "interval" (``interval_s`` of simulated time), "iteration", or "event" (an arrival, a finish
    or a preemption, at the latest after ``interval_s``)."""
    interval_s: float
    """Simulated seconds between decisions."""
    episode_requests: int | None
    """Consecutive requests an episode serves; None: all."""
    reward: str | Reward
    """A name of ``reward.REWARDS`` or a function of the engine's state before and after a step."""
    ttft_scale: Range
    """SLO on the first token, as a multiple of a request's uncontended TTFT; or a range."""
    tbt_scale: Range
    """SLO between tokens, likewise."""
    slo_form: str
    """What the limit between tokens is about: "mean-tbt", "p99-gap" or "token-deadlines"."""
    predictor: str | None
    """Name of a policy whose length predictor fills in predicted output lengths, e.g. "srtf-predicted"."""
    tp: int | None
    """Tensor-parallel degree, by default the model's."""
    prefix_cache: str
    """The rule by which cached prompt segments are given up: "lru", "lfu" or "tree"; or "off"."""
    patience_s: float | None
    """After so many seconds without a first token a client leaves; None: never."""
    seed: int
    """Of the trace, where it is generated."""


def known_only(given: Iterable[str], *more: str) -> None:
    """Raises L3EnvError for an argument that no environment takes, with the right ones; ``more`` are of this one."""
    known = [*more, *EpisodeOptions.__annotations__]
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise L3EnvError(f"unknown argument {name!r}; {hint}expected some of {', '.join(known)}")


@dataclass(frozen=True)
class Episode:
    """One episode: what replica of which pair serves what, under which SLO."""

    pair_idx: int
    trace_idx: int
    load: float
    workload: Workload
    slo: Slo


@dataclass(frozen=True)
class Episodes:
    """Everything that environments of one configuration share.

    Attributes:
        pairs: the compiled machines, systems x models; ``names`` says which.
        workloads: the whole traces at their own rates; ``traces`` says which.
        load, utilization: range of arrival rates, as multiples of a trace's own, or (where not None) of what the pair's
            reference policy sustains on it.
        requests_count: consecutive requests of one episode, at most.
    """

    names: tuple[tuple[str, str], ...]
    pairs: tuple[Tables, ...]
    traces: tuple[str, ...]
    workloads: tuple[Workload, ...]
    load: tuple[float, float]
    utilization: tuple[float, float] | None
    ttft_scale: tuple[float, float]
    tbt_scale: tuple[float, float]
    slo_form: str
    until: Until
    interval_s: float
    episode_requests: int | None
    reward: Reward
    predictor: str | None
    prefix_cache: str
    patience_s: float | None
    _loads_at_capacity: dict[tuple[int, int], float] = field(default_factory=dict)
    _shares: dict[tuple[int, int], list[Workload]] = field(default_factory=dict)
    _predictors: dict[tuple[int, int], Policy] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        system: Systems = "l3-dgx-a100",
        model: Models = "gpt-175b",
        trace: Traces = "azure-conv-2023",
        *,
        load: Range = 1.0,
        utilization: Range | None = None,
        decision: str = "interval",
        interval_s: float = 1.0,
        episode_requests: int | None = 500,
        reward: str | Reward = "goodput",
        ttft_scale: Range = 5.0,
        tbt_scale: Range = 5.0,
        slo_form: str = "mean-tbt",
        predictor: str | None = None,
        tp: int | None = None,
        prefix_cache: str = "off",
        patience_s: float | None = None,
        seed: int = 0,
    ) -> Episodes:
        """From an environment's keyword arguments; see ``ServingEnv``. Raises L3EnvError for what is wrong."""
        if decision not in DECISIONS:
            raise L3EnvError(f"decision = {decision!r}; expected one of {', '.join(DECISIONS)}")
        if episode_requests is not None and episode_requests < 1:
            raise L3EnvError(f"episode_requests = {episode_requests}; expected at least 1, or None")
        chosen_reward = get_reward(reward)
        if predictor is not None:
            make_policy(predictor)  # an unknown name fails here
        traces = names_of("trace", trace)
        names = tuple((each, other) for each in names_of("system", system) for other in names_of("model", model))
        episodes = cls(
            names=names,
            pairs=tuple(compile_pair(*name, tp) for name in names),
            traces=traces,
            workloads=tuple(load_trace(each, seed=seed) for each in traces),
            load=range_of("load", load),
            utilization=None if utilization is None else range_of("utilization", utilization),
            ttft_scale=range_of("ttft_scale", ttft_scale),
            tbt_scale=range_of("tbt_scale", tbt_scale),
            slo_form=Slo(form=slo_form).form,
            until=DECISIONS[decision],
            interval_s=interval_of("interval_s", interval_s),
            episode_requests=episode_requests,
            reward=chosen_reward,
            predictor=predictor,
            prefix_cache=_rule_of_an_environment(prefix_cache),
            patience_s=patience_of(patience_s),
        )
        if utilization is not None:
            for i in range(len(traces)):
                episodes.load_at_capacity(0, i)  # a trace without a clock fails here
        return episodes

    @property
    def requests_count(self) -> int:
        """Requests of the longest episode."""
        return max(self._count(pair, workload) for pair in self.pairs for workload in self.workloads)

    def _count(self, pair: Tables, workload: Workload) -> int:
        share = -(-len(workload) // pair.replicas_count)
        return share if self.episode_requests is None else min(self.episode_requests, share)

    def load_at_capacity(self, pair_idx: int, trace_idx: int) -> float:
        """The load that is utilization 1 of a pair on a trace; found on first use."""
        key = pair_idx, trace_idx
        if key not in self._loads_at_capacity:
            self._loads_at_capacity[key] = load_at_capacity(
                self.pairs[pair_idx], self.workloads[trace_idx], prefix_cache=self.prefix_cache
            )
        return self._loads_at_capacity[key]

    def draw(self, rng: np.random.Generator, options: dict[str, Any] | None = None) -> Episode:
        """One episode: a replica's share of consecutive requests, from a random start.

        Options fix what else is drawn: ``system``, ``model``, ``trace`` (names among those of the configuration),
        ``load`` or ``utilization``, ``replica`` (whose share), ``start`` (index of the first request of that share), or
        ``workload`` (serve this instead, at ``load`` times its rate, 1 by default). Raises L3EnvError for unknown or
        impossible ones.
        """
        wanted = dict(options or {})
        if unknown := sorted(set(wanted) - set(OPTIONS)):
            raise L3EnvError(f"unknown reset options {', '.join(unknown)}; expected {', '.join(OPTIONS)}")
        pair_idx = self._pair_idx(rng, wanted.get("system"), wanted.get("model"))
        trace_idx = _index("trace", self.traces, wanted.get("trace"), rng)
        slo = Slo(rng.uniform(*self.ttft_scale), rng.uniform(*self.tbt_scale), form=self.slo_form)
        load = self._load(rng, wanted, pair_idx, trace_idx)
        pair, workload = self.pairs[pair_idx], self.workloads[trace_idx]
        share = self._share(rng, trace_idx, pair.replicas_count, wanted.get("replica"))
        count = min(self._count(pair, workload), len(share))
        first = int(wanted.get("start", rng.integers(len(share) - count + 1)))
        if not 0 <= first < len(share):
            raise L3EnvError(f"start = {first}; expected 0 to {len(share) - 1}")
        part: Workload | None = wanted.get("workload")
        if part is None:
            part = share.stretch(first, min(first + count, len(share)))
        return Episode(pair_idx, trace_idx, load, part.at_load(load) if load != 1.0 else part, slo)

    def drawn(self, episode: Episode) -> dict[str, Any]:
        """What an episode is of: system, model, trace, load, SLO, how many requests; for ``info`` at reset."""
        system, model = self.names[episode.pair_idx]
        slo = {"ttft_scale": episode.slo.ttft_scale, "tbt_scale": episode.slo.tbt_scale, "slo_form": episode.slo.form}
        return {
            "system": system,
            "model": model,
            "trace": self.traces[episode.trace_idx],
            "load": episode.load,
            **slo,
            "requests_count": len(episode.workload),
        }

    def _share(self, rng: np.random.Generator, trace_idx: int, replicas_count: int, wanted: Any) -> Workload:
        """The requests of the replica asked for, or of any that has some, as the offline runner deals them out."""
        key = trace_idx, replicas_count
        if key not in self._shares:
            workload = self.workloads[trace_idx]
            dealt = [rows for rows in replica_shares(workload, replicas_count) if rows.size]
            self._shares[key] = [workload.select(rows) for rows in dealt]  # in turn: the first ones have requests
        shares = self._shares[key]
        replica = int(rng.integers(len(shares)) if wanted is None else wanted)
        if not 0 <= replica < len(shares):
            fewer = (
                f": only so many of {replicas_count} get a request of this trace"
                if len(shares) < replicas_count
                else ""
            )
            raise L3EnvError(f"replica = {replica}; expected 0 to {len(shares) - 1}{fewer}")
        return shares[replica]

    def changed(self, name: str, value: Any) -> Episodes:
        """These episodes with another value of what episodes are drawn from, from the next reset on.

        Raises L3EnvError for an option that is fixed once the environment is made, and for a wrong value.
        """
        if name not in CHANGEABLE:
            raise L3EnvError(
                f"{name!r} cannot be changed once an environment is made; expected {', '.join(CHANGEABLE)}"
            )
        return replace(self, **{name: CHANGEABLE[name](name, value)})

    def _pair_idx(self, rng: np.random.Generator, system: str | None, model: str | None) -> int:
        fits = [i for i, name in enumerate(self.names) if system in (None, name[0]) and model in (None, name[1])]
        if not fits:
            known = ", ".join(f"{name[0]} with {name[1]}" for name in self.names)
            raise L3EnvError(f"reset: system = {system!r}, model = {model!r}; this environment has {known}")
        return fits[int(rng.integers(len(fits)))]

    def _load(self, rng: np.random.Generator, wanted: dict[str, Any], pair_idx: int, trace_idx: int) -> float:
        share = rng.random()
        if "load" in wanted:
            return float(wanted["load"])
        if "workload" in wanted:
            return 1.0
        utilization = range_of("utilization", wanted["utilization"]) if "utilization" in wanted else self.utilization
        if utilization is None:
            return _between(self.load, share)
        return _between(utilization, share) * self.load_at_capacity(pair_idx, trace_idx)

    def open(self, engine: Engine, e: int, episode: Episode) -> None:
        """Puts an episode into environment ``e`` and goes to its first moment with a request."""
        engine.reset(
            e,
            episode.workload,
            table_idx=episode.pair_idx,
            slo=episode.slo,
            predicted_tokens=self.predicted(episode),
            patience_s=self.patience_s,
        )
        engine.await_work(e, e + 1)

    def predicted(self, episode: Episode) -> NDArray[np.int64] | None:
        """(N,) predicted output lengths of an episode's requests; None without a predictor."""
        if self.predictor is None:
            return None
        return predictions(self._predictor(episode.pair_idx, episode.trace_idx), episode.workload)

    def _predictor(self, pair_idx: int, trace_idx: int) -> Policy:
        assert self.predictor is not None
        key = pair_idx, trace_idx
        if key not in self._predictors:
            policy = make_policy(self.predictor)
            policy.prepare(self.pairs[pair_idx], training_window(self.workloads[trace_idx]))
            self._predictors[key] = policy
        return self._predictors[key]

    def limits(self, clock_s: Any) -> Any:
        """Where the next step ends, for ``Engine.run``: an iteration, or a time."""
        return np.ones_like(clock_s) if self.until == Until.ITERATIONS else clock_s + self.interval_s


def interval_of(what: str, given: float) -> float:
    """Seconds. Raises L3EnvError for anything but a number > 0."""
    if not given > 0 or math.isinf(given):
        raise L3EnvError(f"{what} = {given}; expected a number > 0")
    return float(given)


def names_of(what: str, given: Any) -> tuple[str, ...]:
    """One name or several as a tuple, objects by names. Raises L3EnvError where there is none, or one twice."""
    several = not isinstance(given, str | SystemSpec | ModelSpec | Workload)
    names = tuple(map(reference, given if several else (given,)))
    if not names or len(set(names)) != len(names):
        raise L3EnvError(f"{what} = {given!r}; expected a name, or a list of different names")
    return names


def _rule_of_an_environment(prefix_cache: str) -> str:
    rule = eviction_rule(prefix_cache)
    if rule == Eviction.SCORE:
        raise L3EnvError("prefix_cache = 'score' asks a policy for scores; environments take off, lru, lfu or tree")
    return rule.name.lower()


def range_of(what: str, given: Range) -> tuple[float, float]:
    """A number or a range as (low, high). Raises L3EnvError for anything else."""
    ends = tuple(np.atleast_1d(np.asarray(given, dtype=float)).tolist())
    low, high = (ends[0], ends[-1]) if len(ends) in (1, 2) else (float("nan"), float("nan"))
    if not (0 < low <= high < float("inf")):
        raise L3EnvError(f"{what} = {given!r}; expected a number > 0, or a range [low, high] of such")
    return low, high


CHANGEABLE: Mapping[str, Callable[[str, Any], Any]] = {
    "load": range_of,
    "utilization": lambda what, given: None if given is None else range_of(what, given),
    "ttft_scale": range_of,
    "tbt_scale": range_of,
    "interval_s": interval_of,
    "reward": lambda _, given: get_reward(given),
}


def _between(ends: tuple[float, float], share: float) -> float:
    return ends[0] + share * (ends[1] - ends[0])


def _index(what: str, names: Sequence[str], wanted: str | None, rng: np.random.Generator) -> int:
    if wanted is None:
        return int(rng.integers(len(names)))
    if wanted not in names:
        raise L3EnvError(f"reset: {what} = {wanted!r}; this environment has {', '.join(names)}")
    return list(names).index(wanted)
