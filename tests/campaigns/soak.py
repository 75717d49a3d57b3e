"""``python -m tests.campaigns.soak [--requests N]``: one environment that serves requests without end.

They are appended in chunks; what has ended is dropped by copying the present (``kernels.snapshot.extract``) into an
environment of the same size, with the true lengths as the imagined ones. So memory does not grow while clocks and sums
run on. Figures are compared with those of short runs from the start, and of the first half with the second.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import stats

import l3env
from l3env import Knobs, Workload
from l3env.choices import Status
from l3env.engine.engine import Engine, Until
from l3env.engine.kernels import snapshot
from l3env.engine.rollout import present_idx

CHUNK = 5000
ROOM = 3 * CHUNK
GAP_S = 0.02  # between arrivals: three quarters of what the machine serves
LEFT_OUT = 2  # chunks at the start, until the machine is warm
SHORT_RUNS, SHORT_CHUNKS = 12, 6
CONFIDENCE = 0.999
FIGURES = ("ttft_s", "gap_s", "output_tokens", "batch", "energy_j")


@dataclass
class Service:
    """Two engines of one environment each; the present moves from one to the other."""

    seed: int
    engines: list[Engine] = field(default_factory=list)
    next_s: float = 0.0
    served: int = 0
    chunks: list[list[float]] = field(default_factory=list)  # FIGURES of each
    before: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        tables = l3env.compile_pair("gpu-dgx-a100?gpus_count=1", "llama-3-8b", tp=1)
        self.engines = [Engine(tables, 1, ROOM) for _ in range(2)]
        self.scratch = np.zeros(ROOM, np.int32)
        self.engines[0].reset(0, self.arriving(1))
        for engine in self.engines:
            Knobs(prefill_budget_tokens=512).write(engine.knobs, 0)

    def arriving(self, count: int) -> Workload:
        gaps_s = self.rng.exponential(GAP_S, count)
        arrival_s = self.next_s + np.cumsum(gaps_s)
        self.next_s = float(arrival_s[-1])
        prompts = self.rng.integers(1, 400, count)
        return Workload.build("soak", arrival_s, prompts, self.rng.geometric(1 / 40, count).clip(1, 400))

    def serve_chunk(self) -> None:
        """One chunk arrives, and all until then is served; what has ended is counted and dropped."""
        live, other = self.engines
        live.append(0, self.arriving(CHUNK))
        env = live.state.env
        clocks = live.state.group["clock"][0].copy()
        live.run(0, Until.TIME, self.next_s)
        while (live.state.req["status"][0, : env["requests_count"][0]] == Status.FUTURE).any():
            live.run(0, Until.ITERATIONS, 1)
        assert (live.state.group["clock"][0] >= clocks).all()
        self.count(live)
        idx = present_idx(live, 0)
        assert idx.size + CHUNK < ROOM, "more requests wait than are served"
        snapshot.extract(
            live.state, 0, idx, live.state.truth[0, idx].astype(np.int64), CHUNK, self.scratch, other.state, 0
        )
        self.engines.reverse()

    def count(self, live: Engine) -> None:
        """Figures of what has ended, and that no clock or sum has gone back."""
        env = {name: live.state.env[name][0].item() for name in live.state.env.dtype.names}
        req = live.state.req[0, : env["requests_count"]]
        done = req[req["status"] == Status.FINISHED]
        for name in ("clock_s", "busy_s", "energy_j", "output_tokens", "finished_count", "iterations_count"):
            assert env[name] > self.before.get(name, -1), name
        since = {name: env[name] - self.before.get(name, 0) for name in env}
        assert since["finished_count"] == done.size
        assert env["arrived_count"] == env["finished_count"] + env["waiting_count"] + env["running_count"]
        gaps = done["emitted_tokens"] - 1
        self.chunks.append(
            [
                float((done["first_token_s"] - done["arrival_s"]).mean()),
                float((done["finish_s"] - done["first_token_s"]).sum() / gaps.sum()),
                float(done["emitted_tokens"].mean()),
                since["decode_tokens"] / since["iterations_count"],
                since["energy_j"] / since["output_tokens"],
            ]
        )
        self.before, self.served = env, self.served + done.size


def interval(batches: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(mean, half a confidence interval) of columns of batches."""
    half = stats.t.ppf(0.5 + CONFIDENCE / 2, len(batches) - 1) * batches.std(0, ddof=1) / np.sqrt(len(batches))
    return batches.mean(0), half


def apart(first: NDArray[np.float64], second: NDArray[np.float64]) -> list[str]:
    """Figures whose intervals do not meet."""
    (left, more), (right, less) = interval(first), interval(second)
    wrong = np.abs(left - right) > more + less
    return [name for name, bad in zip(FIGURES, wrong, strict=True) if bad]


def rss_bytes() -> int:
    """What this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def short_runs(seed: int) -> NDArray[np.float64]:
    """(runs, figures): each the mean of a run from the start."""
    found = []
    for run in range(SHORT_RUNS):
        service = Service(seed + 1000 + run)
        for _ in range(SHORT_CHUNKS):
            service.serve_chunk()
        found.append(np.mean(service.chunks[LEFT_OUT:], axis=0))
    return np.array(found)


def campaign(requests: int, seed: int = 1, *, say=print) -> int:
    """Serves so many requests; returns the number of faults."""
    short = short_runs(seed)
    service, begun_s, held = Service(seed), time.perf_counter(), []
    while service.served < requests:
        service.serve_chunk()
        if len(service.chunks) % max(requests // CHUNK // 20, 1) == 0:
            gc.collect()
            held.append(rss_bytes())
    batches = np.array(service.chunks[LEFT_OUT:])
    halves = np.array_split(batches, 2)
    drift, wrong = apart(*halves), apart(batches, short)
    grown = held[-1] / held[len(held) // 5] - 1
    wall_s = time.perf_counter() - begun_s
    say(
        f"{service.served:,} requests, {service.before['iterations_count']:,} iterations, "
        f"{service.before['clock_s']:,.0f} simulated s in {wall_s:,.0f} s; "
        f"memory {held[-1] / 2**20:,.0f} MiB, {grown:+.1%} since a fifth of the way"
    )
    for place, name in enumerate(FIGURES):
        (long, more), (brief, less) = interval(batches), interval(short)
        say(
            f"  {name}: {long[place]:.5g} +- {more[place]:.2g}, short runs {brief[place]:.5g} +- {less[place]:.2g}, "
            f"halves {halves[0][:, place].mean():.5g} and {halves[1][:, place].mean():.5g}"
        )
    for what, names in (("the halves", drift), ("long and short runs", wrong)):
        say(f"{what} differ beyond their intervals ({CONFIDENCE:.1%}) in: {', '.join(names) or 'nothing'}")
    return len(drift) + len(wrong) + (grown > 0.05)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.soak")
    parser.add_argument("--requests", type=int, default=100_000_000)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    return min(campaign(chosen.requests, chosen.seed), 1)


if __name__ == "__main__":
    sys.exit(main())
