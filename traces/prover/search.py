"""Proof search as a workload: RMaxTS (or independent sampling) over many theorems, against a serving system.

As DeepSeek-Prover-V1.5 runs it (arXiv 2408.08152 and its released code): search processes, each with one theorem at a
time and a number of jobs. A job selects a node, has a whole proof generated from a stored variant of the node's code,
has it verified (off the GPUs, first come first served, on a limited number of processes), and updates the tree. After a
proof, or when its samples are used up, the tree starts no more jobs; when the last has ended, the process takes the
next theorem. What the generator and the verifier do is drawn: ``traces/prover/model.py``; lengths and times as below.

``ProofSearch`` is a client for ``l3env.runs.reactive``; ``FORMAT`` reads the log of a run, a real one's too.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace
from statistics import NormalDist
from typing import Any

import numpy as np

from l3env.errors import WorkloadError
from l3env.requests.workload import Workload
from l3env.runs.reactive import Submission, workload_of
from l3env.search import tree as rmaxts
from l3env.traces.prover.model import JOBS, MOST_STEPS, ProofModel, Theorems, attempt, grow, hashed, unit

NORMAL = NormalDist()
MODES = ("rmaxts", "single-pass")
BLOCK_TOKENS = 16


@dataclass(frozen=True)
class Lengths:
    """Lognormal lengths and times, as (mean, coefficient of variation). None of them is published but the first mean.

    Attributes:
        statement_tokens: header and statement; the paper's prompts average 515 characters.
        tactic_tokens: code of one tactic.
        goal_tokens: the tactic state that is appended where a proof is resumed.
        rest_tokens: comments, and all that is generated after the first error.
        verify_s: one verification.
        variant_frac: chance that a tactic is worded in a new way.
        new_tokens, verify_most_s: the paper's limits.
    """

    statement_tokens: tuple[float, float] = (170.0, 0.5)
    tactic_tokens: tuple[float, float] = (35.0, 0.8)
    goal_tokens: tuple[float, float] = (90.0, 0.7)
    rest_tokens: tuple[float, float] = (300.0, 1.0)
    verify_s: tuple[float, float] = (1.0, 1.8)
    variant_frac: float = 0.3
    new_tokens: int = 2048
    verify_most_s: float = 300.0


@dataclass(frozen=True)
class SearchSettings:
    """What is searched and how. Defaults are the paper's, but for fewer samples a tree.

    Attributes:
        theorems_count: theorems in all.
        trees_count: search processes, one theorem each at a time.
        jobs_count: concurrent jobs of a tree.
        samples_count: generations a tree may use (the paper: 6,400).
        verifiers_count: verification processes of the node.
        mode: "rmaxts", or "single-pass" for independent whole proofs.
        gamma: discount of RMaxTS; 1 is UCB1.
        rewarded: with the intrinsic reward.
    """

    theorems_count: int = 256
    trees_count: int = 256
    jobs_count: int = JOBS
    samples_count: int = 512
    verifiers_count: int = 64
    mode: str = "rmaxts"
    gamma: float = rmaxts.GAMMA
    rewarded: bool = True

    def __post_init__(self) -> None:
        for name in ("theorems_count", "trees_count", "jobs_count", "samples_count", "verifiers_count"):
            if getattr(self, name) < 1:
                raise WorkloadError(f"proof search: {name} = {getattr(self, name)}; expected at least 1")
        if self.mode not in MODES:
            raise WorkloadError(f"proof search: mode = {self.mode!r}; expected one of {', '.join(MODES)}")


def lognormal(draw: np.uint64, moments: tuple[float, float]) -> float:
    """A lognormal number of that mean and coefficient of variation from a hash."""
    mean, cv = moments
    variance = math.log1p(cv * cv)
    u = min(unit(draw), 1 - 1e-12)
    return mean * math.exp(math.sqrt(variance) * NORMAL.inv_cdf(u) - variance / 2)


@dataclass
class Variant:
    """One wording of the code that leads to a state: the prefix of the prompts that resume there."""

    name: np.uint64  # hash of the wording of every tactic so far
    tokens: int  # of the code
    pieces: tuple[tuple[int, int], ...]  # (end in tokens from the prompt's start, name) of every tactic


@dataclass
class Job:
    """One generation and its verification."""

    process: int
    slot: int
    node: int
    passed: int  # states up to the first error; negative where the proof is complete
    ranks: Any
    wordings: list[Variant]  # the code after each of them
    draw: np.uint64
    row: dict[str, Any]


class Tree:
    """The search for one proof."""

    def __init__(self, theorem: int, theorems: Theorems, lengths: Lengths) -> None:
        self.theorem = theorem
        self.live_frac, self.right_frac = theorems.live_frac[theorem], theorems.right_frac[theorem]
        self.code = theorems.code[theorem]
        self.statement_tokens = max(round(lognormal(hashed(self.code, 11), lengths.statement_tokens)), 16)
        self.nodes = rmaxts.new_tree(256)
        self.states, self.left, self.depth = np.zeros(256, np.uint64), np.zeros(256, np.int64), np.zeros(256, np.int64)
        self.states[0], self.left[0] = self.code, theorems.steps[theorem]
        self.count = 1
        self.started = self.ended = 0
        self.proved = False
        root = Variant(self.code, 0, ((self.statement_tokens, int(self.code)),))
        self.variants: dict[int, list[Variant]] = {rmaxts.ROOT: [root]}

    def make_room(self, more: int) -> None:
        while self.count + more > self.nodes.size:
            for name in ("nodes", "states", "left", "depth"):
                array = getattr(self, name)
                setattr(self, name, np.concatenate([array, np.zeros_like(array)]))


class ProofSearch:
    """Many proof searches at once: a client of ``l3env.runs.reactive.run_reactive``. Use a fresh one for each run."""

    prefix_block_tokens = BLOCK_TOKENS

    def __init__(
        self,
        settings: SearchSettings | None = None,
        model: ProofModel | None = None,
        lengths: Lengths | None = None,
    ) -> None:
        self.settings = settings or SearchSettings()
        self.model = model or ProofModel()
        self.lengths = lengths or Lengths()
        self.theorems = self.model.theorems(self.settings.theorems_count)
        self.jobs: dict[int, Job] = {}
        self.log: list[dict[str, Any]] = []
        self._next_theorem = 0
        self._trees: list[Tree | None] = []
        self._free_s = [0.0] * self.settings.verifiers_count  # when each verifier is free
        heapify(self._free_s)
        self._verified: dict[int, list[tuple[float, int]]] = defaultdict(list)  # by replica: (end, job)
        self._end_s = self._verify_busy_s = self._verify_wait_s = 0.0
        self._proofs_s: list[float] = []
        self._nodes_count = 0

    def requests_capacity(self, replicas_count: int) -> int:
        """Any tree may take any theorem, so a replica may get all but one sample of each other process."""
        s = self.settings
        rounds = math.ceil(s.theorems_count / s.trees_count)
        own = math.ceil(min(s.trees_count, s.theorems_count) / replicas_count)
        most = s.theorems_count if rounds > 1 else own
        return most * s.samples_count

    def open(self, replicas_count: int) -> list[list[Submission]]:
        """Every process takes a theorem and starts its jobs at time 0; process i belongs to replica i mod R."""
        first: list[list[Submission]] = [[] for _ in range(replicas_count)]
        for process in range(self.settings.trees_count):
            self._trees.append(None)
            first[process % replicas_count] += self._next_tree(process, 0.0)
        return first

    def ended(self, replica: int, tag: int, finish_s: float, finished: bool) -> None:
        """A generation has ended: it queues for a verifier."""
        job = self.jobs[tag]
        verify_s = min(lognormal(hashed(job.draw, 21), self.lengths.verify_s), self.lengths.verify_most_s)
        start_s = max(finish_s, self._free_s[0])
        heapreplace(self._free_s, start_s + verify_s)
        self._verify_busy_s += verify_s
        self._verify_wait_s += start_s - finish_s
        job.row |= {"generated_s": finish_s, "verified_s": start_s + verify_s}
        if not finished:
            job.passed = 0  # it was never generated
        heappush(self._verified[replica], (start_s + verify_s, tag))

    def next_s(self, replica: int) -> float:
        """When the next verification of a replica's jobs ends."""
        queue = self._verified[replica]
        return queue[0][0] if queue else math.inf

    def submit(self, replica: int, until_s: float) -> list[Submission]:
        """What follows from the verifications that have ended by then."""
        out: list[Submission] = []
        queue = self._verified[replica]
        while queue and queue[0][0] <= until_s:
            now_s, tag = heappop(queue)
            out += self._conclude(self.jobs.pop(tag), now_s)
        return out

    def figures(self) -> dict[str, float]:
        """Proofs and their rate, the time all took, the load of the verifiers."""
        verified = max(sum("verified_s" in row for row in self.log), 1)
        end_s = max(self._end_s, 1e-300)
        return {
            "proofs_count": float(len(self._proofs_s)),
            "proofs_per_hour": len(self._proofs_s) / end_s * 3600,
            "search_makespan_s": self._end_s,
            "proof_half_s": float(np.quantile(self._proofs_s, 0.5)) if self._proofs_s else float("nan"),
            "samples_count": float(verified),
            "samples_per_s": verified / end_s,
            "tree_nodes_mean_count": self._nodes_count / max(self._next_theorem, 1),
            "verifier_busy_frac": self._verify_busy_s / (end_s * self.settings.verifiers_count),
            "verifier_wait_mean_s": self._verify_wait_s / verified,
        }

    def _next_tree(self, process: int, now_s: float) -> list[Submission]:
        if self._next_theorem == self.settings.theorems_count:
            self._trees[process] = None
            return []
        tree = Tree(self._next_theorem, self.theorems, self.lengths)
        self._next_theorem += 1
        self._trees[process] = tree
        jobs = min(self.settings.jobs_count, self.settings.samples_count)
        return [self._start(process, slot, now_s) for slot in range(jobs)]

    def _start(self, process: int, slot: int, now_s: float) -> Submission:
        """Selects a node, draws what will be generated from it, and asks for it."""
        tree = self._trees[process]
        assert tree is not None
        settings, lengths, model = self.settings, self.lengths, self.model
        searched = settings.mode == "rmaxts"
        node = int(rmaxts.select(tree.nodes, settings.gamma)) if searched else rmaxts.ROOT
        tree.started += 1
        draw = hashed(hashed(tree.code, 31), tree.started)
        variants = tree.variants[node]
        variant = variants[int(unit(hashed(draw, 1)) * len(variants)) % len(variants)]
        ranks = np.zeros(MOST_STEPS, np.int64)
        passed = attempt(
            tree.states[node],
            int(tree.left[node]),
            tree.live_frac,
            tree.right_frac,
            hashed(draw, 2),
            model.tail,
            model.dead_frac,
            model.stuck,
            model.most_steps - int(tree.depth[node]),
            ranks,
        )
        goal = max(round(lognormal(hashed(variant.name, 12), lengths.goal_tokens)), 4) if node != rmaxts.ROOT else 0
        prompt = tree.statement_tokens + variant.tokens + goal
        wordings: list[Variant] = []
        for i in range(abs(passed)):
            last = wordings[-1] if wordings else variant
            wordings.append(self._worded(tree, last, int(ranks[i]), hashed(draw, 100 + i)))
        code = wordings[-1].tokens - variant.tokens if wordings else 0
        rest = round(lognormal(hashed(draw, 3), lengths.rest_tokens))
        row: dict[str, Any] = {
            "theorem": tree.theorem,
            "process": process,
            "job": slot,
            "submitted_s": now_s,
            "prompt_tokens": prompt,
            "output_tokens": min(max(code + rest, 1), lengths.new_tokens),
            "depth": int(tree.depth[node]),
        }
        tag = len(self.log)
        self.jobs[tag] = Job(process, slot, node, passed, ranks, wordings, draw, row)
        self.log.append(row)
        ids = prefix_ids(variant, prompt - goal)
        row["prefix_ids"] = list(ids)
        return Submission(now_s, prompt, row["output_tokens"], tag, ids)

    def _conclude(self, job: Job, now_s: float) -> list[Submission]:
        """A verification has ended: the tree grows, the reward is backed up, the job's slot goes on."""
        tree = self._trees[job.process]
        assert tree is not None
        self._end_s = max(self._end_s, now_s)
        tree.ended += 1
        job.row["success"] = job.passed < 0
        if job.passed < 0 and not tree.proved:
            tree.proved = True
            self._proofs_s.append(now_s)
        if self.settings.mode == "rmaxts":
            self._grow(tree, job)
        if not tree.proved and tree.started < self.settings.samples_count:
            return [self._start(job.process, job.slot, now_s)]
        if tree.ended == tree.started:
            self._nodes_count += tree.count
            return self._next_tree(job.process, now_s)
        return []

    def _grow(self, tree: Tree, job: Job) -> None:
        """Adds a proof's states, cut at the first error and where the code gets too long, and their wordings."""
        short = [each for each in job.wordings if each.tokens < self.lengths.new_tokens]
        kept = len(short) if job.passed >= 0 else min(len(short), -job.passed - 1)  # the last one closes the goal
        before = tree.count
        tree.make_room(kept)
        tree.count = int(grow(tree.nodes, before, tree.states, tree.left, tree.live_frac, job.ranks, job.node, kept))
        for child in range(before, tree.count):
            tree.depth[child] = tree.depth[tree.nodes["parent"][child]] + 1
        node = job.node
        for i in range(kept):
            node = int(rmaxts.find_child(tree.nodes, node, job.ranks[i]))
            known = tree.variants.setdefault(node, [])
            if all(short[i].name != each.name for each in known):
                known.append(short[i])
        reward = 1.0 if self.settings.rewarded and tree.count > before else 0.0
        rmaxts.end_job(tree.nodes, job.node, reward, self.settings.gamma)

    def _worded(self, tree: Tree, before: Variant, rank: int, draw: np.uint64) -> Variant:
        """The code one tactic on, in the usual wording or in a new one."""
        usual = unit(hashed(draw, 4)) > self.lengths.variant_frac
        name = hashed(before.name, hashed(rank, 0) if usual else draw)
        tokens = before.tokens + self._tactic_tokens(name if usual else draw)
        return Variant(name, tokens, (*before.pieces, (tree.statement_tokens + tokens, int(name))))

    def _tactic_tokens(self, draw: np.uint64) -> int:
        return max(round(lognormal(hashed(draw, 13), self.lengths.tactic_tokens)), 1)


def prefix_ids(variant: Variant, tokens: int) -> tuple[int, ...]:
    """Ids of the whole blocks of a prompt's first ``tokens``: equal where statement and wording so far are equal."""
    ids, piece = [], 0
    for block in range(tokens // BLOCK_TOKENS):
        while variant.pieces[piece][0] < (block + 1) * BLOCK_TOKENS:
            piece += 1
        ids.append(int(hashed(variant.pieces[piece][1], block)) >> 1)
    return tuple(ids)


def earlier_requests(search: ProofSearch, count: int = 2000) -> Workload:
    """Requests of a search over other theorems that nobody had to wait for: what predictors are fitted on."""
    s = search.settings
    model = ProofModel(**{**vars(search.model), "seed": search.model.seed + 1})
    trees = max(count // s.samples_count, 4)
    settings = SearchSettings(**{**vars(s), "theorems_count": trees, "trees_count": trees})
    other = ProofSearch(settings, model, search.lengths)
    queue = other.open(1)[0]
    sent: list[Submission] = []
    while queue and len(sent) < count:
        sent += queue
        for each in queue:
            other.ended(0, each.tag, float(len(sent)), True)
        queue = other.submit(0, math.inf)
    return workload_of([Submission(0.0, each.prompt_tokens, each.output_tokens, 0) for each in sent], BLOCK_TOKENS)
