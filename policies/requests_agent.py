"""A score for every request it is shown, and two knobs beside the scores: an agent of ``l3env/ServingRequests-v0``.

One set of weights for all machines, traces and loads, found by an evolution strategy
(``l3env.experiments.learning.evolve_agent``, the command is in the file). A score is a weighted sum of what a row says
of its request (``ROW``), with weights that shift with the pressure, squashed into [0, 1]: the same weights for every
row, so the order of rows does not matter. The knobs (``KNOBS_BESIDE``) are weighted sums of what the global state says
(``BUDGET``, ``SHARE``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.choices import SubBatching
from l3env.envs.observe.features import columns_of
from l3env.envs.observe.request_rows import REQUEST_FEATURES
from l3env.envs.observe.requests import ViewRequestObserver
from l3env.errors import PolicyError
from l3env.machine.tables import Tables
from l3env.policy.plan import Scored
from l3env.policy.protocol import BasePolicy, Role
from l3env.policy.view import View
from l3env.requests.workload import Workload

FILE = Path(__file__).parent / "data" / "requests-agent.json"

ROW = ("one", "prefilling", "decoding", "late", "slack", "work", "kv", "emitted")
"""What a row says: 1; whether its prompt is under way, or done; 4 if it misses its TTFT; its slack, -1 to 1;
logarithms of what is left of its prefill over the TTFT SLO, and of its KV over what is free; what it emitted."""

BUDGET = ("one", "fits", "pressure", "ahead", "late", "idle")
"""What log2 of the prefill budget over USUAL_TOKENS follows from: 1; the same of the tokens with which an iteration
lasts as long as the mean TBT SLO; the pressure; how far the decoding requests are ahead, how many of them were late,
whether there are none."""

SHARE = ("one", "balance", "prompt", "held", "need")
"""What HBM's share of the KV, over a half, follows from: 1; how much busier the PIM side was than the GPU; log of the
mean prompt; how much of the HBM pool is held; log of the KV that what arrives needs, over that pool."""

BUDGETS = tuple(round(2.0 ** (k / 2)) for k in range(12, 26))  # tokens, half an octave apart
SHARES = tuple(k / 16 for k in range(17))
KNOBS_BESIDE = {"prefill_budget_tokens": BUDGETS, "hbm_share_frac": SHARES}
FIXED = {"prefill_in_order": True, "sub_batching": SubBatching.ADAPTIVE}

HEADS = {"score": ROW, "pressed": ROW, "budget": BUDGET, "share": SHARE}
GENES = tuple(f"{head}.{name}" for head, names in HEADS.items() for name in names)
SCORES = tuple(name for name in GENES if name.startswith(("score", "pressed")))
START = {"score.late": -2.5, "score.work": -1.0}
"""Shortest work first, late ones last; USUAL_TOKENS an iteration, half of the KV in HBM."""

VISIBLE = 128
INTERVAL_S = 1.0  # scores and knobs are given anew at every arrival, finish and preemption, at the latest after this
SETTINGS: dict[str, Any] = {"visible": VISIBLE, "show": "deadline", "knobs": FIXED, "action_knobs": KNOBS_BESIDE}
"""What the environment is told, so that the agent sees and does what it was made for."""

STATE = (
    "waiting_work",
    "prefill_left_work",
    "next_one_batch",
    "next_with_512",
    "ahead",
    "late_share",
    "prompt_mean",
    "decoding_0_count",
    "decoding_1_count",
    "gpu_0_share",
    "gpu_1_share",
    "pim_0_share",
    "pim_1_share",
    "kv_hbm_share",
    "memory_load",
    "hbm_capacity",
    "pim_capacity",
)
STATE_COLUMNS = columns_of(STATE)
COLUMNS = [name for name, _ in REQUEST_FEATURES]
USUAL_TOKENS = 362  # where the search begins
LOG_BUDGETS = np.log2(np.array(BUDGETS) / USUAL_TOKENS)
LEAST = 1e-4  # of a share whose odds are taken


class RequestsAgent(BasePolicy):
    """Schedules by the scores and knobs of weights that ``l3env.experiments.learning.evolve_agent`` found.

    Args:
        path: of the weights.
        fixed_order: the same knobs, but requests in the order that the search began with.
    """

    role = Role.LEARNED
    decision_interval_s = INTERVAL_S
    decides_at_events = True

    def __init__(self, path: Path = FILE, fixed_order: bool = False, name: str = "requests-agent") -> None:
        self.name = name
        weights = read_agent(path)
        self.agent = Agent(with_fixed_order(weights) if fixed_order else weights)

    def prepare(self, system: Tables, training: Workload | None) -> None:
        self._observer = ViewRequestObserver(**SETTINGS)

    def decide(self, view: View) -> Scored:
        obs, mask = self._observer.look(view)
        return self._observer.scored(self.agent.act(obs, mask))


class Agent:
    """One candidate an environment, or the same for all.

    Args:
        weights: (E or 1, len(GENES)) in the order of GENES.
    """

    def __init__(self, weights: NDArray[np.float64]) -> None:
        ends = np.cumsum([len(names) for names in HEADS.values()])[:-1]
        self.score, self.pressed, self.budget, self.share = np.split(np.atleast_2d(weights), ends, axis=1)

    def act(self, obs: Any, mask: NDArray[np.bool_]) -> NDArray[Any]:
        """(E, 2 K + 2) scores and knobs; 0 where there is no request."""
        rows = obs["requests"]
        state = dict(zip(STATE, obs["state"].T[STATE_COLUMNS].astype(np.float64), strict=True))
        pressure = np.log1p(4 * odds(state["waiting_work"]) + odds(state["prefill_left_work"]))
        weights = self.score + pressure[:, None] * self.pressed
        which, place = np.nonzero(mask[:, : rows.shape[1]])
        actions = np.zeros((len(rows), rows.shape[1] + len(KNOBS_BESIDE)), np.float32)
        values = (row_inputs(rows[which, place]) * weights[which]).sum(axis=1)
        actions[which, place] = 0.5 + 0.5 * squashed(values)  # nobody is held back
        actions[:, -2] = entries(LOG_BUDGETS, (budget_inputs(state, pressure) * self.budget).sum(axis=1))
        actions[:, -1] = entries(np.array(SHARES), 0.5 + (share_inputs(state) * self.share).sum(axis=1))
        return actions


def squashed(value: NDArray[np.float64]) -> NDArray[np.float64]:
    """(-inf, inf) -> (-1, 1)."""
    return value / (1 + np.abs(value))


def odds(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """What was squashed, in units of its scale: x / (x + 1) -> x."""
    inside = np.minimum(np.maximum(share, LEAST), 1 - LEAST)
    return inside / (1 - inside)


def row_inputs(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """(M, features) rows -> (M, len(ROW))."""
    value = dict(zip(COLUMNS, rows.T.astype(np.float64), strict=True))
    parts = {
        "one": value["present"],
        "prefilling": value["prefilling"],
        "decoding": value["running"] - value["prefilling"],
        "late": 4 * value["late"],
        "slack": 2 * value["slack"] - 1,
        "work": np.log(odds(value["prefill_work"])),
        "kv": np.log(odds(value["kv_over_free"])),
        "emitted": value["emitted"],
    }
    return np.array([parts[name] for name in ROW]).T


def budget_inputs(state: Mapping[str, NDArray[np.float64]], pressure: NDArray[np.float64]) -> NDArray[np.float64]:
    """(E,) each -> (E, len(BUDGET))."""
    now, more = odds(state["next_one_batch"]), odds(state["next_with_512"])
    fits = 512 * (1 - now) / np.maximum(more - now, LEAST)
    parts = {
        "one": np.ones(len(pressure)),
        "fits": np.log2(np.minimum(np.maximum(fits, BUDGETS[0]), BUDGETS[-1]) / USUAL_TOKENS),
        "pressure": pressure,
        "ahead": 2 * state["ahead"] - 1,
        "late": state["late_share"],
        "idle": 1.0 * (state["decoding_0_count"] + state["decoding_1_count"] == 0),
    }
    return np.array([parts[name] for name in BUDGET]).T


def share_inputs(state: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    """(E,) each -> (E, len(SHARE))."""
    busy = {side: state[f"{side}_0_share"] + state[f"{side}_1_share"] for side in ("gpu", "pim")}
    parts = {
        "one": np.ones(len(state["prompt_mean"])),
        "balance": busy["pim"] - busy["gpu"],
        "prompt": np.log(odds(state["prompt_mean"])),
        "held": state["kv_hbm_share"],
        "need": np.log(odds(state["memory_load"]) * (1 + odds(state["pim_capacity"]) / odds(state["hbm_capacity"]))),
    }
    return np.array([parts[name] for name in SHARE]).T


def entries(levels: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """(E,) action entries that stand for the levels (evenly spaced) nearest to what is wanted."""
    place = np.rint((wanted - levels[0]) / (levels[-1] - levels[0]) * (len(levels) - 1))
    return 2 * (np.minimum(np.maximum(place, 0), len(levels) - 1) + 0.5) / len(levels) - 1


def weights_of(values: Mapping[str, float]) -> NDArray[np.float64]:
    """(len(GENES),) from their names; those left out are 0. Raises PolicyError for a name there is not."""
    if unknown := sorted(set(values) - set(GENES)):
        raise PolicyError(f"requests agent: unknown weights {', '.join(unknown)}; expected some of {', '.join(GENES)}")
    return np.array([float(values.get(name, 0.0)) for name in GENES])


def read_agent(path: Path = FILE) -> NDArray[np.float64]:
    """(len(GENES),) weights in a file that the search wrote. Raises PolicyError for what is wrong with it."""
    try:
        values = {str(name): float(value) for name, value in json.loads(path.read_text("utf-8"))["weights"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PolicyError(f"{path}: expected JSON with an object 'weights' of numbers: {error!r}") from None
    return weights_of(values)


def with_fixed_order(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same knobs under the scores of START: shortest work first, late ones last."""
    return np.where([name in SCORES for name in GENES], weights_of(START), weights)
