"""Short forms of the campaigns: ``make fuzz``, ``make chaos`` and ``make soak`` are the long ones."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest

from l3env.errors import TraceError
from l3env.traces import catalog
from tests.campaigns import bombs, chaos, fuzz_engine, fuzz_inputs, soak, views
from tests.campaigns.conserve import Broken
from tests.campaigns.random_runs import knobs, rows_of, scene

TRIES = 40  # files of each kind


def test_random_iterations_conserve_requests_tokens_blocks_and_references() -> None:
    tally = fuzz_engine.campaign(4000, seed=5, compiled=False)
    assert tally.counts["iterations"] >= 4000
    assert tally.counts["runs, single = batched = offline"] >= 1


@pytest.mark.parametrize(
    ("array", "field", "broken"),
    [("pool", "used", "BLOCKS"), ("env", "output_tokens", "OUTPUT_TOKENS"), ("env", "waiting_count", "REQUESTS")],
)
def test_what_is_not_conserved_is_named(array: str, field: str, broken: str) -> None:
    rng = np.random.default_rng(3)
    made = scene(rng)
    while made.eviction or made.tables.model.draft_modules_count:
        made = scene(rng)
    episode = fuzz_engine.Episode(made, len(made.workload), compiled=False)
    episode.drive(rows_of([knobs(rng)]), np.zeros(5, np.int64))
    getattr(episode.engine.state, array)[field][0] += 1
    with pytest.raises(AssertionError, match=Broken[broken].name):
        episode.check()


def test_damaged_files_of_every_kind_are_read_or_refused(tmp_path: Path) -> None:
    said: list[str] = []
    assert fuzz_inputs.campaign(TRIES, tmp_path, seed=7, say=said.append) == 0, "\n".join(said)
    assert len(said) > 25


def test_what_writes_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"x\.txt"), fuzz_inputs.nothing_written():
        (tmp_path / "x.txt").write_text("x")
    with fuzz_inputs.nothing_written(), pytest.raises(TraceError):
        catalog.resolve(os.fspath(tmp_path / "x.txt"))


@pytest.mark.parametrize("name", ["rows.csv.zst", "line.jsonl", "merges.yaml"])
def test_small_files_that_would_be_large_are_refused(tmp_path: Path, name: str) -> None:
    path = next(path for path in bombs.bombs(tmp_path, 2**25, (name,)))
    found = bombs.try_one(path, 2**23)
    assert found["outcome"] == "refused", found
    assert int(str(found["bytes"])) < bombs.FREE_BYTES + bombs.TIMES * 2**23


def test_what_a_process_held_is_its_own(tmp_path: Path) -> None:
    ballast = np.ones(2**27)  # 1 GiB, held by whoever starts it
    found = bombs.try_one(bombs._written(tmp_path / "deep.yaml", "policies: " + "[" * 200_000), 2**23)
    assert 2**24 < int(str(found["bytes"])) < ballast.nbytes


def test_nothing_that_a_view_shows_is_the_truth() -> None:
    assert "3 of them searched" in views.campaign(3, every=2003)


def test_the_search_of_a_view_finds_what_is_there() -> None:
    workload = views.marked(4, 2)
    secret = views.marks(workload, np.zeros(4, np.int8))
    hidden = {"a": [{"b": workload.output_tokens[1:3]}], "_c": workload.arrival_s}
    assert views.walk({"x": hidden}, secret)[1] == ["x['a'][0]['b']", "x['a'][0]['b'].base"]
    raw = np.zeros(4, [("n", np.int8), ("v", np.int64)])
    raw["v"][2] = workload.output_tokens[3]
    assert views.walk({"x": raw}, secret)[1] == ["x"]


def test_a_killed_comparison_finishes_as_one_never_stopped(tmp_path: Path) -> None:
    said: list[str] = []
    folder = chaos.prepared(tmp_path)
    assert chaos.kill_campaign("compare", 2, random.Random(1), folder, say=said.append) == 0, said
    assert chaos.full_disk(folder, say=said.append) == 0, said
    assert chaos.two_at_once(folder, 1, say=said.append) == 0, said


def test_memory_stays_and_clocks_go_on_while_requests_come() -> None:
    service = soak.Service(1)
    for _ in range(4):
        service.serve_chunk()
    held = soak.rss_bytes()
    for _ in range(8):
        service.serve_chunk()
    assert soak.rss_bytes() < 1.05 * held
    assert service.served > 10 * soak.CHUNK
