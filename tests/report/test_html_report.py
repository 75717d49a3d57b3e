"""The HTML report in a real browser: what it shows is what the dataset says, without network or console errors.

Skips where no Chromium is installed (Debian: ``apt-get install chromium``).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pandas as pd
import pytest

from l3env.report.bootstrap import intervals
from l3env.report.html import FIGURES, page_data, write_html
from l3env.runs.compare import Comparison, compare, run_grid
from l3env.runs.grid import Grid

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
TRACES = ("profile:azure-conv-2023?n=120", "profile:azure-code-2023?n=120")
POLICIES = ("fcfs", "sarathi", "edf")
SYSTEMS = ("l3-dgx-a100", "gpu-dgx-a100")
LOADS = (2.0, 40.0)


class Tables(HTMLParser):
    """Tables of a page by id: rows of cells, a number where the cell carries one; attributes of the body."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: dict[str, list[list[str | float | None]]] = {}
        self.body: dict[str, str | None] = {}
        self.plots = 0
        self._table = ""
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "table":
            self._table = found.get("id") or ""
            self.rows[self._table] = []
        elif tag == "tr":
            self.rows[self._table].append([])
        elif tag in ("td", "th"):
            value = found.get("data-value")
            self._in_cell = "data-value" not in found
            known = None if value in (None, "null") else float(value)
            self.rows[self._table][-1].append("" if self._in_cell else known)
        elif tag == "body":
            self.body = found
        elif tag == "svg" and "main-svg" in (found.get("class") or ""):
            self.plots += 1

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[self._table][-1][-1] += data


def browse(path: Path, **choice: str) -> tuple[Tables, list[str]]:
    """The page as the browser has built it, and what it wrote to the console."""
    assert BROWSER is not None
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=20000")
    command = [BROWSER, *flags, "--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking"]
    url = f"{path.resolve().as_uri()}#{urlencode(choice)}"
    done = subprocess.run(
        [*command, f"--user-data-dir={path.parent / 'browser'}", "--dump-dom", url],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Tables(done.stdout), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    """A small study with its page; one policy fails on every run."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "mine.py").write_text(
        "from l3env import BasePolicy\n\n\nclass Broken(BasePolicy):\n"
        "    name = 'broken'\n\n    def decide(self, view):\n        raise RuntimeError('</script> & such')\n",
        encoding="utf-8",
    )
    policies = (*POLICIES, f"{folder}/mine.py:Broken")
    config = Grid(policies, SYSTEMS, ("llama-3-8b",), TRACES, LOADS, seeds_count=3)
    found = run_grid(config, out=folder / "out")
    return found, write_html(found, "Study <of> two", folder / "out" / "report.html")


def chosen(results: pd.DataFrame, **names: object) -> pd.DataFrame:
    done = results[results["error"].isna()]
    for name, value in names.items():
        done = done[done[name] == value]
    return done


@needs_browser
@pytest.mark.parametrize(
    ("system", "trace", "load", "figure"),
    [
        ("l3-dgx-a100", TRACES[0], 40.0, "goodput_requests_per_s"),
        ("gpu-dgx-a100", TRACES[1], 2.0, "ttft_p99_s"),
    ],
)
def test_the_page_shows_what_the_dataset_says(
    study: tuple[Comparison, Path], system: str, trace: str, load: float, figure: str
) -> None:
    store, path = study
    page, console = browse(path, system=system, trace=trace, level=f"load {load:g}", figure=figure, scope="scenario")
    assert console == []
    assert page.plots >= 5
    shown = {row[0]: row[1:] for row in page.rows["ranking"][1:]}
    rows = chosen(store.results, system=system, trace=trace)
    here = rows[rows["load"] == load]
    spans = intervals(rows, {}).query("load == @load and figure == @figure").set_index("policy")
    assert set(shown) == set(POLICIES)
    for policy, (mean, low, high) in shown.items():
        assert mean == pytest.approx(here.loc[here["policy"] == policy, figure].mean(), rel=1e-12)
        assert (low, high) == pytest.approx((spans.loc[policy, "low"], spans.loc[policy, "high"]), rel=1e-12)
    better = -1 if figure == "ttft_p99_s" else 1
    means = [row[1] * better for row in page.rows["ranking"][1:]]
    assert means == sorted(means, reverse=True)
    wide = rows.pivot_table(index=["load", "seed"], columns="policy", values=figure)
    for line in page.rows["wins"][1:]:
        for other, share in zip(page.rows["wins"][0][1:], line[1:], strict=True):
            if line[0] in POLICIES and other in POLICIES and line[0] != other:
                gap = better * (wide[line[0]] - wide[other])
                assert share == pytest.approx(((gap > 0) + 0.5 * (gap == 0)).mean())
            else:
                assert share is None


@needs_browser
def test_failures_are_shown_and_text_is_escaped(study: tuple[Comparison, Path]) -> None:
    store, path = study
    page, console = browse(path)
    assert console == []
    assert len(page.rows["failed"]) - 1 == len(TRACES) * len(SYSTEMS) * len(LOADS) * 3
    assert page.rows["failed"][1][1] == "RuntimeError: </script> & such"
    assert "level=load+40" in str(page.body["data-drawn"])
    text = path.read_text(encoding="utf-8")
    assert "<title>Study &lt;of&gt; two</title>" in text
    held = json.loads(re.findall(r'<script id="study" type="application/json">(.*?)</script>', text, re.DOTALL)[0])
    assert json.loads(held["config"]) == store.config.to_json()  # the configuration that repeats it


@needs_browser
def test_choosing_in_the_form_redraws(study: tuple[Comparison, Path], tmp_path: Path) -> None:
    """As a user does: another system from the list."""
    store, path = study
    click = "const list = document.querySelector('select[name=system]'); list.value = 'gpu-dgx-a100'; list.onchange();"
    acted = tmp_path / "acted.html"
    acted.write_text(
        path.read_text(encoding="utf-8").replace("</body>", f"<script>{click}</script></body>"), encoding="utf-8"
    )
    page, console = browse(acted)
    assert console == []
    assert "system=gpu-dgx-a100" in str(page.body["data-drawn"])
    rows = chosen(store.results, system="gpu-dgx-a100", trace=TRACES[0], load=40.0, policy="edf")
    assert {row[0]: row[1] for row in page.rows["ranking"][1:]}["edf"] == pytest.approx(
        rows["goodput_requests_per_s"].mean()
    )


@needs_browser
def test_errors_and_requests_would_be_noticed(study: tuple[Comparison, Path], tmp_path: Path) -> None:
    """The checks above can fail: a script's error, and any request, show on the console."""
    text = study[1].read_text(encoding="utf-8")
    for broken in ("<script>undefined.x</script>", '<img src="http://example.com/x.png">'):
        page = tmp_path / "broken.html"
        page.write_text(text.replace("</body>", broken + "</body>"), encoding="utf-8")
        assert len(browse(page)[1]) == 1


def test_page_of_a_comparison(tmp_path: Path) -> None:
    """One seed: intervals from blocks of requests; curves from the requests and time lines."""
    made = compare(["fcfs", "edf"], "l3-dgx-a100", "llama-3-8b", TRACES[0], load=30.0)
    data = page_data(made)
    (group,) = data["groups"]
    spans = intervals(made.results, made.requests).query("figure == 'slo_attainment_frac'").set_index("policy")
    for place, name in enumerate(("fcfs", "edf")):
        found = group["policies"][place]
        shown = found["figures"]["slo_attainment_frac"]
        assert (shown["low"], shown["high"]) == pytest.approx((spans.loc[name, "low"], spans.loc[name, "high"]))
        requests = made.requests[made.results.iloc[place]["key"]]
        curve = found["cdf"]["ttft_s"]
        for x, y in zip(curve["x"], curve["y"], strict=True):
            assert abs((requests["ttft_s"] <= x * (1 + 1e-4)).mean() - y) <= 2 / 120 + 1e-4
        row = made.results.iloc[place]
        busy = np.mean(found["time"]["gpu_busy_frac"]) * row["makespan_s"]
        assert np.mean(found["time"]["gpu_busy_frac"]) <= 1
        horizon_s = made.results["makespan_s"].max()
        assert busy * horizon_s / row["makespan_s"] == pytest.approx(row["gpu_busy_frac"] * row["makespan_s"], rel=0.02)
    assert write_html(made, "t", tmp_path / "report.html").stat().st_size > 1e6


def nothing() -> Comparison:
    row = {"key": "a", "policy": "fcfs", "system": "s", "model": "m", "trace": "t", "load": 1.0, "seed": 0}
    config = Grid(("fcfs",), ("s",), ("m",), ("t",), (1.0,))
    return Comparison(config, pd.DataFrame([row | {"error": "SpecError: no"}]), {}, {})


def test_page_of_nothing() -> None:
    """All runs failed: still a page."""
    data = page_data(nothing())
    assert data["groups"] == []
    assert data["failed"] == [{"run": "a", "error": "SpecError: no"}]
    assert len(data["figures"]) == len(FIGURES)


@needs_browser
def test_page_of_nothing_in_the_browser(tmp_path: Path) -> None:
    page, console = browse(write_html(nothing(), "t", tmp_path / "report.html"))
    assert console == []
    assert page.rows["failed"][1] == ["a", "SpecError: no"]
