"""One run as a Chrome / Perfetto trace (JSON): what each device does when, requests as flows, memory as counters.

An iteration is drawn as it is priced (``machine/iteration.py``, arXiv 2504.17584, section 6). Two interleaved
sub-batches are two phases of max(T_GPU, T_PIM) each; one batch is prefill and HBM attention beside the PIM side, then
FC. On the PIM side a transfer fills the buses through one rankset after the other: each computes around the part that
blocks it. Boundaries are rounded to nanoseconds, so spans on one lane never overlap; what is left of a phase is a
bubble.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.choices import Status
from l3env.engine.engine import Engine, Slo
from l3env.files import write_text
from l3env.machine.tables import Tables
from l3env.policy.mistakes import ask
from l3env.policy.protocol import Policy
from l3env.policy.registry import beside
from l3env.requests.workload import Workload
from l3env.runs.driver import drive, predictions, replica_shares
from l3env.runs.metrics import Outcome, collect

DEVICES, REQUESTS = 1, 2  # processes of the trace
GPU, PIM, PCIE, RANKSET = 1, 2, 3, 10  # lanes (threads) of the devices; ranksets count up from the last
NS_PER_S = 1e9
US_PER_NS = 1e-3
PHASES = {Status.WAITING: "waiting", Status.PREFILL: "prefill", Status.DECODE: "decode", Status.PAUSED: "paused"}

Event = dict[str, Any]


@dataclass
class Lane:
    """Where on a lane the drawing has come to, seconds."""

    tid: int
    at_s: float


@dataclass
class Recorder:
    """Watches one environment and collects events; ``drive(..., watch=recorder)``."""

    engine: Engine
    e: int
    events: list[Event] = field(default_factory=list)
    _ended_ns: dict[tuple[int, int], int] = field(default_factory=dict)  # the last span of each lane
    iterations_count: int = 0

    def __post_init__(self) -> None:
        coef = self.engine.tables.coef[int(self.engine.state.env["table_idx"][self.e])]
        self.has_pim = bool(coef["has_pim"])
        self.ranksets_count = round(1 / float(coef["transfer_exposed_frac"])) if self.has_pim else 0
        self.has_link = self.has_pim and float(coef["transfer_request_s"] + coef["transfer_token_s"]) > 0
        count = int(self.engine.state.env["requests_count"][self.e])
        self.req = self.engine.state.req[self.e, :count]
        self.status = self.req["status"].copy()
        self.prefilled = self.req["prefilled_tokens"].copy()
        self.since_s = np.where(self.status == Status.WAITING, self.req["arrival_s"], np.nan)
        self._name_lanes()

    def __call__(self) -> None:
        """After an iteration, or a wait."""
        env = self.engine.state.env[self.e]
        if int(env["iterations_count"]) == self.iterations_count:
            self._follow(float(env["clock_s"]), float(env["clock_s"]))
            return
        self.iterations_count = int(env["iterations_count"])
        end_s = float(self.engine.state.log[self.e, int(env["log_count"]) - 1]["end_s"])
        start_s = end_s - float(env["last_iteration_s"])
        prefill_at_s = self._draw_iteration(start_s, end_s)
        self._flow_prefills(prefill_at_s)
        self._follow(start_s, end_s)
        self._count(end_s)

    # devices

    def _draw_iteration(self, start_s: float, end_s: float) -> tuple[float, float]:
        """Spans of all lanes; returns when the prefills of both sub-batches begin."""
        phases = self.engine.state.sub[self.e]
        gpu, attention, prefill, pim, read, move = (
            phases[f"{name}_s"].tolist() for name in ("gpu", "attention", "prefill", "pim", "read", "transfer")
        )
        if self.engine.state.env["last_interleaved"][self.e]:
            middle_s = start_s + max(gpu[0], pim[0])
            begin = (start_s, middle_s)
            for sub, (first_s, last_s) in enumerate(((start_s, middle_s), (middle_s, end_s))):
                lane = Lane(GPU, first_s)
                self._span(lane, "prefill", prefill[sub], sub)
                self._span(lane, "attention", attention[sub] - prefill[sub], sub)
                self._span(lane, "FC", gpu[sub] - attention[sub], sub)
                self._bubble(lane, last_s, sub)
                self._draw_pim(first_s, last_s, pim[sub], read[sub], move[sub], sub)
            return begin
        lane = Lane(GPU, start_s)
        front_s = attention[0] + attention[1]
        self._span(lane, "prefill", prefill[0] + prefill[1], None)
        self._span(lane, "attention", front_s - prefill[0] - prefill[1], None)
        self._bubble(lane, start_s + max(front_s, pim[0]), None)
        self._span(lane, "FC", end_s - lane.at_s, None)
        self._draw_pim(start_s, end_s, pim[0], read[0], move[0], None)
        return start_s, start_s

    def _draw_pim(
        self, start_s: float, end_s: float, side_s: float, read_s: float, move_s: float, sub: int | None
    ) -> None:
        """The PIM side of a phase: busy and bubble as the metrics count them, transfers, and each rankset's share."""
        if not self.has_pim:
            return
        side = Lane(PIM, start_s)
        self._span(side, "busy", side_s, sub)
        self._bubble(side, end_s, sub)
        blocked_s = move_s / self.ranksets_count
        latency_s = max(side_s - max(read_s + blocked_s, move_s), 0.0)
        if self.has_link:
            link = Lane(PCIE, start_s)
            if latency_s > 0.5 / NS_PER_S:
                self._span(link, "latency", latency_s, sub)
            self._span(link, "transfer", move_s, sub)
        for k in range(self.ranksets_count):
            lane = Lane(RANKSET + k, start_s + latency_s)
            before_s = min(read_s, k * blocked_s)
            self._span(lane, "attention", before_s, sub)
            lane.at_s = start_s + latency_s + k * blocked_s
            self._span(lane, "transfer", blocked_s, sub)
            self._span(lane, "attention", read_s - before_s, sub)

    def _span(self, lane: Lane, name: str, length_s: float, sub: int | None) -> None:
        """A span from where the lane stands; moves it on. Nothing where it is shorter than a nanosecond."""
        end_s = lane.at_s + max(length_s, 0.0)
        label = name if sub is None else f"{name} {sub}"
        self._complete(DEVICES, lane.tid, label, name, lane.at_s, end_s, {} if sub is None else {"sub_batch": sub})
        lane.at_s = end_s

    def _bubble(self, lane: Lane, until_s: float, sub: int | None) -> None:
        self._span(lane, "bubble", until_s - lane.at_s, sub)

    def _complete(
        self, pid: int, tid: int, name: str, category: str, start_s: float, end_s: float, args: dict[str, Any]
    ) -> None:
        start, end = max(round(start_s * NS_PER_S), self._ended_ns.get((pid, tid), 0)), round(end_s * NS_PER_S)
        if end > start:
            self._ended_ns[pid, tid] = end
            span = {"name": name, "cat": category, "ph": "X", "pid": pid, "tid": tid}
            self.events.append(span | {"ts": start * US_PER_NS, "dur": (end - start) * US_PER_NS, "args": args})

    # requests

    def _flow_prefills(self, begin_s: tuple[float, float]) -> None:
        """A step of the request's flow at every chunk of its prefill."""
        now = self.req["prefilled_tokens"]
        for r in np.flatnonzero(now > self.prefilled).tolist():
            self._flow("t", DEVICES, GPU, r, begin_s[int(self.req["sub"][r])])
        self.prefilled = now.copy()

    def _follow(self, start_s: float, end_s: float) -> None:
        """Spans of the requests whose status has changed: plans take effect at the start, tokens come at the end."""
        now = self.req["status"]
        for r in np.flatnonzero(now != self.status).tolist():
            old, new = Status(int(self.status[r])), Status(int(now[r]))
            if old == Status.FUTURE:
                old, self.since_s[r] = Status.WAITING, self.req["arrival_s"][r]
            if old == Status.WAITING and new in (Status.PREFILL, Status.DECODE, Status.FINISHED):
                self._phase(r, old, start_s)
                self._flow("s", REQUESTS, r, r, start_s)
                old = Status.PREFILL
            if old == Status.PAUSED and new == Status.FINISHED:
                self._phase(r, old, start_s)
                old = Status.DECODE
            if old == Status.PREFILL and new in (Status.DECODE, Status.FINISHED):
                self._phase(r, old, end_s)
                self._flow("f", REQUESTS, r, r, end_s if new == Status.DECODE else start_s)
                old = Status.DECODE
            if old != new:
                self._phase(r, old, end_s if new == Status.FINISHED else start_s)
        self.status = now.copy()

    def _phase(self, r: int, status: Status, until_s: float) -> None:
        """The end of a phase of a request's life; the next begins there."""
        args = {"prompt_tokens": int(self.req["prompt_tokens"][r])}
        self._complete(REQUESTS, r, PHASES[status], PHASES[status], float(self.since_s[r]), until_s, args)
        self.since_s[r] = until_s

    def _flow(self, kind: str, pid: int, tid: int, r: int, at_s: float) -> None:
        event = {"name": "request", "cat": "request", "ph": kind, "id": r, "pid": pid, "tid": tid}
        self.events.append(event | {"ts": round(at_s * NS_PER_S) * US_PER_NS} | ({"bp": "e"} if kind == "f" else {}))

    # counters and names

    def _count(self, at_s: float) -> None:
        """Levels when the iteration ended, before new arrivals."""
        env = self.engine.state.env[self.e]
        row = self.engine.state.log[self.e, int(env["log_count"]) - 1]
        block = self.engine.pair(self.e).block_tokens
        kv = {"HBM": int(row["hbm_blocks"]) * block} | ({"PIM": int(row["pim_blocks"]) * block} if self.has_pim else {})
        counters = {
            "KV tokens": kv,
            "requests": {"waiting": int(row["waiting_count"]), "running": int(row["running_count"])},
            "batch": {"decodes": int(env["last_decode_tokens"]), "prefill tokens": int(env["last_prefill_tokens"])},
        }
        ts = round(at_s * NS_PER_S) * US_PER_NS
        self.events += [
            {"name": name, "ph": "C", "pid": DEVICES, "ts": ts, "args": args} for name, args in counters.items()
        ]

    def _name_lanes(self) -> None:
        lanes = {GPU: "GPU"} | ({PIM: "PIM side"} if self.has_pim else {}) | ({PCIE: "PCIe"} if self.has_link else {})
        lanes |= {RANKSET + k: f"PIM rankset {k}" for k in range(self.ranksets_count)}
        for pid, name in ((DEVICES, "devices"), (REQUESTS, "requests")):
            self.events.append({"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}})
        for order, (tid, name) in enumerate(lanes.items()):
            head = {"ph": "M", "pid": DEVICES, "tid": tid}
            self.events.append(head | {"name": "thread_name", "args": {"name": name}})
            self.events.append(head | {"name": "thread_sort_index", "args": {"sort_index": order}})


def record(
    tables: Tables,
    workload: Workload,
    policy: Policy,
    *,
    replica: int = 0,
    slo: Slo | None = None,
    training: Workload | None = None,
) -> tuple[list[Event], Outcome]:
    """One replica's run as trace events, and its outcome, which is that of a run nobody watched."""
    rows: NDArray[np.int64] = replica_shares(workload, tables.replicas_count)[replica]
    part = workload.select(rows)
    engine = Engine(tables, 1, len(part), record=True)
    with beside(policy):
        ask(policy, "prepare", tables, training)
        engine.reset(0, part, slo=slo, predicted_tokens=predictions(policy, part))
        recorder = Recorder(engine, 0)
        drive(engine, 0, policy, recorder)
    return recorder.events, collect(engine, [0], [rows])


def write(path: Path, events: list[Event], about: dict[str, Any]) -> None:
    """Writes the trace, whole or not at all; ``about`` says what it is of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"displayTimeUnit": "ms", "otherData": about, "traceEvents": events}
    write_text(path, json.dumps(content, separators=(",", ":")) + "\n")
