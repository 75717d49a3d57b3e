"""The command line: a module a group of commands, each of which adds its own to ``app`` when it is imported here."""

from l3env.cli import bench, compare, gpu, lists, paper, traces
from l3env.cli.main import main
from l3env.cli.shared import app

__all__ = ["app", "bench", "compare", "gpu", "lists", "main", "paper", "traces"]
