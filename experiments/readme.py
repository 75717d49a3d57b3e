"""Fills in the figures of README and docs by running their commands: ``python -m l3env.experiments.readme``.

Each block between ``<!-- name -->`` and ``<!-- /name -->`` is replaced by what its command prints; pictures go to
``docs/images``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTH = "118"
FIRST = "compare --system l3-dgx-a100 --model qwen-72b --trace azure-conv-2023 --utilization 0.9 --out runs/first"


def printed(command: str) -> str:
    """What ``l3env COMMAND`` shows on a terminal of the README's width."""
    args = [sys.executable, "-m", "l3env.cli", *command.split()]
    done = subprocess.run(args, cwd=ROOT, env={**os.environ, "COLUMNS": WIDTH}, check=True, stdout=subprocess.PIPE)
    return "\n".join(line.rstrip() for line in done.stdout.decode().splitlines() if line)


def fill(text: str, name: str, content: str) -> str:
    """Replaces a block's content; marks between the start and the fence stay (see tests/docs/snippets.py)."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, _, rest = text.partition(start)
    marks, _, rest = rest.lstrip("\n").partition("```text\n")
    _, _, tail = rest.partition(end)
    if not tail:
        raise ValueError(f"README.md: block {name!r} not found")
    return f"{head}{start}\n{marks}```text\n{content}\n```\n{end}{tail}"


def reproduction_table() -> str:
    """The paper's rows as a Markdown table, sensitivities left out."""
    done = subprocess.run(
        [sys.executable, "-m", "l3env.cli", "reproduce", "all", "--json"], cwd=ROOT, check=True, stdout=subprocess.PIPE
    )
    lines = ["| figure | what | paper | here | ratio |", "|---|---|---:|---:|---:|"]
    for row in json.loads(done.stdout):
        if "sensitivity" not in row["case"]:
            paper, ours, ratio = ("-" if row[key] is None else f"{row[key]:.3g}" for key in ("paper", "ours", "ratio"))
            lines.append(f"| {row['figure']} | {row['case']}: {row['quantity']} | {paper} | {ours} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the commands and rewrites README.md and docs/reproduction.md."""
    page = ROOT / "docs" / "reproduction.md"
    start, end = "<!-- reproduce -->", "<!-- /reproduce -->"
    head, _, rest = page.read_text(encoding="utf-8").partition(start)
    page.write_text(f"{head}{start}\n{reproduction_table()}\n{end}{rest.partition(end)[2]}", encoding="utf-8")
    shutil.rmtree(ROOT / "runs" / "first", ignore_errors=True)
    path = ROOT / "README.md"
    text = fill(path.read_text(encoding="utf-8"), "first comparison", printed(FIRST))
    text = fill(text, "bench", printed("bench"))
    images = ROOT / "docs" / "images"
    images.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "runs" / "first" / "latency_cdf.png", images / "latency_cdf.png")
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
