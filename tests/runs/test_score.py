"""The score of a policy: what it is made of, and that nothing a policy does takes the caller along."""

import json
import time

import numpy as np
import pytest
from typer.testing import CliRunner

from l3env.cli import app
from l3env.errors import PolicyError
from l3env.machine.pair import compile_pair
from l3env.policy.registry import make_policy
from l3env.requests.registry import load_trace
from l3env.runs.driver import run_policy
from l3env.runs.score import CELLS, SUITE, score, score_apart

PATIENT = """
from l3env import BasePolicy, Knobs

class Patient(BasePolicy):
    def decide(self, view):
        {body}
        return Knobs(prefill_budget_tokens=256)
"""


@pytest.fixture
def policy_of(tmp_path):
    def write(body, name="mine"):
        file = tmp_path / f"{name}.py"
        file.write_text(PATIENT.format(body=body))
        return str(file)

    return write


def test_a_score_is_who_met_less_who_starved_in_the_mean_over_cells():
    found, shares = score("fcfs"), []
    for cell in CELLS:
        training = load_trace(f"{cell.requests}&seed=1")
        table = run_policy(
            compile_pair(cell.system, cell.model), load_trace(cell.requests), make_policy("fcfs"), training=training
        ).requests
        wait_s = table["first_token_s"] - table["arrival_s"]
        starved = wait_s > np.maximum(60, 10 * table["ttft_slo_s"])
        shares.append((table["slo_met"].sum() - starved.sum()) / len(table))
    assert [cell["guarded_attainment_frac"] for cell in found["cells"]] == pytest.approx(shares)
    assert found["score"] == pytest.approx(np.mean(shares))
    assert min(shares) < max(shares)


def test_what_a_policy_learns_from_is_not_what_it_serves():
    for cell in CELLS:
        served, earlier = load_trace(cell.requests), load_trace(f"{cell.requests}&seed=1")
        assert not np.array_equal(served.output_tokens, earlier.output_tokens)


def test_a_policy_of_a_file_from_its_own_process_scores_as_it_does_here(policy_of):
    ref = policy_of("print('hello')")
    apart = score_apart(ref)
    assert (apart["suite"], apart["policy"], apart["error"]) == (SUITE, ref, None)
    assert apart["cells"] == score(ref)["cells"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ValueError('no')", "mine.py:6, in decide"),
        ("import os; os._exit(3)", "its process ended with 3"),
        ("import os; os.kill(os.getpid(), 9)", "its process ended with -9"),
        ("import time; time.sleep(60)", "no score within"),
    ],
)
def test_what_fails_or_hangs_has_no_score_and_says_why(policy_of, body, said):
    begun_s = time.monotonic()
    found = score_apart(policy_of(body), limit_s=20)
    assert found["score"] is None
    assert said in found["error"]
    assert time.monotonic() - begun_s < 40


def test_what_takes_too_much_memory_has_no_score(policy_of):
    found = score_apart(policy_of("self.kept = bytearray(3 * 2**30)"), memory_bytes=2 * 2**30)
    assert found["score"] is None
    assert "MemoryError" in found["error"] or "GiB of memory" in found["error"]


def test_one_without_a_score_does_not_lose_the_others(policy_of):
    wrong = policy_of("return 3")
    ended = CliRunner().invoke(app, ["score", "fcfs", wrong, "--json"])
    fine, other = json.loads(ended.stdout)
    assert ended.exit_code == 2
    assert fine["error"] is None
    assert -1 <= fine["score"] <= 1
    assert other["score"] is None
    assert "expected Knobs" in other["error"]
    with pytest.raises(PolicyError):
        score(wrong)
