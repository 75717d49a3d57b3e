"""Throughput of L3 over its rivals: best cases, out-of-memory cells, and how they depend on the assumptions."""

from __future__ import annotations

import dataclasses

from l3env.experiments.reproduce.common import (
    DEFAULT,
    MODELS,
    RIVALS,
    TRACES,
    Assumptions,
    Row,
    best,
    measured,
    row,
    throughput,
)

PAPER = {"rank-pim": 7.21, "hbm-pim": 5.15, "hbm-pim-ext": 3.45, "gpu": 3.94, "cpu-offload": 9.2}
NAMES = {
    "rank-pim": "R-PIM",
    "hbm-pim": "HBM-PIM",
    "hbm-pim-ext": "HBM-PIM-EXT",
    "gpu": "GPU only",
    "cpu-offload": "CPU offload",
}
CPU_NOTE = "v1's 9.2x is over NEO/FastDecode-like systems that also use the GPU's memory; here all KV is on the host"


def speedups(rival: str, assumptions: Assumptions) -> list[tuple[float, str]]:
    """L3's throughput over a rival's, by cell, out-of-memory cells left out."""
    found = []
    for model in MODELS:
        for trace in TRACES:
            ours, theirs = (measured(name, model, trace, assumptions) for name in ("l3", rival))
            if ours is not None and theirs is not None:
                ratio = throughput(ours) / throughput(theirs)
                found.append((ratio, f"{model}, {trace}"))
    return found


def rows() -> list[Row]:
    out = [best_case(rival, DEFAULT) for rival in RIVALS]
    out += memory_rows()
    slower = [trace for trace in TRACES if _throughput("hbm-pim", trace) < _throughput("gpu", trace)]
    note = "HBM-PIM splits small batches in two: " + (", ".join(slower) or "nowhere")
    out.append(
        row("fig11", "opt-66b", "traces on which HBM-PIM is below GPU only (paper: Dolphin)", 1, len(slower), note)
    )
    return out + sensitivity_rows()


def _throughput(name: str, trace: str) -> float:
    figures = measured(name, "opt-66b", trace)
    return throughput(figures) if figures is not None else float("nan")


def best_case(rival: str, assumptions: Assumptions) -> Row:
    """Best case over one rival."""
    ratio, where = best(speedups(rival, assumptions))
    note = f"best at {where}" + (f"; {CPU_NOTE}" if rival == "cpu-offload" else "")
    return row("fig11", f"L3 over {NAMES[rival]}", "best-case speedup", PAPER[rival], ratio, note)


def memory_rows() -> list[Row]:
    """OPT-66B on two GPUs: the paper has GPU only and HBM-PIM out of memory on two traces."""
    out = []
    for rival in ("gpu", "hbm-pim"):
        missing = [trace for trace in TRACES if measured(rival, "opt-66b", trace) is None]
        note = "out of memory on " + (", ".join(missing) or "none")
        out.append(row("fig11", f"{NAMES[rival]}, opt-66b", "traces out of memory", 2, len(missing), note))
    return out


def sensitivity_rows() -> list[Row]:
    """The four best cases under the other assumptions."""
    out = []
    for admission in ("reserve", "paged", "watermark"):
        for peak in (312e12, 156e12):
            assumptions = dataclasses.replace(DEFAULT, admission=admission, fp16_flop_per_s=peak)
            if assumptions == DEFAULT:
                continue
            for rival in ("rank-pim", "hbm-pim", "hbm-pim-ext", "gpu"):
                each = best_case(rival, assumptions)
                each["case"] += f" (sensitivity: {admission}, {peak / 1e12:.0f} TFLOPS)"
                out.append(each)
    for rival in ("rank-pim", "hbm-pim", "hbm-pim-ext", "gpu"):
        each = best_case(rival, dataclasses.replace(DEFAULT, interleave="always"))
        each["case"] += " (sensitivity: L3 always interleaves)"
        out.append(each)
    each = best_case("hbm-pim-ext", dataclasses.replace(DEFAULT, ext_uses_hbm=False))
    each["case"] += " (sensitivity: KV in its own 320 GB only)"
    return [*out, each]
