"""Ray behind joblib, for sweeps over many machines (the extra ``sweep``). Imported only where Ray is asked for."""

from __future__ import annotations

import logging

import ray
from joblib import register_parallel_backend
from ray.util.joblib.ray_backend import RayBackend


class StreamingRayBackend(RayBackend):
    """Ray's joblib backend, handing results over as they come.

    It inherits from joblib's multiprocessing backend, which forbids that for its own pool; Ray's pool has a thread a
    task that calls back when the task ends, as joblib's generators need.
    """

    supports_return_generator = True


def connect(address: str | None, workers_count: int) -> None:
    """Joins the cluster at ``address`` (``auto``: the one this machine belongs to), or starts one on this machine."""
    if address is None:
        cpus = workers_count if workers_count > 0 else None
        ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    else:
        ray.init(address=address, log_to_driver=False)
    register_parallel_backend("ray", StreamingRayBackend)
