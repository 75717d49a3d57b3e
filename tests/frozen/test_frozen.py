"""A regression guard: some of the frozen cells (all: ``python -m tests.frozen.frozen check``)."""

from __future__ import annotations

import json

import pytest

from tests.frozen.cells import all_cells
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
    old = {"metrics": "a", "makespan_s": "1.0", "obs elapsed": "b 0.5"}
    assert differences(old, {**old, "new": "c"}) == {}
    found = differences(old, {"metrics": "a", "makespan_s": "1.5"})
    assert found == {"makespan_s": ("1.0", "1.5"), "obs elapsed": ("b 0.5", "none")}
    drifts = [{"cell": "env/*", "part": "obs *", "reason": "because"}]
    assert is_listed(drifts, "env/one", "obs elapsed")
    assert not is_listed(drifts, "env/one", "makespan_s")
    assert not is_listed(drifts, "knob/one", "obs elapsed")
