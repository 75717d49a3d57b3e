"""What the scheduler is told from outside: environment variables, or ``additional_config`` of vLLM."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l3env.engine.engine import Slo
from l3env.errors import L3EnvError, PolicyError, SpecError
from l3env.machine.pair import compile_pair
from l3env.machine.specs import names
from l3env.machine.tables import Tables
from l3env.reference import parse
from l3env.requests.registry import load_trace
from l3env.requests.workload import Workload

OLDEST, TOO_NEW = (0, 22), (0, 33)
DEFAULT_SYSTEM, DEFAULT_MODEL = "gpu-dgx-h100?gpus_count=1", "llama-3-8b"
KEYS = ("policy", "system", "model", "slo", "training")


@dataclass(frozen=True)
class Settings:
    """References, as on l3env's command line.

    Attributes:
        policy: which policy decides.
        system: the machine that it is told it runs on.
        model: the model; empty takes vLLM's, where l3env has it.
        slo: what deadlines follow from, as ``ttft_scale=5&tbt_s=0.1``.
        training: a trace of earlier requests for policies that learn from one; empty for none.
    """

    policy: str
    system: str = DEFAULT_SYSTEM
    model: str = ""
    slo: str = ""
    training: str = ""


def read_settings(additional: Any, environ: Mapping[str, str] = os.environ) -> Settings:
    """``additional_config`` (``l3env_policy`` ...) over ``L3ENV_POLICY`` ... Raises PolicyError without a policy."""
    given = additional if isinstance(additional, Mapping) else {}
    unknown = sorted(key for key in given if str(key).startswith("l3env_") and key[6:] not in KEYS)
    if unknown:
        known = ", ".join(f"l3env_{key}" for key in KEYS)
        raise PolicyError(f"additional_config: unknown {', '.join(unknown)}; expected {known}")
    found = {key: str(given.get(f"l3env_{key}") or environ.get(f"L3ENV_{key.upper()}") or "") for key in KEYS}
    if not found["policy"]:
        raise PolicyError(
            "l3env.vllm: no policy; expected a reference in L3ENV_POLICY, or in "
            'additional_config as {"l3env_policy": "sarathi?prefill_budget_tokens=512"}'
        )
    return Settings(**{key: value for key, value in found.items() if value})


def check_version(version: str) -> tuple[int, int]:
    """(major, minor). Raises L3EnvError for a vLLM that this was not made for."""
    found = re.match(r"(\d+)\.(\d+)", version)
    parts = (int(found[1]), int(found[2])) if found else (0, 0)
    if not OLDEST <= parts < TOO_NEW:
        raise L3EnvError(
            f"l3env.vllm: vLLM {version}; expected {OLDEST[0]}.{OLDEST[1]} <= version < {TOO_NEW[0]}.{TOO_NEW[1]}, "
            "whose scheduler this one is derived from"
        )
    return parts


def read_slo(text: str) -> Slo:
    """An SLO written as options of a reference."""
    reference = parse(f"slo?{text}" if text else "slo", "slo", PolicyError)
    return Slo(**reference.arguments(Slo))


def training_of(text: str) -> Workload | None:
    """The trace that predictors are fitted on."""
    return load_trace(text) if text else None


def machine_of(settings: Settings, served: str) -> tuple[Tables, str]:
    """(the machine that a policy sees, how its model was found).

    Args:
        served: vLLM's model: a name, or a folder with a ``config.json``.
    """
    if settings.model:
        return compile_pair(settings.system, settings.model), f"model {settings.model}, as asked for"
    known = {re.sub(r"[^a-z0-9]", "", name): name for name in names("model")}
    plain = re.sub(r"[^a-z0-9]", "", Path(served).name.lower().replace("meta-", ""))
    if plain in known:
        return compile_pair(settings.system, known[plain]), f"model {known[plain]}, after vLLM's {served}"
    if (Path(served) / "config.json").is_file():
        try:
            return compile_pair(settings.system, f"hf:{served}"), f"model of {served}/config.json"
        except SpecError:
            pass
    return (
        compile_pair(settings.system, DEFAULT_MODEL),
        f"model {DEFAULT_MODEL} in place of vLLM's {served}, which l3env does not know: L3ENV_MODEL names another",
    )
