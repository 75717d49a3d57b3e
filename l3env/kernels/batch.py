"""One call for a whole step of a batch: actions into knobs, run to the decision point, observations, masks."""

from __future__ import annotations

import numpy as np

from l3env.jit import inner, kernel
from l3env.kernels.features import write_row
from l3env.kernels.run import ready, run_one

ACTION = (  # which knob each entry of an action sets
    "admit_max_count",
    "prefill_budget_tokens",
    "budget_counts_decodes",
    "hbm_share_frac",
    "order",
    "headroom_frac",
    "sub_batching",
)


@inner
def set_knobs(k, e, actions, levels):
    """The levels that an action names; the other knobs stay."""
    k[e]["admit_max_count"] = np.int64(levels[0, actions[e, 0]])
    k[e]["prefill_budget_tokens"] = np.int64(levels[1, actions[e, 1]])
    k[e]["budget_counts_decodes"] = np.int64(levels[2, actions[e, 2]])
    k[e]["hbm_share_frac"] = levels[3, actions[e, 3]]
    k[e]["order"] = np.int64(levels[4, actions[e, 4]])
    k[e]["headroom_frac"] = levels[5, actions[e, 5]]
    k[e]["sub_batching"] = np.int64(levels[6, actions[e, 6]])


@kernel
def step_batch(t, s, k, actions, levels, until, limits, marks, machine, legal, first, last, obs, masks):
    """Steps environments first..last - 1.

    Args:
        actions: (E, knobs) levels by index, in range; levels: (knobs, most) their values.
        until, limits: where each step ends, as for ``run``.
        marks, machine: of the observer, see ``write_features``.
        legal: (T, sum of levels) the masks of each machine; the first level of the first knob is legal while any runs.
        obs, masks: (E, F) and (E, sum of levels), filled.
    """
    for e in range(first, last):
        set_knobs(k, e, actions, levels)
        run_one(t, s, k, e, until, limits[e])
        ready(t, s, e)
        write_row(t, s, marks[e], machine[e], e, obs[e])
        table = s.env[e]["table_idx"]
        for i in range(masks.shape[1]):
            masks[e, i] = legal[table, i]
        masks[e, 0] = s.env[e]["running_count"] > 0
