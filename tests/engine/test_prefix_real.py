"""The prefix cache on the real traces against their published hit rates; skipped, saying so, without the files."""

from __future__ import annotations

import numpy as np
import pytest

from l3env.choices import Eviction
from l3env.engine.engine import Engine, Stop
from l3env.knobs import Knobs
from l3env.traces import kv_cache_tester, mooncake
from l3env.traces.stats import prefix_hit_frac
from tests.engine.engine_cases import compiled, with_coef, with_memory
from tests.traces.real_traces import MOONCAKE, SESSIONS, SYNTHETIC, real

ENDLESS_BLOCKS = 1 << 40
BLOCK_TOKENS = 16


def served(workload, blocks: int, eviction: Eviction = Eviction.LRU, *, pair=("gpu-dgx-a100", "llama-3-8b")) -> Engine:
    """One replica with pools of so many blocks serves the whole workload, whole prompts, first come first served."""
    tables = compiled(*pair)
    tables = with_memory(tables, BLOCK_TOKENS, [blocks] * tables.arrays.pool_blocks.shape[1])
    tables = with_coef(tables, served_tokens=2**31)  # the traces are of models with longer contexts
    engine = Engine(tables, 1, len(workload), prefix_cache=eviction)
    engine.reset(0, workload)
    Knobs(headroom_frac=0.0).write(engine.knobs, 0)
    assert engine.run(0) == Stop.DONE
    return engine


def hit_frac(engine: Engine) -> float:
    env = engine.state.prefix.env[0]
    return float(env["hits_count"] / env["ids_count"])


@pytest.mark.parametrize("pair", [("gpu-dgx-a100", "llama-3-8b"), ("l3-dgx-a100", "llama-2-7b")])
@pytest.mark.parametrize(("file", "share"), [(MOONCAKE, 0.347), (SYNTHETIC, 0.640)])
def test_with_room_for_everything_hits_are_those_of_an_unbounded_cache(file: str, share: float, pair) -> None:
    """One request after the other, so that every prefix has been computed before the next prompt comes."""
    workload = mooncake.load(real(file))
    found = hit_frac(served(workload.at_load(1e-4), ENDLESS_BLOCKS, pair=pair))
    assert found == prefix_hit_frac(workload)
    assert found == pytest.approx(share, abs=5.1e-4)


def test_sessions_share_what_their_turns_have_in_common() -> None:
    """Closed loops: a turn comes after its parent's end, so only turns of one chain's forks could race; 96.2 %."""
    workload = kv_cache_tester.load(real(SESSIONS), sessions=40)
    engine = served(workload, ENDLESS_BLOCKS)
    assert hit_frac(engine) == pytest.approx(prefix_hit_frac(workload), abs=0.002)
    assert hit_frac(engine) > 0.9
    assert engine.state.env["prefill_tokens"][0] < 0.15 * workload.prompt_tokens.sum()


@pytest.mark.parametrize("eviction", [Eviction.LRU, Eviction.LFU, Eviction.TREE])
def test_hits_fall_with_capacity(eviction: Eviction) -> None:
    workload = mooncake.load(real(MOONCAKE)).at_load(1e-4)
    longest = -(-int((workload.prompt_tokens + workload.output_tokens).max()) // BLOCK_TOKENS) + 1
    found = [hit_frac(served(workload, longest * k, eviction)) for k in (1, 4, 16, 64, 1 << 20)]
    assert found == sorted(found)
    assert found[0] < 0.6 * found[-1]


def test_the_prefix_cache_shortens_ttft() -> None:
    """Mooncake's conversations at a sixth of their speed, which one replica keeps up with only with the cache."""
    workload = mooncake.load(real(MOONCAKE))
    tables = compiled("gpu-dgx-a100", "llama-3-8b")
    blocks = int(tables.arrays.pool_blocks.max())
    median_s = {}
    for eviction in (Eviction.OFF, Eviction.LRU):
        req = served(workload.at_load(0.16), blocks, eviction).state.req[0]
        median_s[eviction] = np.nanmedian(req["first_token_s"] - req["arrival_s"])
    assert median_s[Eviction.LRU] < 0.5 * median_s[Eviction.OFF]
