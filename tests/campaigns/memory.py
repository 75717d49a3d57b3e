"""What a process holds."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def most_held_bytes() -> int:
    """The most that this process held. ``ru_maxrss`` is inherited from whoever started it, Linux's ``VmHWM`` is not."""
    status = Path("/proc/self/status")
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
