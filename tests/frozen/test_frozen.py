"""A regression guard: some of the frozen cells (all: ``python -m tests.frozen.frozen check``)."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.frozen.cells import all_cells
from tests.frozen.figures import column, same
from tests.frozen.frozen import DRIFTS, compared, differences, is_listed, kept

QUICK = (
    "trace/options",
    "knob/budget-align/l3",
    "knob/hbm-share-some/l3",
    "memory/l3-full",
    "victim/latest_deadline",
    "latent/h200/decompressed/guess",
    "slo/p99-gap/l3-model",
    "sub-batching/adaptive/l3-dgx-h200+deepseek-v3",
    "policy/srtf-predicted/gpu",
    "env/one/l3-gpt",
)


@pytest.mark.parametrize("name", QUICK)
def test_a_frozen_cell(name: str) -> None:
    """Regression guard: the package's own results of before, but for the drifts that are listed."""
    found, unlisted = compared(name, all_cells()[name])
    assert not unlisted, {part: found[part] for part in unlisted}


def test_every_cell_is_kept_and_every_drift_is_one_of_a_cell() -> None:
    known = kept()
    assert known.keys() == all_cells().keys()
    for drift in json.loads(DRIFTS.read_text(encoding="utf-8")):
        assert drift["reason"]
        places = [(name, part) for name, each in known.items() for part in each["parts"]]
        assert any(is_listed([drift], *place) for place in places), drift


def test_a_difference_is_seen_and_a_listed_one_known() -> None:
    old = {"knobs": "a", "makespan_s": [1.0], "obs elapsed": [0.5, 0.2]}
    assert differences(old, {**old, "makespan_s": [1.0 + 1e-10], "new": [3.0]}) == {}
    found = differences(old, {"knobs": "a", "makespan_s": [1.000001]})
    assert found == {"makespan_s": ([1.0], [1.000001]), "obs elapsed": ([0.5, 0.2], "none")}
    drifts = [{"cell": "env/*", "part": "obs *", "reason": "because"}]
    assert is_listed(drifts, "env/one", "obs elapsed")
    assert not is_listed(drifts, "env/one", "makespan_s")
    assert not is_listed(drifts, "knob/one", "obs elapsed")


def test_what_a_column_says_changes_with_any_of_its_values_and_their_places() -> None:
    rng = np.random.default_rng(0)
    values = rng.lognormal(size=200)
    kept = column(values)
    for i, j in rng.choice(200, (50, 2)):
        swapped, changed, unknown = values.copy(), values.copy(), values.copy()
        swapped[[i, j]] = values[[j, i]]
        changed[i] *= 1.01
        unknown[i] = np.nan
        assert same(kept, column(swapped)) == (i == j)
        assert not same(kept, column(changed))
        assert not same(kept, column(unknown))
    assert column(["a", "b"]) != column(["b", "a"])
    assert column([np.nan, np.nan]) != column([np.nan])
