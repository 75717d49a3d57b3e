"""One call for a whole step of a batch: actions into knobs, run to the decision point, observations, masks."""

from __future__ import annotations

import numpy as np

from l3env.engine.kernels.run import ready, run_one
from l3env.envs.observe.features import write_row
from l3env.jit import inner, kernel

ACTION = (  # knobs that actions may set, by the numbers that ``columns`` names them with
    "admit_max_count",
    "prefill_budget_tokens",
    "budget_counts_decodes",
    "hbm_share_frac",
    "order",
    "headroom_frac",
    "sub_batching",
    "pim_form",
    "multi_token",
    "prefill_in_order",
)


@inner
def set_knob(k, e, which, value):
    """One of ACTION."""
    if which == 0:
        k[e]["admit_max_count"] = np.int64(value)
    elif which == 1:
        k[e]["prefill_budget_tokens"] = np.int64(value)
    elif which == 2:
        k[e]["budget_counts_decodes"] = np.int64(value)
    elif which == 3:
        k[e]["hbm_share_frac"] = value
    elif which == 4:
        k[e]["order"] = np.int64(value)
    elif which == 5:
        k[e]["headroom_frac"] = value
    elif which == 6:
        k[e]["sub_batching"] = np.int64(value)
    elif which == 7:
        k[e]["pim_form"] = np.int64(value)
    elif which == 8:
        k[e]["multi_token"] = np.int64(value)
    else:
        k[e]["prefill_in_order"] = np.int64(value)


@kernel
def step_batch(t, s, k, actions, columns, levels, until, limits, marks, machine, legal, none, first, last, obs, masks):
    """Steps environments first..last - 1.

    Args:
        actions: (E, knobs) levels by index, in range.
        columns: (knobs,) which of ACTION each sets, the other knobs stay; levels: (knobs, most) their values.
        until, limits: where each step ends, as for ``run``.
        marks, machine: of the observer, see ``write_features``.
        legal: (T, sum of levels) the masks of each machine; the level at ``none``, which admits nobody, is legal while
            any request runs; -1 where no level does.
        obs, masks: (E, F) and (E, sum of levels), filled.
    """
    for e in range(first, last):
        for i in range(columns.shape[0]):
            set_knob(k, e, columns[i], levels[i, actions[e, i]])
        run_one(t, s, k, e, until, limits[e])
        ready(t, s, e)
        write_row(t, s, marks[e], machine[e], e, obs[e])
        table = s.env[e]["table_idx"]
        for i in range(masks.shape[1]):
            masks[e, i] = legal[table, i]
        if none >= 0:
            masks[e, none] = s.env[e]["running_count"] > 0
