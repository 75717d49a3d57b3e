"""Parts of a trace's span: for training, for choosing the best model, for judging it."""

from __future__ import annotations

from l3env.errors import L3EnvError


def in_window(trace: str, window: str) -> str:
    """A trace spec cut to a part of its span. Raises L3EnvError where it is cut already."""
    if "window=" in trace:
        raise L3EnvError(f"trace {trace!r}: training and evaluation cut the window themselves; leave window= out")
    return f"{trace}{'&' if '?' in trace else '?'}window={window}"
