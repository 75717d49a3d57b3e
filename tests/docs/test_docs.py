"""Every command and snippet of README and docs, run, and what it prints compared; the site builds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests.docs.snippets import ROOT, Block, Runner, blocks_of, compare, lines_of, marks, pages, unmarked


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_snippets_do_what_the_page_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    runner = Runner()
    for block in blocks_of(page):
        assert not unmarked(block), f"{block.where}: a {block.language or 'plain'} block that nothing checks"
        runner.run(block)


def block(body: str, **found: str) -> Block:
    return Block(ROOT / "README.md", 1, "text", body, found)


def test_differences_are_found() -> None:
    compare(block("a   1\n─────\n\nb", output=""), "a 1\n── \nb\n")
    with pytest.raises(AssertionError, match=r"README.md:1"):
        compare(block("a 1", output=""), "a 2")
    compare(block("a 1 s", output="shape"), "a 23.5 s")
    with pytest.raises(AssertionError):
        compare(block("a 1 s", output="shape"), "a 1 ms")
    compare(block("a\nb\nc", output="some"), "c\na")
    for printed in ("a\nd", ""):
        with pytest.raises(AssertionError):
            compare(block("a\nb\nc", output="some"), printed)


def test_marks_belong_to_the_block_they_stand_before(tmp_path: Path) -> None:
    assert marks("x\n<!-- run: l3env models -->\n<!-- needs: torch -->\n") == {"run": "l3env models", "needs": "torch"}
    assert marks("<!-- skip: why -->\ntext\n") == {}
    assert lines_of("written: x\n a  b ") == ["a b"]
    page = tmp_path / "page.md"
    page.write_text("<!-- file: a.py -->\n```python\nx = 1\n```\n\n- item\n\n  ```sh\n  l3env models\n  ```\n")
    first, second = blocks_of(page)
    assert (first.marks, first.body) == ({"file": "a.py"}, "x = 1\n")
    assert (second.language, second.body, second.marks) == ("sh", "l3env models\n", {})


def test_a_wrong_snippet_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runner = Runner()
    with pytest.raises(AssertionError, match="unknown system 'nosuch'"):
        runner.run(Block(ROOT / "README.md", 1, "sh", "l3env roofline --system nosuch --model nosuch\n", {}))
    with pytest.raises(ZeroDivisionError):
        runner.run(Block(ROOT / "README.md", 1, "python", "1 / 0\n", {}))


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    """Links, navigation and references of the API pages; needs the extra ``docs``."""
    for name in ("material", "mkdocstrings"):
        pytest.importorskip(name)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "site" / "reference" / "index.html").read_text(encoding="utf-8")
    assert 'id="l3env.Knobs"' in reference
    assert "headroom_frac" in reference
    assert "episode_requests" in reference
    assert (tmp_path / "site" / "results" / "planner.csv").exists()


TABLES = {
    "learning-grid": ("learning-grid", "learning-grid-left-out"),
    "learning-requests": ("request-score", "request-score-left-out"),
}


@pytest.mark.parametrize("line", ["best heuristic", "best constant"])
@pytest.mark.parametrize(("page", "table"), [(page, each) for page, tables in TABLES.items() for each in tables])
def test_a_page_says_what_its_table_holds(page: str, table: str, line: str) -> None:
    """The worst cell of a summary is that of the table which the page links to below it."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    above = text[: text.index(f"](results/{table}.csv)")]
    row = [each for each in above.splitlines() if each.startswith(f"| {line} |")][-1]
    cells = pd.read_csv(ROOT / "docs" / "results" / f"{table}.csv")
    assert float(row.strip("| ").split("|")[-1]) == cells[f"vs {line}"].min()
