"""The command line: a module a group of commands, each of which adds its own to ``app`` when it is imported here."""

from l3env.cli import bench, capacity, compare, gpu, learn, lists, paper, study, timeline, traces
from l3env.cli.main import main
from l3env.cli.shared import app

__all__ = [
    "app",
    "bench",
    "capacity",
    "compare",
    "gpu",
    "learn",
    "lists",
    "main",
    "paper",
    "study",
    "timeline",
    "traces",
]
