"""Pictures of a measured run beside the simulated one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from l3env.experiments.gpu.serving_run import Measured
from l3env.report import style
from l3env.runs.metrics import Outcome


def draw(outcome: Outcome, run: Measured, title: str, path: Path) -> None:
    """Writes a PNG: distributions of TTFT, TPOT and E2E, measured and simulated."""
    path.parent.mkdir(parents=True, exist_ok=True)
    style.save(lambda: _draw(outcome, run, title), path)


def _draw(outcome: Outcome, run: Measured, title: str) -> Figure:
    figure = Figure(figsize=(11, 3.4))
    panels = figure.subplots(1, 3)
    for axes, (name, measured) in zip(
        panels, (("TTFT", run.ttft_s), ("TPOT", run.tpot_s), ("E2E", run.e2e_s)), strict=True
    ):
        ours = outcome.requests[f"{name.lower()}_s"].to_numpy(dtype=float)
        for label, values, line in (("measured", measured, "-"), ("simulated", ours, "--")):
            known = np.sort(values[np.isfinite(values)])
            axes.plot(known, np.arange(1, known.size + 1) / known.size, line, label=label)
        axes.set(xlabel=f"{name} (s)", ylim=(0, 1), xscale="log")
    panels[0].set_ylabel("share of requests")
    panels[0].legend(frameon=False)
    figure.suptitle(title, parse_math=False)
    return figure
