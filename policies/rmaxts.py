"""RMaxTS as a scheduler: plans knob settings by tree search over copies of the simulator (arXiv 2408.08152).

The tree's actions are settings of the knobs for the next few decision intervals; from there on a trial goes on under
the best constant setting until all requests of its scenario are served, so that nothing lies beyond the horizon. A
scenario is the present with output lengths and further arrivals drawn from what earlier requests were like, given what
has been emitted and how often requests came so far; true lengths are never read. A trial's extrinsic reward is its
goodput against that of the best constant setting on the same scenario, its intrinsic reward 1 where it reached a coarse
state of the machine that no trial of this decision had reached. Trials run in batches, kept apart by virtual loss.

The default action is the best constant setting. The first action of the best sequence replaces it where the advantage,
over scenarios, is clear of its standard error.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env import rmaxts
from l3env.errors import PolicyError
from l3env.policy import BasePolicy, Knobs, View
from l3env.rollout import Rollouts
from l3env.state import KNOB_DTYPE
from l3env.tables import Tables
from l3env.tune import GRID
from l3env.workload import Workload
from policies.best_constant import BestConstant

INTERVAL_S = 5.0  # of an action
LEVELS = 3  # actions in a sequence
ACTIONS = 12  # settings the tree chooses from, the best constant one included
SCENARIOS = 16
BATCH = 32
LOOKAHEAD_S = 30.0  # of imagined arrivals
LONGEST_S = 3600.0  # a trial ends here at the latest
INTRINSIC_WEIGHT = 0.5
CLEAR_ERRORS = 3.0  # standard errors an advantage must exceed: the best of many sequences is a lucky one
LEAST_TRIALS = 6  # scenarios
PRIOR_REQUESTS = 50  # weight of the earlier requests' rate of arrival
TIE_BREAK = 1e-3  # weight of time in the system
BINS = 8


class Lengths:
    """Output lengths of earlier requests, by prompt length: what a request with so many tokens out may come to."""

    def __init__(self, earlier: Workload) -> None:
        self.edges = np.unique(np.quantile(earlier.prompt_tokens, np.linspace(0, 1, BINS + 1)[1:-1]))
        place = np.searchsorted(self.edges, earlier.prompt_tokens, side="right")
        self.outputs = [np.sort(earlier.output_tokens[place == b]) for b in range(self.edges.size + 1)]
        everything = np.sort(earlier.output_tokens)
        self.outputs = [each if each.size else everything for each in self.outputs]

    def draw(
        self, prompt_tokens: NDArray[np.int64], emitted_tokens: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.int64]:
        """(N,) lengths longer than what was emitted; past the longest seen, half as long again at most."""
        drawn = np.empty(prompt_tokens.size, dtype=np.int64)
        place = np.searchsorted(self.edges, prompt_tokens, side="right")
        u = rng.random(prompt_tokens.size)
        for b in np.unique(place):
            mask = place == b
            known, emitted = self.outputs[b], emitted_tokens[mask]
            shorter = np.searchsorted(known, emitted, side="right")
            pick = shorter + (u[mask] * (known.size - shorter)).astype(np.int64)
            beyond = emitted + 1 + (u[mask] * emitted / 2).astype(np.int64)
            drawn[mask] = np.where(shorter < known.size, known[np.minimum(pick, known.size - 1)], beyond)
        return drawn


class RMaxTS(BasePolicy):
    """Tree search over knob settings, by default those of the best constant.

    Args:
        simulations: trials a decision.
        budget_ms: instead, wall-clock time a decision.
        gamma: discount of the tree's statistics; 1 is UCB1.
        intrinsic: reward coarse states not seen before.
    """

    name = "rmaxts"
    decision_interval_s = INTERVAL_S

    def __init__(
        self,
        simulations: int = 512,
        *,
        budget_ms: float | None = None,
        gamma: float = rmaxts.GAMMA,
        intrinsic: bool = True,
        seed: int = 0,
    ) -> None:
        self.simulations, self.budget_ms = simulations, budget_ms
        self.gamma, self.intrinsic, self.seed = gamma, intrinsic, seed
        self._machine: tuple[Any, ...] | None = None

    def prepare(self, system: Tables, training: Workload | None) -> None:
        if training is None:
            raise PolicyError("rmaxts needs earlier requests to learn lengths and the best constant setting from")
        constant = BestConstant()
        constant.slo = self.slo
        constant.prepare(system, training)
        self.actions = _actions(constant, ACTIONS)
        self._rows = np.zeros(len(self.actions), KNOB_DTYPE)
        for i, knobs in enumerate(self.actions):
            knobs.write(self._rows, i)
        self._lengths = Lengths(training)
        self._earlier = training
        self._replicas = system.replicas_count
        self._rng = np.random.default_rng(self.seed)
        machine = (system.system, system.model, system.tp, system.block_tokens)
        if machine != self._machine:
            self._rollouts = Rollouts(system, BATCH, SCENARIOS)
            self._machine = machine
        self._decisions = self._deviations = self._trials = 0
        self._spent_s = 0.0

    def decide(self, view: View) -> Knobs:
        start_s = time.perf_counter()
        chosen = self._plan(view, start_s) if len(self.actions) > 1 else 0
        self._decisions += 1
        self._deviations += chosen != 0
        self._spent_s += time.perf_counter() - start_s
        return self.actions[chosen]

    def figures(self) -> dict[str, float]:
        """Cost of a decision, trials a decision, share of decisions that differ from the best constant setting."""
        count = max(self._decisions, 1)
        return {
            "decision_ms": 1e3 * self._spent_s / count,
            "simulations_mean_count": self._trials / count,
            "deviations_frac": self._deviations / count,
        }

    def _plan(self, view: View, start_s: float) -> int:
        """The action of the best sequence, 0 for the default."""
        self._imagine(view)
        search = _Search(self, view.now_s)
        while search.count < self.simulations or self.budget_ms is not None:
            if self.budget_ms is not None and 1e3 * (time.perf_counter() - start_s) > self.budget_ms:
                break
            search.batch()
        self._trials += search.count
        return search.best_first_action()

    def _imagine(self, view: View) -> None:
        present = view.present
        prompts, emitted = present["prompt_tokens"], present["emitted_tokens"]
        for scenario in range(SCENARIOS):
            lengths = np.maximum(self._lengths.draw(prompts, emitted, self._rng), emitted + 1)
            view.imagine(self._rollouts, scenario, lengths, self._arrivals(view), self.slo)

    def _arrivals(self, view: View) -> Workload | None:
        """Some stretch of the earlier requests, at the rate seen so far; one replica's share of it."""
        earlier = self._earlier
        if len(earlier) < 2 or not math.isfinite(earlier.rate_per_s):
            return None
        rate = earlier.rate_per_s / self._replicas
        seen = (view.arrived_count + PRIOR_REQUESTS) / (view.now_s + PRIOR_REQUESTS / rate)
        count = int(self._rng.poisson(seen * LOOKAHEAD_S))
        if count == 0:
            return None
        rows = (int(self._rng.integers(len(earlier))) + self._replicas * np.arange(count + 1)) % len(earlier)
        gaps = np.diff(earlier.arrival_s[rows])
        gaps = np.where(gaps > 0, gaps, 1 / rate) * rate / seen  # around the end of the table: one mean gap
        prompts = earlier.prompt_tokens[rows[1:]]
        outputs = self._lengths.draw(prompts, np.zeros(count, np.int64), self._rng)
        return Workload.build("imagined", view.now_s + np.cumsum(gaps), prompts, outputs)


class _Search:
    """One decision's tree."""

    def __init__(self, policy: RMaxTS, now_s: float) -> None:
        self.policy, self.rollouts, self.now_s = policy, policy._rollouts, now_s
        self.nodes = rmaxts.new_tree(4096)
        self.size = 1
        self.paths: list[tuple[int, ...]] = [()]
        self.advantages: list[list[float]] = [[]]
        self.seen: set[tuple[int, ...]] = set()
        self.count = 0
        self.scale = 1e-6
        trials: list[tuple[tuple[int, ...], int]] = [((), scenario) for scenario in range(SCENARIOS)]
        self.default = self._run(trials)[0]

    def batch(self) -> None:
        """Selects a batch of nodes, tries one more action at each, backs up."""
        chosen, trials, rng = [], [], self.policy._rng
        for _ in range(BATCH):
            node = int(rmaxts.select(self.nodes, self.policy.gamma))
            child = node
            if len(self.paths[node]) < LEVELS:
                action = int(rng.integers(len(self.policy.actions)))
                child = int(rmaxts.find_child(self.nodes, node, action))
                if child == rmaxts.NONE:
                    child = self._add(node, action)
            place = len(self.advantages[child])
            self.advantages[child].append(0.0)  # filled in below
            chosen.append((node, child, place))
            trials.append((self.paths[child], place % SCENARIOS))
        values, is_new = self._run(trials)
        for (node, child, place), (_, scenario), value, new in zip(chosen, trials, values, is_new, strict=True):
            advantage = float(value - self.default[scenario])
            self.advantages[child][place] = advantage
            self.scale = max(self.scale, abs(advantage))
            reward = 0.5 + 0.5 * advantage / self.scale
            if self.policy.intrinsic:
                reward = (1 - INTRINSIC_WEIGHT) * reward + INTRINSIC_WEIGHT * new
            rmaxts.end_job(self.nodes, node, reward, self.policy.gamma)

    def best_first_action(self) -> int:
        """First action of the sequence whose advantage is clearest; 0 where none is clear."""
        best, most = 0, 0.0
        for path, advantages in zip(self.paths[1:], self.advantages[1:], strict=True):
            if len(advantages) < LEAST_TRIALS or path[0] == 0:
                continue
            values = np.array(advantages[:SCENARIOS])  # what follows repeats them
            clear = values.mean() - CLEAR_ERRORS * values.std(ddof=1) / math.sqrt(values.size)
            if clear > most:
                best, most = path[0], float(clear)
        return best

    def _add(self, node: int, action: int) -> int:
        if self.size == self.nodes.size:
            self.nodes = np.concatenate([self.nodes, np.zeros_like(self.nodes)])
        child = int(rmaxts.add_child(self.nodes, self.size, node, action))
        self.size += 1
        self.paths.append((*self.paths[node], action))
        self.advantages.append([])
        return child

    def _run(self, trials: list[tuple[tuple[int, ...], int]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(value, 1 where it reached an unseen coarse state) of action sequences on scenarios."""
        rollouts, count = self.rollouts, len(trials)
        for trial in range(rollouts.trials_count):
            rollouts.start(trial, trials[trial % count][1])
        before = rollouts.env.copy()
        actions = np.zeros((rollouts.trials_count, LEVELS), np.int64)
        for trial in range(rollouts.trials_count):
            path = trials[trial % count][0]
            actions[trial, : len(path)] = path
        is_new = np.zeros(count)
        for level in range(LEVELS):
            rollouts.engine.knobs[:] = self.policy._rows[actions[:, level]]
            rollouts.run_until(np.full(rollouts.trials_count, self.now_s + (level + 1) * INTERVAL_S))
            for trial, state in enumerate(self._coarse(count)):
                if state not in self.seen:
                    self.seen.add(state)
                    is_new[trial] = 1.0
        rollouts.engine.knobs[:] = self.policy._rows[0]
        rollouts.run_until(np.full(rollouts.trials_count, self.now_s + LONGEST_S))
        self.count += count
        env = rollouts.env
        requests = np.maximum(env["requests_count"], 1)
        met = (env["slo_met_count"] - before["slo_met_count"]) / requests
        present_s = (env["present_s"] - before["present_s"]) / requests
        return (met - TIE_BREAK * present_s / (1 + present_s))[:count], is_new

    def _coarse(self, count: int) -> list[tuple[int, ...]]:
        """Octaves of queue and batch, tenths of each kind of memory."""
        env, pool = self.rollouts.env[:count], self.rollouts.engine.state.pool["used"][:count]
        blocks = self.rollouts.engine.tables.pool_blocks[0]
        hbm = 10 * pool[:, 0] // max(int(blocks[0]), 1)
        pim = 10 * pool[:, 1:].sum(axis=1) // max(int(blocks[1:].sum()), 1)
        octaves = [np.log2(1 + env[name]).astype(np.int64) for name in ("waiting_count", "running_count")]
        return list(zip(*(each.tolist() for each in (*octaves, hbm, pim)), strict=True))


def _actions(constant: BestConstant, count: int) -> list[Knobs]:
    """The best constant setting, then the best others tried, those that do just the same left out."""
    tried = constant.tried.sort_values("value", ascending=False)
    found, values = [constant.knobs], []
    for row in tried.to_dict("records"):
        knobs = Knobs(**{str(name): type(GRID[str(name)][0])(row[name]) for name in GRID})
        if knobs != constant.knobs and row["value"] not in values and len(found) < count:
            found.append(knobs)
        values.append(row["value"])
    return found
