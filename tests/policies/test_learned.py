"""Trained networks pick what they see by name: places of features do not matter to them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from l3env.envs.observe.features import FEATURES, columns_of
from l3env.errors import L3EnvError, PolicyError
from l3env.policies.learned_ppo import FILE
from l3env.policies.network import load_network

NAMES = [name for name, _ in FEATURES]


def test_columns_are_where_the_names_say() -> None:
    wanted = ["elapsed", "waiting_count", "fc_256"]
    assert [NAMES[column] for column in columns_of(wanted)] == wanted
    with pytest.raises(L3EnvError, match="features: there is no colour, taste; expected some of waiting_count, "):
        columns_of(["taste", "ahead", "colour"])


def test_a_network_of_fewer_features_in_another_order_does_the_same(tmp_path: Path) -> None:
    """The shipped network with the weights of one feature set to 0 is the network without that feature."""
    shipped = load_network(FILE)
    (weight, bias), *others = shipped.layers
    trained_on = list(shipped.config["features"])
    gone = trained_on.index("waiting_many")
    without = weight.copy()
    without[:, gone] = 0
    order = np.random.default_rng(0).permutation(np.delete(np.arange(len(trained_on)), gone))
    config = dict(shipped.config) | {"features": [trained_on[i] for i in order]}
    replace(shipped, layers=[(weight[:, order], bias), *others], config=config).save(tmp_path / "fewer.npz")
    obs = np.random.default_rng(1).random((500, len(NAMES)), dtype=np.float32)
    wanted = replace(shipped, layers=[(without, bias), *others]).logits(obs)
    np.testing.assert_allclose(load_network(tmp_path / "fewer.npz").logits(obs), wanted, rtol=1e-4, atol=1e-4)


def test_names_must_fit_the_weights(tmp_path: Path) -> None:
    shipped = load_network(FILE)
    for names, says in (
        (NAMES[:3], "76 inputs, and names of 3 features"),
        (["colour"], "there is no colour; expected some of waiting_count"),
    ):
        replace(shipped, config=dict(shipped.config) | {"features": names}).save(tmp_path / "other.npz")
        with pytest.raises(PolicyError, match=rf"other\.npz: .*{says}"):
            load_network(tmp_path / "other.npz")
