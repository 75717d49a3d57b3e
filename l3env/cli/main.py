"""The entry point: user errors become one line, an interrupt is quiet."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from l3env.cli.shared import app, err
from l3env.errors import L3EnvError

INTERRUPTED = 130


def main() -> None:
    """Runs the command line."""
    warnings.showwarning = _show_warning
    try:
        app()
    except L3EnvError as error:
        err.print(f"[bold red]error:[/] {error}", soft_wrap=True, highlight=False)
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer has caught the KeyboardInterrupt
            err.print("interrupted; what was finished is kept")
        raise


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    err.print(f"[yellow]note:[/] {message}", soft_wrap=True, highlight=False)
