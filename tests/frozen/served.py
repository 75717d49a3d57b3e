"""What the frozen cells serve, and the policies and the client that are theirs alone."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from l3env import BasePolicy, FixedKnobs, Knobs, Plan, View, Workload
from l3env.machine.tables import Tables
from l3env.runs.reactive import Submission


def lognormal(rng: np.random.Generator, mean: float, count: int, most: int) -> NDArray[np.int64]:
    """Lengths with a standard deviation as large as their mean."""
    variance = math.log1p(1.0)
    drawn = rng.lognormal(math.log(mean) - variance / 2, math.sqrt(variance), count)
    return np.clip(np.rint(drawn), 1, most).astype(np.int64)


def plain(count: int, rate: float, seed: int, prompt: float = 800, output: float = 150, cv: float = 2.0) -> Workload:
    """Bursty arrivals (gamma gaps), lognormal lengths."""
    rng = np.random.default_rng([seed, count])
    gaps = rng.gamma(1 / cv**2, cv**2 / rate, count)
    arrival = np.cumsum(gaps) - gaps[0]
    prompts = lognormal(rng, prompt, count, 20_000)
    return Workload.build("plain", arrival, prompts, lognormal(rng, output, count, 4000))


def at_once(count: int, rate: float, seed: int, prompt: float = 600, output: float = 300) -> Workload:
    """All present at 0."""
    return replace(plain(count, rate, seed, prompt, output), arrival_s=np.zeros(count))


def chats(count: int, rate: float, seed: int, block: int = 64) -> Workload:
    """Sessions of up to six turns on one of four system prompts; a turn's prompt begins with all before it."""
    rng = np.random.default_rng([seed, count, 7])
    rows: list[tuple[float, int, int, int, float, int, list[int]]] = []
    session, now_s = 0, 0.0
    while len(rows) < count:
        now_s += float(rng.exponential(3 / rate))
        kind, history, parent = int(rng.integers(4)), 640, -1
        ids = [kind * 10_000 + i for i in range(history // block)]
        for turn in range(int(rng.integers(1, 7))):
            prompt = history + int(rng.integers(20, 900))
            output = int(rng.integers(5, 300))
            ids += [1_000_000 * (session + 1) + i for i in range(len(ids), prompt // block)]
            think_s = float(rng.exponential(1.0)) if turn else 0.0
            rows.append((now_s, prompt, output, parent, think_s, session, list(ids)))
            parent, history = len(rows) - 1, prompt + output
        session += 1
    arrival, prompts, outputs, parents, thinks, sessions, all_ids = zip(*rows, strict=True)
    return Workload.build(
        "chats",
        arrival,
        prompts,
        outputs,
        parent_idx=parents,
        think_s=thinks,
        session_idx=sessions,
        prefix_ids=[i for each in all_ids for i in each],
        prefix_offsets=np.cumsum([0, *map(len, all_ids)]),
        prefix_block_tokens=block,
    )


KINDS: Mapping[str, Callable[[int, float, int], Workload]] = {
    "plain": plain,
    "chats": chats,
    "at-once": at_once,
    "crowd": lambda count, rate, seed: at_once(count, rate, seed, prompt=300, output=40),
    "long": lambda count, rate, seed: plain(count, rate, seed, prompt=5000, output=400, cv=3.0),
    "reasoning": lambda count, rate, seed: plain(count, rate, seed, prompt=150, output=1500, cv=1.0),
    "short": lambda count, rate, seed: plain(count, rate, seed, prompt=300, output=40, cv=3.0),
}
"""(requests, requests a second, seed) -> workload."""


class Scripted(BasePolicy):
    """Writes plans by a fixed random script: places, chunks, pauses, preemptions, moves, stalls."""

    name = "scripted"

    def prepare(self, system: Tables, training: Workload | None) -> None:
        self._rng = np.random.default_rng(5)

    def decide(self, view: View) -> Plan | Knobs:
        rng = self._rng
        if rng.random() < 0.1:
            return Knobs(prefill_budget_tokens=256, headroom_frac=0.05)
        decoding, paused = view.decoding["idx"], view.paused["idx"]
        preempt = [int(rng.choice(decoding[2:]))] if decoding.size > 40 and rng.random() < 0.1 else []
        pause = [int(i) for i in decoding[2:] if int(i) not in preempt and rng.random() < 0.02]
        resume = [int(i) for i in paused if rng.random() < 0.3 or decoding.size < 3]
        admit = self._places(view)
        chunks = {int(r["idx"]): int(min(r["prefill_left_tokens"], 700)) for r in view.prefilling}
        chunks = {idx: tokens for idx, tokens in chunks.items() if idx not in preempt}
        moved = {int(i): int(rng.integers(2)) for i in decoding if i not in (*preempt, *pause) and rng.random() < 0.03}
        return Plan(
            admit,
            None if rng.random() < 0.5 else chunks,
            moved,
            preempt,
            pause,
            resume,
            decode=rng.random() < 0.97 or not view.prefilling.size,
            interleave=rng.random() < 0.7,
            multi_token=rng.random() < 0.5,
        )

    def _places(self, view: View) -> dict[int, str | int]:
        """Those of the first waiting requests that surely fit, each at a random place."""
        free = int(view.pools.free_tokens.max()) - 4 * view.pools.block_tokens * (view.running.size + 8)
        both = view.system.has_pim and view.system.has_hbm_kv
        places = ["auto", "pim", "hbm"] if both else ["auto"]
        admit: dict[int, str | int] = {}
        for row in view.waiting(8):
            if row["kv_tokens"] + row["prompt_tokens"] < free // 2 and view.running.size < 200:
                admit[int(row["idx"])] = places[int(self._rng.integers(len(places)))]
                free -= int(row["prompt_tokens"])
        return admit


class Keeper(FixedKnobs):
    """Cached segments that many held and that lie early in their prompts are worth most."""

    def score_segments(self, segments: NDArray[np.void]) -> NDArray[np.float64]:
        return np.tanh(segments["uses"] / 8 - segments["depth"] / 32)


class Chains:
    """A client: sends a request whenever the one before has ended, after a pause; prompts of a chain begin alike."""

    prefix_block_tokens = 64

    def __init__(self, chains: int, length: int, rate: float) -> None:
        rng = np.random.default_rng(1)
        self.prompt = rng.integers(50, 3000, (chains, length))
        self.output = rng.integers(1, 200, (chains, length))
        self.start_s = np.sort(rng.random(chains)) * chains / rate
        self.queue: dict[int, list[tuple[float, int]]] = {}
        self.told = 0

    def requests_capacity(self, replicas_count: int) -> int:
        return int(self.prompt.size)

    def one(self, tag: int, when_s: float) -> Submission:
        chain, prompt = tag // self.prompt.shape[1], int(self.prompt.flat[tag])
        ids = tuple(chain * 1000 + i for i in range(prompt // self.prefix_block_tokens))
        return Submission(when_s, prompt, int(self.output.flat[tag]), tag, ids)

    def open(self, replicas_count: int) -> list[list[Submission]]:
        first: list[list[Submission]] = [[] for _ in range(replicas_count)]
        for chain, start_s in enumerate(self.start_s):
            first[chain % replicas_count].append(self.one(chain * self.prompt.shape[1], float(start_s)))
        return first

    def ended(self, replica: int, tag: int, finish_s: float, finished: bool) -> None:
        self.told += 1
        if (tag + 1) % self.prompt.shape[1]:
            heapq.heappush(self.queue.setdefault(replica, []), (finish_s + 0.3, tag + 1))

    def next_s(self, replica: int) -> float:
        queue = self.queue.get(replica)
        return queue[0][0] if queue else math.inf

    def submit(self, replica: int, until_s: float) -> list[Submission]:
        out, queue = [], self.queue.get(replica, [])
        while queue and queue[0][0] <= until_s:
            when_s, tag = heapq.heappop(queue)
            out.append(self.one(tag, when_s))
        return out

    def figures(self) -> dict[str, float]:
        return {"told_count": float(self.told)}
