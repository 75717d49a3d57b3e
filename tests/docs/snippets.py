"""Runs the fenced blocks of README and docs, and says where what they print is not what the page shows.

A block in ``python`` or ``sh`` runs as it stands, the blocks of a page one after the other in one folder and one Python
namespace. A comment on the line before a block says otherwise:

    <!-- file: NAME -->         write the block to a file
    <!-- output -->             what the block before prints (stdout and stderr of a command, stdout of Python)
    <!-- output: some -->       ... of which every line is among those shown: for a shorter run of the same thing
    <!-- output: shape -->      ... but for its numbers: for times and the like
    <!-- run: COMMAND -->       run this instead: a shorter variant of the block
    <!-- needs: MODULE -->      run only where that can be imported; ``trace NAME``: where that trace is at hand
    <!-- skip: REASON -->       not run, with a reason; a link to the test that runs it is one

``python -m tests.docs.snippets PAGE ...`` runs pages and writes what is printed into them (not into "some" blocks).

Blocks in other languages (yaml, toml, csv, json) need a mark; ``text`` ones that no mark claims are taken as they are.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from l3env.cli import app
from l3env.cli.shared import err, out
from l3env.errors import L3EnvError
from l3env.traces.catalog import listing

ROOT = Path(__file__).parents[2]
WIDTH = 118  # columns that pages show
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[a-z]*)[^\n]*\n(?P<body>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)
MARK = re.compile(r"<!-- (?P<name>[a-z]+)(?:: (?P<value>[^\n]*?))? -->\s*\Z")
MARKS = ("file", "output", "run", "needs", "skip")
RUNNABLE = ("python", "sh")
NUMBER = re.compile(r"\d[\d.,]*")
NOISE = ("compiling", "note:", "measuring", "written", "drawn")  # lines that depend on the machine


@dataclass
class Block:
    """A fenced block and the marks before it."""

    page: Path
    line: int
    language: str
    body: str
    marks: dict[str, str]

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass
class Runner:
    """Runs the blocks of one page in order, in the current folder."""

    namespace: dict[str, Any] = field(default_factory=lambda: {"__name__": "snippet"})
    printed: str | None = None  # of the last block; None: it did not run

    def run(self, block: Block) -> None:
        """Raises AssertionError naming page and line."""
        if "output" in block.marks:
            if self.printed is not None:
                compare(block, self.printed)
            return
        self.printed = None
        if "skip" in block.marks:
            return
        if not is_here(block.marks.get("needs", "")):
            return
        if "file" in block.marks:
            Path(block.marks["file"]).parent.mkdir(parents=True, exist_ok=True)
            Path(block.marks["file"]).write_text(block.body, encoding="utf-8")
        elif block.language == "python":
            self.printed = self._python(block)
        elif block.language == "sh":
            text = block.marks.get("run", block.body)
            commands = text.replace("\\\n", " ").splitlines()
            self.printed = "".join(self._command(block, command) for command in commands)

    def _python(self, block: Block) -> str:
        code = compile("\n" * block.line + block.body, str(block.page), "exec")
        out = io.StringIO()
        with contextlib.redirect_stdout(out), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(code, self.namespace)
        return out.getvalue()

    def _command(self, block: Block, command: str) -> str:
        words = shlex.split(command, comments=True)
        if not words:
            return ""
        assert words[0] == "l3env", f"{block.where}: {command!r}: only l3env commands are run; mark others as skipped"
        told, before = io.StringIO(), err.size
        err.width = out.width = WIDTH
        try:
            with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                app(words[1:], standalone_mode=False)
        except L3EnvError as error:
            raise AssertionError(f"{block.where}: {command}: {error}") from error
        finally:
            err.size = out.size = before
        return told.getvalue()


def compare(block: Block, text: str) -> None:
    """Shown and printed lines: the same but for spaces."""
    shown, printed, kind = lines_of(block.body), lines_of(text), block.marks["output"]
    assert kind in ("", "some", "shape"), f"{block.where}: unknown kind of output {kind!r}"
    if kind == "shape":
        shown, printed = ([NUMBER.sub("#", line) for line in lines] for lines in (shown, printed))
    if kind == "some":
        strange = [line for line in printed if line not in shown]
        assert not strange, f"{block.where}: printed but not shown:\n" + "\n".join(strange)
        assert printed, f"{block.where}: nothing was printed"
    else:
        wanted, found = "\n".join(shown), "\n".join(printed)
        assert printed == shown, f"{block.where}: shown:\n{wanted}\nprinted:\n{found}"


def is_here(need: str) -> bool:
    """Is a module, or a real trace, at hand?"""
    if need.startswith("trace "):
        return any(row["name"] == need[6:] and row["where"] != "not here" for row in listing())
    return not need or importlib.util.find_spec(need) is not None


def lines_of(text: str) -> list[str]:
    """Lines that are not empty, runs of spaces and of rules made one."""
    lines = (re.sub(r"─+", "─", " ".join(line.split())) for line in text.splitlines())
    return [line for line in lines if line and not line.startswith(NOISE)]


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page with their marks."""
    text = page.read_text(encoding="utf-8")
    blocks = []
    for found in FENCE.finditer(text):
        indent = len(found["indent"])
        body = "\n".join(line[indent:] for line in found["body"].split("\n"))
        blocks.append(
            Block(page, text.count("\n", 0, found.start()) + 1, found["language"], body, marks(text[: found.start()]))
        )
    return blocks


def marks(before: str) -> dict[str, str]:
    """Marks that stand directly before a block, by name."""
    found = {}
    while (mark := MARK.search(before)) and mark["name"] in MARKS:
        found[mark["name"]] = mark["value"] or ""
        before = before[: mark.start()]
    return found


def pages() -> list[Path]:
    """README and every page of the docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def unmarked(block: Block) -> bool:
    """Would nothing check this block?"""
    return block.language not in (*RUNNABLE, "text", "mermaid") and not block.marks


def refill(page: Path) -> str:
    """The page's text with its outputs as they are printed now; runs in the current folder."""
    runner, text = Runner(), page.read_text(encoding="utf-8")
    for block in blocks_of(page):
        if block.marks.get("output") not in ("", "shape"):
            runner.run(block)
        elif runner.printed is not None:
            lines = (line.rstrip() for line in runner.printed.splitlines())
            body = "".join(line + "\n" for line in lines if line and not line.startswith(NOISE))
            text = text.replace(f"```text\n{block.body}```", f"```text\n{body}```", 1)
    return text


if __name__ == "__main__":
    for name in sys.argv[1:]:
        target = Path(name).resolve()
        sys.path.insert(0, "")  # pages import the files they write
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            filled = refill(target)
        target.write_text(filled, encoding="utf-8")
