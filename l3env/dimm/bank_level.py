"""Decode attention with PUs beside every bank: a list of jobs (heads that fill a rank, at a length), in turn.

Per tile: score pass over K (internal), scores to the rank PU (external), softmax, probabilities to the shared buffers
(external), context pass over V (internal). Per job also: the query to the shared buffers, the output to the rank PU.
"""

from __future__ import annotations

from l3env.dimm.bus import (
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
from l3env.jit import helper, inner, kernel

FAR = 1 << 60


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
        m.k_done[parity, b] = multiply(p, m, b, columns, gate, 0)
        done = max(done, m.k_done[parity, b])
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
def read_scores(p, m, tokens, ready, parity):
    """PIM_RD_RB, bank after bank as results come; returns when the rank PU has the last one."""
    bursts = ceil_div(ceil_div(tokens, p.banks) * p.queries, p.scores_per_burst)
    done = 0
    for b in range(min(tokens, p.banks)):
        done = move(p, m, Bus.READ, b, bursts, max(ready, m.k_done[parity, b]))
    return done


@inner
def write_probabilities(p, m, tokens, ready):
    """PIM_WR_SB: probabilities of a tile and one factor per query for the accumulators."""
    bursts = ceil_div(tokens * p.queries, p.scores_per_burst) + ceil_div(p.queries, p.scores_per_burst)
    return move(p, m, Bus.WRITE, -1, bursts, ready)


@inner
def arrival(p, m, job):
    """When the host has written a job's Q into the rank PU: the channel at its full rate, job after job."""
    if p.host_bursts == 0:
        return 0
    record(m, job * p.host_bursts * p.ccd_s, Command.WR_R, -1, p.host_bursts, p.ccd_s)
    return (job + 1) * p.host_bursts * p.ccd_s + p.wl + p.bl


@helper
def serve_bus(p, m, jobs, before):
    """Issues one external transfer if it can start before a cycle: of those that could go, the one that starts first.

    Ties in the order probabilities, output, scores, query: what computing waits for most urgently. False: none can.
    """
    st = m.state[0]
    w, o, r, q = st["w_tiles"], st["o_jobs"], st["r_tiles"], st["q_jobs"]
    w_start, o_start, r_start, q_start = FAR, FAR, FAR, FAR
    if w < r and w < st["v_tiles"] + 2:  # half of the buffer is free once the context pass two tiles ago has ended
        ready = m.tile[w % RING]["softmax_done"]
        if w >= 2:
            ready = max(ready, m.tile[(w - 2) % RING]["v_done"])
        w_start = bus_start(p, m, Bus.WRITE, ready)
    if o < st["v_jobs"]:
        o_start = bus_start(p, m, Bus.READ, m.job[o % RING]["v_done"])
    if r < st["k_tiles"]:
        r_start = bus_start(p, m, Bus.READ, m.k_done[r % 2, 0])
    if q < jobs and q < st["k_jobs"] + 2:
        ready = m.job[q % RING]["q_done"]  # until then: arrival in the rank PU
        if q >= 2:
            ready = max(ready, m.job[(q - 2) % RING]["k_done"])
        q_start = bus_start(p, m, Bus.WRITE, ready)
    start = min(w_start, o_start, r_start, q_start)
    if start >= before:
        return False
    if w_start == start:
        m.tile[w % RING]["written"] = write_probabilities(p, m, m.tile[w % RING]["tokens"], start)
        st["w_tiles"] = w + 1
    elif o_start == start:
        m.job[o % RING]["o_done"] = move(p, m, Bus.READ, -1, p.output_bursts, start)
        st["o_jobs"] = o + 1
    elif r_start == start:
        done = read_scores(p, m, m.tile[r % RING]["tokens"], start, r % 2)
        m.tile[r % RING]["read"] = done
        m.tile[r % RING]["softmax_done"] = done + p.softmax
        st["r_tiles"] = r + 1
    else:
        m.job[q % RING]["q_done"] = move(p, m, Bus.WRITE, -1, p.query_bursts, start)
        st["q_jobs"] = q + 1
        m.job[(q + 1) % RING]["q_done"] = arrival(p, m, q + 1) if q + 1 < jobs else 0
    return True


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
    """V of tile ``n``; needs its probabilities, and free accumulators at the start of a job."""
    st, tile = m.state[0], m.tile[n % RING]
    job = tile["job"]
    while st["w_tiles"] <= n:
        serve_bus(p, m, jobs, FAR)
    ready = tile["written"]
    if n > 0:
        ready = max(ready, m.tile[(n - 1) % RING]["v_done"])
    if tile["first"] and job > 0:
        while st["o_jobs"] < job:
            serve_bus(p, m, jobs, FAR)
        ready = max(ready, m.job[(job - 1) % RING]["o_done"])
    gate = load_operands(p, m, ready)
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
            end = read_scores(p, m, tokens, end, 0)
        end += p.softmax
        for start in range(0, total, p.tile_tokens):
            tokens = min(p.tile_tokens, total - start)
            refresh_if_due(p, m)
            end = load_operands(p, m, write_probabilities(p, m, tokens, end))
            end = context_pass(p, m, tokens, end)
        end = move(p, m, Bus.READ, -1, p.output_bursts, end)
    return end
