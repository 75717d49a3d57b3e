"""What an agent sees and does: features with names and ranges, the knob action space and its mask.

Every feature could be known to a real scheduler; true output lengths are in none. Counts, times and rates are squashed
to [0, 1] by x / (x + scale); shares are shares.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from l3env.engine import Engine
from l3env.errors import PlanError
from l3env.kernels.features import write_features
from l3env.policy import UNLIMITED, Knobs, View
from l3env.state import MARK_DTYPE, Budget, Order
from l3env.tables import Tables

LEVELS: dict[str, tuple[Any, ...]] = {
    "admit_max_count": (0, 1, 2, 4, 8, 16, 64, UNLIMITED),
    "prefill_budget_tokens": (256, 512, 1024, 2048, 4096, 8192, Budget.UNLIMITED, Budget.ALIGN),
    "hbm_share_frac": (0.0, 0.05, 0.1, 0.25, 0.5, 1.0),
    "order": tuple(Order),
    "headroom_frac": (0.0, 0.01, 0.05, 0.1, 0.2, 0.4),
    "sub_batching": (False, True),
}
"""The action: one level of each knob."""

FEATURES: tuple[tuple[str, str], ...] = (
    ("waiting_count", "requests in the queue, scale 64"),
    ("waiting_tokens", "prompt tokens in the queue, scale 65,536"),
    ("oldest_wait_share", "age of the oldest waiting request over its TTFT SLO, scale 1"),
    ("head_prompt_tokens", "prompt of the oldest waiting request, scale 4,096"),
    ("head_slack", "share of its TTFT SLO that is left to the oldest waiting request, 0 when hopeless"),
    ("prefilling_count", "requests in prefill, scale 8"),
    ("prefill_left_tokens", "prompt tokens of admitted requests still to prefill, scale 16,384"),
    ("decoding_0_count", "decoding requests of sub-batch 0, scale 64"),
    ("decoding_1_count", "decoding requests of sub-batch 1, scale 64"),
    ("paused_count", "requests paused, scale 16"),
    ("kv_hbm_share", "share of the HBM pool that is held"),
    ("kv_pim_share", "share of the PIM pools that is held"),
    ("kv_pim_fullest_share", "share held of the fullest PIM pool"),
    ("steps_to_full", "decode steps until memory is full at the present growth, scale 256"),
    ("lane_imbalance", "slowest PIM lane over the mean lane, minus 1, scale 1"),
    ("iteration_over_slo", "last iteration over the tightest decode step alone, scale 4"),
    ("gpu_0_share", "T_GPU of phase 0 over the last iteration"),
    ("gpu_1_share", "T_GPU of phase 1 over the last iteration"),
    ("pim_0_share", "T_PIM of phase 0 over the last iteration"),
    ("pim_1_share", "T_PIM of phase 1 over the last iteration"),
    ("gpu_bubble_share", "GPU idle share of iteration time since the last step"),
    ("pim_bubble_share", "PIM idle share of iteration time since the last step"),
    ("arrivals_per_s", "arrivals since the last step, scale 4/s"),
    ("arrivals_long_per_s", "arrivals since the start, scale 4/s"),
    ("arrival_surge", "recent over long-run arrival rate, scale 1"),
    ("finishes_per_s", "finished since the last step, scale 4/s"),
    ("tokens_per_s", "output tokens since the last step, scale 1,024/s"),
    ("prefill_tokens_per_s", "prompt tokens since the last step, scale 8,192/s"),
    ("preemptions_count", "preemptions since the last step, scale 4"),
    ("slo_met_share", "of the requests finished since the last step; 1 where none"),
    ("elapsed_s", "simulated time since the last step, scale 1 s"),
    ("has_pim", "1 on systems with a PIM side"),
    ("hbm_capacity_tokens", "KV tokens the HBM pool holds, scale 262,144"),
    ("pim_capacity_tokens", "KV tokens the PIM pools hold, scale 262,144"),
    ("fc_one_s", "FC time of one token, scale 20 ms"),
    ("fc_thousand_over_one", "FC time of 1,024 tokens over that of one, scale 10"),
    ("pim_full_read_s", "time to read the PIM side when full, scale 100 ms"),
)
FEATURES_COUNT = len(FEATURES)


def observe(engine: Engine, marks: NDArray[np.void], first: int = 0, last: int | None = None) -> NDArray[np.float32]:
    """(last - first, FEATURES_COUNT) fresh features of a range of environments; moves their marks."""
    end = engine.num_envs if last is None else last
    out = np.empty((engine.num_envs, FEATURES_COUNT), np.float32)
    write_features(engine.tables, engine.state, marks, first, end, out)
    return out[first:end]


class Observer:
    """What an agent would see, for a policy in the offline runner: one for each replica's run."""

    def __init__(self, *, has_predictor: bool = False) -> None:
        self._has_predictor = has_predictor
        self._marks: NDArray[np.void] | None = None

    def look(self, view: View) -> tuple[NDArray[np.float32], list[NDArray[np.bool_]]]:
        """((FEATURES_COUNT,) features, legal levels of each knob) now; "since the last step" is since the last look."""
        engine, e = view._engine, view._e
        if self._marks is None:
            self._marks = np.zeros(engine.num_envs, MARK_DTYPE)
        features = observe(engine, self._marks, e, e + 1)[0]
        return features, mask_heads(engine, e, has_predictor=self._has_predictor)


def observation_space() -> gymnasium.spaces.Space[NDArray[np.float32]]:
    """All features lie in [0, 1]."""
    return gymnasium.spaces.Box(0.0, 1.0, (FEATURES_COUNT,), np.float32)


def action_space() -> gymnasium.spaces.MultiDiscrete:
    """One level of each knob, in the order of LEVELS."""
    return gymnasium.spaces.MultiDiscrete([len(levels) for levels in LEVELS.values()])


def knobs_of(action: NDArray[np.int64]) -> Knobs:
    """The settings an action stands for."""
    return Knobs(**{name: levels[int(i)] for (name, levels), i in zip(LEVELS.items(), action, strict=True)})


def action_of(knobs: Knobs) -> NDArray[np.int64]:
    """The action nearest to some settings: the same order and mode, numbers to the closest level."""
    return np.array([_nearest(levels, getattr(knobs, name)) for name, levels in LEVELS.items()], dtype=np.int64)


def _nearest(levels: tuple[Any, ...], value: Any) -> int:
    if value in levels:
        return levels.index(value)
    if value == Budget.ALIGN_WHEN_FULL:
        return levels.index(Budget.ALIGN)
    return int(np.argmin([abs(float(level) - float(value)) for level in levels]))


LEVEL_ARRAYS = {name: np.array([float(level) for level in levels]) for name, levels in LEVELS.items()}
SIZES = np.array([len(levels) for levels in LEVELS.values()])
STARTS = np.cumsum([0, *SIZES[:-1]])


def write_knobs(actions: NDArray[np.int64], knobs: NDArray[np.void]) -> None:
    """Puts (E, knobs) actions into E rows of KNOB_DTYPE; what no action sets keeps the default of ``Knobs``.

    Raises PlanError for an action out of range.
    """
    if actions.shape != (knobs.size, len(LEVELS)) or (actions < 0).any() or (actions >= SIZES).any():
        expected = (knobs.size, len(LEVELS))
        raise PlanError(f"actions of shape {actions.shape}; expected shape {expected}, entries from 0 to below {SIZES}")
    Knobs().write(knobs, slice(None))
    for i, (name, levels) in enumerate(LEVEL_ARRAYS.items()):
        knobs[name] = levels[actions[:, i]]


def mask_rows(engine: Engine, *, has_predictor: bool = False) -> NDArray[np.bool_]:
    """``mask_heads`` of all environments, heads concatenated: (E, sum of levels)."""
    table_rows = np.array([np.concatenate(static_heads(pair, has_predictor=has_predictor)) for pair in engine.pairs])
    rows = table_rows[engine.state.env["table_idx"]]
    rows[:, STARTS[list(LEVELS).index("admit_max_count")]] = engine.state.env["running_count"] > 0
    return rows


def mask_heads(engine: Engine, e: int, *, has_predictor: bool = False) -> list[NDArray[np.bool_]]:
    """For each knob, which levels do something in environment ``e`` now. At least one of each is legal."""
    heads = static_heads(engine.pair(e), has_predictor=has_predictor)
    heads[list(LEVELS).index("admit_max_count")][0] = int(engine.state.env["running_count"][e]) > 0
    return heads


def static_heads(pair: Tables, *, has_predictor: bool) -> list[NDArray[np.bool_]]:
    """The part of the mask that depends on the machine alone."""
    heads = {name: np.ones(len(levels), dtype=bool) for name, levels in LEVELS.items()}
    if not pair.has_pim:
        heads["prefill_budget_tokens"][LEVELS["prefill_budget_tokens"].index(Budget.ALIGN)] = False
        heads["sub_batching"][1] = False
    if not (pair.has_pim and pair.has_hbm_kv):
        heads["hbm_share_frac"][1:] = False
    if not has_predictor:
        heads["order"][Order.SHORTEST_PREDICTED_HOPELESS_LAST] = False
    return list(heads.values())
