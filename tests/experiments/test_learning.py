"""Evaluation on cells, interquartile means, the imitation of tuned constants."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch as th

from l3env.choices import Order
from l3env.envs.observe.features import FEATURES
from l3env.errors import L3EnvError
from l3env.experiments.learning import pictures, teacher
from l3env.experiments.learning.evaluate import LEARNED, baselines_of, evaluate, heuristics, networks_of
from l3env.experiments.learning.grid import grid_scenarios, table
from l3env.experiments.learning.imitate import fit, imitate
from l3env.experiments.learning.iqm import interquartile_mean, interval, summarise
from l3env.experiments.learning.scenarios import Scenario, judge, requests
from l3env.experiments.train.export import interface
from l3env.machine.pair import compile_pair
from l3env.policies.learned_ppo import Learned
from l3env.policies.network import Network
from l3env.policy.levels import LEVELS, knobs_of
from l3env.policy.registry import make_policy
from l3env.requests.registry import load_trace
from l3env.runs.driver import run_policy
from l3env.runs.saturation import load_at_capacity
from l3env.runs.store import Store
from l3env.search.tune import ACTIONS, probe

TRACE = "profile:azure-conv-2023?n=300"
SCENARIO = Scenario("gpu-dgx-a100", "qwen-72b", TRACE, 0.9)
LEVELS_COUNT = sum(len(levels) for levels in LEVELS.values())


def network(path: Path, seed: int = 0) -> str:
    """An untrained network's file."""
    rng = np.random.default_rng(seed)
    shapes = [(8, len(FEATURES)), (LEVELS_COUNT, 8)]
    layers = [(rng.normal(size=shape).astype(np.float32), np.zeros(shape[0], np.float32)) for shape in shapes]
    about = {"interval_s": 2.0, "predictor": None, "training": {"systems": ["gpu-dgx-a100"]}}
    Network(layers, interface("tanh", masked=True) | about).save(path)
    return str(path)


# --- statistics


def test_interquartile_mean_by_hand() -> None:
    """Of 1..8 the middle half is 3, 4, 5, 6."""
    assert interquartile_mean(np.array([8, 1, 7, 2, 6, 3, 5, 4])) == 4.5
    assert interquartile_mean(np.array([1.0, 1.0, 1.0, 1e9])) == 1.0


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Ratios drawn around 1.05 in 12 cells: about 95 % of the intervals hold the IQM of the population."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(60):
        low, high = interval(1.05 + 0.02 * rng.standard_normal((12, 20)))
        assert low < high
        held += low <= 1.05 <= high
    assert 50 <= held <= 60
    assert interval(np.array([[1.0], [1.2]])) == (1.1, 1.1)


def rows_of(goodput: dict[str, list[list[float]]]) -> list[dict[str, object]]:
    return [
        {"system": "s", "model": "m", "trace": "t", "utilization": float(c), "policy": policy, "seed": seed}
        | {"guarded_attainment_frac": value, "slo_attainment_frac": 1.0, "requests_count": 100}
        for policy, by_cell in goodput.items()
        for c, values in enumerate(by_cell)
        for seed, value in enumerate(values)
    ]


def test_summary_by_hand() -> None:
    """Two cells, two seeds. The best heuristic is one a cell: by mean b (0.45) in the first, a in the second."""
    goodput = {
        "learned": [[0.6, 0.5], [0.9, 0.8]],
        "a": [[0.1, 0.7], [0.8, 0.8]],
        "b": [[0.5, 0.4], [0.1, 0.1]],
        "l3": [[0.0, 0.25], [0.45, 0.4]],
        "best-constant": [[0.6, 0.5], [0.9, 0.8]],
    }
    figures = summarise(rows_of(goodput), "learned", ["a", "b", "l3"])
    assert [cell["best_heuristic"] for cell in figures["cells"]] == ["b", "a"]
    ratios = np.array([[0.6 / 0.5, 0.5 / 0.4], [0.9 / 0.8, 0.8 / 0.8]])
    assert figures["iqm_vs_best_heuristic"] == pytest.approx(np.sort(ratios, axis=None)[1:3].mean())
    assert figures["worst_cell_vs_best_heuristic"] == pytest.approx(ratios[1].mean())
    assert figures["iqm_vs_best_constant"] == figures["iqm_vs_best_constant_high"] == 1.0
    # 0.0 of 100 requests counts as one request
    assert figures["cells"][0]["vs_l3"] == pytest.approx((0.6 / 0.01 + 0.5 / 0.25) / 2)
    assert figures["cells"][0]["goodput_frac"]["a"] == pytest.approx(0.4)
    assert "1.162" in table(figures) or f"{figures['iqm_vs_best_heuristic']:.3f}" in table(figures)
    with pytest.raises(L3EnvError, match="b lacks 1 of 4 runs"):
        summarise(rows_of(goodput | {"b": [[0.5], [0.1, 0.1]]}), "learned", ["a"])


# --- scenarios


def test_a_policy_is_judged_on_the_held_out_window() -> None:
    """The rows equal runs by hand: the window from 60 %, resampled by seed, at its own capacity's utilization."""
    rows = judge([SCENARIO], {"edf": ("edf",)}, 2).rows
    tables = compile_pair("gpu-dgx-a100", "qwen-72b")
    base = load_trace(f"{TRACE}&window=60%:100%")
    full = load_at_capacity(tables, base)
    for seed, row in enumerate(rows):
        workload = load_trace(f"{TRACE}&window=60%:100%", seed=seed).at_load(0.9 * full)
        outcome = run_policy(tables, workload, make_policy("edf"))
        assert row["slo_attainment_frac"] == outcome.metrics["slo_attainment_frac"]
        assert row["seed"] == seed
    training = load_trace(f"{TRACE}&window=0%:60%")
    assert requests(SCENARIO, "0%:60%").rate_per_s == pytest.approx(
        0.9 * load_at_capacity(tables, training) * training.rate_per_s
    )


def test_what_was_judged_is_taken_from_the_folder(tmp_path: Path) -> None:
    """The same rows again, none of them run; a network that was trained on is run again, the baselines are not."""
    store = Store(tmp_path / "out")
    store.begin()
    file = network(tmp_path / "net.npz")
    policies = {LEARNED: (file,), "fcfs": ("fcfs",), "edf": ("edf",)}
    first = judge([SCENARIO], policies, store=store)
    again = judge([SCENARIO], policies, store=store)
    assert (first.taken_count, again.taken_count) == (0, 3)
    assert again.rows == first.rows
    network(tmp_path / "net.npz", seed=1)
    assert judge([SCENARIO], policies, store=store).taken_count == 2


def test_a_policy_that_fails_leaves_the_others_results(tmp_path: Path) -> None:
    store = Store(tmp_path / "out")
    store.begin()
    (tmp_path / "bad.py").write_text(
        "from l3env import BasePolicy\n\nclass Bad(BasePolicy):\n    name = 'bad'\n"
        "    def decide(self, view):\n        return 3\n"
    )
    with pytest.raises(L3EnvError, match="1 of 2 runs failed"):
        judge([SCENARIO], {"bad": (f"{tmp_path}/bad.py:Bad",), "fcfs": ("fcfs",)}, store=store)
    assert judge([SCENARIO], {"fcfs": ("fcfs",)}, store=store).taken_count == 1


def test_evaluation_takes_several_training_seeds_in_turn(tmp_path: Path) -> None:
    files = [network(tmp_path / f"{seed}.npz", seed) for seed in (0, 1)]
    figures, judged = evaluate([SCENARIO], files, ("edf", "fcfs"), seeds_count=2)
    learned = [row for row in judged.rows if row["policy"] == LEARNED]
    tables = compile_pair("gpu-dgx-a100", "qwen-72b")
    for seed, row in enumerate(learned):
        outcome = run_policy(tables, requests(SCENARIO, SCENARIO.window, seed), Learned(Path(files[seed])))
        assert row["slo_attainment_frac"] == outcome.metrics["slo_attainment_frac"]
    assert {"iqm_vs_best_heuristic", "iqm_vs_best_heuristic_low", "iqm_vs_best_heuristic_high", "cells"} <= set(figures)
    json.dumps(figures, allow_nan=False)
    with pytest.raises(L3EnvError, match="a scenario is there twice"):
        evaluate([SCENARIO, SCENARIO], files, ("edf",))


def test_opponents_and_networks_by_name(tmp_path: Path) -> None:
    assert "l3" in heuristics()
    assert not [name for name in heuristics() if name.startswith("oracle-") or name in ("random", "learned-ppo")]
    assert {"best-constant", "best-constant-global", *heuristics()} == set(baselines_of("best"))
    with pytest.raises(L3EnvError, match="unknown foo"):
        baselines_of("edf,foo")
    file = network(tmp_path / "best_model.npz")
    assert networks_of(str(tmp_path)) == (file,)
    assert networks_of(f"{file},{tmp_path}") == (file, file)
    with pytest.raises(L3EnvError, match="no such file, or a run folder"):
        networks_of(str(tmp_path / "none"))


def test_the_learning_grid_is_the_whole_of_it() -> None:
    cells = grid_scenarios()
    assert len(cells) == len({cell.key for cell in cells}) == 3 * 2 * 4 * 3
    assert any(cell.trace.startswith("splice:") for cell in cells)


def test_pictures(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "evaluations.csv").write_text(
        "steps,goodput_frac,standard_error,wall_s\n0,0.4,0.1,1\n10,0.6,0.1,2\n"
    )
    pictures.learning_curve([tmp_path / "run"], tmp_path / "curve.png")
    pictures.policy_picture(SCENARIO, network(tmp_path / "net.npz"), tmp_path / "policy.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000
    assert (tmp_path / "policy.png").stat().st_size > 5000


def test_curves_of_an_algorithm_are_averaged_at_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs evaluated at steps 0, 10, 20 and 0, 5, 20: at 10 the second lies a third of the way from 0.3 to 0.9."""
    for name, rows in {"a": "0,0.4\n10,0.6\n20,0.8\n", "b": "0,0.2\n5,0.3\n20,0.9\n"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "evaluations.csv").write_text("steps,goodput_frac\n" + rows)
    drawn = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path: drawn.append(figure))
    pictures.compared_curves({"cell": {"ppo": [tmp_path / "a", tmp_path / "b"]}}, tmp_path / "x.png")
    mean = drawn[0].axes[0].lines[-1]
    assert mean.get_label() == "ppo"
    np.testing.assert_allclose(mean.get_xdata(), [0, 10, 20])
    np.testing.assert_allclose(mean.get_ydata(), [0.3, (0.6 + 0.5) / 2, 0.85])


# --- imitation


SOURCE = teacher.Source(
    systems=("l3-dgx-a100", "gpu-dgx-a100"), models=("qwen-72b",), traces=(TRACE,), episode_requests=40, interval_s=5.0
)


def test_targets_are_soft_where_a_knob_does_not_matter() -> None:
    """exp(-loss / tau), normalised: losses 0, tau ln 2, 10 tau give 1 : 1/2 : e^-10; levels not tried get nothing."""
    tau = 0.02
    grid = {name: levels[:1] for name, levels in ACTIONS.items()}
    grid["headroom_frac"] = LEVELS["headroom_frac"][:3]
    around = {name: np.array([0.7]) for name in grid} | {
        "headroom_frac": np.array([0.9, 0.9 - tau * np.log(2), 0.9 - 10 * tau])
    }
    heads = dict(
        zip(
            LEVELS,
            np.split(teacher.targets(around, grid, tau=tau), np.cumsum([len(v) for v in LEVELS.values()])[:-1]),
            strict=True,
        )
    )
    expected = np.array([1, 0.5, np.exp(-10), 0, 0, 0])
    np.testing.assert_allclose(heads["headroom_frac"], expected / expected.sum())
    for name, head in heads.items():
        assert head.sum() == pytest.approx(1)
        if name != "headroom_frac":
            assert head[LEVELS[name].index(grid[name][0])] == 1


def test_a_tuned_cell_reaches_its_goodput_when_it_is_rolled_out() -> None:
    """With a decision interval or once: fixed knobs are the same, so the rollout's goodput is the search's."""
    for i in range(3):
        row = teacher.tuned(SOURCE, i)
        best, *others = teacher.seen_under_settings(SOURCE, [row])[0]
        assert best.goodput_frac == row["goodput_frac"]
        assert best.action == tuple(row["action"])
        assert best.obs.shape == (len(best.masks), len(FEATURES))
        assert [each.action for each in others] == [tuple(each) for each in row["others"]]
        assert len(row["targets"]) == LEVELS_COUNT
        assert row == teacher.tuned(SOURCE, i)


def test_rollouts_side_by_side_are_those_of_the_runner(tmp_path: Path) -> None:
    """Many in one engine, a decision every interval: as the offline runner serves each, and as each alone."""
    path = network(tmp_path / "net.npz")
    source = replace(SOURCE, interval_s=2.0)  # the network's own
    rows = [{"i": i} for i in range(4)]
    found = teacher.seen_by_network(source, rows, path)
    for row, seen in zip(rows, found, strict=True):
        alone = teacher.seen_by_network(source, [row], path)[0]
        np.testing.assert_array_equal(seen.obs, alone.obs)
        assert (seen.goodput_frac, seen.action) == (alone.goodput_frac, alone.action)
        cell = teacher.episode(source, row["i"])
        tables = replace(teacher._episodes(source).pairs[cell.pair_idx], replicas_count=1)
        outcome = run_policy(tables, cell.workload, Learned(Path(path)), slo=cell.slo)
        assert outcome.metrics["slo_attainment_frac"] == pytest.approx(seen.goodput_frac, abs=1e-12)


def test_corrections_point_away_from_a_bad_level() -> None:
    """Around the best constant with one knob spoilt, that knob's target is not what it is."""
    row = next(row for i in range(8) if (row := teacher.tuned(SOURCE, i))["goodput_frac"] > 0.5)
    spoilt = [0, *row["action"][1:]]  # admits nobody
    found = probe(teacher._cells(SOURCE, row["i"]), knobs_of(np.array(row["action"])), grid=ACTIONS)
    assert found.goodput_frac[0] == row["goodput_frac"]
    with pytest.raises(L3EnvError, match="not in the grid"):
        teacher.corrections(SOURCE, row, spoilt)
    spoilt = [row["action"][0], *row["action"][1:5], len(LEVELS["headroom_frac"]) - 1, row["action"][6]]
    head = np.split(np.array(teacher.corrections(SOURCE, row, spoilt)), np.cumsum([len(v) for v in LEVELS.values()]))[5]
    assert head[row["action"][5]] >= head[-1]


def test_fit_learns_a_rule_it_can_express() -> None:
    """The target of one knob depends on the sign of a feature; another's level is illegal: both come out."""
    rng = np.random.default_rng(0)
    obs = rng.random((4000, len(FEATURES)), dtype=np.float32)
    masks = np.ones((4000, LEVELS_COUNT), bool)
    wanted = np.zeros((4000, LEVELS_COUNT), np.float32)
    start = 0
    for k, levels in enumerate(LEVELS.values()):
        level = (obs[:, 3] > 0.5).astype(int) if k == 1 else np.zeros(4000, int)
        wanted[np.arange(4000), start + level] = 1
        start += len(levels)
    layers = fit(obs, masks, wanted, [16], 0)
    net = Network(layers, interface("tanh", masked=True) | {"interval_s": 1.0})
    test = rng.random((200, len(FEATURES)), dtype=np.float32)
    actions = np.array([net.act(row, masks[0]) for row in test])
    clear = np.abs(test[:, 3] - 0.5) > 0.1
    np.testing.assert_array_equal(actions[clear, 1], (test[clear, 3] > 0.5).astype(int))
    assert (actions[:, [0, *range(2, len(LEVELS))]] == 0).all()


def test_imitation_writes_a_policy_and_does_not_tune_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = imitate(SOURCE, tmp_path, 6, rounds=2, hidden=(16,))
    assert 0 < figures["mean"] <= 1.5
    policy = Learned(tmp_path / "policy.npz")
    outcome = run_policy(compile_pair("gpu-dgx-a100", "qwen-72b"), load_trace(TRACE), policy)
    assert 0 <= outcome.metrics["slo_attainment_frac"] <= 1
    monkeypatch.setattr("l3env.experiments.learning.imitate.tuned", lambda *args: 1 / 0)  # tuned again
    th.manual_seed(1)
    assert imitate(SOURCE, tmp_path, 6, rounds=2, hidden=(16,)) == figures
    with pytest.raises(L3EnvError, match="6 of 6 runs failed, the first: ZeroDivisionError"):
        imitate(replace(SOURCE, seed=9), tmp_path, 6)


def test_imitation_with_more_knobs_and_a_predictor(tmp_path: Path) -> None:
    """The network sets ``prefill_in_order`` and may order by predicted lengths, in rollouts as in the runner."""
    more = replace(SOURCE, action_knobs=(*LEVELS, "prefill_in_order"), predictor="srtf-predicted")
    rows = [teacher.tuned(more, i) for i in range(3)]
    for row in rows:
        assert len(row["action"]) == len(LEVELS) + 1
        assert len(row["targets"]) == LEVELS_COUNT + 2
        order = np.split(np.array(row["targets"]), np.cumsum([len(v) for v in more.levels.values()]))[4]
        assert order[Order.SHORTEST_PREDICTED_HOPELESS_LAST] > 0  # it was tried
        assert teacher.seen_under_settings(more, [row])[0][0].goodput_frac == row["goodput_frac"]
    imitate(more, tmp_path, 4, rounds=1, hidden=(8,))
    policy = Learned(tmp_path / "policy.npz")
    tables = compile_pair("gpu-dgx-a100", "qwen-72b")
    outcome = run_policy(tables, load_trace(TRACE), policy, training=load_trace(TRACE))
    assert policy.predictor() is not None
    assert 0 <= outcome.metrics["slo_attainment_frac"] <= 1


def test_the_shipped_policy_runs_on_machines_of_every_kind() -> None:
    """``learned-ppo`` by name, without torch; its file says how it was made."""
    policy = make_policy("learned-ppo")
    assert isinstance(policy, Learned)
    assert {"command", "seed", "training"} <= set(policy.network.config)
    for system in ("l3-dgx-a100", "hbm-pim-dgx-a100", "gpu-dgx-a100"):
        outcome = run_policy(compile_pair(system, "qwen-72b"), load_trace(TRACE), make_policy("learned-ppo"))
        assert outcome.metrics["finished_count"] + outcome.metrics["rejected_count"] == 300


def test_a_learned_policy_needs_no_torch() -> None:
    code = "import sys; from l3env import make_policy; make_policy('learned-ppo'); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
