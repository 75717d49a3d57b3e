"""What an agent sees and does: features with names and ranges, the knob action space and its mask.

Every feature could be known to a real scheduler; true output lengths are in none. All lie in [0, 1]: shares are shares,
and a quantity with a scale is shown as x / (x + scale). Times are measured by the SLO, queues by what the machine does
in that time, and KV by what its memory holds, so that a state means the same on another system, model or load.

TTFT and TBT SLO without further words are those of a request with 1,024 prompt tokens; "pace" is the time per token of
a prefill of 2,048 tokens on the empty system.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from l3env.choices import Budget, Order, PimForm, SubBatching
from l3env.engine.engine import Engine
from l3env.engine.kernels.run import Until
from l3env.engine.state import MARK_DTYPE
from l3env.envs.observe.features import FEATURES_END, MACHINE, write_features
from l3env.envs.observe.step import ACTION, step_batch
from l3env.errors import L3EnvError, PlanError
from l3env.machine.tables import Tables
from l3env.policy.knobs import UNLIMITED, Knobs
from l3env.policy.view import View
from l3env.threads import Sharer

Levels = Mapping[str, tuple[Any, ...]]

LEVELS: dict[str, tuple[Any, ...]] = {
    "admit_max_count": (0, 1, 2, 4, 8, 16, 64, UNLIMITED),
    "prefill_budget_tokens": (256, 512, 1024, 2048, 4096, 8192, *Budget),
    "budget_counts_decodes": (False, True),
    "hbm_share_frac": (0.0, 0.05, 0.1, 0.25, 0.5, 1.0),
    "order": tuple(order for order in Order if order != Order.BY_SCORE),
    "headroom_frac": (0.0, 0.01, 0.05, 0.1, 0.2, 0.4),
    "sub_batching": tuple(SubBatching),
}
"""The action: one level of each knob."""

MORE_LEVELS: dict[str, tuple[Any, ...]] = {
    "pim_form": tuple(PimForm),
    "multi_token": (False, True),
    "prefill_in_order": (False, True),
}
"""Knobs that an action may set besides (``action_knobs`` of the environments). The first does something where a model
stores a latent and the system has PIM, the second where a model guesses tokens."""

FEATURES: tuple[tuple[str, str], ...] = (
    # the queue
    ("waiting_count", "requests in the queue, scale 16"),
    ("waiting_many", "the same, scale 256"),
    ("waiting_work", "prefill time of the queue at the pace, over the TTFT SLO, scale 4"),
    ("waiting_over_free", "tokens of the queue over free KV tokens, scale 1"),
    ("waiting_age", "mean age of the waiting over the TTFT SLO, scale 1"),
    ("waiting_prompt_p10", "log2 of the 10th percentile of prompts in the queue, over 20"),
    ("waiting_prompt_p50", "log2 of their median, over 20"),
    ("waiting_prompt_p90", "log2 of their 90th percentile, over 20"),
    ("waiting_feasible_share", "share of the waiting whose TTFT deadline can still be met; 1 where none waits"),
    ("least_slack", "time until the first of those cannot meet it, over the TTFT SLO, scale 1; 1 where there is none"),
    ("waiting_predicted", "mean predicted output of the waiting, scale 256; 0 without a predictor"),
    # what runs
    ("prefilling_count", "requests in prefill, scale 8"),
    ("prefill_left_work", "time of what is left of their prompts at the pace, over the TTFT SLO, scale 1"),
    ("decoding_0_count", "decoding requests of sub-batch 0, scale 64"),
    ("decoding_1_count", "decoding requests of sub-batch 1, scale 64"),
    ("paused_count", "requests paused, scale 16"),
    ("decoded_mean", "mean tokens emitted by the decoding requests, scale 256"),
    ("decoded_spread", "their standard deviation over mean plus standard deviation"),
    ("kv_mean", "mean KV tokens of the decoding requests, scale 2,048"),
    ("kv_spread", "their standard deviation over mean plus standard deviation"),
    ("late_share", "share of the decoding requests whose first token missed its deadline"),
    ("ahead", "tokens that they are ahead of the mean TBT of their SLO, on average: 0.5 + 0.5 x / (|x| + 16)"),
    ("predicted_left", "their mean predicted output left, scale 256; 0 without a predictor"),
    # memory
    ("kv_hbm_share", "share of the HBM pool that is held"),
    ("kv_pim_share", "share of the PIM pools that is held"),
    ("kv_pim_fullest_share", "share held of the fullest PIM pool"),
    ("hbm_steps_to_full", "decode steps until the HBM pool is full at the present growth, scale 256; 1 without growth"),
    ("pim_steps_to_full", "the same of the PIM pools"),
    ("next_growth", "blocks that the next decode step takes over free blocks, scale 1"),
    ("promised", "predicted blocks of all residents at their ends over all blocks, scale 1"),
    ("lane_imbalance", "slowest PIM lane over the mean lane, minus 1, scale 1"),
    # the next decode step by the tables, over the mean TBT SLO of the decoding requests, scale 1
    ("next_gpu_0", "T_GPU of phase 0 (systems without PIM: of the batch)"),
    ("next_gpu_1", "T_GPU of phase 1"),
    ("next_pim_0", "T_PIM of phase 0"),
    ("next_pim_1", "T_PIM of phase 1"),
    ("next_one_batch", "as one batch"),
    ("next_interleaved", "as two sub-batches"),
    ("one_batch_share", "one batch over the sum of both"),
    ("next_with_512", "as one batch with the FC work of 512 prompt tokens more"),
    ("next_with_2048", "with that of 2,048 more"),
    ("last_iteration", "the last iteration"),
    # what happened
    ("gpu_0_share", "T_GPU of phase 0 over the last iteration"),
    ("gpu_1_share", "T_GPU of phase 1 over the last iteration"),
    ("pim_0_share", "T_PIM of phase 0 over the last iteration"),
    ("pim_1_share", "T_PIM of phase 1 over the last iteration"),
    ("gpu_bubble_share", "GPU idle share of iteration time since the last step"),
    ("pim_bubble_share", "PIM idle share of iteration time since the last step"),
    ("prompt_token_share", "prompt tokens over prompt and output tokens since the last step"),
    ("preemptions_count", "preemptions since the last step, scale 4"),
    ("slo_met_share", "of finished and rejected requests, running mean over some 32; 1 where there are none"),
    ("elapsed", "time since the last step over the mean TBT SLO, scale 16"),
    # arrivals and what they ask for: running means over some 8 (short) and 128 (long) arrivals
    ("prefill_load_short", "arrival rate x mean prompt x pace, scale 1; short"),
    ("prefill_load_long", "the same, long"),
    ("memory_load", "KV tokens held at that rate if requests decode at their TBT SLO, over capacity, scale 1"),
    ("arrival_surge", "short over long arrival rate, scale 1"),
    ("burstiness_short", "squared coefficient of variation of the gaps, scale 1; short"),
    ("burstiness_long", "the same, long"),
    ("since_arrival", "time since the last arrival over the mean gap, scale 1"),
    ("prompt_mean", "mean prompt of arrivals, scale 2,048"),
    ("output_mean", "mean output of finished requests, scale 256; 0 before there are any"),
    ("capacity_requests", "KV tokens of the machine over prompt and output mean, scale 64"),
    # the machine and the SLO: constant in an episode
    ("has_pim", "1 on systems with a PIM side"),
    ("has_hbm_kv", "1 where KV may live in HBM"),
    ("fc_1", "FC and head of 1 token over the TBT SLO, scale 1"),
    ("fc_256", "of 256 tokens"),
    ("fc_2048", "of 2,048 prompt tokens"),
    ("ttft_tightness", "TTFT on the empty system over the TTFT SLO"),
    ("prefill_pace", "1,024 tokens at the pace over the TTFT SLO, scale 1"),
    ("slo_ratio", "TTFT SLO over TBT SLO, scale 16"),
    ("hbm_attention", "attention of 64 requests of 1,024 tokens in HBM over their FC, scale 1"),
    ("pim_attention", "on the PIM side"),
    ("hbm_capacity", "HBM pool in requests of 1,280 tokens, scale 64"),
    ("pim_capacity", "PIM pools in requests of 1,280 tokens, scale 64"),
    ("pim_full_read", "time to read the PIM side when full over the TBT SLO, scale 1"),
    ("pim_lanes", "PIM lanes, scale 8"),
    ("transfer", "moving the KV of 2,048 prompt tokens over their FC, scale 1"),
)
FEATURES_COUNT = len(FEATURES)
assert FEATURES_COUNT == FEATURES_END


class Observer:
    """Watches the environments of an engine: what happened since its last look at each is part of what it sees."""

    def __init__(self, engine: Engine, *, has_predictor: bool = False, levels: Levels = LEVELS) -> None:
        self.engine = engine
        self.legal = static_masks(engine, has_predictor=has_predictor, levels=levels)
        self._none = admits_none(levels)
        self._sizes = sizes_of(levels)
        self._columns = np.array([ACTION.index(name) for name in levels])
        self._values = np.zeros((len(levels), self._sizes.max()))
        for row, values in zip(self._values, levels.values(), strict=True):
            row[: len(values)] = [float(value) for value in values]
        self.marks = np.zeros(engine.num_envs, MARK_DTYPE)
        self.machine = np.zeros((engine.num_envs, FEATURES_COUNT - MACHINE), np.float32)
        self._share_out = Sharer()
        Knobs().write(engine.knobs, slice(None))  # what no action sets

    def forget(self, e: int) -> None:
        """Environment ``e`` starts anew."""
        self.marks[e] = 0

    def look(self, first: int = 0, last: int | None = None) -> NDArray[np.float32]:
        """(last - first, FEATURES_COUNT) fresh features of a range of environments, all by default."""
        end = self.engine.num_envs if last is None else last
        out = np.empty((self.engine.num_envs, FEATURES_COUNT), np.float32)
        write_features(self.engine.tables, self.engine.state, self.marks, self.machine, first, end, out)
        return out[first:end]

    def masks(self) -> NDArray[np.bool_]:
        """(E, sum of levels) fresh: which levels do something in each environment now; at least one of each knob."""
        return mask_rows(self.engine, self.legal, self._none)

    def check(self, actions: NDArray[Any]) -> NDArray[Any]:
        """(E, knobs) actions as ``step`` takes them; see ``check_actions``."""
        return check_actions(actions, self.engine.num_envs, self._sizes)

    def shown(self, flat: NDArray[np.float32]) -> Any:
        """Features as the observation space has them: as they are."""
        return flat

    def step(
        self, actions: NDArray[Any], until: Until, limits: NDArray[np.float64]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Every environment runs under its (checked) action to its own limit; fresh features and masks.

        Long steps are shared out to all cores; each environment is run by one thread, so results do not depend on it.
        """
        engine = self.engine
        obs = np.empty((engine.num_envs, FEATURES_COUNT), np.float32)
        masks = np.empty((engine.num_envs, self.legal.shape[1]), np.bool_)
        how, tables, state, knobs, marks = int(until), engine.tables, engine.state, engine.knobs, self.marks

        def share(first: int, last: int) -> None:
            step_batch(
                tables, state, knobs, actions, self._columns, self._values, how, limits,
                marks, self.machine, self.legal, self._none, first, last, obs, masks,
            )  # fmt: skip

        self._share_out(share, engine.num_envs)
        return obs, masks


class ViewObserver:
    """What an agent in an environment would see, for a policy in the offline runner: one for each replica's run."""

    def __init__(self, *, has_predictor: bool = False, levels: Levels = LEVELS) -> None:
        self._has_predictor, self._levels = has_predictor, levels
        self._observer: Observer | None = None

    def look(self, view: View) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """((FEATURES_COUNT,) features, (sum of levels,) mask) now; "since the last step" is since the last look."""
        engine, e = view._engine, view._e
        if self._observer is None:
            self._observer = Observer(engine, has_predictor=self._has_predictor, levels=self._levels)
        mask = self._observer.legal[engine.state.env["table_idx"][e]].copy()
        none = admits_none(self._levels)
        if none >= 0:
            mask[none] = engine.state.env["running_count"][e] > 0
        return self._observer.look(e, e + 1)[0], mask


def observation_space() -> gymnasium.spaces.Space[NDArray[np.float32]]:
    """All features lie in [0, 1]."""
    return gymnasium.spaces.Box(0.0, 1.0, (FEATURES_COUNT,), np.float32)


def levels_of(action_knobs: Sequence[str] | None) -> Levels:
    """Levels of the knobs that an action sets, in the order given; LEVELS by default.

    Raises L3EnvError for none, an unknown one, or one named twice.
    """
    if action_knobs is None:
        return LEVELS
    known = LEVELS | MORE_LEVELS
    names = [action_knobs] if isinstance(action_knobs, str) else list(action_knobs)
    if not names or len(set(names)) < len(names) or not set(names) <= known.keys():
        raise L3EnvError(f"action_knobs = {action_knobs!r}; expected one or more of {', '.join(known)}, each once")
    return {name: known[name] for name in names}


def action_space(levels: Levels = LEVELS) -> gymnasium.spaces.MultiDiscrete:
    """One level of each knob, in the order of ``levels``."""
    return gymnasium.spaces.MultiDiscrete(sizes_of(levels))


def knobs_of(action: NDArray[np.int64], levels: Levels = LEVELS) -> Knobs:
    """The settings an action stands for."""
    return Knobs(**{name: values[int(i)] for (name, values), i in zip(levels.items(), action, strict=True)})


def action_of(knobs: Knobs, levels: Levels = LEVELS) -> NDArray[np.int64]:
    """The action nearest to some settings: the same order and mode, numbers to the closest level."""
    return np.array([_nearest(values, getattr(knobs, name)) for name, values in levels.items()], dtype=np.int64)


def sizes_of(levels: Levels) -> NDArray[np.int64]:
    """(knobs,) how many levels each has."""
    return np.array([len(values) for values in levels.values()], dtype=np.int64)


def admits_none(levels: Levels) -> int:
    """Place in a mask of the level that admits nobody; -1 where no action sets it."""
    place = 0
    for name, values in levels.items():
        if name == "admit_max_count":
            return place + values.index(0)
        place += len(values)
    return -1


def _nearest(levels: tuple[Any, ...], value: Any) -> int:
    if value in levels:
        return levels.index(value)
    return int(np.argmin([abs(float(level) - float(value)) for level in levels]))


assert tuple(LEVELS | MORE_LEVELS) == ACTION


def check_actions(actions: NDArray[Any], num_envs: int, sizes: NDArray[np.int64]) -> NDArray[Any]:
    """(E, knobs) actions as the engine takes them. Raises PlanError for a wrong shape or type or level."""
    given, expected = np.asarray(actions), (num_envs, len(sizes))
    if given.dtype.kind in "iu" and given.shape == expected:
        found = np.ascontiguousarray(given, np.int64)
        if not (found.view(np.uint64) >= sizes.view(np.uint64)).any():  # negative ones are large
            return found
    shown = f"{given.dtype} of shape {given.shape}"
    raise PlanError(f"actions: {shown}; expected integers, expected shape {expected}, entries from 0 to below {sizes}")


def static_masks(engine: Engine, *, has_predictor: bool = False, levels: Levels = LEVELS) -> NDArray[np.bool_]:
    """(T, sum of levels) the part of the masks that depends on the machine alone, heads concatenated."""
    rows = [static_heads(pair, has_predictor=has_predictor) for pair in engine.pairs]
    return np.array([np.concatenate([heads[name] for name in levels]) for heads in rows])


def mask_rows(engine: Engine, static: NDArray[np.bool_], none: int) -> NDArray[np.bool_]:
    """(E, sum of levels) which levels do something in each environment now; at least one of each knob is legal.

    Args:
        static: ``static_masks`` of the engine; none: ``admits_none`` of the levels.
    """
    rows = static[engine.state.env["table_idx"]]
    if none >= 0:
        rows[:, none] = engine.state.env["running_count"] > 0
    return rows


def static_heads(pair: Tables, *, has_predictor: bool) -> dict[str, NDArray[np.bool_]]:
    """The part of the mask that depends on the machine alone, of every knob."""
    heads = {name: np.ones(len(levels), dtype=bool) for name, levels in (LEVELS | MORE_LEVELS).items()}
    if not pair.has_pim:
        for budget in (Budget.ALIGN, Budget.ALIGN_WHEN_FULL):
            heads["prefill_budget_tokens"][LEVELS["prefill_budget_tokens"].index(budget)] = False
        heads["sub_batching"][1:] = False
    if not (pair.has_pim and pair.has_hbm_kv):
        heads["hbm_share_frac"][1:] = False
    if not has_predictor:
        heads["order"][Order.SHORTEST_PREDICTED_HOPELESS_LAST] = False
    heads["pim_form"][MORE_LEVELS["pim_form"].index(PimForm.DECOMPRESSED)] = pair.arrays.coef["spread_lane"][0] > 0
    heads["multi_token"][MORE_LEVELS["multi_token"].index(True)] = pair.arrays.coef["drafts_count"][0] > 0
    return heads
