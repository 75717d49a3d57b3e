"""The time line: a row for each iteration, or for several where there are more iterations than rows."""

from __future__ import annotations

from l3env.jit import helper
from l3env.machine.arrays import HBM
from l3env.machine.forms import pim_blocks_used


@helper
def write_log(t, s, e):
    """Adds the last iteration; when the rows are full, neighbours are merged and the stride doubles."""
    env, log = s.env[e], s.log
    rows = log.shape[1]
    if env["log_count"] == 0:
        env["log_stride"] = 1
    stride = env["log_stride"]
    row = (env["iterations_count"] - 1) // stride
    if row == rows:
        for i in range(rows // 2):
            first, second = 2 * i, 2 * i + 1
            merge_rows(log, e, i, first, second)
        for i in range(rows // 2, rows):
            clear_row(log, e, i)
        env["log_stride"] = 2 * stride
        row = (env["iterations_count"] - 1) // (2 * stride)
    log[e, row]["end_s"] = env["clock_s"]
    log[e, row]["duration_s"] += env["last_iteration_s"]
    log[e, row]["iterations_count"] += 1
    log[e, row]["gpu_busy_s"] += s.sub[e, 0]["gpu_s"] + s.sub[e, 1]["gpu_s"]
    log[e, row]["pim_busy_s"] += s.sub[e, 0]["pim_s"] + s.sub[e, 1]["pim_s"]
    log[e, row]["decode_tokens"] += env["last_decode_tokens"]
    log[e, row]["prefill_tokens"] += env["last_prefill_tokens"]
    log[e, row]["waiting_count"] = env["waiting_count"]
    log[e, row]["running_count"] = env["running_count"]
    log[e, row]["hbm_blocks"] = s.pool[e, HBM]["used"]
    log[e, row]["pim_blocks"] = pim_blocks_used(t.forms, t.coef[env["table_idx"]], s.pool[e])
    env["log_count"] = row + 1


@helper
def merge_rows(log, e, into, first, second):
    """Sums of two rows, levels of the later one."""
    duration_s = log[e, first]["duration_s"] + log[e, second]["duration_s"]
    iterations = log[e, first]["iterations_count"] + log[e, second]["iterations_count"]
    gpu_s = log[e, first]["gpu_busy_s"] + log[e, second]["gpu_busy_s"]
    pim_s = log[e, first]["pim_busy_s"] + log[e, second]["pim_busy_s"]
    decodes = log[e, first]["decode_tokens"] + log[e, second]["decode_tokens"]
    tokens = log[e, first]["prefill_tokens"] + log[e, second]["prefill_tokens"]
    log[e, into] = log[e, second]
    log[e, into]["duration_s"] = duration_s
    log[e, into]["iterations_count"] = iterations
    log[e, into]["gpu_busy_s"] = gpu_s
    log[e, into]["pim_busy_s"] = pim_s
    log[e, into]["decode_tokens"] = decodes
    log[e, into]["prefill_tokens"] = tokens


@helper
def clear_row(log, e, row):
    """Zero sums; levels are overwritten."""
    log[e, row]["duration_s"] = 0.0
    log[e, row]["iterations_count"] = 0
    log[e, row]["gpu_busy_s"] = 0.0
    log[e, row]["pim_busy_s"] = 0.0
    log[e, row]["decode_tokens"] = 0
    log[e, row]["prefill_tokens"] = 0
