"""l3env's decisions step by step, in the words of ``real``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

import l3env
from l3env import Knobs, Workload
from l3env.choices import Status
from l3env.engine.engine import Engine
from l3env.engine.kernels.run import Stop, Until
from l3env.knobs import UNLIMITED
from l3env.machine.specs.serving_engine import IDEAL
from l3env.machine.tables import Tables, compile_tables
from l3env.policy.protocol import FixedKnobs, Policy
from l3env.policy.registry import make_policy
from l3env.runs.driver import Driver, happened_count

LENGTH = 1 << 20
LARGEST_TOKENS, LARGEST_SEQS = 8192, 256  # of vLLM, where a policy sets the limits


@dataclass(frozen=True)
class Case:
    """Requests under limits; see ``real`` for what each is."""

    workload: Workload
    blocks: int = 2_500
    budget: int = 512
    seqs: int = 256
    threshold: int = 0
    ahead: bool = False
    policy: str = ""  # in vLLM under ``PolicyScheduler``; empty for vLLM's own
    inside: bool = True  # for a policy of vLLM's own rules: False leaves vLLM alone


@cache
def machine(ahead: bool) -> Tables:
    """One H100 under vLLM's rules."""
    rules = dataclasses.replace(
        IDEAL, name="rules", schedules_ahead=ahead, blocks_by_chunk=True, waits_after_preemption=True
    )
    system = dataclasses.replace(l3env.load("system/gpu-dgx-h100", gpus_count=1), engine=rules)
    return compile_tables(system, l3env.load("model/llama-3-8b", max_model_len=LENGTH), tp=1)


def with_blocks(tables: Tables, blocks: int) -> Tables:
    return dataclasses.replace(tables, arrays=tables.arrays._replace(pool_blocks=np.array([[blocks]])))


def run(case: Case, steps_count: int = 10**9) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What is scheduled in each step, and the case for ``real``, with arrivals at the steps that saw them."""
    engine = Engine(with_blocks(machine(case.ahead), case.blocks), 1, len(case.workload))
    engine.reset(0, case.workload)
    policy = policy_of(case)
    policy.prepare(engine.pair(0), None)
    driver = Driver(engine, 0, policy)
    req, env = engine.state.req[0], engine.state.env[0]
    steps: list[dict[str, Any]] = []
    arrivals: list[list[list[int]]] = []
    times: list[float] = []
    known, start_s = np.zeros(len(case.workload), bool), -np.inf
    driver.wake()
    while len(steps) < steps_count:
        before = req.copy()
        stop = one_step(driver)
        now = (req["status"] != Status.FUTURE) & ~known
        late = now & (req["arrival_s"] > start_s) if case.ahead else np.zeros_like(now)
        known |= now
        start_s = float(env["clock_s"] - env["last_iteration_s"])
        times.append(start_s)
        arrivals.append([np.flatnonzero(now & ~late).tolist(), np.flatnonzero(late).tolist()])
        used = int(engine.state.pool["used"][0, 0])
        steps.append(
            {
                "scheduled": scheduled(before, req, engine),
                "preempted": int(env["preemptions_count"]),
                "free": case.blocks - used,
            }
        )
        if stop == Stop.DONE:
            break
        assert stop == Stop.RUNNING, stop
    limits = {name: getattr(case, name) for name in ("blocks", "budget", "seqs", "threshold", "ahead")}
    rows = zip(case.workload.prompt_tokens.tolist(), case.workload.output_tokens.tolist(), strict=True)
    asked = limits | {"prefix": False, "length": LENGTH, "arrivals": arrivals}
    asked["requests"] = [{"prompt": prompt, "output": output} for prompt, output in rows]
    if case.policy and case.inside:
        limits = {"policy": case.policy, "times": times, "arrival_s": case.workload.arrival_s.tolist()}
        asked |= limits | {"budget": LARGEST_TOKENS, "seqs": LARGEST_SEQS, "threshold": 0}
    return steps, asked


def policy_of(case: Case) -> Policy:
    """The policy of a case, or one that has vLLM's own rules under its limits."""
    if case.policy:
        return make_policy(case.policy)
    knobs = Knobs(
        prefill_budget_tokens=case.budget,
        budget_counts_decodes=True,
        headroom_frac=0.0,
        running_max_count=case.seqs,
        chunk_max_tokens=case.threshold or UNLIMITED,
    )
    return FixedKnobs("limits", knobs)


def one_step(driver: Driver) -> Stop:
    """One iteration; the policy is asked before it if it is time."""
    engine = driver.engine
    driver.wake()  # lets in who has arrived, as a server would
    due = float(engine.state.env["clock_s"][0]) >= driver._held_until_s
    if due or (driver.policy.decides_at_events and happened_count(engine, 0) != driver._happened_count):
        assert driver._decide() is None  # no plans here
    return engine.run(0, Until.ITERATIONS, 1)


def scheduled(before: np.ndarray, after: np.ndarray, engine: Engine) -> dict[int, int]:
    """Tokens of each request in an iteration, from the request table before and after."""
    found: dict[int, int] = {}
    kept = after["preemptions_count"] == before["preemptions_count"]
    for r in np.flatnonzero(kept & (after["status"] >= Status.PREFILL)):
        old, new = before[r], after[r]
        if old["status"] == Status.DECODE:
            found[int(r)] = 1
            continue
        if old["status"] in (Status.FINISHED, Status.REJECTED) or new["status"] == Status.REJECTED:
            continue
        begun = int(old["prefilled_tokens"]) if old["status"] == Status.PREFILL else 0
        ended = int(new["prefilled_tokens"]) if new["status"] == Status.PREFILL else int(new["target_tokens"])
        if ended > begun:
            found[int(r)] = ended - begun
    return found


def first_difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> tuple[int, str] | None:
    """The first step that differs, and how; None where all agree."""
    for step, (mine, real) in enumerate(zip(ours, theirs, strict=True)):
        real_scheduled = {int(name): count for name, count in real["scheduled"].items()}
        if mine["scheduled"] != real_scheduled:
            names = sorted(mine["scheduled"].keys() ^ real_scheduled.keys())
            both = mine["scheduled"].keys() & real_scheduled.keys()
            names += [name for name in both if mine["scheduled"][name] != real_scheduled[name]]
            shown = {name: (mine["scheduled"].get(name), real_scheduled.get(name)) for name in names}
            return step, f"scheduled (ours, vLLM's): {shown}"
        for what in ("preempted", "free"):
            if mine[what] != real[what]:
                return step, f"{what}: {mine[what]}, vLLM's {real[what]}"
    return None
