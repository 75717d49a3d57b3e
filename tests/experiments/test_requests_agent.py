"""The agent of ``l3env/ServingRequests-v0``: what it does with what it sees, its search, its evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from l3env import FixedKnobs, Knobs, run_policy
from l3env.envs.observe.observer import FEATURES
from l3env.envs.observe.requests import REQUEST_FEATURES
from l3env.envs.requests import ServingRequestsEnv
from l3env.errors import L3EnvError
from l3env.experiments.learning import requests_agent as module
from l3env.experiments.learning.cells import Cell, requests
from l3env.experiments.learning.evolve import Task
from l3env.experiments.learning.requests_agent import (
    BUDGETS,
    FILE,
    FIXED,
    FIXED_ORDER,
    GENES,
    SHARES,
    START,
    Agent,
    entries,
    environment,
    evaluate,
    read_agent,
    run_cell,
    search,
    serve,
    table,
    weights_of,
    with_fixed_order,
)
from l3env.machine.pair import compile_pair
from l3env.requests.workload import Workload

CELL = Cell("l3-dgx-a100", "qwen-72b", "profile:azure-conv-2023?n=200", 1.0)  # two replicas, HBM and PIM
NAMES = [name for name, _ in FEATURES]


def drawn(envs_count: int, visible: int, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """An observation and its mask."""
    rng = np.random.default_rng(seed)
    mask = np.concatenate([rng.random((envs_count, 2 * visible)) < 0.7, np.ones((envs_count, 2), bool)], axis=1)
    rows = rng.random((envs_count, 2 * visible, len(REQUEST_FEATURES)), np.float32) * mask[:, :-2, None]
    return {"state": rng.random((envs_count, len(FEATURES)), np.float32), "requests": rows.astype(np.float32)}, mask


def test_a_request_gets_its_score_wherever_its_row_is() -> None:
    obs, mask = drawn(3, 8)
    agent = Agent(np.random.default_rng(1).normal(size=(3, len(GENES))))
    actions = agent.act(obs, mask)
    order = np.random.default_rng(2).permutation(16)
    turned = agent.act(
        {"state": obs["state"], "requests": obs["requests"][:, order]},
        np.concatenate([mask[:, order], mask[:, 16:]], axis=1),
    )
    np.testing.assert_array_equal(turned[:, :16], actions[:, order])
    np.testing.assert_array_equal(turned[:, 16:], actions[:, 16:])
    assert np.unique(actions[:, :16]).size == mask[:, :16].sum() + 1  # all different, and 0 where nobody is
    assert (np.abs(actions) <= 1).all()


def test_candidates_side_by_side_do_what_they_do_alone() -> None:
    obs, mask = drawn(3, 8)
    weights = np.random.default_rng(1).normal(size=(3, len(GENES)))
    together = Agent(weights).act(obs, mask)
    for e in range(3):
        alone = Agent(weights[e]).act({name: part[e : e + 1] for name, part in obs.items()}, mask[e : e + 1])
        np.testing.assert_array_equal(alone[0], together[e])


def test_scores_and_knobs_by_hand() -> None:
    """One request with half a TTFT SLO of prefill left, late; a queue of two TTFT SLOs of work."""
    obs = {"state": np.zeros((1, len(FEATURES)), np.float32), "requests": np.zeros((1, 2, 13), np.float32)}
    columns = [name for name, _ in REQUEST_FEATURES]
    for name, value in {"present": 1.0, "late": 1.0, "prefill_work": 1 / 3}.items():
        obs["requests"][0, 0, columns.index(name)] = value
    for name, value in {"waiting_work": 1 / 3, "next_one_batch": 0.2, "next_with_512": 0.6}.items():
        obs["state"][0, NAMES.index(name)] = value
    weights = weights_of({"score.work": -1.0, "score.late": -2.0, "pressed.one": 0.5, "budget.fits": 1.0})
    first, second, budget, share = Agent(weights).act(obs, np.array([[True, False, True, True]]))[0]
    total = -np.log(0.5) - 4 * 2 + 0.5 * np.log(1 + 4 * 0.5 + module.LEAST / (1 - module.LEAST))
    assert first == pytest.approx(0.5 + 0.5 * total / (1 + abs(total)), rel=1e-6)
    assert second == 0
    # an iteration takes 0.25 SLOs, with 512 tokens 1.5; so 1 SLO is that of 307 tokens: nearer to 362 than to 256
    assert 362 / 307.2 < 307.2 / 256
    assert BUDGETS[int((budget + 1) / 2 * len(BUDGETS))] == 362
    assert SHARES[int((share + 1) / 2 * len(SHARES))] == 0.5


def test_entries_stand_for_the_nearest_level() -> None:
    levels = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    chosen = entries(levels, np.array([-3.0, 0.1, 0.13, 0.6, 9.0]))
    assert ((chosen + 1) / 2 * 5).astype(int).tolist() == [0, 0, 1, 2, 4]


def test_an_agent_without_weights_is_fixed_knobs_in_order_of_arrival() -> None:
    """All scores equal, the usual budget, half of the KV in HBM: the offline runner gives the same, both replicas."""
    (row,) = run_cell(CELL, {"none": weights_of({})}, 0)
    knobs = Knobs(prefill_budget_tokens=362, hbm_share_frac=0.5, **FIXED)  # type: ignore[arg-type]
    offline = run_policy(compile_pair(CELL.system, CELL.model), requests(CELL, CELL.window), FixedKnobs("x", knobs))
    assert row["slo_attainment_frac"] == pytest.approx(offline.metrics["slo_attainment_frac"], rel=1e-12)
    assert row["requests_count"] == offline.metrics["requests_count"]
    assert row["makespan_s"] == offline.metrics["makespan_s"]


def test_goodput_is_what_the_requests_say() -> None:
    """Counted by hand from the times of all requests, under the agent that the search starts from."""
    workload = requests(CELL, CELL.window).head(60)
    envs = environment(1, system=CELL.system, model=CELL.model, trace=CELL.trace, episode_requests=None)
    metrics, _ = serve(envs, Agent(weights_of(START)), {"workload": workload})
    settings = {"visible": module.VISIBLE, "show": "deadline", "knobs": FIXED, "action_knobs": module.KNOBS_BESIDE}
    env = ServingRequestsEnv(
        system=CELL.system, model=CELL.model, trace=CELL.trace, episode_requests=None, decision="event", **settings
    )
    obs, info = env.reset(seed=0, options={"workload": workload})
    terminated = False
    while not terminated:
        batch = {name: part[None] for name, part in obs.items()}
        obs, _, terminated, _, info = env.step(Agent(weights_of(START)).act(batch, info["action_mask"][None])[0])
    assert env.engine is not None
    req = env.engine.state.req[0, : len(workload)]
    ttft_met = req["first_token_s"] - req["arrival_s"] <= req["ttft_slo_s"]
    tbt_s = (req["finish_s"] - req["first_token_s"]) / np.maximum(workload.output_tokens - 1, 1)
    met = int((ttft_met & (tbt_s <= req["tbt_slo_s"])).sum())
    assert 0 < met < 60
    assert metrics[0]["slo_attainment_frac"] == info["metrics"]["slo_attainment_frac"] == met / 60


def test_decisions_do_not_depend_on_lengths_to_come() -> None:
    """Until the first request ends, other output lengths change nothing at all."""
    base = requests(CELL, CELL.window).head(40)
    longer = Workload.build("longer", base.arrival_s, base.prompt_tokens, base.output_tokens + 300)
    envs = [environment(1, system=CELL.system, model=CELL.model, trace=CELL.trace) for _ in range(2)]
    agent, steps = Agent(weights_of(START | {"budget.ahead": 1.0, "pressed.kv": 0.3})), 0
    shown = [each.reset(seed=0, options={"workload": part}) for each, part in zip(envs, (base, longer), strict=True)]
    while envs[0].engine.state.env["finished_count"][0] == 0:
        actions = [agent.act(obs, infos["action_mask"]) for obs, infos in shown]
        np.testing.assert_array_equal(*actions)
        shown = [(out[0], out[4]) for out in (each.step(actions[0]) for each in envs)]
        steps += 1
    assert steps > 5


def test_the_search_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two generations in two pieces equal those in one; what is not searched stays."""
    monkeypatch.setattr(module, "tasks_of", lambda generation, seed: [Task(CELL, 0.1 * generation)])
    monkeypatch.setitem(module.STRETCH_REQUESTS, "profile", 20)
    search(tmp_path / "whole", "knobs", 2, 4, 0, np.inf)
    search(tmp_path / "parts", "knobs", 1, 4, 0, np.inf)
    search(tmp_path / "parts", "knobs", 2, 4, 0, np.inf)
    whole, parts = (read_agent(tmp_path / name / "requests-agent.json") for name in ("whole", "parts"))
    np.testing.assert_array_equal(whole, parts)
    changed = {name for name, value, before in zip(GENES, whole, weights_of(START), strict=True) if value != before}
    assert changed
    assert all(name.startswith(("budget", "share")) for name in changed)


def test_an_evaluation_runs_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONSTANTS", ())
    agents = {"start": weights_of(START), "none": weights_of({})}
    rows = evaluate([CELL], agents, 2, tmp_path, 1)
    assert [(row["policy"], row["seed"]) for row in rows] == [("start", 0), ("none", 0), ("start", 1), ("none", 1)]
    alone = [run_cell(CELL, {name: weights}, 1)[0] for name, weights in agents.items()]
    for row, other in zip(rows[2:], alone, strict=True):
        assert {**row, "wall_s": 0} == {**other, "wall_s": 0}
    monkeypatch.setattr(module, "run_cell", None)
    assert evaluate([CELL], agents, 2, tmp_path, 1) == rows


def test_the_table_by_hand() -> None:
    """Ratios 2, 1 and 0.5 with one seed: a quarter of three is none, so the mean, 7/6."""
    goodput = {"a": (0.4, 0.5, 0.3), "b": (0.2, 0.5, 0.6)}
    rows = [
        {"system": str(c), "model": "m", "trace": "t", "utilization": 0.9, "policy": name, "seed": 0}
        | {"slo_attainment_frac": values[c], "requests_count": 10}
        for name, values in goodput.items()
        for c in range(3)
    ]
    text = table(rows, "a")
    assert "| b | 1.167 | 1.167 to 1.167 | 0.500 | 2.000 |" in text
    assert "| 0 | m | t | 0.9 | 0.400 | 0.200 |" in text


def test_the_fixed_order_keeps_the_knobs_alone() -> None:
    weights = np.arange(1.0, len(GENES) + 1)
    fixed = dict(zip(GENES, with_fixed_order(weights), strict=True))
    assert {name: fixed[name] for name in START if name.startswith("score")} == {
        name: value for name, value in START.items() if name.startswith("score")
    }
    assert fixed["pressed.work"] == 0
    assert fixed["budget.fits"] == GENES.index("budget.fits") + 1
    assert FIXED_ORDER != module.AGENT


@pytest.mark.parametrize("text", ["{", '{"weights": {"score.work": "x"}}', '{"weights": {"NO": 1}}', "[]"])
def test_a_bad_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(L3EnvError):
        read_agent(tmp_path / "bad.json")


def test_the_shipped_file_says_how_it_was_made() -> None:
    raw = json.loads(FILE.read_text(encoding="utf-8"))
    assert raw["command"].startswith("python -m l3env.experiments.learning.requests_agent train")
    assert raw["config"]["training_window"] == "0%:60%"
    assert read_agent().shape == (len(GENES),)
