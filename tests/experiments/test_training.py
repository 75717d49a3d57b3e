"""Training: resume after a kill loses nothing, exports decide as torch does, GRPO's formulas, imitation's start."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch as th
from scipy.stats import norm

from l3env.envs.observe.features import FEATURES
from l3env.envs.sb3 import make_vec_env
from l3env.envs.serving import ServingEnv
from l3env.errors import L3EnvError, PolicyError
from l3env.experiments.train import algorithms
from l3env.experiments.train.config import ALGORITHMS, TrainConfig, hyperparams_of
from l3env.experiments.train.export import actor_layers, load_weights
from l3env.experiments.train.grpo import GRPO, group_advantages, kl_estimate, process_advantages
from l3env.experiments.train.run import evaluate, evaluations, train
from l3env.experiments.train.windows import in_window
from l3env.machine.pair import compile_pair
from l3env.policies.learned_ppo import Learned
from l3env.policies.network import load_network
from l3env.policy.levels import LEVELS
from l3env.requests.registry import load_trace
from l3env.runs.driver import run_policy

TRACE = "profile:azure-conv-2023?n=600"
SMALL = {
    "ppo": {"num_envs": 4, "n_steps": 16, "batch_size": 32, "n_epochs": 2},
    "maskable-ppo": {"num_envs": 4, "n_steps": 16, "batch_size": 32, "n_epochs": 2},
    "a2c": {"num_envs": 4, "n_steps": 16},
    "dqn": {"num_envs": 4, "learning_starts": 32, "buffer_size": 500, "batch_size": 16, "train_freq": 16},
    "grpo": {"num_envs": 4, "group_size": 2, "n_steps": 16, "batch_size": 32, "n_epochs": 2, "reference_every": 2},
}


def config(algo: str, **changes: object) -> TrainConfig:
    base = TrainConfig(
        algo=algo,
        traces=(TRACE,),
        utilization=(0.8,),
        env={"episode_requests": 20, "interval_s": 2.0},
        total_steps=512,
        checkpoint_steps=128,
        eval_steps=256,
        eval_episodes=2,
        hyperparams=hyperparams_of(algo) | SMALL[algo],
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def weights(folder: Path, algo: str) -> dict[str, th.Tensor]:
    return dict(algorithms.CLASSES[algo].load(folder / "last_model.zip", device="cpu").policy.state_dict())


RUN_SLOWLY = """
import sys, time
from pathlib import Path
from l3env.experiments.train import run
from l3env.experiments.train.config import TrainConfig
save = run.save_checkpoint
def save_and_wait(*args):
    save(*args)
    print("saved", flush=True)
    time.sleep(0.3)
run.save_checkpoint = save_and_wait
run.train(TrainConfig.from_yaml(Path(sys.argv[1])), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("algo", ["maskable-ppo", "dqn"])
def test_a_run_with_more_knobs_writes_a_network_that_sets_them(algo: str, tmp_path: Path) -> None:
    names = ["prefill_budget_tokens", "pim_form", "multi_token"]
    env = {"episode_requests": 20, "interval_s": 2.0, "action_knobs": names}
    changed = {"systems": ("l3-dgx-h200",), "models": ("deepseek-v3",), "env": env, "total_steps": 128}
    small = config(algo, **changed)
    if algo == "dqn":
        small = replace(small, hyperparams=small.hyperparams | {"discrete": ["pim_form", "multi_token"]})
    path = train(small, tmp_path)
    assert list(load_network(path).config["levels"]) == names
    policy = Learned(path)
    work = load_trace(TRACE).head(10)
    assert run_policy(compile_pair("l3-dgx-h200", "deepseek-v3"), work, policy).metrics["finished_count"] == 10


@pytest.mark.parametrize("algo", ["maskable-ppo", "grpo", "dqn"])
def test_a_killed_run_resumes_as_if_nothing_had_happened(algo: str, tmp_path: Path) -> None:
    """SIGKILL after the second checkpoint: weights and evaluations are those of a run that was left alone."""
    wanted = config(algo)
    train(wanted, tmp_path / "whole")
    (tmp_path / "wanted.yml").write_text(wanted.to_yaml())
    command = [sys.executable, "-c", RUN_SLOWLY, str(tmp_path / "wanted.yml"), str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(2):
        assert process.stdout.readline() == "saved\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "last_model.zip").exists()
    train(wanted, tmp_path / "killed")
    left, right = weights(tmp_path / "whole", algo), weights(tmp_path / "killed", algo)
    assert left.keys() == right.keys()
    for name in left:
        assert th.equal(left[name], right[name]), name
    tables = [pd.read_csv(tmp_path / name / "evaluations.csv").drop(columns="wall_s") for name in ("whole", "killed")]
    pd.testing.assert_frame_equal(*tables)


def test_a_finished_run_is_not_run_again_and_another_is_refused(tmp_path: Path) -> None:
    wanted = config("maskable-ppo", total_steps=128)
    train(wanted, tmp_path)
    before = (tmp_path / "last_model.zip").stat().st_mtime_ns
    train(wanted, tmp_path)
    assert (tmp_path / "last_model.zip").stat().st_mtime_ns == before
    with pytest.raises(L3EnvError, match="another configuration: seed was 0 and is 1; expected the same"):
        train(replace(wanted, seed=1), tmp_path)


def test_more_steps_go_on_where_a_run_ended(tmp_path: Path) -> None:
    """As if they had been asked for at once, where nothing depends on how long the run is."""
    wanted = config("maskable-ppo", eval_steps=128)
    wanted = replace(wanted, hyperparams=wanted.hyperparams | {"learning_rate": 3e-4})
    train(replace(wanted, total_steps=256), tmp_path / "twice")
    train(wanted, tmp_path / "twice")
    train(wanted, tmp_path / "once")
    assert [row["steps"] for row in evaluations(tmp_path / "twice")] == [0, 128, 256, 384, 512]
    twice, once = weights(tmp_path / "twice", wanted.algo), weights(tmp_path / "once", wanted.algo)
    assert all(th.equal(twice[name], once[name]) for name in once)


def test_a_failed_start_stops_no_corrected_one(tmp_path: Path) -> None:
    wanted = config("maskable-ppo", total_steps=64)
    with pytest.raises(L3EnvError):
        train(replace(wanted, traces=("nowhere.csv",)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yml").write_text(replace(wanted, seed=3).to_yaml())  # killed at once
    train(wanted, tmp_path / "out")
    assert evaluations(tmp_path / "out")[-1]["steps"] == 64


def test_a_torn_checkpoint_is_named(tmp_path: Path) -> None:
    wanted = config("maskable-ppo", total_steps=128)
    train(wanted, tmp_path)
    (tmp_path / "checkpoint.pkl").write_bytes(b"half a check")
    with pytest.raises(L3EnvError, match=r"checkpoint\.pkl: cannot be read"):
        train(wanted, tmp_path)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_exported_networks_decide_as_torch_does(algo: str, tmp_path: Path) -> None:
    """On many observations, with masks where the algorithm has them."""
    wanted = config(algo, total_steps=64, eval_steps=64)
    train(wanted, tmp_path)
    model = algorithms.CLASSES[algo].load(tmp_path / "best_model.zip", device="cpu")
    network = load_network(tmp_path / "best_model.npz")
    rng = np.random.default_rng(0)
    obs = rng.random((200, len(FEATURES)), dtype=np.float32)
    sizes = [len(levels) for levels in LEVELS.values()]
    heads = [[np.arange(n) == rng.integers(n) for n in sizes] for _ in obs]
    heads = [[head | (rng.random(head.size) < 0.5) for head in row] for row in heads]
    masks = np.array([np.concatenate(row) for row in heads])
    actions = algorithms.act(model, obs, masks)
    settings = network.config["settings"]
    for i, row in enumerate(heads):
        expected = actions[i] if settings is None else settings[actions[i]]
        np.testing.assert_array_equal(network.act(obs[i], masks[i]), expected)
        if algo in algorithms.MASKED:
            assert all(mask[level] for mask, level in zip(row, expected, strict=True))


def test_weights_go_back_into_torch(tmp_path: Path) -> None:
    train(config("maskable-ppo", total_steps=64), tmp_path)
    network = load_network(tmp_path / "best_model.npz")
    other = algorithms.build("grpo", make_vec_env(4, trace=TRACE, load=0.5), config("grpo").hyperparams, 3)
    load_weights(other, network)
    for linear, (weight, bias) in zip(actor_layers(other), network.layers, strict=True):
        np.testing.assert_array_equal(linear.weight.detach().numpy(), weight)
        np.testing.assert_array_equal(linear.bias.detach().numpy(), bias)
    started = replace(config("maskable-ppo", total_steps=64), init=str(tmp_path / "best_model.npz"))
    train(started, tmp_path / "further")
    replace(network, layers=[*network.layers[:-1], (network.layers[-1][0][1:], network.layers[-1][1][1:])]).save(
        tmp_path / "narrow.npz"
    )
    with pytest.raises(L3EnvError, match="do not fit"):
        train(replace(started, init=str(tmp_path / "narrow.npz")), tmp_path / "narrow")


def test_value_warm_up_leaves_the_policy_alone(tmp_path: Path) -> None:
    train(config("maskable-ppo", total_steps=64), tmp_path / "first")
    file = str(tmp_path / "first" / "best_model.npz")
    wanted = config("maskable-ppo", total_steps=128, init=file, value_warmup_rollouts=2)
    train(wanted, tmp_path / "warm")
    model = algorithms.CLASSES["maskable-ppo"].load(tmp_path / "warm" / "last_model.zip", device="cpu")
    for linear, (weight, _) in zip(actor_layers(model), load_network(Path(file)).layers, strict=True):
        np.testing.assert_array_equal(linear.weight.detach().numpy(), weight)
    cold = config("maskable-ppo", total_steps=128, init=file)
    train(cold, tmp_path / "cold")
    model = algorithms.CLASSES["maskable-ppo"].load(tmp_path / "cold" / "last_model.zip", device="cpu")
    assert any(
        (linear.weight.detach().numpy() != weight).any()
        for linear, (weight, _) in zip(actor_layers(model), load_network(Path(file)).layers, strict=True)
    )


def test_a_learned_policy_acts_in_the_runner_as_in_its_environment(tmp_path: Path) -> None:
    """The same episode by torch in the environment and by NumPy in the offline runner: equal request by request."""
    train(config("maskable-ppo", total_steps=64), tmp_path)
    model = algorithms.CLASSES["maskable-ppo"].load(tmp_path / "best_model.zip", device="cpu")
    for system in ("l3-dgx-a100", "gpu-dgx-a100"):
        env = ServingEnv(system=system, trace=TRACE, utilization=0.8, episode_requests=150, interval_s=2.0)
        obs, _ = env.reset(seed=0, options={"start": 5})
        done = False
        while not done:
            obs, _, done, _, info = env.step(algorithms.act(model, obs, env.action_masks()))
        episode = env.episodes.draw(np.random.default_rng(0), {"start": 5, "replica": 0})
        part, pair = episode.workload, env.episodes.pairs[0]
        outcome = run_policy(pair, part, Learned(tmp_path / "best_model.npz"), slo=episode.slo)
        assert env.engine is not None
        np.testing.assert_array_equal(outcome.requests["finish_s"], env.engine.state.req["finish_s"][0, : len(part)])
        assert outcome.metrics["slo_attainment_frac"] == info["metrics"]["slo_attainment_frac"]


def test_networks_of_other_features_are_refused(tmp_path: Path) -> None:
    train(config("maskable-ppo", total_steps=64), tmp_path)
    network = load_network(tmp_path / "best_model.npz")
    replace(network, config=dict(network.config) | {"features": ["colour"]}).save(tmp_path / "other.npz")
    with pytest.raises(PolicyError, match=r"other\.npz: features: there is no colour; expected some of waiting_count"):
        load_network(tmp_path / "other.npz")
    (tmp_path / "torn.npz").write_bytes(b"PK")
    with pytest.raises(PolicyError, match=r"torn\.npz: not a policy network"):
        load_network(tmp_path / "torn.npz")


# --- GRPO


def test_group_advantages() -> None:
    """Two groups by hand: (1, 2, 3) has sd sqrt(2/3); equal returns have no advantage."""
    found = group_advantages(np.array([1.0, 2.0, 3.0, 5.0, 5.0, 5.0]), 3)
    np.testing.assert_allclose(found, [-np.sqrt(1.5), 0.0, np.sqrt(1.5), 0.0, 0.0, 0.0])


def test_process_advantages() -> None:
    """Two steps, a group of two, discount 1/2, by hand: to come (1/2, 1) and (1, 0), less their means 3/4 and 1/2."""
    found = process_advantages(np.array([[0.0, 1.0], [1.0, 0.0]]), 2, 0.5)
    sd = np.sqrt((2 * 0.25**2 + 2 * 0.5**2) / 4)
    np.testing.assert_allclose(found, np.array([[-0.25, 0.25], [0.5, -0.5]]) / sd)
    np.testing.assert_array_equal(process_advantages(np.ones((3, 4)), 2, 0.9), np.zeros((3, 4)))


def test_process_advantages_of_a_first_step_rank_rollouts_as_outcomes_do() -> None:
    """Without a discount all that a rollout earns is to come at its first step; groups do not mix."""
    rewards = np.random.default_rng(0).random((20, 6))
    process = process_advantages(rewards, 3, 1.0)
    outcome = group_advantages(rewards.sum(axis=0), 3)
    for group in (slice(0, 3), slice(3, 6)):
        ratio = process[0, group] / outcome[group]
        np.testing.assert_allclose(ratio, ratio[0])
        assert ratio[0] > 0
    rewards[:, 3:] *= 7.0  # scale of another group
    np.testing.assert_allclose(process_advantages(rewards, 3, 1.0), process)


def test_grpo_refuses_what_has_no_meaning() -> None:
    env = make_vec_env(4, trace=TRACE, load=0.5, episode_requests=10)
    with pytest.raises(L3EnvError, match="supervision = 'outcomes'; expected one of outcome, process"):
        GRPO("MlpPolicy", env, group_size=2, supervision="outcomes", device="cpu")
    with pytest.raises(L3EnvError, match=r"gamma = 0\.9 with outcome supervision"):
        GRPO("MlpPolicy", env, group_size=2, gamma=0.9, device="cpu")


def test_kl_estimate_is_unbiased_and_never_negative() -> None:
    """Against the closed form for two normal distributions, KL = (mu1 - mu2)^2 / 2 at unit variance."""
    rng = np.random.default_rng(0)
    x = rng.normal(0.3, 1.0, 400_000)
    estimate = kl_estimate(th.as_tensor(norm.logpdf(x, 0.3)), th.as_tensor(norm.logpdf(x, 0.0)))
    assert float(estimate.min()) >= 0
    assert float(estimate.mean()) == pytest.approx(0.3**2 / 2, rel=0.02)


def test_grpo_rolls_out_the_same_requests_in_a_group() -> None:
    env = make_vec_env(6, trace=TRACE, load=0.5, episode_requests=10, interval_s=2.0)
    model = GRPO(
        "MlpPolicy",
        env,
        group_size=3,
        n_steps=400,
        batch_size=64,
        seed=0,
        device="cpu",
        policy_kwargs={"net_arch": [8]},
    )
    model.learn(1)
    req = env.env.engine.state.req
    first = model.steps.obs[:6].numpy()  # all are alive at the first step
    np.testing.assert_array_equal(first[0], first[1])
    np.testing.assert_array_equal(first[3], first[5])
    assert (first[0] != first[3]).any()
    assert req.shape[0] == 6
    assert set(np.round(model.steps.advantages.numpy(), 6)) <= set(np.round(model.steps.advantages[:6].numpy(), 6))
    with pytest.raises(L3EnvError, match="group_size"):
        GRPO("MlpPolicy", env, group_size=4, device="cpu")


def test_grpo_has_no_value_network() -> None:
    env = make_vec_env(4, trace=TRACE, load=0.5, episode_requests=10)
    model = GRPO("MlpPolicy", env, group_size=2, device="cpu", policy_kwargs={"net_arch": [8]})
    count = sum(parameter.numel() for parameter in model.policy.parameters())
    levels = sum(len(each) for each in LEVELS.values())
    assert count == len(FEATURES) * 8 + 8 + 8 * levels + levels


# --- configuration


def test_training_improves_goodput(tmp_path: Path) -> None:
    """Some thousand steps of GRPO under overload, where random settings lose much, beat the untrained network."""
    wanted = config(
        "grpo",
        utilization=(1.0,),
        env={"episode_requests": 100, "interval_s": 5.0},
        total_steps=12_000,
        eval_steps=12_000,
        checkpoint_steps=12_000,
        eval_episodes=16,
        hyperparams=hyperparams_of("grpo")
        | {"num_envs": 32, "n_steps": 128, "batch_size": 1024, "learning_rate": 1e-3},
    )
    train(wanted, tmp_path)
    goodput = pd.read_csv(tmp_path / "evaluations.csv")["goodput_frac"]
    assert goodput.iloc[-1] > goodput.iloc[0] + 0.03


def test_evaluations_use_the_same_requests() -> None:
    env = make_vec_env(3, trace=TRACE, load=0.5, episode_requests=10, interval_s=2.0)
    model = algorithms.build("maskable-ppo", env, config("maskable-ppo").hyperparams, 0)
    once, again = evaluate(model, env), evaluate(model, env)
    for objective, values in once.items():
        np.testing.assert_array_equal(values, again[objective])


def test_windows_and_hyperparameters(tmp_path: Path) -> None:
    assert in_window("a", "0%:50%") == "a?window=0%:50%"
    assert in_window("a?n=3", "0%:50%") == "a?n=3&window=0%:50%"
    with pytest.raises(L3EnvError, match="leave window= out"):
        in_window("a?window=0:1", "0%:50%")
    own = tmp_path / "own.yml"
    own.write_text("gamma: 0.9\n")
    assert hyperparams_of("ppo", own)["gamma"] == 0.9
    assert hyperparams_of("ppo", own)["n_steps"] == hyperparams_of("ppo")["n_steps"]
    with pytest.raises(L3EnvError, match="expected one of"):
        TrainConfig(algo="sarsa")
    env = make_vec_env(2, trace=TRACE, load=0.5)
    with pytest.raises(L3EnvError, match="no_such_parameter"):
        algorithms.build("ppo", env, {"no_such_parameter": 1}, 0)
    path = tmp_path / "config.yml"
    path.write_text(config("ppo").to_yaml())
    assert TrainConfig.from_yaml(path) == config("ppo")
