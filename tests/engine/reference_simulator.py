"""A second simulator, slow and obvious, for checking the kernels: one object a request, one loop pass a token.

Nothing is kept up to date here: what a lane carries, what a pool holds and who waits is summed anew whenever it is
asked for. It shares no code with ``l3env.engine.kernels``; it reads the numbers of a compiled system from its tables
and restates the formulas (arXiv 2504.17584, section 6) in a few lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from l3env.choices import Budget, Eviction, Order, PimForm, Victim
from l3env.knobs import Knobs
from l3env.machine.arrays import fc_grid_tokens
from l3env.machine.tables import Tables
from l3env.requests.workload import Workload
from tests.engine.reference_prefix import Key, PrefixCache, prompt_keys

HEEDS_HOPELESS = set(Order) - {Order.FCFS, Order.NEWEST_FIRST, Order.BY_SCORE}
ALIGN_MIN_CHUNK_TOKENS = 128


def norm_s(a_s: float, b_s: float, exponent: float) -> float:
    """Two times that overlap."""
    if exponent == 0 or min(a_s, b_s) <= 0:
        return max(a_s, b_s)
    return float((a_s**exponent + b_s**exponent) ** (1 / exponent))


@dataclass(eq=False)
class Request:
    """All about one request. KV tokens of a decoding one are counted up one by one."""

    idx: int
    arrival_s: float
    think_s: float
    prompt: int
    output: int
    parent: int
    predicted: int
    ttft_slo_s: float
    ttft_alone_s: float
    guesses_right: int  # of every eight guessed tokens
    status: str = "future"
    sub: int = 0
    lane: int = -1
    target: int = 0
    prefilled: int = 0
    chunk: int = 0
    kv: int = 0
    emitted: int = 0
    promised_blocks: int = 0
    seq: int = 0
    preemptions: int = 0
    first_s: float | None = None
    last_s: float | None = None
    finish_s: float | None = None
    score: float = 0.0
    was_late: bool = False  # when it was admitted
    gaps_s: list[float] = field(default_factory=list)
    keys: list[tuple[Key, int]] = field(default_factory=list)  # its prompt's segments
    hit_tokens: int = 0
    moving: int = 0


@dataclass
class Totals:
    """What happened, summed."""

    iterations: int = 0
    output_tokens: int = 0
    prefill_tokens: int = 0
    recomputed_tokens: int = 0
    decode_tokens: int = 0
    preemptions: int = 0
    busy_s: float = 0.0
    gpu_busy_s: float = 0.0
    pim_busy_s: float = 0.0
    energy_j: float = 0.0
    prefix_ids: int = 0
    prefix_hits: int = 0


class Prices:
    """The published formulas, fed from the coefficients of one compiled system."""

    def __init__(self, tables: Tables) -> None:
        self.coef = {name: tables.arrays.coef[name][0].item() for name in tables.arrays.coef.dtype.names}
        self.grid = fc_grid_tokens()
        self.fc_row, self.head_row = tables.arrays.fc_s[0], tables.arrays.head_s[0]
        self.comm_row, self.draft_row = tables.arrays.comm_s[0], tables.arrays.draft_s[0]
        self.experts_row = tables.arrays.experts_s[0]

    def _along(self, row: np.ndarray, tokens: int, slope: float) -> float:
        beyond = max(tokens - self.grid[-1], 0.0)
        return float(np.interp(tokens, self.grid, row) + beyond * slope)

    def fc_s(self, tokens: int) -> float:
        return self._along(self.fc_row, tokens, self.coef["fc_slope_s"])

    def comm_s(self, tokens: int) -> float:
        """All-to-all that computing hides."""
        return self._along(self.comm_row, tokens, self.coef["comm_slope_s"])

    def gpu_s(self, work_s: float, tokens: int) -> float:
        """A batch's work beside its all-to-all, which keeps a share of the multiprocessors while it runs: a stage that
        computes x beside y of sending ends when the last of both is done. Where micro-batches take turns there are four
        stages of half a batch: attention | dispatch, experts | dispatch, experts | combine, attention | combine."""
        c, comm_s = self.coef, self.comm_s(tokens)

        def stage_s(computing_s: float, sending_s: float) -> float:
            return max(sending_s, computing_s + sending_s * c["comm_sm_frac"])

        if not c["dispatch_frac"]:
            return stage_s(work_s, comm_s)
        experts_s = self._along(self.experts_row, tokens, c["experts_slope_s"])
        dispatch_s, combine_s = comm_s * c["dispatch_frac"], comm_s * (1 - c["dispatch_frac"])
        order = [(work_s - experts_s, dispatch_s), (experts_s, dispatch_s), (experts_s, combine_s)]
        order.append((work_s - experts_s, combine_s))
        return sum(stage_s(computing_s / 2, sending_s / 2) for computing_s, sending_s in order)

    def guessing_s(self, requests: int) -> float:
        return self._along(self.draft_row, requests, self.coef["draft_slope_s"])

    def head_s(self, rows: int) -> float:
        return self._along(self.head_row, rows, self.coef["head_slope_s"])

    def prefill_s(self, *chunks: tuple[int, int]) -> float:
        """t_p of (chunk, done) pairs: one launch for all, and the last tile of the longest chunk runs on beside."""
        if not chunks:
            return 0.0
        c = self.coef
        longest_s = max(c["prefill_tail_s"] + c["prefill_tail_token_s"] * chunk for chunk, _ in chunks if chunk)
        work_s = sum(self.chunk_s(chunk, done) for chunk, done in chunks)
        return c["prefill_fixed_s"] + norm_s(work_s, longest_s, c["prefill_exponent"])

    def chunk_s(self, chunk: int, done: int) -> float:
        """Every query sees the history and the part of its chunk up to itself; fewer rows than a tile cost a tile."""
        c = self.coef
        pairs = max(chunk, c["prefill_tile_tokens"]) * (chunk + 1) / 2 + max(chunk, c["prefill_history_tokens"]) * done
        tiles = math.ceil(chunk / c["prefill_tile_tokens"])
        working_s = pairs * c["prefill_pair_s"] + chunk * c["prefill_new_s"] + tiles * c["prefill_tile_s"]
        reading_s = c["prefill_kv_s"] * (done + chunk) + c["prefill_query_s"] * chunk
        return max(working_s, reading_s) + c["prefill_history_token_s"] * done

    def hbm_s(self, kv: int, requests: int, queries: int = 1) -> float:
        """A launch, more where KV is long enough to be split, and reading beside the tiles of (request, KV head)."""
        c = self.coef
        if requests == 0:
            return 0.0
        mean = kv / requests
        token_s = c[{1: "hbm_token_s", 2: "hbm_verify_s"}[queries]]
        reading_s = token_s * kv + c["hbm_request_s"] * requests * queries
        tiles_s = c["hbm_tile_s"] * max(requests - c["hbm_wave_requests"], 0) + c["hbm_mean_token_s"] * mean
        launch_s = c["hbm_fixed_s"] + (c["hbm_regroup_s"] if requests > 1 else 0.0)
        launch_s += c["hbm_split_s"] * float(np.clip((mean - 128) / 384, 0, 1))
        return norm_s(reading_s, tiles_s, c["hbm_exponent"]) + launch_s

    def lane_s(self, kv: int, requests: int, queries: int = 1) -> float:
        """Attention of one PIM lane: linear in tokens and requests."""
        token_s = self.coef[{1: "pim_token_s", 2: "pim_verify_s"}[queries]]
        return token_s * kv + self.coef["pim_request_s"] * requests * queries

    def decompressed_s(self, kv: int, queries: int) -> float:
        """Attention on decompressed KV, which keeps all lanes busy alike."""
        return self.coef[{1: "decompressed_token_s", 2: "decompressed_verify_s"}[queries]] * kv

    def pim_s(self, slowest_s: float, requests: int, pushed: float) -> float:
        """T_PIM: the slowest lane and the filling of its pipeline, held up by a share of the transfers; never less than
        the transfers."""
        c = self.coef
        comm_s = c["transfer_request_s"] * requests + c["transfer_token_s"] * pushed
        latency_s = c["transfer_latency_s"] if requests else 0.0
        attention_s = slowest_s + (c["pim_batch_s"] if requests else 0.0)
        return max(attention_s + c["transfer_exposed_frac"] * comm_s, comm_s) + latency_s

    def alone_s(self, prompt: int) -> tuple[float, float]:
        """(TTFT, time between tokens) of a prompt on the empty system."""
        has_pim = self.coef["has_pim"]
        ttft = max(self.prefill_s((prompt, 0)), self.pim_s(0, 0, prompt if has_pim else 0))
        tbt = self.pim_s(self.lane_s(prompt + 1, 1), 1, 0) if has_pim else self.hbm_s(prompt + 1, 1)
        ttft, tbt = ttft + self.fc_s(prompt) + self.head_s(1), tbt + self.fc_s(1) + self.head_s(1)
        return self.gpu_s(ttft, prompt), self.gpu_s(tbt, 1)


class ReferenceSimulator:
    """One machine, one workload; ``step(knobs)`` runs one iteration."""

    def __init__(
        self,
        tables: Tables,
        workload: Workload,
        predicted,
        ttft_slo_s,
        ttft_alone_s,
        guesses_right=None,
        eviction=Eviction.OFF,
    ) -> None:
        arrays = tables.arrays
        self.price = Prices(tables)
        coef = self.price.coef
        self.block, self.has_pim = coef["block_tokens"], bool(coef["has_pim"])
        self.lane_pool = arrays.lane_pool[0, : coef["lanes_count"]].tolist()
        self.capacity = arrays.pool_blocks[0, : coef["pools_count"]].tolist()
        self.cache = PrefixCache(len(self.capacity), self.block, eviction)
        self.now = 0.0
        self.admissions = 0
        self.decompressed_lane, self.decompressed_pool = coef["decompressed_lane"], coef["decompressed_pool"]  # 0: none
        self.growing: set[int] = set()  # pools where blocks of the coming decode step are taken
        self.queries = 1  # tokens that a decode step verifies
        self.guessing_steps = [0, 0]
        self.totals = Totals()
        self.running: list[Request] = []
        self.requests = [
            Request(
                idx=i,
                arrival_s=float(workload.arrival_s[i])
                if workload.recorded_floor or workload.parent_idx[i] < 0
                else 0.0,
                think_s=float(workload.think_s[i]),
                prompt=int(workload.prompt_tokens[i]),
                output=int(workload.output_tokens[i]),
                parent=int(workload.parent_idx[i]),
                predicted=int(predicted[i]),
                ttft_slo_s=float(ttft_slo_s[i]),
                ttft_alone_s=float(ttft_alone_s[i]),
                guesses_right=0 if guesses_right is None else int(guesses_right[i]),
                keys=prompt_keys(workload, i) if eviction else [],
            )
            for i in range(len(workload))
        ]

    # --- what is where, from scratch

    def blocks(self, tokens: int) -> int:
        return math.ceil(tokens / self.block)

    def footprint(self, r: Request, tokens: int) -> int:
        """Segments of the prompt lie in blocks of their own."""
        rest = tokens - sum(size for _, size in r.keys)
        return sum(self.blocks(size) for _, size in r.keys) + self.blocks(rest)

    def held(self, r: Request) -> int:
        if r.status == "prefill":
            return self.footprint(r, r.target)
        grows = r.status == "decode" and self.lane_pool[r.lane] in self.growing
        return self.footprint(r, r.kv + (self.emits(r) if grows else 0))

    def emits(self, r: Request) -> int:
        """Tokens of its next step: of steps 1..x with a guess, the whole part of x / 8 x its rate were right."""
        if self.queries == 1:
            return 1
        done = self.guessing_steps[r.sub]
        return 1 + math.floor((done + 1) / 8 * r.guesses_right) - math.floor(done / 8 * r.guesses_right)

    def room(self, pool: int) -> int:
        """Blocks a pool may hold beside those of the other form of KV in the same memory."""
        share, others = self.price.coef["decompressed_share"], range(1, self.decompressed_pool)
        if pool == self.decompressed_pool and pool > 0:
            return min(self.capacity[pool], *(int((self.capacity[p] - self.used(p)) / share) for p in others))
        taken = math.ceil(self.used(self.decompressed_pool) * share) if pool in others else 0
        return self.capacity[pool] - taken

    def used(self, pool: int) -> int:
        """What is shared counts once."""
        residents = [r for r in self.running if self.lane_pool[r.lane] == pool]
        own = sum(self.held(r) - self.cache.held_by(r.idx, pool) for r in residents)
        return own + self.cache.in_use(pool)

    def evict_to_fit(self, pool: int) -> None:
        while self.used(pool) + self.cache.idle(pool) > self.capacity[pool]:
            self.cache.evict_one(pool)

    def waiting(self) -> list[Request]:
        return [r for r in self.requests if r.status == "waiting"]

    def prefilling(self) -> list[Request]:
        return sorted((r for r in self.running if r.status == "prefill"), key=lambda r: r.seq)

    def decoding(self, sub: int | None = None) -> list[Request]:
        return [r for r in self.running if r.status == "decode" and sub in (None, r.sub)]

    def lane_load(self, sub: int, lane: int, interleaved: bool) -> int:
        mine = [r for r in self.running if r.lane == lane and (r.sub == sub or not interleaved)]
        return sum(r.target if r.status == "prefill" else r.kv for r in mine)

    def lighter_sub(self) -> int:
        members = [sum(r.sub == sub for r in self.running) for sub in (0, 1)]
        return 1 if members[1] < members[0] else 0

    # --- arrivals and the queue

    def known_arrivals(self) -> list[Request]:
        """Future requests whose arrival time is settled: no parent, or a parent that is done."""
        done = ("finished", "rejected")
        future = (r for r in self.requests if r.status == "future")
        return [r for r in future if r.parent < 0 or self.requests[r.parent].status in done]

    def let_in(self) -> None:
        """Rejecting a parent may settle a child's arrival, so again until nothing changes."""
        while due := [r for r in self.known_arrivals() if r.arrival_s <= self.now]:
            r = min(due, key=lambda r: (r.arrival_s, r.parent >= 0, r.idx))
            r.target = r.prompt
            if any(self.footprint(r, r.prompt + r.output - 1) <= capacity for capacity in self.capacity):
                r.status = "waiting"
            else:
                r.status = "rejected"
                self.free_children(r)

    def free_children(self, parent: Request) -> None:
        for r in self.requests:
            if r.parent == parent.idx:
                r.arrival_s = max(r.arrival_s, self.now + r.think_s)

    def next_arrival_s(self) -> float | None:
        return min((r.arrival_s for r in self.known_arrivals()), default=None)

    def is_hopeless(self, r: Request) -> bool:
        if r.first_s is None:
            return self.now > r.arrival_s + r.ttft_slo_s - r.ttft_alone_s
        return r.first_s > r.arrival_s + r.ttft_slo_s

    def queue(self, order: Order, is_late: Callable[[Request], bool] | None = None) -> list[Request]:
        is_late = is_late or self.is_hopeless
        return sorted(self.waiting(), key=lambda r: (*self.rank(r, order, is_late(r)), r.idx))

    def rank(self, r: Request, order: Order, late: bool) -> tuple[bool, float]:
        by = {
            Order.FCFS: r.arrival_s,
            Order.FCFS_HOPELESS_LAST: r.arrival_s,
            Order.SHORTEST_PROMPT_HOPELESS_LAST: r.prompt,
            Order.EARLIEST_DEADLINE_HOPELESS_LAST: r.arrival_s + r.ttft_slo_s,
            Order.NEWEST_FIRST: -r.arrival_s,
            Order.BY_SCORE: -r.score,
            Order.SHORTEST_PREDICTED_HOPELESS_LAST: r.target + max(r.predicted - r.emitted, 1),
        }
        return order in HEEDS_HOPELESS and late, by[order]

    # --- admission

    def has_room(self, knobs: Knobs, r: Request, pool: int) -> bool:
        capacity = self.room(pool)
        need = self.footprint(r, r.target) - self.cache.shared_here(r.keys, pool)
        residents = [x for x in self.running if self.lane_pool[x.lane] == pool]
        if not residents:
            return need <= capacity
        if self.used(pool) + need > capacity - math.ceil(knobs.headroom_frac * capacity):
            return False
        if knobs.reserve_predicted:
            return sum(x.promised_blocks for x in residents) + self.blocks_at_end(r) <= capacity
        return True

    def blocks_at_end(self, r: Request) -> int:
        return self.footprint(r, r.target + max(r.predicted - r.emitted, 1) - 1)

    def find_pim_lane(self, knobs: Knobs, r: Request, sub: int) -> int | None:
        decompressed = self.decompressed_lane and knobs.pim_form == PimForm.DECOMPRESSED
        if decompressed and self.blocks(r.target) <= self.capacity[self.decompressed_pool]:
            return self.decompressed_lane if self.has_room(knobs, r, self.decompressed_pool) else None
        lanes = range(1, self.decompressed_lane or len(self.lane_pool))
        fitting = [lane for lane in lanes if self.has_room(knobs, r, self.lane_pool[lane])]

        def load(lane: int) -> int:
            return self.lane_load(sub, lane, knobs.sub_batching) - self.cache.tokens_here(r.keys, self.lane_pool[lane])

        return min(fitting, key=lambda lane: (load(lane), lane), default=None)

    def find_lane(self, knobs: Knobs, r: Request, sub: int) -> int | None:
        hbm_fits = self.has_room(knobs, r, 0)
        if not self.has_pim:
            return 0 if hbm_fits else None
        share = knobs.hbm_share_frac
        if share <= 0:
            too_large = all(self.footprint(r, r.target) > capacity for capacity in self.capacity[1:])
            return 0 if too_large and hbm_fits else self.find_pim_lane(knobs, r, sub)
        total = sum(self.used(pool) for pool in range(len(self.capacity)))
        if hbm_fits and self.used(0) <= share * total:
            return 0
        lane = None
        if share < 1 or self.footprint(r, r.target) > self.capacity[0]:
            lane = self.find_pim_lane(knobs, r, sub)
        return 0 if lane is None and hbm_fits else lane

    def admit_next(self, knobs: Knobs, sub: int) -> Request | None:
        for r in self.queue(knobs.order)[:1]:  # the head of the queue blocks those behind it
            if knobs.order == Order.BY_SCORE and r.score < 0 and self.running:
                return None
            lane = self.find_lane(knobs, r, sub)
            if lane is not None:
                self.admissions += 1
                r.was_late = self.is_hopeless(r)
                r.status, r.lane, r.sub, r.seq, r.prefilled = "prefill", lane, sub, self.admissions, 0
                r.promised_blocks = self.blocks_at_end(r)
                self.running.append(r)
                self.use_prefix(r)
                return r
        return None

    def use_prefix(self, r: Request) -> None:
        """What is cached need not be computed, the last token aside; copies from other pools come after evictions."""
        pool = self.lane_pool[r.lane]
        hits = self.cache.hits(r.keys)
        hit_tokens = sum(tokens for _, tokens in hits)
        r.prefilled, r.moving = min(hit_tokens, r.target - 1), self.cache.crossings(r.keys, pool)
        if r.preemptions == 0:
            r.hit_tokens = hit_tokens
            self.totals.prefix_ids += len(r.keys)
            self.totals.prefix_hits += len(hits)
        here = [hit for hit in hits if hit[0] in self.cache.pools[pool]]
        self.cache.hold(r.idx, here, pool)
        self.evict_to_fit(pool)
        self.cache.hold(r.idx, [hit for hit in hits if hit not in here], pool)

    def publish(self, r: Request) -> None:
        """Segments that are complete are there for others."""
        pool, end = self.lane_pool[r.lane], 0
        for key, tokens in r.keys:
            end += tokens
            entry = self.cache.pools[pool].get(key)
            if end <= r.prefilled and (entry is None or r.idx not in entry.users):
                self.cache.hold(r.idx, [(key, tokens)], pool)

    def leave(self, r: Request) -> None:
        """The last of the running list takes the place of the one that leaves."""
        self.cache.let_go(r.idx, self.lane_pool[r.lane])
        place = self.running.index(r)
        self.running[place] = self.running[-1]
        self.running.pop()

    # --- memory

    def preempt(self, r: Request) -> None:
        self.leave(r)
        r.status, r.target, r.prefilled, r.kv, r.chunk, r.moving = "waiting", r.prompt + r.emitted, 0, 0, 0, 0
        r.preemptions += 1
        self.totals.preemptions += 1

    def make_room(self, rule: Victim) -> None:
        """Preempts until one decode step fits into every pool."""
        badness = {
            Victim.NEWEST_ADMITTED: lambda r: r.seq,
            Victim.MOST_PREDICTED_LEFT: lambda r: r.predicted - r.emitted,
            Victim.LATEST_DEADLINE: lambda r: r.arrival_s + r.ttft_slo_s,
            Victim.LOWEST_SCORE: lambda r: -r.score,
        }[rule]
        for pool in range(len(self.capacity)):
            self.growing.add(pool)
            while self.used(pool) > self.room(pool):
                self.preempt(max((r for r in self.running if self.lane_pool[r.lane] == pool), key=badness))
            self.evict_to_fit(pool)

    # --- the plan of an iteration

    def plan(self, knobs: Knobs) -> tuple[bool, int]:
        """(decode?, prompt tokens planned)"""
        for r in self.running:
            r.chunk = 0
        self.growing = set()
        self.queries = 2 if knobs.multi_token and self.price.coef["drafts_count"] else 1
        self.interleaved = knobs.sub_batching and self.has_pim
        if not knobs.prefill_first:
            self.make_room(knobs.victim)
        planned = self.plan_prefill(knobs)
        if knobs.prefill_first and planned:
            return False, planned
        if knobs.prefill_first:
            self.make_room(knobs.victim)
            if not self.decoding():  # preempted, all of them
                planned = self.plan_prefill(knobs)
        decode = bool(self.decoding())
        if decode and self.interleaved:
            self.balance()
        return decode, planned

    def plan_prefill(self, knobs: Knobs) -> int:
        # a machine with nothing running may always start one
        self.may_admit = max(knobs.admit_max_count, 1) if not self.running else knobs.admit_max_count
        if self.interleaved and knobs.prefill_budget_tokens in (Budget.ALIGN, Budget.ALIGN_WHEN_FULL):
            self.plan_aligned(knobs)
        elif knobs.prefill_in_order:
            self.plan_in_order(knobs)
        else:
            self.plan_by_budget(knobs)
        return sum(r.chunk for r in self.running)

    def plan_by_budget(self, knobs: Knobs) -> None:
        budget = knobs.prefill_budget_tokens
        left = math.inf if budget < 0 else budget
        if knobs.budget_counts_decodes:
            left = max(left - len(self.decoding()), 0)
        for r in self.prefilling():
            r.chunk = min(r.target - r.prefilled, left)
            left -= r.chunk
        while left > 0 and self.may_admit > 0:
            r = self.admit_next(knobs, self.lighter_sub())
            if r is None:
                return
            self.may_admit -= 1
            r.chunk = min(r.target - r.prefilled, left)
            left -= r.chunk

    def plan_in_order(self, knobs: Knobs) -> None:
        """Whoever is first of the prompts under way and the head of the queue gets all it can use of what is left."""
        order = knobs.order
        left = math.inf if knobs.prefill_budget_tokens < 0 else knobs.prefill_budget_tokens
        if knobs.budget_counts_decodes:
            left = max(left - len(self.decoding()), 0)
        under_way = sorted(self.prefilling(), key=lambda r: (self.rank(r, order, r.was_late), r.seq))
        others = len(self.decoding()) > 0
        while left > 0:
            waiting = self.queue(order)[:1] if self.may_admit > 0 else []
            held = order == Order.BY_SCORE and self.running and waiting and waiting[0].score < 0
            new = None
            if waiting and not held:
                rank = self.rank(waiting[0], order, self.is_hopeless(waiting[0]))
                if not under_way or rank < self.rank(under_way[0], order, under_way[0].was_late):
                    new = self.admit_next(knobs, self.lighter_sub())
                    if new is None:  # no room: nobody else starts either
                        self.may_admit = 0
                        continue
                    self.may_admit -= 1
            if new is None and not under_way:
                return
            if new is None and order == Order.BY_SCORE and under_way[0].score < 0 and others:
                return
            r = new or under_way.pop(0)
            r.chunk = min(r.target - r.prefilled, left)
            left -= r.chunk
            others = True

    def gpu_phase_s(self, sub: int, chunks: list[tuple[int, int]]) -> float:
        """T_GPU of a phase in which ``sub`` prefills (chunk, done) pairs, as the aligning planner foresees it."""
        hbm = [r for r in self.decoding(sub) if r.lane == 0]
        others, queries = len(self.decoding(1 - sub)), self.queries
        tokens = sum(chunk for chunk, _ in chunks) + queries * others
        attention_s = self.price.prefill_s(*chunks)
        attention_s += self.price.hbm_s(sum(r.kv + queries for r in hbm), len(hbm), queries)
        return self.price.gpu_s(attention_s + self.back_s(tokens, queries * others, others), tokens)

    def back_s(self, tokens: int, rows: int, decodes: int) -> float:
        """FC and head of a batch, and a guess for each of its decoding requests."""
        guessing_s = self.price.guessing_s(decodes) if self.queries == 2 else 0.0
        return self.price.fc_s(tokens) + self.price.head_s(rows) + guessing_s

    def plan_aligned(self, knobs: Knobs) -> None:
        """Whole prefills while the GPU is faster than PIM; the last one then cut to the largest that stays hidden.

        Nothing is cut while nothing decodes.
        """
        full = False
        pushed = 0
        for sub in (0, 1):
            in_pim = [r for r in self.decoding(sub) if r.lane > 0]
            goal_s = self.price.pim_s(self.slowest_lane_s(in_pim), self.moved(in_pim), pushed)
            begun = [r for r in self.prefilling() if r.sub == sub]
            taken: list[Request] = []
            while not taken or self.gpu_phase_s(sub, [(r.chunk, r.prefilled) for r in taken]) < goal_s:
                if begun:
                    r = begun.pop(0)
                elif self.may_admit > 0:
                    r = self.admit_next(knobs, sub)
                    if r is None:
                        full = full or bool(self.waiting())
                        break
                    self.may_admit -= 1
                else:
                    break
                r.chunk = r.target - r.prefilled
                taken.append(r)
            if taken and self.decoding() and (full or knobs.prefill_budget_tokens == Budget.ALIGN):
                *whole, last = taken
                hidden = [(r.chunk, r.prefilled) for r in whole]
                low, high = 0, last.chunk
                while low < high:
                    middle = (low + high + 1) // 2
                    if self.gpu_phase_s(sub, [*hidden, (middle, last.prefilled)]) <= goal_s:
                        low = middle
                    else:
                        high = middle - 1
                last.chunk = low if whole else max(low, min(last.chunk, ALIGN_MIN_CHUNK_TOKENS))
            pushed = sum(r.chunk for r in taken)

    def balance(self) -> None:
        """One decoding request a step goes over from a sub-batch that has at least two more."""
        counts = [len(self.decoding(0)), len(self.decoding(1))]
        if abs(counts[0] - counts[1]) >= 2:
            heavy = 0 if counts[0] > counts[1] else 1
            self.decoding(heavy)[-1].sub = 1 - heavy

    # --- the iteration

    def slowest_lane_s(self, decoding: list[Request]) -> float:
        """Attention of the busiest PIM lane, the new tokens included."""
        queries, stored = self.queries, range(1, self.decompressed_lane or len(self.lane_pool))
        lanes = [[r.kv + queries for r in decoding if r.lane == lane] for lane in stored]
        decompressed = sum(
            r.kv + queries for r in decoding if self.decompressed_lane and r.lane == self.decompressed_lane
        )
        slowest_s = max((self.price.lane_s(sum(kv), len(kv), queries) for kv in lanes), default=0.0)
        return slowest_s + self.price.decompressed_s(decompressed, queries)

    def moved(self, in_pim: list[Request]) -> float:
        """Requests on the PIM side by what their queries, KV and outputs move."""
        ratio = self.price.coef["decompressed_request_ratio"]
        return self.queries * sum(
            ratio if self.decompressed_lane and r.lane == self.decompressed_lane else 1 for r in in_pim
        )

    def pushed(self, r: Request) -> float:
        """Tokens of a chunk by what their KV moves to the PIM side."""
        ratio = self.price.coef["decompressed_token_ratio"]
        return (
            r.chunk * (ratio if self.decompressed_lane and r.lane == self.decompressed_lane else 1) if r.lane > 0 else 0
        )

    def execute(self, decode: bool) -> None:
        price, coef, queries = self.price, self.price.coef, self.queries
        chunked = [r for r in self.prefilling() if r.chunk]
        decoding = self.decoding() if decode else []
        subs = (0, 1) if self.interleaved else (None,)
        duration_s = gpu_s = pim_s = 0.0
        batches = 0
        for sub in subs:
            other = None if sub is None else 1 - sub
            mine = [r for r in chunked if sub in (None, r.sub)]
            fc_decodes = [r for r in decoding if other in (None, r.sub)]
            attends = [r for r in decoding if sub in (None, r.sub)]
            hbm, pim = [r for r in attends if r.lane == 0], [r for r in attends if r.lane > 0]
            pushed = sum(self.pushed(r) for r in chunked if other in (None, r.sub))
            pushed += sum(r.moving for r in chunked if other in (None, r.sub))
            batch = sum(r.chunk for r in mine) + queries * len(fc_decodes)
            rows = sum(r.prefilled + r.chunk == r.target for r in mine) + queries * len(fc_decodes)
            front_s = price.prefill_s(*((r.chunk, r.prefilled) for r in mine))
            front_s += price.hbm_s(sum(r.kv + queries for r in hbm), len(hbm), queries)
            fc_s = self.back_s(batch, rows, len(fc_decodes))
            side_s = price.pim_s(self.slowest_lane_s(pim), self.moved(pim), pushed)
            if sub is None:  # one batch: attention on both sides, then FC
                duration_s += price.gpu_s(max(front_s, side_s) + fc_s, batch)
            else:  # T_GPU_i beside T_PIM_i
                duration_s += max(price.gpu_s(front_s + fc_s, batch), side_s)
            gpu_s += price.gpu_s(front_s + fc_s, batch)
            pim_s += side_s
            batches += batch > 0
        self.now += duration_s

        totals = self.totals
        totals.iterations += 1
        totals.busy_s += duration_s
        totals.gpu_busy_s += gpu_s
        totals.pim_busy_s += pim_s
        totals.decode_tokens += len(decoding)
        totals.energy_j += coef["fc_batch_j"] * batches
        work_j = coef["fc_batch_j"] * batches
        for r in chunked:
            totals.prefill_tokens += r.chunk
            totals.recomputed_tokens += r.chunk if r.emitted else 0
            pairs = sum(r.prefilled + i for i in range(1, r.chunk + 1))
            totals.energy_j += coef["prefill_pair_j"] * pairs + coef["prefill_kv_j"] * (r.prefilled + r.chunk)
            work_j += coef["prefill_pair_j"] * pairs + coef["prefill_kv_j"] * (r.prefilled + r.chunk)
            work_j += coef["fc_token_j"] * r.chunk
            totals.energy_j += coef["fc_token_j"] * r.chunk + coef["transfer_token_j"] * (self.pushed(r) + r.moving)
        for r in decoding:
            token_j = coef["pim_token_j"] if r.lane > 0 else coef["hbm_token_j"]
            if self.decompressed_lane and r.lane == self.decompressed_lane:
                token_j = coef["decompressed_token_j"]
            totals.energy_j += coef["fc_token_j"] * queries + token_j * (r.kv + queries)
            totals.energy_j += coef["transfer_request_j"] * self.moved([r]) if r.lane > 0 else 0
            work_j += coef["fc_token_j"] * queries + (token_j * (r.kv + queries) if r.lane == 0 else 0)
        if coef["gpu_most_w"]:  # GPUs draw power for being busy, up to their limit
            totals.energy_j += min(coef["gpu_busy_w"] * gpu_s, coef["gpu_most_w"] * gpu_s - work_j)

        self.growing = set()
        dropped = set()
        for r in decoding:
            for _ in range(self.emits(r)):
                r.kv += 1
                if r.emitted == r.output:
                    dropped.add(r.idx)
                else:
                    self.emit(r)
        if decode and queries == 2:
            self.guessing_steps = [done + 1 for done in self.guessing_steps]
        for r in chunked:
            r.prefilled += r.chunk
            r.moving = 0
            self.publish(r)
            if r.prefilled == r.target:
                r.status, r.kv = "decode", r.target
                self.emit(r)
        for r in sorted(self.decoding(), key=lambda r: (r.guesses_right, r.sub, r.idx not in dropped, r.idx)):
            if r.emitted == r.output:
                self.leave(r)
                r.status, r.finish_s = "finished", self.now
                self.free_children(r)

    def emit(self, r: Request) -> None:
        if r.last_s is None:
            r.first_s = self.now
        else:
            r.gaps_s.append(self.now - r.last_s)
        r.last_s = self.now
        r.emitted += 1
        self.totals.output_tokens += 1

    def step(self, knobs: Knobs) -> str:
        """One iteration, idle time skipped; says "running", "done" or "stalled"."""
        while True:
            self.let_in()
            while not self.running and not self.waiting():
                when_s = self.next_arrival_s()
                if when_s is None:
                    return "done"
                self.now = when_s
                self.let_in()
            decode, planned = self.plan(knobs)
            if decode or planned:
                self.execute(decode)
                idle = not self.running and not self.waiting() and self.next_arrival_s() is None
                return "done" if idle else "running"
            when_s = self.next_arrival_s()
            if when_s is None:
                return "stalled"
            self.now = when_s

    def run(self, knobs: Knobs) -> str:
        """To the end."""
        while (stop := self.step(knobs)) == "running":
            pass
        return stop
