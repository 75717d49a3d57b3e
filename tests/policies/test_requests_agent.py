"""The requests agent: what it does with what it sees; in the offline runner the same as in the environment."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from l3env import FixedKnobs, Knobs, make_policy, run_policy
from l3env.engine.engine import Engine
from l3env.envs.observe.features import FEATURES
from l3env.envs.observe.request_rows import REQUEST_FEATURES
from l3env.envs.requests import ServingRequestsEnv
from l3env.errors import PlanError, PolicyError
from l3env.experiments.learning.evolve_agent import environment, serve
from l3env.machine.pair import compile_pair
from l3env.policies import requests_agent as module
from l3env.policies.requests_agent import (
    BUDGETS,
    FILE,
    FIXED,
    GENES,
    SETTINGS,
    SHARES,
    START,
    Agent,
    RequestsAgent,
    entries,
    read_agent,
    weights_of,
    with_fixed_order,
)
from l3env.policy.plan import Scored
from l3env.requests.registry import load_trace
from l3env.requests.workload import Workload
from l3env.runs.driver import replica_shares
from l3env.runs.timeline import record

SYSTEM, MODEL, TRACE = "l3-dgx-a100", "qwen-72b", "profile:azure-conv-2023?n=200"  # two replicas, HBM and PIM
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


def served(weights: np.ndarray, workload: Workload) -> list[dict[str, float]]:
    """Metrics of every replica's share, through the batched environment."""
    shares = replica_shares(workload, compile_pair(SYSTEM, MODEL).replicas_count)
    envs = environment(1, system=SYSTEM, model=MODEL, trace=TRACE, episode_requests=None)
    return [serve(envs, Agent(weights), {"workload": workload.select(rows)})[0][0] for rows in shares]


@pytest.mark.parametrize("load", [0.5, 3.0])
def test_a_run_is_what_the_environment_gives(load: float) -> None:
    """Both replicas, decision by decision: the same requests at the same times, so the same figures to the last bit."""
    workload = load_trace(TRACE).at_load(load)
    parts = served(read_agent(), workload)
    outcome = run_policy(compile_pair(SYSTEM, MODEL), workload, make_policy("requests-agent"))
    met = sum(part["slo_attainment_frac"] * part["requests_count"] for part in parts)
    assert outcome.metrics["slo_attainment_frac"] * len(workload) == pytest.approx(met, rel=1e-12)
    for name in ("requests_count", "iterations_count", "preemptions_count"):
        assert outcome.metrics[name] == sum(part[name] for part in parts), name
    shares = replica_shares(workload, 2)
    first_s = workload.arrival_s[[rows[0] for rows in shares]]
    ends_s = [at + part["makespan_s"] for at, part in zip(first_s, parts, strict=True)]
    assert outcome.metrics["makespan_s"] == pytest.approx(max(ends_s) - first_s[0], rel=1e-12)
    assert outcome.metrics["iterations_count"] > 100


def test_watching_a_run_changes_nothing() -> None:
    workload = load_trace(TRACE).head(60).at_load(2.0)
    tables = compile_pair(SYSTEM, MODEL)
    (rows, _) = replica_shares(workload, tables.replicas_count)
    _, watched = record(tables, workload, make_policy("requests-agent"), replica=0)
    alone = served(read_agent(), workload)[0]
    assert watched.metrics["requests_count"] == rows.size
    for name in ("makespan_s", "iterations_count", "slo_attainment_frac"):
        assert watched.metrics[name] == alone[name]


def test_without_weights_it_is_fixed_knobs_in_order_of_arrival(tmp_path: Path) -> None:
    """All scores equal, the usual budget, half of the KV in HBM."""
    (tmp_path / "none.json").write_text('{"weights": {}}')
    workload = load_trace(TRACE)
    knobs = Knobs(prefill_budget_tokens=362, hbm_share_frac=0.5, **FIXED)  # type: ignore[arg-type]
    agent, fixed = (
        run_policy(compile_pair(SYSTEM, MODEL), workload, policy).metrics
        for policy in (RequestsAgent(tmp_path / "none.json"), FixedKnobs("x", knobs))
    )
    for name in ("slo_attainment_frac", "makespan_s", "iterations_count"):
        assert agent[name] == fixed[name]


def test_scores_are_checked() -> None:
    engine = Engine(compile_pair(SYSTEM, MODEL), 1, 3)
    engine.reset(0, Workload.build("three", [0.0, 0.0, 9.0], [16] * 3, [2] * 3))
    engine.score_requests(0, *Scored(Knobs(), np.array([1, 0]), np.array([0.5, -1.0])).checked())
    assert engine.state.req["score"][0].tolist() == [-1.0, 0.5, 0.0]
    for requests, scores in (([0, 1], [0.5]), ([0], [1.5]), ([0], [np.nan])):
        with pytest.raises(PlanError, match="from -1 to 1"):
            Scored(Knobs(), np.array(requests), np.array(scores)).checked()
    for absent in (2, 3, -1):  # still to arrive, and not there at all
        with pytest.raises(PlanError, match=f"request {absent} neither waits nor runs"):
            engine.score_requests(0, np.array([0, absent]), np.zeros(2))


def test_goodput_is_what_the_requests_say() -> None:
    """Counted by hand from the times of all requests, under the agent that the search starts from."""
    workload = load_trace(TRACE).head(60)
    envs = environment(1, system=SYSTEM, model=MODEL, trace=TRACE, episode_requests=None)
    metrics, _ = serve(envs, Agent(weights_of(START)), {"workload": workload})
    env = ServingRequestsEnv(
        system=SYSTEM, model=MODEL, trace=TRACE, episode_requests=None, decision="event", **SETTINGS
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
    base = load_trace(TRACE).head(40)
    longer = Workload.build("longer", base.arrival_s, base.prompt_tokens, base.output_tokens + 300)
    envs = [environment(1, system=SYSTEM, model=MODEL, trace=TRACE) for _ in range(2)]
    agent, steps = Agent(weights_of(START | {"budget.ahead": 1.0, "pressed.kv": 0.3})), 0
    shown = [each.reset(seed=0, options={"workload": part}) for each, part in zip(envs, (base, longer), strict=True)]
    while envs[0].engine.state.env["finished_count"][0] == 0:
        actions = [agent.act(obs, infos["action_mask"]) for obs, infos in shown]
        np.testing.assert_array_equal(*actions)
        shown = [(out[0], out[4]) for out in (each.step(actions[0]) for each in envs)]
        steps += 1
    assert steps > 5


def test_the_fixed_order_keeps_the_knobs_alone() -> None:
    weights = np.arange(1.0, len(GENES) + 1)
    fixed = dict(zip(GENES, with_fixed_order(weights), strict=True))
    assert {name: fixed[name] for name in START if name.startswith("score")} == {
        name: value for name, value in START.items() if name.startswith("score")
    }
    assert fixed["pressed.work"] == 0
    assert fixed["budget.fits"] == GENES.index("budget.fits") + 1
    np.testing.assert_array_equal(RequestsAgent(fixed_order=True).agent.budget, RequestsAgent().agent.budget)


@pytest.mark.parametrize("text", ["{", '{"weights": {"score.work": "x"}}', '{"weights": {"NO": 1}}', "[]"])
def test_a_bad_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(PolicyError):
        read_agent(tmp_path / "bad.json")


def test_the_shipped_file_says_how_it_was_made() -> None:
    raw = json.loads(FILE.read_text(encoding="utf-8"))
    assert raw["command"].startswith("python -m l3env.experiments.learning.evolve_agent")
    assert raw["config"]["training_window"] == "0%:60%"
    assert read_agent().shape == (len(GENES),)
