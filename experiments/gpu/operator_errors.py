"""Tables of operators in a folder, held against the presets: times, and where watts were measured, joules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from l3env.experiments.gpu import energy_rows
from l3env.experiments.gpu.operators import LINKS, PRESETS, Operation, files, read
from l3env.experiments.gpu.predict import predict_s
from l3env.experiments.gpu.validation import DATA_DIR, statistics
from l3env.machine import specs
from l3env.machine.specs import GpuSpec, LinkSpec

REPORT = "gpu_fit.json"  # what ``l3env calibrate gpu`` found


def preset(gpu: str, operation: Operation) -> GpuSpec | LinkSpec:
    """What predicts an operation: the GPU's preset, or that of its link."""
    link = {"all_reduce": LINKS[gpu], "nccl_all_reduce": f"{LINKS[gpu]}-nccl"}.get(operation.name)
    found: GpuSpec | LinkSpec = specs.load(f"link/{link}" if link else f"gpu/{PRESETS[gpu]}")
    return found


def energy_errors(gpu: str, operation: Operation) -> dict[str, Any]:
    """Errors of joules; none where the rows have no watts or the GPU's have not been fitted."""
    report = json.loads((DATA_DIR / REPORT).read_text(encoding="utf-8"))["gpus"]
    fitted = report.get(PRESETS[gpu], {}).get("energy")
    measured = energy_rows.metered(operation)
    device = preset(gpu, operation)
    if fitted is None or not len(measured.rows) or isinstance(device, LinkSpec):
        return {}
    return energy_rows.errors(device, measured, fitted["before_w"])


def validate_folder(folder: Path, progress: Callable[[str], None]) -> dict[str, dict[str, dict[str, Any]]]:
    """By GPU and operation: n, median, p90, worst of |predicted / measured - 1|, and the rows left out.

    Where watts were measured, ``energy`` and its variants have the same of joules (``energy_rows.errors``). Older
    versions of a backend, of which a newer one is there, stand apart.

    Raises:
        ProfileError: no tables.
    """
    tables = files(folder)
    latest: dict[tuple[str, str], tuple[int, ...]] = {}
    for each in tables:
        key = each.gpu, each.table
        latest[key] = max(latest.get(key, ()), each.age)
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for table in tables:
        progress(table.path.name)
        older = f" ({table.version})" if table.age < latest[table.gpu, table.table] else ""
        for operation in read(table):
            errors = statistics(predict_s(preset(table.gpu, operation), operation), operation.seconds)
            left_out = {"suspect": operation.suspect_count, "unmodelled": operation.unmodelled_count}
            figures = errors | left_out | energy_errors(table.gpu, operation)
            out.setdefault(PRESETS[table.gpu], {})[operation.name + older] = figures
    return out
