"""The differences in CONTRIBUTING, applied to a copy of the package: a policy, a knob, a feature, a format, a pool.

The copy runs without compilation, so that a new knob costs no minute.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import l3env
from l3env import Workload

ROOT = Path(__file__).parents[1]
ROOMS = ("l3env", "policies", "traces", "experiments")
DIFFS = dict(
    re.findall(r"\*\*(A [^*]+)\*\*(?:(?!\*\*A ).)*?```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
)
KINDS = {
    "policy": "A policy",
    "knob": "A knob",
    "feature": "A feature",
    "format": "A trace format",
    "pool": "A device, link or memory, and with it a KV pool",
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with all of the differences."""
    folder = tmp_path_factory.mktemp("copy")
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / room, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for kind, title in KINDS.items():
        apply(folder, DIFFS[title], kind)
    return folder


def apply(folder: Path, diff: str, kind: str) -> None:
    """Line numbers of hunks are left out in the text: they change with every commit."""
    for target, body in re.findall(r"^\+\+\+ b/(\S+)\n(.*?)(?=^--- |\Z)", diff, re.M | re.S):
        path = folder / target
        for hunk in re.split(r"^@@.*@@\n", body, flags=re.M)[1:]:
            lines = hunk.splitlines()
            before = "\n".join(line[1:] for line in lines if line[:1] != "+")
            after = "\n".join(line[1:] for line in lines if line[:1] != "-")
            text = path.read_text() if path.exists() else ""
            assert text.count(before) == 1 or not text, f"{kind}: the difference does not fit {target}"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text.replace(before, after) if text else after + "\n")


def run(folder: Path, code: str) -> dict[str, object]:
    """What the code prints as JSON, run in the copy."""
    environ = os.environ | {"NUMBA_DISABLE_JIT": "1", "PYTHONPATH": str(folder), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


FIVE = "Workload.build('five', [0, 0, 0, 1, 1], [100, 900, 300, 2000, 50], [8, 4, 6, 3, 9])"
FRAME = f"""
import json, numpy as np, l3env
from l3env import Knobs, Workload, run_policy, make_policy, compile_pair
from l3env.policy.protocol import FixedKnobs
assert l3env.__file__.startswith(__import__("os").getcwd())
tables, five = compile_pair("l3-dgx-a100", "llama-3-8b", 8), {FIVE}
"""


def test_a_policy(copy: Path) -> None:
    """One at a time, the longest first."""
    code = FRAME + "made = make_policy('policies/longest_first.py:LongestFirst')\n"
    code += "frame = run_policy(tables, five, made, record=False).requests\n"
    code += "print(json.dumps({'name': made.name, 'ttft_s': frame['ttft_s'].tolist()}))"
    found = run(copy, code)
    ttft_s = np.array(found["ttft_s"])
    assert found["name"] == "longest-first"
    assert ttft_s[1] < ttft_s[2] < ttft_s[0]


def test_a_knob(copy: Path) -> None:
    """A prompt of 900 tokens waits until nothing runs; references, actions and searches know the knob."""
    code = (
        FRAME
        + """
from l3env.policy.levels import levels_of
def ttft(policy): return run_policy(tables, five, policy, record=False).requests["ttft_s"].tolist()
held, free = Knobs(admit_max_prompt_tokens=500), Knobs()
print(json.dumps({
    "held": ttft(FixedKnobs("held", held)), "free": ttft(FixedKnobs("free", free)),
    "reference": make_policy("fcfs?admit_max_prompt_tokens=500").knobs.admit_max_prompt_tokens,
    "levels": list(map(int, levels_of(["admit_max_prompt_tokens"])["admit_max_prompt_tokens"])),
}))
"""
    )
    found = run(copy, code)
    held, free = np.array(found["held"]), np.array(found["free"])
    assert found["reference"] == 500
    assert found["levels"][:2] == [1024, 8192]
    assert held[0] < free[0]
    assert held[1] > free[1]


def test_a_feature(copy: Path) -> None:
    """It is seen, and the shipped network decides as before."""
    code = (
        FRAME
        + """
from l3env.envs.observe.features import FEATURES
frame = run_policy(tables, five, make_policy("learned-ppo"), record=False).requests
print(json.dumps({"names": [name for name, _ in FEATURES], "finish_s": frame["finish_s"].tolist()}))
"""
    )
    found = run(copy, code)
    assert "rejected_share" in found["names"]
    workload = eval(FIVE, {"Workload": Workload})
    tables = l3env.compile_pair("l3-dgx-a100", "llama-3-8b", 8)
    plain = l3env.run_policy(tables, workload, l3env.make_policy("learned-ppo"), record=False).requests
    np.testing.assert_allclose(found["finish_s"], plain["finish_s"], rtol=1e-12)


def test_a_format(copy: Path) -> None:
    code = (
        FRAME
        + """
from pathlib import Path
from l3env.traces.lengths import FORMAT
path = Path("two.lengths"); path.write_text("10:3\\n20:4\\n")
workload = FORMAT.load(path)
path.write_text("10:3\\n20\\n")
try:
    FORMAT.load(path)
except l3env.errors.TraceError as error:
    said = str(error)
print(json.dumps({"matches": FORMAT.matches(path), "prompts": workload.prompt_tokens.tolist(), "said": said}))
"""
    )
    found = run(copy, code)
    assert found == {
        "matches": True,
        "prompts": [10, 20],
        "said": "two.lengths: row 2: got '20'; expected PROMPT:OUTPUT",
    }


def test_a_pool(copy: Path) -> None:
    code = (
        FRAME
        + """
tables = compile_pair("my/cxl-offload.toml", "opt-66b")
plain = compile_pair("cpu-offload-dgx-a100", "opt-66b")
frame = run_policy(tables, five, make_policy("fcfs"), record=False).requests
pools = [[p.name, p.side.name, p.blocks_count * tables.block_tokens] for p in tables.pools]
done = int(frame["finish_s"].notna().sum())
print(json.dumps({"pools": pools, "ratio": tables.pim_tokens / plain.pim_tokens, "done": done}))
"""
    )
    found = run(copy, code)
    assert [each[:2] for each in found["pools"]] == [["HBM", "GPU"], ["host", "HOST"]]
    assert found["ratio"] == pytest.approx(4e12 / float(l3env.load("pim/host-cpu-ddr4-3200").capacity_bytes), rel=1e-3)
    assert found["done"] == 5
