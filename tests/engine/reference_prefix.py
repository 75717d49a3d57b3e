"""A second prefix cache, slow and obvious: a dictionary a pool, keyed by the very ids of a prompt's beginning.

Nothing is counted along: what is in use, idle or shared is summed anew whenever it is asked for. It shares no code with
``l3env.engine.segments`` and ``l3env.engine.kernels``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from l3env.choices import Eviction
from l3env.requests.workload import Workload

Key = tuple[int, ...]  # the ids of a prompt's beginning, then the tokens they stand for


@dataclass
class Entry:
    """One copy of a segment."""

    key: Key
    tokens: int
    users: set[int] = field(default_factory=set)
    uses: int = 0
    idle_since: int = 0

    @property
    def depth(self) -> int:
        return len(self.key) - 2


def prompt_keys(workload: Workload, row: int) -> list[tuple[Key, int]]:
    """(key, tokens) of each segment of a prompt."""
    size, prompt = workload.prefix_block_tokens, int(workload.prompt_tokens[row])
    ids = workload.prefix_ids[workload.prefix_offsets[row] : workload.prefix_offsets[row + 1]].tolist()
    ends = [min((i + 1) * size, prompt) for i in range(len(ids))]
    return [((*ids[: i + 1], end), end - i * size) for i, end in enumerate(ends)]


class PrefixCache:
    """What every pool holds of the prompts."""

    def __init__(self, pools_count: int, block_tokens: int, rule: Eviction) -> None:
        self.pools: list[dict[Key, Entry]] = [{} for _ in range(pools_count)]
        self.block = block_tokens
        self.rule = rule
        self.scores: dict[Key, float] = {}
        self.releases = self.evictions = 0

    def blocks(self, tokens: int) -> int:
        return math.ceil(tokens / self.block)

    def in_use(self, pool: int) -> int:
        return sum(self.blocks(entry.tokens) for entry in self.pools[pool].values() if entry.users)

    def idle(self, pool: int) -> int:
        return sum(self.blocks(entry.tokens) for entry in self.pools[pool].values() if not entry.users)

    def held_by(self, user: int, pool: int) -> int:
        """Blocks that one request would hold anyway."""
        return sum(self.blocks(entry.tokens) for entry in self.pools[pool].values() if user in entry.users)

    def hits(self, keys: list[tuple[Key, int]]) -> list[tuple[Key, int]]:
        """The leading segments that are somewhere."""
        found = []
        for key, tokens in keys:
            if not any(key in pool for pool in self.pools):
                break
            found.append((key, tokens))
        return found

    def tokens_here(self, keys: list[tuple[Key, int]], pool: int) -> int:
        return sum(tokens for key, tokens in self.hits(keys) if key in self.pools[pool])

    def shared_here(self, keys: list[tuple[Key, int]], pool: int) -> int:
        """Blocks that a new holder would not add, since others use them."""
        here = self.pools[pool]
        return sum(self.blocks(tokens) for key, tokens in self.hits(keys) if key in here and here[key].users)

    def crossings(self, keys: list[tuple[Key, int]], pool: int) -> int:
        """Tokens over the link: to be read by a GPU unless HBM has them, to the PIM pool unless it has them."""
        total = 0
        for key, tokens in self.hits(keys):
            to_gpu = key not in self.pools[0]
            to_pool = pool > 0 and key not in self.pools[pool]
            total += tokens * (to_gpu + to_pool)
        return total

    def hold(self, user: int, keys: list[tuple[Key, int]], pool: int) -> None:
        """One more holder of each; a copy that is not there yet comes in."""
        for key, tokens in keys:
            entry = self.pools[pool].setdefault(key, Entry(key, tokens))
            assert user not in entry.users
            entry.users.add(user)
            entry.uses += 1

    def let_go(self, user: int, pool: int) -> None:
        """The deepest first."""
        mine = [entry for entry in self.pools[pool].values() if user in entry.users]
        for entry in sorted(mine, key=lambda entry: -entry.depth):
            entry.users.remove(user)
            if not entry.users:
                self.releases += 1
                entry.idle_since = self.releases

    def evict_one(self, pool: int) -> None:
        order = {
            Eviction.LRU: lambda entry: entry.idle_since,
            Eviction.LFU: lambda entry: (entry.uses, entry.idle_since),
            Eviction.TREE: lambda entry: (-entry.depth, entry.idle_since),
            Eviction.SCORE: lambda entry: (self.scores.get(entry.key, 0.0), entry.idle_since),
        }[self.rule]
        idle = [entry for entry in self.pools[pool].values() if not entry.users]
        del self.pools[pool][min(idle, key=order).key]
        self.evictions += 1
