"""From one run to a study: a grid of runs as a dataset, the capacity of a system under a policy, what tokens cost."""

from l3env.study.config import StudyCell, StudyConfig
from l3env.study.store import StudyStore
from l3env.study.sweep import run_study

__all__ = ["StudyCell", "StudyConfig", "StudyStore", "run_study"]
