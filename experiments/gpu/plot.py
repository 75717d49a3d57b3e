"""Scatter plot of measured against predicted GPU times, an operation a panel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from l3env.experiments.gpu.validation import OPS, Point, predict_ms
from l3env.machine.specs import GpuSpec
from l3env.report import style


def scatter(device: GpuSpec, points: list[Point], path: Path) -> None:
    """Writes a PNG: one colour a model, the diagonal and 10 % to both sides of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    style.save(lambda: _draw(device, points), path)


def _draw(device: GpuSpec, points: list[Point]) -> Figure:
    predicted = predict_ms(device, points)
    ops = [op for op in OPS if any(p.op == op for p in points)]
    models = sorted({p.model for p in points})
    colours = {model: style.COLOURS[i % len(style.COLOURS)] for i, model in enumerate(models)}
    figure = Figure(figsize=(3.6 * len(ops) + 0.4, 4.2))
    for axes, op in zip(figure.subplots(1, len(ops), squeeze=False)[0], ops, strict=True):
        rows = [i for i, p in enumerate(points) if p.op == op]
        measured = np.array([points[i].ms for i in rows])
        ends = np.array([measured.min() / 1.5, measured.max() * 1.5])
        axes.fill_between(ends, ends / 1.1, ends * 1.1, color="#E4E4E4")
        axes.plot(ends, ends, color="#777777", linewidth=0.8)
        for model in models:
            own = [i for i in rows if points[i].model == model]
            axes.scatter([points[i].ms for i in own], predicted[own], s=6, color=colours[model], alpha=0.7)
        axes.set(
            xscale="log", yscale="log", xlabel="measured, ms", ylabel="predicted, ms", title=f"{device.name}: {op}"
        )
    handles = [Line2D([], [], marker="o", linestyle="", color=colours[model], label=model) for model in models]
    style.legend_below(figure, handles)
    return figure
