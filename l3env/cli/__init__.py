"""The command line. Commands join by name (entry points ``l3env.commands``), those that are built in like any other."""

from l3env.cli.main import app, main

__all__ = ["app", "main"]
