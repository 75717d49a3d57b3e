"""Decode attention with PUs beside every bank: a list of jobs (heads that fill a rank, at a length), in turn.

Per tile: score pass over K (internal), scores to the rank PU (external), softmax, probabilities to the shared buffers
(external), context pass over V (internal). Per job also: the query to the shared buffers, the output to the rank PU.
"""

from __future__ import annotations

from l3env.jit import helper, inner, kernel
from l3env.machine.dimm.bus import (
    RING,
    Bus,
    Command,
    bus_start,
    columns_end,
    load_operands,
    move,
    multiply,
    open_row,
    record,
    refresh,
    refresh_if_due,
    refresh_is_due,
)

FAR = 1 << 60
SHARES = 8


@inner
def ceil_div(a, b):
    return -(-a // b)


@inner
def chip_tokens(p, length):
    """Tokens of one head in one chip."""
    return ceil_div(length, p.token_split)


@helper
def score_pass(p, m, tokens, gate, parity):
    """K of a tile, all banks; returns the last result's cycle. Tokens are dealt to the banks in turn."""
    columns = ceil_div(tokens, p.banks) * p.k_columns * p.passes
    done = 0
    for b in range(min(tokens, p.banks)):
        open_row(p, m, b)
        done = max(done, multiply(p, m, b, columns, gate, 0))
        m.k_first[parity, b] = m.bank[b]["column"] - (columns - 1) * p.ccd_l
    return done


@helper
def context_pass(p, m, tokens, gate):
    """V of a tile, all banks; returns the last result's cycle. First, the accumulators are rescaled."""
    sets = p.banks // p.v_banks
    columns = ceil_div(tokens, sets) * p.v_columns * p.passes
    done = 0
    for b in range(min(tokens, sets) * p.v_banks):
        open_row(p, m, b)
        done = max(done, multiply(p, m, b, columns, gate, p.rescale_columns))
    return done


@inner
def score_bursts(p, tokens):
    """PIM_RD_RBs of a tile: the banks in turn, each round one burst of every bank that has tokens."""
    return ceil_div(ceil_div(tokens, p.banks) * p.queries, p.scores_per_burst) * min(tokens, p.banks)


@inner
def probability_bursts(p, tokens):
    """PIM_WR_SBs of a tile: one factor per query for the accumulators, then the probabilities in order of tokens."""
    return ceil_div(p.queries, p.scores_per_burst) + ceil_div(tokens * p.queries, p.scores_per_burst)


@inner
def share_of(total):
    """Bursts issued together: a transfer goes in up to SHARES parts, so that others fit between."""
    return ceil_div(total, SHARES)


@inner
def scores_ready(p, m, tokens, parity, first, count):
    """When bursts ``first ...`` of a tile's scores may start, for none to come before its result."""
    banks = min(tokens, p.banks)
    ready = 0
    for b in range(banks):
        for place in (first + (b - first) % banks, first + count - 1 - (first + count - 1 - b) % banks):
            if first <= place < first + count:
                token = ceil_div((place // banks + 1) * p.scores_per_burst, p.queries)
                token = min(token, ceil_div(tokens, p.banks))
                result = m.k_first[parity, b] + (token * p.k_columns * p.passes - 1) * p.ccd_l + p.result
                ready = max(ready, result - (place - first) * p.ccd_s)
    return ready


@inner
def column_of(p, burst):
    """The column of a context pass that first needs a burst of the probabilities."""
    tokens = max(burst - ceil_div(p.queries, p.scores_per_burst), 0) * p.scores_per_burst // p.queries
    return tokens // (p.banks // p.v_banks) * p.v_columns * p.passes


@inner
def arrival(p, m, job):
    """When the host has written a job's Q into the rank PU: the channel at its full rate, job after job."""
    if p.host_bursts == 0:
        return 0
    record(m, job * p.host_bursts * p.ccd_s, Command.WR_R, -1, p.host_bursts, p.ccd_s)
    return (job + 1) * p.host_bursts * p.ccd_s + p.wl + p.bl


@helper
def serve_bus(p, m, jobs, before):
    """Issues a part of an external transfer if it can start before a cycle: of those that could go, the earliest.

    Ties in the order probabilities, output, scores, query: what computing waits for most urgently. False: none can.
    """
    st = m.state[0]
    w, o, r, q = st["w_tiles"], st["o_jobs"], st["r_tiles"], st["q_jobs"]
    w_start, o_start, r_start, q_start = FAR, FAR, FAR, FAR
    if w < r and w < st["v_tiles"] + 2:  # half of the buffer is free once the context pass two tiles ago has ended
        ready = m.tile[w % RING]["read"] + p.softmax
        if w >= 2:
            ready = max(ready, m.tile[(w - 2) % RING]["v_done"])
        w_start = bus_start(p, m, Bus.WRITE, ready)
    if o < st["v_jobs"]:
        o_start = bus_start(p, m, Bus.READ, m.job[o % RING]["v_done"])
    if r < st["k_tiles"]:
        tokens = m.tile[r % RING]["tokens"]
        total = score_bursts(p, tokens)
        count = min(share_of(total), total - st["r_bursts"])
        r_start = bus_start(p, m, Bus.READ, scores_ready(p, m, tokens, r % 2, st["r_bursts"], count))
    if q < jobs and q < st["k_jobs"] + 2:
        ready = m.job[q % RING]["q_done"]  # until then: arrival in the rank PU
        if q >= 2:
            ready = max(ready, m.job[(q - 2) % RING]["k_done"])
        q_start = bus_start(p, m, Bus.WRITE, ready)
    start = min(w_start, o_start, r_start, q_start)
    if start >= before:
        return False
    if w_start == start:
        write_part(p, m, w, start)
    elif o_start == start:
        done, st["o_bursts"] = move_part(p, m, Bus.READ, p.output_bursts, st["o_bursts"], start)
        if st["o_bursts"] == 0:
            m.job[o % RING]["o_done"] = done
            st["o_jobs"] = o + 1
    elif r_start == start:
        total = score_bursts(p, m.tile[r % RING]["tokens"])
        done, st["r_bursts"] = move_part(p, m, Bus.READ, total, st["r_bursts"], start)
        if st["r_bursts"] == 0:
            m.tile[r % RING]["read"] = done
            st["r_tiles"] = r + 1
    else:
        done, st["q_bursts"] = move_part(p, m, Bus.WRITE, p.query_bursts, st["q_bursts"], start)
        if st["q_bursts"] == 0:
            m.job[q % RING]["q_done"] = done
            st["q_jobs"] = q + 1
            m.job[(q + 1) % RING]["q_done"] = arrival(p, m, q + 1) if q + 1 < jobs else 0
    return True


@inner
def move_part(p, m, kind, total, moved, start):
    """The next part of a transfer. Returns (its arrival, bursts moved now; 0 once the transfer is complete)."""
    count = min(share_of(total), total - moved)
    done = move(p, m, kind, -1, count, start)
    return done, (moved + count) % total


@inner
def write_part(p, m, w, start):
    """A part of a tile's probabilities. The context pass may begin before the last of them are there."""
    st, tile = m.state[0], m.tile[w % RING]
    total, before = probability_bursts(p, tile["tokens"]), st["w_bursts"]
    done, st["w_bursts"] = move_part(p, m, Bus.WRITE, total, before, start)
    if before == 0:
        tile["written"], tile["v_gate"] = done, 0
    tile["v_gate"] = max(tile["v_gate"], done + p.ccd_l - column_of(p, before) * p.ccd_l)
    if st["w_bursts"] == 0:
        st["w_tiles"] = w + 1


@helper
def score_tile(p, m, n, jobs):
    """K of tile ``n``; needs its job's query and the half of the result registers that tile ``n - 2`` used.

    REFs owed go first: here the transfers of the tile before are all but done.
    """
    st, tile = m.state[0], m.tile[n % RING]
    now = columns_end(p, m)
    if refresh_is_due(p, m, now):
        while serve_bus(p, m, jobs, now):
            pass
        refresh(p, m, now)
    gate = m.tile[(n - 2) % RING]["read"] if n >= 2 else 0
    job = tile["job"]
    if tile["first"]:
        while st["q_jobs"] <= job:
            serve_bus(p, m, jobs, FAR)
        ready = m.job[job % RING]["q_done"]
        if job > 0:
            ready = max(ready, m.job[(job - 1) % RING]["k_done"])
        gate = max(gate, load_operands(p, m, ready))
    done = score_pass(p, m, tile["tokens"], gate, n % 2)
    st["k_tiles"] = n + 1
    if tile["last"]:
        m.job[job % RING]["k_done"] = done
        st["k_jobs"] = job + 1


@helper
def context_tile(p, m, n, jobs):
    """V of tile ``n``; needs its probabilities as it goes, and free accumulators at the start of a job."""
    st, tile = m.state[0], m.tile[n % RING]
    job = tile["job"]
    while st["w_tiles"] <= n:
        serve_bus(p, m, jobs, FAR)
    ready = tile["written"]
    if n > 0:
        ready = max(ready, m.tile[(n - 1) % RING]["v_done"])
    if tile["first"] and job > 1:
        while st["o_jobs"] < job - 1:
            serve_bus(p, m, jobs, FAR)
        ready = max(ready, m.job[(job - 2) % RING]["o_done"])
    gate = max(load_operands(p, m, ready), tile["v_gate"])
    tile["v_done"] = context_pass(p, m, tile["tokens"], gate)
    st["v_tiles"] = n + 1
    if tile["last"]:
        m.job[job % RING]["v_done"] = tile["v_done"]
        st["v_jobs"] = job + 1


@kernel
def attend_pipelined(p, m, lengths):
    """Bubble-free: one stream of tiles over all jobs, K one tile ahead of V, both buses at once. Returns the end."""
    st = m.state[0]
    jobs = lengths.shape[0]
    m.job[0]["q_done"] = arrival(p, m, 0)
    job, left, n = 0, chip_tokens(p, lengths[0]), 0
    first = 1
    while job < jobs:
        tile = m.tile[n % RING]
        tile["tokens"], tile["job"], tile["first"] = min(left, p.tile_tokens), job, first
        left -= tile["tokens"]
        first = tile["last"] = 1 if left == 0 else 0
        if left == 0:
            job += 1
            if job < jobs:
                left = chip_tokens(p, lengths[job])
        score_tile(p, m, n, jobs)
        if n > 0:
            context_tile(p, m, n - 1, jobs)
        n += 1
    context_tile(p, m, n - 1, jobs)
    while st["o_jobs"] < jobs:
        serve_bus(p, m, jobs, FAR)
    return m.job[(jobs - 1) % RING]["o_done"]


@kernel
def attend_serial(p, m, lengths):
    """One thing at a time: query, all scores (computed, then read, a tile at a time), softmax, all probabilities and
    context (written, then computed), output. Rows are opened while the external bus works. Returns the end."""
    end = 0
    for job in range(lengths.shape[0]):
        end = move(p, m, Bus.WRITE, -1, p.query_bursts, max(end, arrival(p, m, job)))
        end = load_operands(p, m, end)
        total = chip_tokens(p, lengths[job])
        for start in range(0, total, p.tile_tokens):
            tokens = min(p.tile_tokens, total - start)
            refresh_if_due(p, m)
            end = score_pass(p, m, tokens, end, 0)
            end = move(p, m, Bus.READ, -1, score_bursts(p, tokens), end)
        end += p.softmax
        for start in range(0, total, p.tile_tokens):
            tokens = min(p.tile_tokens, total - start)
            refresh_if_due(p, m)
            end = load_operands(p, m, move(p, m, Bus.WRITE, -1, probability_bursts(p, tokens), end))
            end = context_pass(p, m, tokens, end)
        end = move(p, m, Bus.READ, -1, p.output_bursts, end)
    return end
