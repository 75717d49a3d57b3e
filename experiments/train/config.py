"""What a training run is: everything that repeats it, as its folder's ``config.yml`` holds it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from l3env import files
from l3env.cli.options import option, tuple_of
from l3env.cli.shared import names, numbers
from l3env.errors import L3EnvError
from l3env.experiments.train.windows import in_window
from l3env.search.objective import objective_of

HYPERPARAMS = Path(__file__).parent / "hyperparams"
ALGORITHMS = ("ppo", "maskable-ppo", "a2c", "dqn", "grpo")


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        algo: one of ALGORITHMS.
        systems, models, traces: what episodes are drawn from.
        utilization: arrival rate as a multiple of what the reference policy sustains: a number, or a range.
        train_window, validation_window: parts of each trace, in its span, for learning and for choosing the best model.
        env: further keyword arguments of the environment.
        total_steps: environment steps, all environments together.
        checkpoint_steps, eval_steps: environment steps between checkpoints and between evaluations.
        eval_episodes: episodes of an evaluation, the same ones each time.
        objective: what chooses the best model: guarded or plain goodput, see ``search.objective``.
        init: an exported network (``.npz``) to start from, or None.
        value_warmup_rollouts: first rollouts that teach the value function alone, where ``init`` gave the policy.
        hyperparams: of the algorithm, resolved.
    """

    algo: str = option("maskable-ppo", "ppo, maskable-ppo, a2c, dqn or grpo.")
    systems: tuple[str, ...] = option(("l3-dgx-a100",), "Names with commas between.", "--system", names)
    models: tuple[str, ...] = option(("gpt-175b",), "Names with commas between.", "--model", names)
    traces: tuple[str, ...] = option(
        ("azure-conv-2023",), "A trace spec; several times for several.", "--trace", tuple_of
    )
    utilization: tuple[float, ...] = option(
        (0.9,), "Load, times capacity: a number, or LOW,HIGH to draw from.", read=lambda *given: tuple(numbers(*given))
    )
    train_window: str = option("0%:50%", "Part of each trace's span to learn from.")
    validation_window: str = option("50%:60%", "Part that chooses the best model.")
    env: dict[str, Any] = field(default_factory=dict)
    total_steps: int = option(1_000_000, "Environment steps in all.", "--steps")
    checkpoint_steps: int = option(100_000, "Environment steps between checkpoints.")
    eval_steps: int = option(100_000, "Environment steps between evaluations.")
    eval_episodes: int = option(32, "Episodes of an evaluation.")
    objective: str = option("guarded", "What chooses the best model: guarded or plain goodput.")
    seed: int = option(0, "Of the run.")
    init: str | None = option(None, "Network (.npz) to start from, e.g. an imitated one.")
    value_warmup_rollouts: int = option(
        0, "With --init: rollouts that teach the value function alone.", "--value-warmup"
    )
    hyperparams: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.algo not in ALGORITHMS:
            raise L3EnvError(f"--algo {self.algo!r}; expected one of {', '.join(ALGORITHMS)}")
        objective_of(self.objective)
        for name in ("systems", "models", "traces"):
            if not getattr(self, name):
                raise L3EnvError(f"training: {name} is empty; expected at least one")
        for name in ("total_steps", "checkpoint_steps", "eval_steps", "eval_episodes"):
            if getattr(self, name) < 1:
                raise L3EnvError(f"training: {name} = {getattr(self, name)}; expected at least 1")

    def env_kwargs(self, window: str) -> dict[str, Any]:
        """Keyword arguments of the environment over one part of the traces."""
        kwargs: dict[str, Any] = {
            "system": list(self.systems),
            "model": list(self.models),
            "trace": [in_window(trace, window) for trace in self.traces],
            "utilization": list(self.utilization),
        }
        return kwargs | self.env

    def to_yaml(self) -> str:
        return yaml.safe_dump(_plain(dataclasses.asdict(self)), sort_keys=False)

    @classmethod
    def from_yaml(cls, path: Path) -> TrainConfig:
        """The inverse of ``to_yaml``. Raises L3EnvError naming the file."""
        raw = {"objective": "plain"} | read_yaml(path)  # runs that do not say so chose by plain goodput
        try:
            tuples: dict[str, Any] = {
                name: tuple(raw[name]) for name in ("systems", "models", "traces", "utilization") if name in raw
            }
            return cls(**{**raw, **tuples})
        except TypeError as error:
            raise L3EnvError(f"{path}: {error}") from None


def hyperparams_of(algo: str, path: Path | None = None) -> dict[str, Any]:
    """The algorithm's own YAML file, with what a file of the user's changes. Raises L3EnvError naming file and key."""
    if algo not in ALGORITHMS:
        raise L3EnvError(f"--algo {algo!r}; expected one of {', '.join(ALGORITHMS)}")
    known = read_yaml(HYPERPARAMS / f"{algo}.yml")
    return known if path is None else known | read_yaml(path)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping. Raises L3EnvError naming the file."""
    raw = files.read_yaml(path)
    if not isinstance(raw, dict):
        raise L3EnvError(f"{path}: expected keys and values")
    return raw


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value
