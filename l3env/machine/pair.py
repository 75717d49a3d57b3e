"""A system and a model, named as on the command line, compiled."""

from __future__ import annotations

from typing import Any

from l3env.machine import specs
from l3env.machine.tables import DEFAULT_BLOCK_TOKENS, Tables, compile_tables


def compile_pair(system: str, model: str, tp: int | None = None, block_tokens: int = DEFAULT_BLOCK_TOKENS) -> Tables:
    """Compiles a system and a model named as on the command line: preset names or TOML files."""
    return compile_tables(named_spec("system", system), named_spec("model", model), tp=tp, block_tokens=block_tokens)


def named_spec(kind: str, name: str) -> Any:
    """A preset, or a TOML file where the name ends so."""
    return specs.load(f"{kind}:{name}" if name.endswith(".toml") else f"{kind}/{name}")
