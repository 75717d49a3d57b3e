"""Specs and names: the grammar, what each key does, seeds, synthetic workloads, and the registry."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l3env.errors import TraceError, WorkloadError
from l3env.requests import registry as trace_registry
from l3env.requests.workload import Workload
from l3env.traces import catalog, resample, synthetic
from l3env.traces.spec import apply, parse_options
from l3env.traces.window import Window, parse_window

HEADER = "arrival_s,prompt_tokens,output_tokens\n"


def resolved(text: str, seed: int = 0) -> Workload:
    workload = catalog.resolve(text, seed)
    assert workload is not None
    return workload


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """1,000 requests, one each second from 0; prompt = row + 1, output = 2 x prompt."""
    path = tmp_path / "even.csv"
    path.write_text(HEADER + "".join(f"{row},{row + 1},{2 * row + 2}\n" for row in range(1000)))
    return path


# -------------------------------------------------------------------------------------------------------- grammar


@pytest.mark.parametrize(
    ("text", "bounds"),
    [
        ("0:3600", (0.0, 3600.0)),
        ("60%:100%", (600.0, np.inf)),
        ("60%:", (600.0, np.inf)),
        (":600", (0.0, 600.0)),
        ("10%:500", (100.0, 500.0)),
        ("0%:60%", (0.0, 600.0)),
    ],
)
def test_windows(text: str, bounds: tuple[float, float]) -> None:
    assert parse_window(text).bounds(0.0, 1000.0) == pytest.approx(bounds)


@pytest.mark.parametrize("text", ["5", "5:1", "a:b", "-1:5", "0%:101%", "60%:20%", "nan:5", "1:inf"])
def test_bad_windows(text: str) -> None:
    with pytest.raises(TraceError, match=f"key 'window': got '{text}'; expected START:END"):
        parse_options(f"x?window={text}", {})


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("wndow=0:5", r"unknown key 'wndow' \(did you mean window\?\); expected one of arrival, arrivals"),
        ("n=0", "key 'n': got '0'; expected a whole number >= 1"),
        ("n=many", "key 'n': got 'many'"),
        ("load=0", "key 'load': got '0'; expected a finite number > 0"),
        ("rate=nan", "key 'rate'"),
        ("arrivals=burst", "expected one of closed, poisson, gamma"),
        ("seed=-1", "key 'seed'"),
        ("n", "key 'n' has no value"),
        ("n=1&n=2", "given twice"),
        ("load=2&rate=3", "expected one of them"),
        ("cv=2", "cv needs arrivals=gamma"),
        ("spread=no", "unknown key 'spread'"),
        ("format=nope", "format 'nope'; expected one of azure-csv"),
    ],
)
def test_bad_options(trace: Path, query: str, expected: str) -> None:
    with pytest.raises(TraceError, match=expected):
        catalog.resolve(f"{trace}?{query}", 0)


def test_each_key(trace: Path) -> None:
    assert len(resolved(str(trace))) == 1000
    part = resolved(f"{trace}?window=100:200&n=5")
    assert part.arrival_s.tolist() == [0, 1, 2, 3, 4]
    assert part.prompt_tokens.tolist() == [101, 102, 103, 104, 105]
    halves = [resolved(f"{trace}?window={window}").prompt_tokens for window in ("0%:60%", "60%:100%")]
    assert np.concatenate(halves).tolist() == list(range(1, 1001))  # split without loss or overlap
    assert resolved(f"{trace}?load=4").rate_per_s == pytest.approx(4.0)
    assert resolved(f"{trace}?rate=2.5").rate_per_s == pytest.approx(2.5)
    assert resolved(f"{trace}?arrivals=closed").arrival_s.max() == 0.0
    drawn = resolved(f"{trace}?arrivals=gamma&cv=3&rate=10")
    assert drawn.rate_per_s == pytest.approx(10, rel=0.4)  # 4 standard errors: 3 / sqrt(1000)
    assert drawn.prompt_tokens.tolist() == list(range(1, 1001))
    assert resolved(f"{trace}?seed=3").prompt_tokens.tolist() == resolved(str(trace), 3).prompt_tokens.tolist()
    assert resolved(f"{trace}?n=2").name == "even.csv?n=2"


def test_keys_that_do_not_fit(trace: Path, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="needs a clock"):
        catalog.resolve("openr1?rate=2", 0)
    with pytest.raises(TraceError, match="window= has no meaning"):
        catalog.resolve("openr1?window=0%:50%", 0)
    with pytest.raises(WorkloadError, match="no request arrives"):
        catalog.resolve(f"{trace}?window=5000:6000", 0)
    with pytest.raises(TraceError, match="arrivals=closed takes neither rate nor cv"):
        catalog.resolve(f"{trace}?arrivals=closed&rate=2", 0)
    with pytest.raises(TraceError, match="unknown key 'max_outputs'"):
        catalog.resolve("openr1?max_outputs=3", 0)
    assert len(resolved(f"{trace}?format=canonical&n=2")) == 2
    with pytest.raises(TraceError, match="unknown key 'format'"):
        catalog.resolve("openr1?format=canonical", 0)


def test_lengths_scale(trace: Path, tmp_path: Path) -> None:
    """Row k has a prompt of k + 1 and twice the output; blocks that prefix ids name grow with the prompts."""
    plain, scaled = resolved(str(trace)), resolved(f"{trace}?prompt_scale=1.5&output_scale=0.25")
    np.testing.assert_array_equal(scaled.prompt_tokens, np.rint(1.5 * plain.prompt_tokens))
    np.testing.assert_array_equal(scaled.output_tokens, np.maximum(np.rint(0.25 * plain.output_tokens), 1))
    np.testing.assert_array_equal(scaled.arrival_s, plain.arrival_s)
    shared = Workload.build(
        "x", [0.0, 1.0], [20, 30], [1, 1], prefix_ids=[1, 2, 1, 3], prefix_offsets=[0, 2, 4], prefix_block_tokens=10
    )
    longer = apply(shared, {"prompt_scale": 1.5}, 0)
    assert (longer.prefix_block_tokens, longer.prompt_tokens.tolist()) == (15, [30, 45])
    with pytest.raises(TraceError, match=r"blocks of 10\.5 tokens"):
        apply(shared, {"prompt_scale": 1.05}, 0)


def test_a_new_clock_comes_before_its_window() -> None:
    workload = resolved("openr1?arrivals=poisson&rate=10&window=0:50")
    assert len(workload) == pytest.approx(500, abs=4 * np.sqrt(500))
    assert workload.arrival_s.max() < 50


# ---------------------------------------------------------------------------------------------------------- seeds


def test_seed_0_is_the_trace_and_others_are_samples_of_it(trace: Path) -> None:
    plain, one, again, two = (resolved(str(trace), seed) for seed in (0, 1, 1, 2))
    assert plain.arrival_s.tolist() == list(range(1000))
    assert one.arrival_s.tobytes() == again.arrival_s.tobytes()
    assert one.prompt_tokens.tobytes() == again.prompt_tokens.tobytes()
    assert one.prompt_tokens.tolist() != two.prompt_tokens.tolist()
    assert np.array_equal(one.output_tokens, 2 * one.prompt_tokens)  # rows stay whole
    assert (np.diff(one.prompt_tokens) == 1).mean() > 0.95  # and stay in their blocks
    assert one.rate_per_s == pytest.approx(1.0, rel=0.02)
    assert "moving-block bootstrap, blocks of 60 s" in one.source["resampled"]


def test_a_sample_of_a_window_stays_in_it(trace: Path) -> None:
    held_out = resolved(f"{trace}?window=60%:100%", 7)
    assert held_out.prompt_tokens.min() > 599
    assert resolved(f"{trace}?window=0%:60%", 7).prompt_tokens.max() <= 600


@settings(deadline=None, max_examples=60)
@given(
    times=st.lists(st.floats(0, 1e4), min_size=2, max_size=60),
    seed=st.integers(1, 2**32),
)
def test_any_sample_is_a_workload(times: list[float], seed: int) -> None:
    times.sort()
    rows = np.arange(1, len(times) + 1)
    workload = Workload.build(
        "w", times, rows, rows, prefix_ids=rows, prefix_offsets=np.arange(len(times) + 1), prefix_block_tokens=16
    )
    sample = resample.resample(workload, seed)
    sample.check()
    assert set(sample.prompt_tokens) <= set(rows)
    assert np.array_equal(sample.prefix_ids, sample.prompt_tokens)  # ids follow their rows


def test_block_bootstrap_has_the_mean_of_the_trace() -> None:
    rng = np.random.default_rng(0)
    times_s = np.sort(rng.random(600)) * 600
    workload = Workload.build("w", times_s, rng.integers(1, 1000, 600), np.ones(600))
    samples = [resample.resample(workload, seed) for seed in range(1, 201)]
    counts = np.array([len(sample) for sample in samples])
    means = np.array([sample.prompt_tokens.mean() for sample in samples])
    assert counts.mean() == pytest.approx(600, abs=4 * counts.std() / np.sqrt(200))
    assert means.mean() == pytest.approx(workload.prompt_tokens.mean(), abs=4 * means.std() / np.sqrt(200) + 1)


def test_sessions_are_resampled_whole() -> None:
    # session s: three requests with prompts 10 s + 1, 2, 3, at s, s + 0.5, s + 100
    rows = sorted((s + gap, s, turn) for s in range(20) for turn, gap in enumerate((0.0, 0.5, 100.0)))
    place = {(s, turn): row for row, (_, s, turn) in enumerate(rows)}
    workload = Workload.build(
        "w",
        [time for time, _, _ in rows],
        [10 * s + turn + 1 for _, s, turn in rows],
        np.ones(60),
        parent_idx=[place[s, turn - 1] if turn else -1 for _, s, turn in rows],
        think_s=[float(turn) for _, _, turn in rows],
        session_idx=[s for _, s, _ in rows],
        prefix_ids=[s for _, s, _ in rows],
        prefix_offsets=np.arange(61),
        prefix_block_tokens=64,
        source={"prefix_scope": "session"},
    )
    sample = resample.resample(workload, 5)
    sample.check()
    chosen = Counter((sample.prompt_tokens[sample.parent_idx < 0] // 10).tolist())
    assert sum(chosen.values()) == 20
    assert max(chosen.values()) > 1
    children = np.flatnonzero(sample.parent_idx >= 0)
    parents = sample.parent_idx[children]
    assert np.array_equal(sample.prompt_tokens[children], sample.prompt_tokens[parents] + 1)
    assert np.array_equal(sample.session_idx[children], sample.session_idx[parents])
    assert np.array_equal(sample.think_s, (sample.prompt_tokens % 10 - 1).astype(float))
    assert sorted(sample.arrival_s[sample.parent_idx < 0]) == pytest.approx(list(range(20)))
    assert np.unique(sample.prefix_ids).size == 20  # copies of one session do not share a cache
    assert np.array_equal(sample.prefix_ids[children], sample.prefix_ids[parents])
    with pytest.raises(TraceError, match="session_rate"):
        apply(workload, {"arrivals": "poisson", "rate": 1.0}, 0)


# ------------------------------------------------------------------------------------------------------ synthetic

# shared/traces/README.md, "Reasoning data sets": mean, sd, p50, p90, p99 of the published lognormals
PUBLISHED = {
    "openr1": ((96.0, 75.1, 76, 183, 377), (12684.1, 8464.6, 10551, 22965, 43297)),
    "dolphin-r1": ((201.9, 563.0, 68, 451, 2101), (3926.2, 4216.0, 2676, 8220, 20521)),
    "openthoughts": ((89.4, 66.7, 72, 168, 337), (6366.7, 4662.9, 5136, 11896, 23591)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_synthetic_lengths_have_the_published_statistics(name: str) -> None:
    workload = resolved(f"{name}?n=200000")
    assert workload.arrival_s.max() == 0.0
    for tokens, published in zip((workload.prompt_tokens, workload.output_tokens), PUBLISHED[name], strict=True):
        mean, sd, *percentiles = published
        assert tokens.mean() == pytest.approx(mean, abs=4 * sd / np.sqrt(200_000) + 0.1)
        assert np.percentile(tokens, [50, 90, 99]) == pytest.approx(percentiles, rel=0.03, abs=1)
        assert tokens.min() >= 1


def test_synthetic_defaults_and_options() -> None:
    assert len(resolved("openr1")) == 1000
    assert resolved("openr1").prompt_tokens.tolist() != resolved("openr1", 1).prompt_tokens.tolist()
    assert resolved("openr1", 1).prompt_tokens.tolist() == resolved("openr1", 1).prompt_tokens.tolist()
    assert resolved("openr1?max_output=4096").output_tokens.max() == 4096
    short = resolved("dolphin-short?n=100000")
    assert short.output_tokens.mean() == pytest.approx(392.6, abs=4 * 421.6 / np.sqrt(100_000))
    with pytest.raises(TraceError, match="expected one of openr1"):
        synthetic.generate("openr2")


# ----------------------------------------------------------------------------------------------- names, registry


def test_a_trace_that_is_not_here_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("L3ENV_TRACE_DIR", str(tmp_path))
    monkeypatch.setenv("L3ENV_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(catalog, "CHECKOUT", tmp_path / "a" / "b")
    with pytest.warns(catalog.StandInWarning, match=r"L3ENV_TRACE_DIR.*l3env traces fetch azure-conv-2023.*stands in"):
        stand_in = catalog.resolve("azure-conv-2023?load=2", 0)
    assert stand_in is not None
    assert stand_in.name == "profile:azure-conv-2023?load=2"
    assert stand_in.source["stands_in_for"] == "azure-conv-2023"
    same = catalog.resolve("profile:azure-conv-2023?load=2", 0)
    assert same is not None
    np.testing.assert_array_equal(stand_in.prompt_tokens, same.prompt_tokens)
    with pytest.raises(TraceError, match=r"its files from https://github\.com/alibaba/ServeGen"):
        catalog.resolve("servegen-mm-image", 0)
    rows = {row["name"]: row for row in catalog.listing()}
    assert rows["azure-conv-2023"]["where"] == "not here"
    assert rows["azure-conv-2023"]["profile"]
    assert rows["openr1"]["where"] == "generated"
    assert rows.keys() == set(catalog.names())


def test_trace_dir_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "azure-2023" / "AzureLLMInferenceTrace_code.csv"
    file.parent.mkdir()
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,3,4\n")
    monkeypatch.setenv("L3ENV_TRACE_DIR", str(tmp_path))
    workload = resolved("azure-code-2023")
    assert workload.prompt_tokens.tolist() == [3]
    assert workload.source["licence"] == "CC-BY-4.0"
    assert workload.source["spec"] == "azure-code-2023"


def test_cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("L3ENV_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert catalog.cache_dir() == tmp_path / "x" / "l3env" / "traces"
    monkeypatch.setenv("L3ENV_CACHE_DIR", str(tmp_path / "y"))
    assert catalog.cache_dir() == tmp_path / "y" / "traces"
    monkeypatch.delenv("L3ENV_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert catalog.cache_dir() == tmp_path / ".cache" / "l3env" / "traces"


def test_unknown_names_resolve_to_nothing() -> None:
    assert catalog.resolve("nothing", 0) is None
    assert catalog.resolve("profile:nothing?n=5", 0) is None
    assert catalog.resolve("no/such/file.csv", 0) is None
    assert catalog.resolve("x" * 5000, 0) is None


def test_load_trace_asks_the_resolvers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_registry, "resolvers", lambda: {"builtin": catalog.resolve})
    assert len(trace_registry.load_trace("openr1?n=7")) == 7
    with pytest.raises(TraceError, match="did you mean azure-conv-2023"):
        trace_registry.load_trace("azure-conv-2022?n=7")
    with pytest.raises(TraceError, match="known names: arxiv-summarization"):
        trace_registry.load_trace("zzz")
    with pytest.raises(TraceError, match="seed -1"):
        trace_registry.load_trace("openr1", seed=-1)
    monkeypatch.setattr(trace_registry, "resolvers", dict)
    with pytest.raises(TraceError, match="no trace resolver is installed"):
        trace_registry.load_trace("openr1")


def test_window_of_an_open_end() -> None:
    assert Window().bounds(3.0, 10.0) == (0.0, np.inf)


def test_the_entry_points_of_the_package() -> None:
    if not trace_registry.resolvers():
        pytest.skip("l3env is not installed here, so it has no entry points")
    assert trace_registry.formats().keys() >= {module.FORMAT.name for module in catalog.BUILT_IN}
    assert len(trace_registry.load_trace("openr1?n=3", seed=1)) == 3
    with pytest.raises(TraceError, match="did you mean"):
        trace_registry.load_trace("azure-conv")
