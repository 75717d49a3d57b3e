"""GRPO as a Stable-Baselines3 algorithm: groups of rollouts of the same requests instead of a value network.

Shao et al., DeepSeekMath (arXiv 2402.03300), section 4.1: PPO's clipped ratio, and the KL divergence to a reference
policy by the estimator ref/pi - log(ref/pi) - 1 of its equation 4. A group is one workload window: equal seeds, so
equal arrivals. Two forms of advantage (``supervision``):

* "outcome" (its 4.1.2): all steps of rollout i have (r_i - mean(r)) / sd(r) within its group.
* "process" (its 4.1.3): a step has the sum of the normalised rewards that follow it. There the mean is over all rewards
  of the group; here, where all of a group serve the same requests on the same clock, it is over what its rollouts earn
  from the same step on, and later rewards may be discounted (``gamma``).
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import torch as th
from numpy.typing import NDArray
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.common.maskable.utils import get_action_masks
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import FloatSchedule

from l3env.errors import L3EnvError

SUPERVISIONS = ("outcome", "process")


class ActorPolicy(MaskableActorCriticPolicy):
    """The masked actor alone."""

    def __init__(self, *args: Any, net_arch: Any = None, **kwargs: Any) -> None:
        actor = net_arch["pi"] if isinstance(net_arch, dict) else net_arch
        super().__init__(*args, net_arch={"pi": actor, "vf": []}, **kwargs)

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.value_net = th.nn.Identity()  # there is no critic
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)


class Steps(NamedTuple):
    """All steps of the rollouts of one collection, (M, ...)."""

    obs: th.Tensor
    actions: th.Tensor
    masks: th.Tensor
    log_prob: th.Tensor
    advantages: th.Tensor


class GRPO(OnPolicyAlgorithm):
    """Group relative policy optimisation over a VecEnv with ``seed_each`` and action masks.

    Args:
        group_size: rollouts of the same requests; divides the number of environments.
        n_steps: a rollout that has not ended by then is judged by what it has earned.
        supervision: "outcome" or "process", see above.
        gamma: discount of later rewards, a step; with "process" alone.
        kl_coef: weight of the divergence from the reference policy, which is the initial one, or that of the last
            multiple of ``reference_every`` collections.
    """

    policy_aliases = {"MlpPolicy": ActorPolicy}  # noqa: RUF012  # as SB3's algorithms declare it

    def __init__(
        self,
        policy: str | type[ActorPolicy],
        env: Any,
        learning_rate: Any = 3e-4,
        *,
        group_size: int = 8,
        n_steps: int = 512,
        supervision: str = "outcome",
        gamma: float = 1.0,
        batch_size: int = 4096,
        n_epochs: int = 4,
        clip_range: float = 0.2,
        kl_coef: float = 0.01,
        reference_every: int = 0,
        ent_coef: float = 0.0,
        max_grad_norm: float = 0.5,
        _init_setup_model: bool = True,
        **kwargs: Any,
    ) -> None:
        if supervision not in SUPERVISIONS:
            raise L3EnvError(f"GRPO: supervision = {supervision!r}; expected one of {', '.join(SUPERVISIONS)}")
        if supervision == "outcome" and gamma != 1.0:
            raise L3EnvError(f"GRPO: gamma = {gamma} with outcome supervision; expected 1, or process supervision")
        self.supervision = supervision
        self.group_size, self.batch_size, self.n_epochs = group_size, batch_size, n_epochs
        self.clip_range, self.kl_coef, self.reference_every = clip_range, kl_coef, reference_every
        self.collections_count = 0
        super().__init__(
            policy,
            env,
            learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=1.0,
            ent_coef=ent_coef,
            vf_coef=0.0,
            max_grad_norm=max_grad_norm,
            use_sde=False,
            sde_sample_freq=-1,
            _init_setup_model=False,
            **kwargs,
        )
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        if self.n_envs % self.group_size or self.group_size < 2:
            raise L3EnvError(f"GRPO: group_size = {self.group_size}; expected a divisor >= 2 of {self.n_envs} envs")
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        self.rollout_buffer = None
        self.policy = self.policy_class(
            self.observation_space, self.action_space, self.lr_schedule, **self.policy_kwargs
        )
        self.policy = self.policy.to(self.device)
        self.reference = copy.deepcopy(self.policy)
        self._clip = FloatSchedule(self.clip_range)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "reference", "steps"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer", "reference"], []

    def collect_rollouts(self, env: Any, callback: BaseCallback, rollout_buffer: Any, n_rollout_steps: int) -> bool:
        """Serves one workload window per group, all rollouts to their ends."""
        self.policy.set_training_mode(False)
        callback.on_rollout_start()
        if self.collections_count == 0 or (self.reference_every and self.collections_count % self.reference_every == 0):
            self.reference.load_state_dict(self.policy.state_dict())
        self.collections_count += 1
        seeds = np.random.randint(2**31 - 1, size=self.n_envs // self.group_size)  # noqa: NPY002  # SB3 seeds this one
        env.seed_each(np.repeat(seeds, self.group_size).tolist())
        obs = env.reset()
        alive = np.ones(self.n_envs, bool)
        earned: list[NDArray[np.float64]] = []
        kept: list[tuple[NDArray[Any], ...]] = []
        while alive.any() and len(kept) < n_rollout_steps:
            masks = get_action_masks(env)
            with th.no_grad():
                distribution = self.policy.get_distribution(self.policy.obs_to_tensor(obs)[0], masks)
                actions = distribution.get_actions()
                log_prob = distribution.log_prob(actions)
            kept.append((obs, actions.numpy(), masks, log_prob.numpy(), alive.copy()))
            obs, rewards, dones, infos = env.step(actions.numpy())
            self.num_timesteps += self.n_envs
            callback.update_locals(locals())
            if not callback.on_step():
                return False
            earned.append(np.where(alive, rewards, 0.0))
            self._update_info_buffer(infos, dones & alive)
            alive &= ~dones
        self._last_obs, self._last_episode_starts = obs, np.ones(self.n_envs, bool)
        rewards = np.stack(earned)
        self.steps = self._flatten(kept, self._advantages(rewards))
        self.logger.record("rollout/return_mean", float(rewards.sum(axis=0).mean()))
        self.logger.record("rollout/steps_used_frac", len(self.steps.obs) / (len(kept) * self.n_envs))
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _advantages(self, rewards: NDArray[np.float64]) -> NDArray[np.float64]:
        """(T, E) rewards, 0 after a rollout's end -> (T, E) advantages."""
        if self.supervision == "process":
            return process_advantages(rewards, self.group_size, self.gamma)
        return np.broadcast_to(group_advantages(rewards.sum(axis=0), self.group_size), rewards.shape)

    def _flatten(self, kept: list[tuple[NDArray[Any], ...]], advantages: NDArray[np.float64]) -> Steps:
        """The steps of rollouts that had not ended, (T, E) -> (M,)."""
        obs, actions, masks, log_prob, alive = (np.stack(column) for column in zip(*kept, strict=True))
        columns = (obs, actions, masks, log_prob, advantages.astype(np.float32))
        return Steps(*(th.as_tensor(column[alive], device=self.device) for column in columns))

    def train(self) -> None:
        """Some epochs of minibatches over the collected steps."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        clip = self._clip(self._current_progress_remaining)
        with th.no_grad():
            reference = self.reference.get_distribution(self.steps.obs, self.steps.masks)
            reference_log_prob = reference.log_prob(self.steps.actions)
        figures: dict[str, list[float]] = {"loss": [], "kl_reference": [], "clip_fraction": [], "entropy": []}
        for _ in range(self.n_epochs):
            for rows in th.randperm(len(self.steps.obs)).split(self.batch_size):
                batch = Steps(*(column[rows] for column in self.steps))
                distribution = self.policy.get_distribution(batch.obs, batch.masks)
                log_prob = distribution.log_prob(batch.actions)
                entropy = distribution.entropy().mean()
                ratio = th.exp(log_prob - batch.log_prob)
                clipped = ratio.clamp(1 - clip, 1 + clip)
                gain = th.min(ratio * batch.advantages, clipped * batch.advantages).mean()
                distance = kl_estimate(log_prob, reference_log_prob[rows]).mean()
                loss = -gain + self.kl_coef * distance - self.ent_coef * entropy
                self.policy.optimizer.zero_grad()
                loss.backward()
                th.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
                self.policy.optimizer.step()
                outside = ((ratio - 1).abs() > clip).float().mean()
                for name, value in zip(figures, (loss, distance, outside, entropy), strict=True):
                    figures[name].append(value.item())
            self._n_updates += 1
        for name, values in figures.items():
            self.logger.record(f"train/{name}", float(np.mean(values)))

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
        action_masks: Any = None,
    ) -> Any:
        """Actions for observations; SB3's signature with sb3-contrib's masks."""
        return self.policy.predict(observation, state, episode_start, deterministic, action_masks=action_masks)


def group_advantages(returns: NDArray[np.float64], group_size: int) -> NDArray[np.float64]:
    """(E,) returns -> (r - mean) / sd within consecutive groups; 0 where all of a group are equal."""
    groups = returns.reshape(-1, group_size)
    sd = groups.std(axis=1, keepdims=True)
    return np.divide(
        groups - groups.mean(axis=1, keepdims=True), sd, out=np.zeros_like(groups), where=sd > 1e-12
    ).reshape(-1)


def process_advantages(rewards: NDArray[np.float64], group_size: int, gamma: float) -> NDArray[np.float64]:
    """(T, E) rewards -> what each rollout earns from a step on, over the mean of its group from the same step on, in
    standard deviations of that difference over all steps and rollouts of the group; 0 where there is none."""
    to_come = np.zeros_like(rewards)
    later = np.zeros(rewards.shape[1])
    for t in range(len(rewards) - 1, -1, -1):
        later = rewards[t] + gamma * later
        to_come[t] = later
    groups = to_come.reshape(len(rewards), -1, group_size)
    lead = groups - groups.mean(axis=2, keepdims=True)
    sd = np.sqrt((lead**2).mean(axis=(0, 2), keepdims=True))
    return np.divide(lead, sd, out=np.zeros_like(lead), where=sd > 1e-12).reshape(rewards.shape)


def kl_estimate(log_prob: th.Tensor, reference_log_prob: th.Tensor) -> th.Tensor:
    """ref/pi - log(ref/pi) - 1 >= 0, unbiased for KL(pi || ref) on actions drawn from pi."""
    log_ratio = reference_log_prob - log_prob
    return th.exp(log_ratio) - log_ratio - 1
