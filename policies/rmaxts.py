"""RMaxTS as a scheduler: plans knob settings by tree search over copies of the simulator (arXiv 2408.08152).

The tree's actions are settings of the knobs for the next decision intervals; the last one of a sequence holds to the
end of a trial. A scenario is the present with output lengths and further arrivals drawn from what is known
(``imagined.py``); true lengths are never read. A trial ends soon after the last arrival of its scenario; requests that
have kept every limit of their SLO so far and await their last token count as served. Its extrinsic reward is its
goodput, guarded by default (``search.objective``), against that of the best constant setting on the same scenario, its
intrinsic reward 1 where it reached a coarse
state of the machine that no trial of this decision had reached. Trials run in batches, kept apart by virtual loss. A
node is tried on every scenario before it is expanded; where nothing is left to try, a job is rewarded with 0.

The default action is the best constant setting. The first action of the best sequence replaces it where the advantage,
over scenarios, is clear of its standard error. To leave the default, an action must also be one that, held from the
start of the run, would have served its recent arrivals as well: scenarios end too soon to show where it leads. Once the
default is left, the machine is not in the state that it would have kept, and scenarios alone decide. Where there is no
such action, or the default meets every SLO of every scenario, there is no search.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.engine.rollout import Rollouts
from l3env.errors import PolicyError
from l3env.knobs import KNOB_DTYPE, Knobs
from l3env.machine.tables import Tables
from l3env.policies.best_constant import BestConstant, BestConstantInOrder, key_of
from l3env.policies.imagined import Known
from l3env.policy.protocol import BasePolicy, Role
from l3env.policy.view import View
from l3env.requests.workload import Workload
from l3env.search import tree as rmaxts
from l3env.search.objective import Objective, earned, objective_of
from l3env.search.tune import Case, serve_each

INTERVAL_REQUESTS = 64  # that come between decisions, about
AHEAD_REQUESTS = 128  # imagined ones, at least
AHEAD_STAYS = 2  # and as many as come while a request runs, so many times
LEVELS = 2  # actions in a sequence, an interval each, the last to the end
ACTIONS = 12  # settings the tree chooses from, the best constant one included
LOADS = (1.0, 1.5)  # of the earlier requests, for which actions are chosen
PARTS = 8  # of the earlier requests, for each of which some action should be good
SCENARIOS = 32
BATCH = 32
AFTER = 0.25  # a trial ends so long after its last arrival, as a share of the time that arrivals took
INTRINSIC_WEIGHT = 0.5
CLEAR_ERRORS = 3.0  # standard errors an advantage must exceed: the best of many sequences is a lucky one
LEAST_TRIALS = 8  # scenarios
LEAST_RECENT = 64  # arrivals, for a replay of them
TIE_BREAK = 1e-3  # weight of time in the system

_portfolios: dict[str, list[Knobs]] = {}


class RMaxTS(BasePolicy):
    """Tree search over knob settings.

    Args:
        simulations: trials a decision, at most; those of the default, one a scenario, always run.
        budget_ms: instead, wall-clock time a decision.
        interval_requests: that come between decisions, about.
        ahead_requests: that come in a scenario, at least; more where many run (``_ahead``).
        clear_errors: standard errors by which an action must be better than the default.
        gamma: discount of the tree's statistics; 1 is UCB1.
        intrinsic: reward coarse states not seen before.
        virtual_loss: jobs of a batch that still run count as zero rewards.
        beyond: a trial goes on past the first interval, and at its end those on track count as served.
        objective: ``guarded``: requests that wait beyond the guard cost as much as a met SLO earns; or ``plain``.
    """

    role = Role.PLANNER
    name = "rmaxts"

    def __init__(
        self,
        simulations: int = 512,
        *,
        budget_ms: float | None = None,
        interval_requests: int = INTERVAL_REQUESTS,
        ahead_requests: int = AHEAD_REQUESTS,
        clear_errors: float = CLEAR_ERRORS,
        gamma: float = rmaxts.GAMMA,
        intrinsic: bool = True,
        virtual_loss: bool = True,
        beyond: bool = True,
        objective: str = "guarded",
        seed: int = 0,
    ) -> None:
        self.objective = objective_of(objective)
        self.simulations, self.budget_ms = simulations, budget_ms
        self.interval_requests, self.ahead_requests = interval_requests, ahead_requests
        self.clear_errors = clear_errors
        self.gamma, self.intrinsic, self.virtual_loss, self.beyond = gamma, intrinsic, virtual_loss, beyond
        self.seed = seed
        self._machine: tuple[Any, ...] | None = None

    def prepare(self, system: Tables, training: Workload | None) -> None:
        if training is None:
            raise PolicyError("rmaxts needs earlier requests to learn lengths and the best constant setting from")
        constant = BestConstantInOrder(self.objective)
        constant.slo = self.slo
        constant.prepare(system, training)
        self.actions = portfolio(constant, system, training)
        self._rows = np.zeros(len(self.actions), KNOB_DTYPE)
        for i, knobs in enumerate(self.actions):
            knobs.write(self._rows, i)
        self._earlier = training
        self._system = system
        self._rng = np.random.default_rng(self.seed)
        machine = (system.system, system.model, system.tp, system.block_tokens)
        if machine != self._machine:
            self._rollouts = Rollouts(system, BATCH, SCENARIOS)
            self._machine = machine
        self._chosen = 0
        self._decisions = self._deviations = self._trials = 0
        self._spent_s = 0.0

    def decide(self, view: View) -> Knobs:
        """The setting for the next interval; its length follows the rate at which requests come."""
        start_s = time.perf_counter()
        self._chosen = self._plan(view, start_s)
        self._decisions += 1
        self._deviations += self._chosen != 0
        self._spent_s += time.perf_counter() - start_s
        return self.actions[self._chosen]

    def figures(self) -> dict[str, float]:
        """Cost of a decision, trials a decision, share of decisions that differ from the best constant setting."""
        count = max(self._decisions, 1)
        return {
            "decision_ms": 1e3 * self._spent_s / count,
            "decisions_count": self._decisions,
            "simulations_mean_count": self._trials / count,
            "deviations_frac": self._deviations / count,
        }

    def _plan(self, view: View, start_s: float) -> int:
        """The action of the best sequence, 0 for the default."""
        known = Known(view, self._earlier, self._system.replicas_count)
        self.decision_interval_s = self.interval_requests * known.gap_s if known.gap_s > 0 else 1.0
        if len(self.actions) == 1:
            return 0
        allowed = self._allowed(known)
        if not allowed:
            return 0
        self._imagine(view, known)
        search = _Search(self, view.now_s, allowed)
        if search.is_perfect:
            self._trials += search.count
            return 0
        while search.count < self.simulations or self.budget_ms is not None:
            if self.budget_ms is not None and 1e3 * (time.perf_counter() - start_s) > self.budget_ms:
                break
            search.batch()
        self._trials += search.count
        return search.best_first_action()

    def _allowed(self, known: Known) -> list[int]:
        """First actions that may be: from the default, those that held up in a replay of this run; else all."""
        if self._chosen != 0:
            return list(range(1, len(self.actions)))
        if known.recent_count < LEAST_RECENT:
            return []
        cell = Case(self._system, known.replay(known.draw_lengths(self._rng)), self.slo, one_replica=True)
        outcomes = serve_each(cell, self.actions)[0][:, -known.recent_count :]
        served = earned(outcomes, self.objective).sum(axis=1)
        self._trials += len(self.actions)
        return [a for a in range(1, len(self.actions)) if served[a] >= served[0]]

    def _ahead(self, view: View) -> int:
        """Requests to imagine: by Little's law, as many come while one runs as are running."""
        return max(self.ahead_requests, AHEAD_STAYS * view.running_count)

    def _imagine(self, view: View, known: Known) -> None:
        """Of the scenarios, the more go on like this run of late the more of it has been seen."""
        ahead = self._ahead(view)
        like_run = round(SCENARIOS * known.recent_count / (known.recent_count + ahead))
        self._ends_s = np.full(SCENARIOS, view.now_s + LEVELS * self.decision_interval_s)
        for scenario in range(SCENARIOS):
            lengths = known.draw_lengths(self._rng)
            future = known.arrivals(ahead, scenario < like_run, lengths, self._rng)
            view.imagine(self._rollouts, scenario, lengths, future, self.slo)
            if future is not None:
                end_s = view.now_s + (1 + AFTER) * (float(future.arrival_s[-1]) - view.now_s)
                self._ends_s[scenario] = max(end_s, self._ends_s[scenario])


class _Search:
    """One decision's tree."""

    def __init__(self, policy: RMaxTS, now_s: float, allowed: list[int]) -> None:
        self.policy, self.rollouts, self.now_s = policy, policy._rollouts, now_s
        self.nodes = rmaxts.new_tree(4096)
        self.size = 1
        self.paths: list[tuple[int, ...]] = [()]
        self.advantages: list[list[float]] = [[]]
        self.children: list[list[int]] = [[]]
        self.seen: set[tuple[int, ...]] = set()
        self.allowed = allowed  # as first actions
        self.order = [int(a) for a in policy._rng.permutation(len(policy.actions))]
        self.count = 0
        self.scale = 1e-6
        trials: list[tuple[tuple[int, ...], int]] = [((0,), scenario) for scenario in range(SCENARIOS)]
        self.default, _, met = self._run(trials)
        self.is_perfect = bool((met == 1).all())

    def batch(self) -> None:
        """Selects a batch of nodes, tries each on one more scenario or one more action at it, backs up."""
        jobs, trials = [], []
        for _ in range(BATCH):
            node = self._select()
            child = self._next(node)
            place = -1
            if child is not None:
                place = len(self.advantages[child])
                self.advantages[child].append(0.0)  # filled in below
                trials.append((self.paths[child], place))
            jobs.append((node, child, place))
        self.count += BATCH - len(trials)  # those that found nothing left to try
        values, is_new, _ = self._run(trials) if trials else (np.zeros(0),) * 3
        results = iter(zip(trials, values, is_new, strict=True))
        for node, child, place in jobs:
            reward = 0.0
            if child is not None:
                (_, scenario), value, new = next(results)
                advantage = float(value - self.default[scenario])
                self.advantages[child][place] = advantage
                self.scale = max(self.scale, abs(advantage))
                reward = 0.5 + 0.5 * advantage / self.scale
                if self.policy.intrinsic:
                    reward = (1 - INTRINSIC_WEIGHT) * reward + INTRINSIC_WEIGHT * new
            if not self.policy.virtual_loss:
                rmaxts.start_job(self.nodes, node, self.policy.gamma)
            rmaxts.end_job(self.nodes, node, reward, self.policy.gamma)

    def best_first_action(self) -> int:
        """First action of the sequence whose advantage is clearest; 0 where none is clear."""
        best, most = 0, 0.0
        for path, advantages in zip(self.paths[1:], self.advantages[1:], strict=True):
            if len(advantages) < LEAST_TRIALS:
                continue
            values = np.array(advantages)
            error = float(values.std(ddof=1)) / math.sqrt(values.size)
            clear = float(values.mean()) - self.policy.clear_errors * error
            if clear > most:
                best, most = path[0], clear
        return best

    def _select(self) -> int:
        """The node to go on at; a job runs at it from here on, unless virtual loss is off."""
        if self.policy.virtual_loss:
            return int(rmaxts.select(self.nodes, self.policy.gamma))
        node = rmaxts.ROOT
        while self.children[node] and (chosen := int(rmaxts.best_choice(self.nodes, node))) != node:
            node = chosen
        return node

    def _next(self, node: int) -> int | None:
        """The node itself where it lacks scenarios, else a new child of it, None where there is none left."""
        path = self.paths[node]
        if path and len(self.advantages[node]) < SCENARIOS:
            return node
        actions = [a for a in self.order if (a != path[-1] if path else a in self.allowed)]
        children = self.children[node]
        for child in children:
            if not self.advantages[child]:
                return child
        if len(path) == LEVELS or len(children) == len(actions):
            return None
        return self._add(node, actions[len(children)])

    def _add(self, node: int, action: int) -> int:
        if self.size == len(self.nodes):
            self.nodes = np.concatenate([self.nodes, np.zeros_like(self.nodes)])
        child = int(rmaxts.add_child(self.nodes, self.size, node, action))
        self.size += 1
        self.paths.append((*self.paths[node], action))
        self.advantages.append([])
        self.children.append([])
        self.children[node].append(child)
        return child

    def _run(self, trials: list[tuple[tuple[int, ...], int]]) -> tuple[NDArray[np.float64], ...]:
        """(value, 1 where it reached an unseen coarse state, what requests earned) of action sequences on scenarios."""
        policy, rollouts, count = self.policy, self.rollouts, len(trials)
        actions = np.zeros((rollouts.trials_count, LEVELS), np.int64)
        ends_s = np.zeros(rollouts.trials_count)  # those not in use do not run
        for trial, (path, scenario) in enumerate(trials):
            rollouts.start(trial, scenario)
            actions[trial] = (*path, *(path[-1],) * (LEVELS - len(path)))
            ends_s[trial] = policy._ends_s[scenario]
        before, guarded = rollouts.env[:count].copy(), policy.objective == Objective.GUARDED
        lost = -rollouts.beyond_guard_count()[:count] if guarded else np.zeros(count, np.int64)
        is_new = np.zeros(count)
        for level in range(LEVELS if policy.beyond else 1):
            rollouts.hold(policy._rows[actions[:, level]])
            rollouts.run_until(np.minimum(ends_s, self.now_s + (level + 1) * policy.decision_interval_s))
            for trial, state in enumerate(self._coarse(count)):
                if state not in self.seen:
                    self.seen.add(state)
                    is_new[trial] = 1.0
        served = np.zeros(count)
        if policy.beyond:
            rollouts.run_until(ends_s)
            served += rollouts.on_track()[:count]
        self.count += count
        env = rollouts.env[:count]
        requests = np.maximum(env["requests_count"], 1)
        if guarded:
            lost += rollouts.beyond_guard_count()[:count]
        met = (env["slo_met_count"] - before["slo_met_count"] + served - lost) / requests
        present_s = (env["present_s"] - before["present_s"]) / requests
        return met - TIE_BREAK * present_s / (1 + present_s), is_new, met

    def _coarse(self, count: int) -> list[tuple[int, ...]]:
        """Octaves of queue and batch, tenths of each kind of memory."""
        env, (used, blocks) = self.rollouts.env[:count], self.rollouts.pool_blocks
        hbm = 10 * used[:count, 0] // max(int(blocks[0]), 1)
        pim = 10 * used[:count, 1:].sum(axis=1) // max(int(blocks[1:].sum()), 1)
        octaves = [np.log2(1 + env[name]).astype(np.int64) for name in ("waiting_count", "running_count")]
        return list(zip(*(each.tolist() for each in (*octaves, hbm, pim)), strict=True))


def portfolio(constant: BestConstant, system: Tables, training: Workload) -> list[Knobs]:
    """The best constant setting, then, of all that its search tried (the heuristics' are among them), one at a time the
    one that most raises what the best of the chosen reaches in each part of the earlier requests, at each load."""
    key = constant.objective + key_of(system, training, constant.slo)
    if key not in _portfolios:
        tried = [
            Knobs(**{str(name): type(levels[0])(row[name]) for name, levels in constant.grid.items()})
            for row in constant.tried.to_dict("records")
        ]
        tried = [constant.knobs, *(knobs for knobs in tried if knobs != constant.knobs)]
        cells = [Case(system, training.at_load(load), constant.slo) for load in LOADS]
        count = min(PARTS, len(training))
        outcomes = [earned(serve_each(cell, tried)[0], constant.objective) for cell in cells]
        parts = [part for each in outcomes for part in np.array_split(each, count, axis=1)]
        goodput = np.stack([part.mean(axis=1) for part in parts], axis=1)  # (S, LOADS x PARTS)
        chosen, reached = [0], goodput[0]
        while len(chosen) < ACTIONS:
            gains = np.maximum(goodput, reached).sum(axis=1) - reached.sum()
            best = int(np.argmax(gains))
            if gains[best] <= 0:
                break
            chosen.append(best)
            reached = np.maximum(reached, goodput[best])
        _portfolios[key] = [tried[i] for i in chosen]
    return _portfolios[key]
