"""What an environment looks like while it runs: queue, memory pools, devices. In the terminal, or as pixels."""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from l3env.choices import Status
from l3env.engine.engine import Engine

WIDTH, HEIGHT = 640, 360  # pixels of a frame
BAR_CHARS = 40
HISTORY_COUNT = 200
MARGIN, LABEL, TOP, STEP, BAR = 16, 110, 44, 30, 18  # pixels: edge, name of a bar, first bar, bar to bar, its height
INK, EMPTY = (34, 34, 34), (232, 232, 232)
COLOURS = {"GPU": (0, 114, 178), "PIM": (213, 94, 0), "HBM KV": (0, 158, 115), "PIM KV": (204, 121, 167)}
QUEUE = (119, 119, 119)
STATES = {Status.WAITING: "waiting", Status.PREFILL: "prefilling", Status.DECODE: "decoding", Status.PAUSED: "paused"}


@dataclass(frozen=True)
class Snapshot:
    """What is shown.

    Attributes:
        counts: requests by state.
        bars: shares in [0, 1]: devices busy since the last decision, pools in use (of several PIM pools the mean).
        pools: (P - 1,) shares of the PIM pools, one by one.
    """

    clock_s: float
    requests_count: int
    finished_count: int
    slo_met_count: int
    counts: dict[str, int]
    bars: dict[str, float]
    pools: NDArray[np.float64]

    @property
    def heading(self) -> str:
        met = f"{self.slo_met_count} within the SLO"
        return f"{self.clock_s:,.1f} s   {self.finished_count} of {self.requests_count} requests done, {met}"


class Renderer:
    """Draws environment ``e`` of an engine; remembers the queue and what "since the last decision" is measured from."""

    def __init__(self) -> None:
        self._marks = (0.0, 0.0, 0.0)  # clock, GPU busy, PIM busy
        self._busy = {"GPU": 0.0, "PIM": 0.0}
        self._queue: deque[int] = deque(maxlen=HISTORY_COUNT)
        self._live: Live | None = None

    def reset(self) -> None:
        """A new episode."""
        self._marks, self._busy = (0.0, 0.0, 0.0), {"GPU": 0.0, "PIM": 0.0}
        self._queue.clear()

    def observe(self, engine: Engine, e: int) -> Snapshot:
        """The state now; drawing the same moment twice shows the same."""
        env, count = engine.state.env[e], int(engine.state.env["requests_count"][e])
        now = (float(env["clock_s"]), float(env["gpu_busy_s"]), float(env["pim_busy_s"]))
        elapsed_s = now[0] - self._marks[0]
        if elapsed_s > 0:
            busy = [(new - old) / elapsed_s for new, old in zip(now[1:], self._marks[1:], strict=True)]
            self._busy = dict(zip(("GPU", "PIM"), (min(share, 1.0) for share in busy), strict=True))
            self._marks = now
            self._queue.append(int(env["waiting_count"]))
        status = np.bincount(engine.state.req["status"][e, :count], minlength=len(Status))
        table = int(env["table_idx"])
        pools_count = int(engine.tables.coef["pools_count"][table])
        capacity = engine.tables.pool_blocks[table, :pools_count]
        shares = engine.state.pool["used"][e, :pools_count] / np.maximum(capacity, 1)
        bars = {"GPU": self._busy["GPU"]}
        if engine.pair(e).has_pim:
            bars["PIM"] = self._busy["PIM"]
        if capacity[0] > 0:
            bars["HBM KV"] = float(shares[0])
        if pools_count > 1:
            bars["PIM KV"] = float((shares[1:] * capacity[1:]).sum() / max(int(capacity[1:].sum()), 1))
        return Snapshot(
            now[0],
            count,
            int(env["finished_count"]),
            int(env["slo_met_count"]),
            {name: int(status[state]) for state, name in STATES.items()},
            bars,
            shares[1:].copy(),
        )

    def pixels(self, shot: Snapshot) -> NDArray[np.uint8]:
        """(HEIGHT, WIDTH, 3) picture."""
        image = Image.new("RGB", (WIDTH, HEIGHT), "white")
        draw = ImageDraw.Draw(image)
        draw.text((MARGIN, MARGIN), shot.heading, fill=INK)
        y, length = TOP, WIDTH - LABEL - 4 * MARGIN
        for name, share in shot.bars.items():
            draw.text((MARGIN, y + 3), name, fill=INK)
            draw.rectangle((LABEL, y, LABEL + length, y + BAR), fill=EMPTY)
            if share > 0:
                draw.rectangle((LABEL, y, LABEL + round(share * length), y + BAR), fill=COLOURS[name])
            draw.text((LABEL + length + 6, y + 3), f"{share:.0%}", fill=INK)
            y += STEP
        if shot.pools.size > 1:  # each PIM pool: the fuller the darker
            cell = length / shot.pools.size
            for i, share in enumerate(shot.pools.tolist()):
                shade = tuple(round(255 - min(share, 1.0) * (255 - full)) for full in COLOURS["PIM KV"])
                draw.rectangle((LABEL + i * cell, y, LABEL + (i + 1) * cell - 1, y + BAR), fill=shade, outline=EMPTY)
            draw.text((MARGIN, y + 3), "PIM pools", fill=INK)
            y += STEP
        draw.text((MARGIN, y + 3), "   ".join(f"{name} {count}" for name, count in shot.counts.items()), fill=INK)
        y += STEP
        most, bottom = max(self._queue, default=0), HEIGHT - MARGIN
        draw.text((MARGIN, y), f"queue\n(most {most})", fill=INK)
        for i, waiting in enumerate(self._queue):
            x, top = LABEL + i * length / HISTORY_COUNT, bottom - (bottom - y) * waiting / max(most, 1)
            draw.rectangle((x, top, x + length / HISTORY_COUNT, bottom), fill=QUEUE)
        return np.asarray(image)

    def text(self, shot: Snapshot) -> Text:
        """The same in characters."""
        lines = [shot.heading]
        for name, share in shot.bars.items():
            filled = round(min(share, 1.0) * BAR_CHARS)
            lines.append(f"{name:8}{'█' * filled}{'·' * (BAR_CHARS - filled)} {share:4.0%}")
        lines.append("   ".join(f"{name} {count}" for name, count in shot.counts.items()))
        most, ticks = max(self._queue, default=0), " ▁▂▃▄▅▆▇█"
        recent = list(self._queue)[-BAR_CHARS:]
        lines.append(f"{'queue':8}" + "".join(ticks[round(8 * waiting / max(most, 1))] for waiting in recent))
        return Text("\n".join(lines))

    def show(self, shot: Snapshot) -> None:
        """Updates the live panel in the terminal (stderr)."""
        if self._live is None:
            self._live = Live(console=Console(file=sys.stderr), auto_refresh=False)
            self._live.start()
        self._live.update(Panel(self.text(shot), title="l3env", width=WIDTH // 8), refresh=True)

    def close(self) -> None:
        """Leaves the terminal as it is."""
        if self._live is not None:
            self._live.stop()
            self._live = None
