"""Policies by reference: arguments, files and their helpers, modules, trained runs; and what each depends on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import l3env
from l3env import BasePolicy, FixedKnobs, Knobs, Order, make_policy
from l3env.envs.observe.features import FEATURES
from l3env.errors import PolicyError
from l3env.policies import learned_ppo, request_score
from l3env.policies.learned_ppo import Learned
from l3env.policies.network import load_network
from l3env.policy.levels import LEVELS
from l3env.policy.registry import policy_files, policy_name

POLICY = """
from l3env import FixedKnobs, Knobs
from helper import BUDGET

class Mine(FixedKnobs):
    def __init__(self, budget: int = BUDGET, **knobs):
        super().__init__("mine", Knobs(prefill_budget_tokens=budget), **knobs)

class Needy(FixedKnobs):
    def __init__(self, budget: int):
        super().__init__("needy", Knobs(prefill_budget_tokens=budget))

class Broken(FixedKnobs):
    def __init__(self, x=0):
        raise RuntimeError("no such thing")
"""


def folder_with(path: Path, budget: int) -> Path:
    path.mkdir()
    (path / "mine.py").write_text(POLICY)
    (path / "helper.py").write_text(f"from deeper import rest\nBUDGET = {budget}\n")
    (path / "deeper.py").write_text("import numpy\nrest = 1\n")
    (path / "unused.py").write_text("")
    return path / "mine.py"


def knobs_of(ref: object) -> Knobs:
    policy = make_policy(ref)  # type: ignore[arg-type]
    assert isinstance(policy, FixedKnobs)
    return policy.knobs


def test_options_are_the_arguments_of_the_class() -> None:
    plain = knobs_of("sarathi")
    assert knobs_of("sarathi?prefill_budget_tokens=2048").prefill_budget_tokens == 2048
    changed = knobs_of("edf?headroom_frac=0.2&order=newest-first&multi_token=false")
    assert (changed.headroom_frac, changed.order, changed.multi_token) == (0.2, Order.NEWEST_FIRST, False)
    assert changed.prefill_budget_tokens == plain.prefill_budget_tokens  # Sarathi's, as before


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        (
            "sarathi?prefill_budget=1",
            r"policy 'sarathi\?prefill_budget=1': unknown key 'prefill_budget' \(did you mean ",
        ),
        ("l3-model?x=1", r"policy 'l3-model\?x=1': unknown key 'x'; it takes none"),
        ("sarathi?headroom_frac=2", "headroom_frac = 2.0; expected 0 to 1"),
        ("rmaxts?simulations=many", "key 'simulations': got 'many'; expected a whole number"),
        ("nowhere.py:Mine", r"nowhere\.py:Mine: no such file 'nowhere\.py'"),
        ("x" * 300 + ".py:Mine", "no such file"),
        ("l3env.nowhere:Mine", "module 'l3env.nowhere' fails to import"),
        ("l3env.policies.sarathi:Mine", "l3env.policies.sarathi has no class 'Mine'; it has .*Sarathi"),
    ],
)
def test_references_that_are_wrong(ref: str, message: str) -> None:
    with pytest.raises(l3env.errors.L3EnvError, match=message):
        make_policy(ref)


def test_a_file_its_arguments_and_what_lies_beside_it(tmp_path: Path) -> None:
    one, other = folder_with(tmp_path / "one", 100), folder_with(tmp_path / "other", 200)
    assert knobs_of(f"{one}:Mine").prefill_budget_tokens == 100
    assert knobs_of(f"{other}:Mine").prefill_budget_tokens == 200  # a helper of the same name, of its own folder
    assert knobs_of(f"{one}:Mine?budget=3e2&admit_max_count=4") == Knobs(prefill_budget_tokens=300, admit_max_count=4)
    with pytest.raises(
        PolicyError,
        match=r"cannot be made\n.*mine\.py:10, __init__\n.*missing budget; expected .*mine\.py:Needy\?budget=VALUE",
    ):
        make_policy(f"{one}:Needy")
    with pytest.raises(PolicyError, match=r"cannot be made\n.*mine\.py:15, in __init__\n.*RuntimeError: no such thing"):
        make_policy(f"{one}:Broken")
    (one.parent / "helper.py").write_text("BUDGET = 150\n")
    assert knobs_of(f"{one}:Mine").prefill_budget_tokens == 150


def test_a_file_depends_on_what_it_imports_from_beside_it(tmp_path: Path) -> None:
    file = folder_with(tmp_path / "one", 100)
    assert set(policy_files(f"{file}:Mine")) == {file, file.with_name("helper.py"), file.with_name("deeper.py")}


def test_a_module_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "house_of_mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "shared.py").write_text("BUDGET = 64\n")
    (package / "rules.py").write_text(POLICY.replace("from helper", "from house_of_mine.shared"))
    monkeypatch.chdir(tmp_path)
    assert knobs_of("house_of_mine.rules:Mine").prefill_budget_tokens == 64
    assert set(policy_files("house_of_mine.rules:Mine")) == set(package.glob("*.py"))


def test_classes_and_policies_stand_for_themselves() -> None:
    class Mine(BasePolicy):
        name = "mine"

        def decide(self, view: l3env.View) -> Knobs:
            return Knobs()

    policy = Mine()
    assert make_policy(policy) is policy
    assert isinstance(make_policy(Mine), Mine)
    assert isinstance(make_policy(lambda: policy), Mine)
    assert policy_name(policy) == policy_name(Mine) == "mine"
    with pytest.raises(PolicyError, match="lacks name"):
        make_policy(object)  # type: ignore[arg-type]
    assert policy_files(Mine) == (Path(__file__),)


def test_a_trained_run_is_a_policy(tmp_path: Path) -> None:
    run = tmp_path / "ppo"
    run.mkdir()
    with pytest.raises(
        PolicyError, match=r"policy '.*ppo': a folder without best_model\.npz; expected one that l3env train"
    ):
        make_policy(str(run))
    (run / "best_model.npz").write_bytes(learned_ppo.FILE.read_bytes())
    policy = make_policy(str(run))
    assert isinstance(policy, Learned)
    assert policy.name == "ppo"
    shipped = load_network(learned_ppo.FILE)
    features = np.zeros(len(FEATURES), np.float32)
    mask = np.ones(sum(map(len, LEVELS.values())), bool)
    np.testing.assert_array_equal(policy.network.act(features, mask), shipped.act(features, mask))
    assert policy_files(str(run)) == (run / "best_model.npz",)
    assert make_policy(str(run / "best_model.npz")).name == "best_model"


def test_what_shipped_policies_depend_on_besides_sources() -> None:
    assert policy_files("sarathi") == ()
    assert policy_files("learned-ppo") == (learned_ppo.FILE,)
    assert policy_files("request-score") == (request_score.FILE,)
