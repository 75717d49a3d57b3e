"""One call for a whole step of a batch: actions into knobs, run to the decision point, observations, masks."""

from __future__ import annotations

from l3env.engine.kernels.run import ready, run_one
from l3env.envs.observe.features import write_row
from l3env.jit import kernel


@kernel
def step_batch(
    t, s, k, words, actions, columns, levels, until, limits, marks, machine, legal, none, first, last, obs, masks
):
    """Steps environments first..last - 1.

    Args:
        words: (E, all knobs) the same memory as ``k``, 8 bytes each.
        actions: (E, knobs) levels by index, in range.
        columns: (knobs,) which each of them sets, the other knobs stay; levels: (knobs, most) their words.
        until, limits: where each step ends, as for ``run``.
        marks, machine: of the observer, see ``write_features``.
        legal: (T, sum of levels) the masks of each machine; the level at ``none``, which admits nobody, is legal while
            any request runs; -1 where no level does.
        obs, masks: (E, F) and (E, sum of levels), filled.
    """
    for e in range(first, last):
        for i in range(columns.shape[0]):
            words[e, columns[i]] = levels[i, actions[e, i]]
        run_one(t, s, k, e, until, limits[e])
        ready(t, s, e)
        write_row(t, s, marks[e], machine[e], e, obs[e])
        table = s.env[e]["table_idx"]
        for i in range(masks.shape[1]):
            masks[e, i] = legal[table, i]
        if none >= 0:
            masks[e, none] = s.env[e]["running_count"] > 0
