"""Sarathi-Serve with the budget that its authors prescribe (OSDI 2024, arXiv 2403.02310): the largest
number of tokens an iteration may have without breaking the limit on the time between tokens, from a profile of
iterations made once for the machine.

The profile here is the engine's own formula. A profiled iteration has ``decodes_count`` decoding requests at a context,
and one chunk at the end of a prompt as long; budgets are multiples of a tile. The limit is the SLO's: an absolute one
as it is, else its multiple of a decode step alone at that context. ``sarathi`` has one budget for all machines.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from l3env.machine.batch import Chunk, Decodes
from l3env.machine.tables import Tables
from l3env.policies.by_count import kv_place
from l3env.policies.by_key import CHUNKED
from l3env.policy.protocol import FixedKnobs, Role
from l3env.requests.workload import Workload

TILE_TOKENS, MOST_TOKENS = 128, 8192
DECODES_COUNT, CONTEXT_TOKENS = 32, 2048


class SarathiSlo(FixedKnobs):
    """Sarathi-Serve, its token budget from the SLO and a profile of the machine."""

    role = Role.PUBLISHED
    source = "Sarathi-Serve, arXiv 2403.02310"
    signals = "TBT SLO, iteration times"

    def __init__(self, decodes_count: int = DECODES_COUNT, context_tokens: int = CONTEXT_TOKENS, **knobs: Any) -> None:
        super().__init__("sarathi-slo", CHUNKED, **knobs)
        self._decodes_count, self._context_tokens = decodes_count, context_tokens

    def prepare(self, system: Tables, training: Workload | None) -> None:
        self.knobs = replace(self.knobs, prefill_budget_tokens=self.budget_tokens(system))

    def budget_tokens(self, system: Tables) -> int:
        """The largest budget within the limit; one tile beside the decodes where none is."""
        limit_s = self.slo.tbt_s
        if limit_s is None:
            limit_s = self.slo.tbt_scale * system.iteration_s([self._decodes(system, 1)])
        decodes = [self._decodes(system, self._decodes_count)]
        least = -(-(self._decodes_count + 1) // TILE_TOKENS) * TILE_TOKENS
        found = least
        for budget in range(least, MOST_TOKENS + 1, TILE_TOKENS):
            chunk = budget - self._decodes_count
            history = max(self._context_tokens - chunk, 0)
            if system.iteration_s(decodes, [Chunk(chunk, history, kv_place(system))]) > limit_s:
                break
            found = budget
        return found

    def _decodes(self, system: Tables, count: int) -> Decodes:
        return Decodes(count, float(self._context_tokens), kv_place(system))
