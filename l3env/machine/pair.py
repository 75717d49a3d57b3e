"""A system and a model, named as on the command line or given as specs, compiled."""

from __future__ import annotations

from l3env.machine import specs
from l3env.machine.tables import DEFAULT_BLOCK_TOKENS, Tables, compile_tables


def compile_pair(
    system: str | specs.SystemSpec,
    model: str | specs.ModelSpec,
    tp: int | None = None,
    block_tokens: int = DEFAULT_BLOCK_TOKENS,
) -> Tables:
    """Compiles a system and a model: references (names or TOML files, with ``?key=value`` changes), or specs."""
    return compile_tables(specs.named("system", system), specs.named("model", model), tp=tp, block_tokens=block_tokens)
