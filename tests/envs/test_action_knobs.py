"""``action_knobs``: which knobs an action sets, alone and batched, through Stable-Baselines3, in a network's file."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from l3env import Knobs, PimForm, View, Workload
from l3env.engine.engine import Engine
from l3env.envs.observe.features import FEATURES
from l3env.envs.observe.observer import action_space
from l3env.envs.requests import ServingRequestsEnv
from l3env.envs.serving import ServingEnv
from l3env.envs.vector import ServingVectorEnv
from l3env.errors import L3EnvError, PlanError, PolicyError
from l3env.knobs import KNOB_DTYPE
from l3env.machine.pair import compile_pair
from l3env.policies.learned_ppo import FILE, Learned
from l3env.policies.network import Network, load_network
from l3env.policy.levels import LEVELS, MORE_LEVELS, Levels, action_of, knobs_of, levels_of
from l3env.runs.driver import run_policy

ALL = [*LEVELS, *MORE_LEVELS]
V3 = {"system": "l3-dgx-h200", "model": "deepseek-v3", "trace": "profile:azure-conv-2023?n=200", "load": 0.5}
V3 |= {"episode_requests": 30, "interval_s": 2.0}
PLAIN = V3 | {"model": "qwen-72b"}


def heads(env: ServingEnv) -> dict[str, list[bool]]:
    """The mask by knob, after a reset."""
    env.reset(seed=0)
    parts = np.split(env.action_masks(), np.cumsum(env.action_space.nvec)[:-1])  # type: ignore[attr-defined]
    return {name: part.tolist() for name, part in zip(env.knob_levels(), parts, strict=True)}


def test_by_default_an_action_is_what_it_was() -> None:
    env = ServingEnv(**V3)
    assert list(env.knob_levels()) == list(LEVELS)
    trained = load_network(FILE).config["levels"]  # of the network that ships
    assert list(trained) == list(LEVELS)
    assert env.action_space.nvec.tolist() == [len(values) for values in trained.values()]  # type: ignore[attr-defined]


def test_gymnasium_check_env_with_all_knobs() -> None:
    check_env(gymnasium.make("l3env/Serving-v0", action_knobs=ALL, **V3).unwrapped, skip_render_check=True)


@pytest.mark.parametrize("names", [ALL, ["multi_token", "pim_form"], ["headroom_frac", "admit_max_count"]])
def test_an_action_sets_its_knobs_and_no_others(names: list[str]) -> None:
    env = ServingEnv(action_knobs=names, **V3)
    assert env.action_space == action_space(levels_of(names))
    rng = np.random.default_rng(0)
    env.reset(seed=1)
    for _ in range(20):
        action = np.array([rng.integers(len(env.levels[name])) for name in names])
        _, _, terminated, _, _ = env.step(action)
        assert env.engine is not None
        wanted = np.zeros(1, KNOB_DTYPE)
        knobs_of(action, env.levels).write(wanted, 0)  # what it does not name has the defaults of Knobs
        assert env.engine.knobs[0] == wanted[0]
        np.testing.assert_array_equal(action_of(knobs_of(action, env.levels), env.levels), action)
        if terminated:
            env.reset()


def test_more_knobs_at_their_defaults_change_nothing() -> None:
    few, many = ServingEnv(**V3), ServingEnv(action_knobs=ALL, **V3)
    np.testing.assert_array_equal(few.reset(seed=3)[0], many.reset(seed=3)[0])
    rng, rest = np.random.default_rng(0), action_of(Knobs(), MORE_LEVELS)
    for _ in range(15):
        action = np.array([rng.integers(len(levels)) for levels in LEVELS.values()])
        one, other = few.step(action), many.step(np.concatenate([action, rest]))
        np.testing.assert_array_equal(one[0], other[0])
        assert one[1:4] == other[1:4]
        if one[2]:
            break


def test_masks_forbid_what_a_machine_or_model_does_not_have() -> None:
    """Decompressed: a latent and PIM; guessing: a module that guesses."""
    cases = [(V3, True, True), (V3 | {"system": "gpu-dgx-h200"}, False, True), (PLAIN, False, False)]
    for options, decompressed, guessed in cases:
        found = heads(ServingEnv(action_knobs=ALL, **options))
        assert found["pim_form"] == [True, decompressed]
        assert found["multi_token"] == [True, guessed]
        assert found["admit_max_count"][0] is False  # nobody runs yet
    found = heads(ServingEnv(action_knobs=["multi_token", "admit_max_count"], **V3))
    assert found["admit_max_count"] == [False] + [True] * 7


def test_the_levels_do_what_they_say() -> None:
    """Decompressed KV fills more of the PIM side; guessing emits two tokens in most steps."""
    held, steps = [], []
    for form in PimForm:
        env = ServingEnv(action_knobs=["pim_form"], **V3)
        env.reset(seed=0)
        for _ in range(3):
            obs = env.step(np.array([form]))[0]
        held.append(obs[[name for name, _ in FEATURES].index("kv_pim_share")])
    assert held[1] > 20 * held[0] > 0
    for on in (0, 1):
        env = ServingEnv(action_knobs=["multi_token"], **V3)
        env.reset(seed=0)
        terminated = False
        while not terminated:
            _, _, terminated, _, info = env.step(np.array([on]))
        steps.append(info["iterations_count"])
    assert steps[1] < 0.75 * steps[0]


def test_batched_equals_single() -> None:
    envs = ServingVectorEnv(3, action_knobs=ALL, **V3)
    singles = [ServingEnv(action_knobs=ALL, **V3) for _ in range(3)]
    obs, info = envs.reset(seed=5)
    assert obs.shape == (3, len(FEATURES))
    for i, single in enumerate(singles):
        np.testing.assert_array_equal(single.reset(seed=5 + i)[0], obs[i])
    rng = np.random.default_rng(0)
    for _ in range(8):
        actions = rng.integers(0, envs.single_action_space.nvec, (3, len(ALL)))  # type: ignore[attr-defined]
        obs, rewards, terminated, _, info = envs.step(actions)
        for i, single in enumerate(singles):
            one, reward, done, _, about = single.step(actions[i])
            if done or terminated[i]:
                return
            np.testing.assert_array_equal(one, obs[i])
            np.testing.assert_array_equal(about["action_mask"], info["action_mask"][i])
            assert reward == rewards[i]


@pytest.mark.parametrize("names", [[], ["order", "order"], ["taste"], "speed"])
def test_bad_names_are_one_clear_error(names: list[str] | str) -> None:
    with pytest.raises(L3EnvError, match=r"action_knobs = .*; expected one or more of admit_max_count, .*multi_token"):
        ServingEnv(action_knobs=names, **V3)
    with pytest.raises(L3EnvError, match="action_knobs"):
        ServingVectorEnv(2, action_knobs=names, **V3)


def test_scores_take_no_order_beside_them() -> None:
    with pytest.raises(L3EnvError, match=r"action_knobs: 'order' = .*: scores stand for the order"):
        ServingRequestsEnv(action_knobs=["order"], **V3)


def test_actions_are_checked_against_the_chosen_levels() -> None:
    envs = ServingVectorEnv(2, action_knobs=["pim_form", "order"], **V3)
    envs.reset(seed=0)
    envs.step(np.array([[1, 5], [0, 0]]))
    for actions in (np.array([[2, 0], [0, 0]]), np.zeros((2, 7), int)):
        with pytest.raises(PlanError, match=r"expected shape \(2, 2\), entries from 0 to below \[2 6\]"):
            envs.step(actions)


def test_discrete_actions_of_stable_baselines3() -> None:
    sb3 = pytest.importorskip("l3env.envs.sb3", reason="needs the train extra")
    envs = sb3.make_vec_env(2, seed=0, action_knobs=ALL, discrete=["pim_form", "multi_token"], **V3)
    assert envs.action_space.n == 4
    assert envs.settings[:, :7].tolist() == [action_of(Knobs()).tolist()] * 4
    chosen = [list(envs.env.levels).index(name) for name in ("pim_form", "multi_token")]
    assert envs.settings[:, chosen].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    others = np.delete(envs.settings, chosen, axis=1)
    assert others.tolist() == [np.delete(action_of(Knobs(), envs.env.levels), chosen).tolist()] * 4
    envs.reset()
    assert envs.action_masks().all()
    envs.step(np.array([3, 0]))
    assert envs.env.engine.knobs["pim_form"].tolist() == [PimForm.DECOMPRESSED, PimForm.STORED]
    assert envs.env.engine.knobs["multi_token"].tolist() == [1, 0]
    plain = sb3.make_vec_env(1, seed=0, action_knobs=ALL, discrete=["pim_form", "multi_token"], **PLAIN)
    plain.reset()
    assert plain.action_masks().tolist() == [[True, False, False, False]]


def saved(path: Path, levels: Levels) -> Path:
    """A network's file that prefers the last level of each knob."""
    sizes = [len(values) for values in levels.values()]
    bias = np.concatenate([np.arange(size) for size in sizes]).astype(np.float32)
    layers = [(np.zeros((sum(sizes), len(FEATURES)), np.float32), bias)]
    about = {"features": [name for name, _ in FEATURES], "activation": "tanh", "masked": True, "interval_s": 1.0}
    about["levels"] = {name: [float(value) for value in values] for name, values in levels.items()}
    Network(layers, about).save(path)
    return path


def test_a_network_with_more_knobs_runs_where_it_may(tmp_path: Path) -> None:
    policy = Learned(saved(tmp_path / "more.npz", levels_of(["multi_token", "pim_form", "headroom_frac"])))
    work = Workload.build("few", np.arange(6) * 0.1, np.full(6, 200), np.full(6, 20))
    for model, guesses in (("deepseek-v3", True), ("qwen-72b", False)):
        tables = compile_pair("l3-dgx-h200", model)
        seen = []

        class Watched(Learned):
            def decide(self, view):  # type: ignore[no-untyped-def]
                seen.append(super().decide(view))  # noqa: B023
                return seen[-1]  # noqa: B023

        metrics = run_policy(tables, work, Watched(tmp_path / "more.npz")).metrics
        assert metrics["finished_count"] == 6
        assert {(k.multi_token, k.pim_form == PimForm.DECOMPRESSED) for k in seen} == {(guesses, guesses)}
        assert {k.headroom_frac for k in seen} == {LEVELS["headroom_frac"][-1]}
    assert policy.name == "more"


def test_a_network_with_other_levels_is_refused(tmp_path: Path) -> None:
    for levels, says in (
        ({"pim_form": (0, 1, 2)}, r"pim_form = 2.0; expected one of STORED \(0\), DECOMPRESSED \(1\)"),
        ({"speed": (0, 1)}, "levels of 'speed': .*; expected levels of admit_max_count, "),
        ({"order": ()}, "levels of 'order'"),
    ):
        with pytest.raises(PolicyError, match=rf"other\.npz: .*{says}"):
            Learned(saved(tmp_path / "other.npz", {**LEVELS, **levels}))


def test_a_network_keeps_its_levels_whatever_the_defaults_are_now(tmp_path: Path) -> None:
    trained = {"order": LEVELS["order"][2:4], "headroom_frac": (0.03, 0.3)}
    policy = Learned(saved(tmp_path / "own.npz", trained))
    tables = compile_pair("gpu-dgx-a100", "llama-3-8b")
    policy.prepare(tables, None)
    engine = Engine(tables, 1, 1)
    engine.reset(0, Workload.build("one", [0.0], [50], [5]))
    engine.await_work(0, 1)
    assert policy.decide(View(engine, 0)) == Knobs(order=LEVELS["order"][3], headroom_frac=0.3)
