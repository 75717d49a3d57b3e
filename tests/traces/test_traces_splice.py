"""Workloads that change over time: pieces of several traces in turn, ramps and swings of the load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from l3env.errors import TraceError
from l3env.requests.workload import Workload
from l3env.traces import catalog

HEADER = "arrival_s,prompt_tokens,output_tokens\n"


def resolved(text: str, seed: int = 0) -> Workload:
    workload = catalog.resolve(text, seed)
    assert workload is not None
    return workload


def write(path: Path, count: int, gap_s: float, prompt: int, output: int) -> str:
    path.write_text(HEADER + "".join(f"{i * gap_s},{prompt},{output}\n" for i in range(count)))
    return str(path)


@pytest.fixture
def parts(tmp_path: Path) -> tuple[str, str]:
    """1,001 requests of 10 + 10 tokens, one a second; 501 of 100 + 20, one in two seconds."""
    return write(tmp_path / "short.csv", 1001, 1.0, 10, 10), write(tmp_path / "long.csv", 501, 2.0, 100, 20)


def test_pieces_take_turns_and_bring_as_many_tokens_a_second(parts: tuple[str, str]) -> None:
    spliced = resolved(f"splice:{parts[0]},{parts[1]}?every=100")
    piece = (spliced.arrival_s // 100).astype(int)
    assert (np.where(spliced.prompt_tokens == 10, 0, 1) == piece % 2).all()
    assert piece.max() == 19  # ten of each: the first lasts 1,000 s, the second longer at its speed
    # 20 tokens each second, and 120 tokens in six seconds
    np.testing.assert_allclose(np.diff(spliced.arrival_s[piece == 0]), 1.0)
    np.testing.assert_allclose(np.diff(spliced.arrival_s[piece == 1]), 6.0)
    tokens = np.bincount(piece, weights=spliced.prompt_tokens + spliced.output_tokens)
    np.testing.assert_allclose(tokens, 2000, rtol=0.1)  # whole requests only


def test_a_part_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "counted.csv"
    path.write_text(HEADER + "".join(f"{i},{i + 1},1\n" for i in range(1001)))
    other = write(tmp_path / "other.csv", 1001, 1.0, 5000, 1)
    spliced = resolved(f"splice:{path},{other}?every=50&rates=1,1")
    assert spliced.prompt_tokens[spliced.prompt_tokens < 5000].tolist() == list(range(1, 1001))
    np.testing.assert_allclose(np.bincount((spliced.arrival_s // 50).astype(int)), 50)


def test_rates_set_each_part(parts: tuple[str, str]) -> None:
    spliced = resolved(f"splice:{parts[0]},{parts[1]}?every=50&rates=2,4")
    counts = np.bincount((spliced.arrival_s // 50).astype(int))
    assert set(counts[::2]) <= {100, 101}
    assert set(counts[1::2]) <= {199, 200, 201}


def test_windows_and_seeds_stay_within_each_part(tmp_path: Path) -> None:
    path = tmp_path / "counted.csv"
    path.write_text(HEADER + "".join(f"{i},{i + 1},1\n" for i in range(1001)))
    spec = f"splice:{path},openr1%3Fn%3D2000?every=60&rates=1,1&window=60%:100%"
    for seed in (0, 1, 2):
        spliced = resolved(spec, seed)
        odd = (spliced.arrival_s // 60).astype(int) % 2 == 1
        assert spliced.prompt_tokens[~odd].min() > 600
        assert spliced.prompt_tokens[~odd].size >= 240
    first, again, other = resolved(spec, 1), resolved(spec, 1), resolved(spec, 2)
    np.testing.assert_array_equal(first.arrival_s, again.arrival_s)
    assert len(first) != len(other) or (first.prompt_tokens != other.prompt_tokens).any()


def test_parts_without_a_clock_get_poisson_arrivals() -> None:
    spliced = resolved("splice:openr1,dolphin-short?every=100&rates=5,5")
    gaps_s = np.diff(spliced.arrival_s)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(1.0, abs=0.15)
    assert spliced.rate_per_s == pytest.approx(5.0, rel=0.1)


def test_a_ramp_is_the_line_it_says(tmp_path: Path) -> None:
    path = write(tmp_path / "even.csv", 10_001, 0.1, 1, 1)
    ramped = resolved(f"{path}?ramp=0.5:2")
    span_s = 2 * 1000 / 2.5  # own span over the mean level
    assert ramped.arrival_s[-1] == pytest.approx(span_s)
    counts, edges = np.histogram(ramped.arrival_s, bins=40)
    middle = (edges[1:] + edges[:-1]) / 2
    np.testing.assert_allclose(counts / np.diff(edges) / 10, 0.5 + 1.5 * middle / span_s, rtol=0.02)
    flat = resolved(f"{path}?ramp=1:1")
    np.testing.assert_allclose(flat.arrival_s, 0.1 * np.arange(10_001), rtol=1e-12)


def test_a_swing_alternates_two_rates(tmp_path: Path) -> None:
    path = write(tmp_path / "even.csv", 10_001, 0.1, 1, 1)
    swung = resolved(f"{path}?swing=0.5:1.5&period=100&load=2")
    counts = np.bincount((swung.arrival_s // 50).astype(int))[:-1]
    assert set(counts[::2]) <= {499, 500, 501}  # 50 s at 0.5 x 20 requests/s
    assert set(counts[1::2]) <= {1499, 1500, 1501}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("splice:openr1", "at least two traces"),
        ("splice:openr1,no-such", "no-such: no such trace"),
        ("splice:openr1,dolphin-r1?rates=1", "rates= has 1 numbers; expected 2"),
        ("splice:openr1,dolphin-r1?rates=1,x", "key 'rates': got '1,x'"),
        ("splice:openr1,dolphin-r1?every=1e6", "lasts"),
        ("openr1?ramp=1:2", "present at once"),
        ("openr1?arrivals=poisson&rate=1&ramp=1:2&swing=1:2", "expected one of them"),
        ("openr1?arrivals=poisson&rate=1&period=5", "period needs swing"),
        ("openr1?arrivals=poisson&rate=1&ramp=0:2", "key 'ramp': got '0:2'"),
        ("openr1?arrivals=poisson&rate=1&swing=2", "key 'swing': got '2'"),
    ],
)
def test_what_is_wrong_is_said(spec: str, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        resolved(spec)


def test_sessions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "sessions.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens,parent_idx,think_s\n0,1,1,-1,0\n0,1,1,0,5\n9,1,1,-1,0\n")
    with pytest.raises(TraceError, match="sessions"):
        resolved(f"splice:{path},openr1?every=2")
