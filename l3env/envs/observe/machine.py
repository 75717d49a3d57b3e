"""The system and model as they are known before any request; also what the other groups measure by."""

from __future__ import annotations

from l3env.engine.state import NOMINAL_PROMPT_TOKENS
from l3env.envs.observe.feature import Feature, scales_of, share, squash
from l3env.envs.observe.prices import fc_head_s
from l3env.jit import helper
from l3env.machine.arrays import FIRST_PIM, HBM
from l3env.machine.forms import stored_lanes, stored_pools
from l3env.machine.iteration import ttft_alone_s
from l3env.machine.price import hbm_attention_s, lane_attention_s, pim_side_s

PACE_TOKENS = 2048  # prompt tokens an iteration at which the pace of prefill is taken
NOMINAL_REQUEST_TOKENS = NOMINAL_PROMPT_TOKENS + 256
NOMINAL_BATCH = 64  # requests
FEW_TOKENS = 256


class Machine(Feature):
    """The machine and the SLO: constant in an episode."""

    has_pim = "1 on systems with a PIM side"
    has_hbm_kv = "1 where KV may live in HBM"
    fc_1 = "FC and head of 1 token over the TBT SLO, scale 1"
    fc_256 = f"of {FEW_TOKENS} tokens"
    fc_2048 = f"of {PACE_TOKENS:,} prompt tokens"
    ttft_tightness = "TTFT on the empty system over the TTFT SLO"
    prefill_pace = f"{NOMINAL_PROMPT_TOKENS:,} tokens at the pace over the TTFT SLO, scale 1"
    slo_ratio = "TTFT SLO over TBT SLO, scale {scale}", 16.0
    hbm_attention = (
        f"attention of {NOMINAL_BATCH} requests of {NOMINAL_PROMPT_TOKENS:,} tokens in HBM over their FC, scale 1"
    )
    pim_attention = "on the PIM side"
    hbm_capacity = f"HBM pool in requests of {NOMINAL_REQUEST_TOKENS:,} tokens, scale {{scale}}", 64.0
    pim_capacity = f"PIM pools in requests of {NOMINAL_REQUEST_TOKENS:,} tokens, scale {{scale}}", 64.0
    pim_full_read = "time to read the PIM side when full over the TBT SLO, scale 1"
    pim_lanes = "PIM lanes, scale {scale}", 8.0
    transfer = f"moving the KV of {PACE_TOKENS:,} prompt tokens over their FC, scale 1"


SCALE = scales_of(Machine)


@helper
def write_machine(t, s, e, mark, row):
    """Into ``row``, and what the other groups measure by into the mark."""
    env = s.env[e]
    table = env["table_idx"]
    coef = t.coef[table]
    block, lanes = coef["block_tokens"], stored_lanes(t.forms, t.coef[table])
    hbm_tokens, pim_tokens = float(t.pool_blocks[table, HBM] * block), 0.0
    for pool in range(FIRST_PIM, stored_pools(t.forms, t.coef[table])):
        pim_tokens += float(t.pool_blocks[table, pool] * block)
    mark["capacity_tokens"] = hbm_tokens + pim_tokens
    mark["prefill_token_s"] = ttft_alone_s(t, table, PACE_TOKENS) / PACE_TOKENS
    slo_s = env["tbt_slo_s"]
    batch_kv = float(NOMINAL_BATCH * NOMINAL_PROMPT_TOKENS)
    fc_s = fc_head_s(t, table, NOMINAL_BATCH, NOMINAL_BATCH)
    row[:] = 0.0
    row[Machine.has_pim] = float(coef["has_pim"])
    row[Machine.has_hbm_kv] = 1.0 if hbm_tokens > 0 else 0.0
    row[Machine.fc_1] = squash(fc_head_s(t, table, 1, 1), slo_s)
    row[Machine.fc_256] = squash(fc_head_s(t, table, FEW_TOKENS, FEW_TOKENS), slo_s)
    row[Machine.fc_2048] = squash(fc_head_s(t, table, PACE_TOKENS, 1), slo_s)
    row[Machine.ttft_tightness] = share(ttft_alone_s(t, table, NOMINAL_PROMPT_TOKENS), env["ttft_slo_s"])
    row[Machine.prefill_pace] = squash(NOMINAL_PROMPT_TOKENS * mark["prefill_token_s"], env["ttft_slo_s"])
    row[Machine.slo_ratio] = squash(env["ttft_slo_s"], SCALE.slo_ratio * slo_s)
    row[Machine.hbm_attention] = squash(hbm_attention_s(t, table, batch_kv, float(NOMINAL_BATCH)), fc_s)
    if lanes > 1:
        lane_s = lane_attention_s(t, table, batch_kv / (lanes - 1), NOMINAL_BATCH / (lanes - 1))
        row[Machine.pim_attention] = squash(pim_side_s(t, table, lane_s, float(NOMINAL_BATCH), 0)[0], fc_s)
        row[Machine.pim_full_read] = squash(coef["pim_token_s"] * pim_tokens / (lanes - 1), slo_s)
    row[Machine.hbm_capacity] = squash(hbm_tokens, SCALE.hbm_capacity * NOMINAL_REQUEST_TOKENS)
    row[Machine.pim_capacity] = squash(pim_tokens, SCALE.pim_capacity * NOMINAL_REQUEST_TOKENS)
    row[Machine.pim_lanes] = squash(float(lanes - 1), SCALE.pim_lanes)
    row[Machine.transfer] = squash(coef["transfer_token_s"] * PACE_TOKENS, fc_head_s(t, table, PACE_TOKENS, 1))
