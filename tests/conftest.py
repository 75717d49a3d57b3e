"""What tests of several rooms share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

import l3env
from l3env.machine.tables import Tables
from tests import warm

MANY_TESTS = 1000


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Where processes share all tests, they share the compiling of kernels first."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None and len(session.items) > MANY_TESTS:
        warm.compile_share(int(worker.removeprefix("gw")), int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))


@pytest.fixture(scope="session")
def mha_tables() -> Tables:
    """A model with a KV head for every query head, on GPUs + DIMM-PIM."""
    return l3env.compile_pair("l3-dgx-a100", "gpt-175b")


@pytest.fixture(scope="session")
def gqa_tables() -> Tables:
    """A model whose query heads share KV heads, likewise."""
    return l3env.compile_pair("l3-dgx-a100", "qwen-72b")


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``l3env`` in a fresh process and checks how it ends."""

    def run(*args: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([sys.executable, "-m", "l3env.cli", *args], capture_output=True, text=True)
        assert (done.returncode == 0) == ok, done.stderr
        return done

    return run
