"""Assumptions under which the paper is reproduced, stated once, and the machines built from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from l3env import Budget, FixedKnobs, Knobs, SubBatching, Workload, load, load_trace
from l3env.errors import SpecError
from l3env.machine.tables import Tables, compile_tables
from l3env.policy.protocol import Policy
from l3env.runs.driver import run_policy
from l3env.units import GIB

MODELS = ("opt-66b", "qwen-72b", "gpt-175b")
TRACES = ("openr1", "dolphin-r1", "openthoughts", "dolphin-short")
RIVALS = ("gpu", "hbm-pim", "hbm-pim-ext", "rank-pim", "cpu-offload")
GPU = "gpu/a100-80-ideal"  # data-sheet peaks and AttAcc's utilisation, as the paper uses
LINK = "link/nvlink3-ideal"
OUT_OF_MEMORY_FRAC = 0.03

Row = dict[str, Any]


@dataclass(frozen=True)
class Assumptions:
    """What the paper leaves open.

    Attributes:
        admission: "reserve" takes a request only when its whole length fits (no preemption); "paged" grows block by
            block with recompute preemption; "watermark" likewise, with a tenth of memory kept free of new requests.
        fp16_flop_per_s: peak of one GPU; the text's "156 TFLOPs" against AttAcc's 312.
        hbm_bytes: usable HBM of one GPU.
        interleave: L3 runs two sub-batches "where shorter" than one batch by its predictions, or "always". The rivals
            with PIM always do, as NeuPIMs does.
        ext_uses_hbm: HBM-PIM-EXT extends the GPUs' memory: KV in both, in proportion to what they hold. Otherwise its
            320 GB are all it has for KV.
    """

    admission: str = "reserve"
    fp16_flop_per_s: float = 312e12
    hbm_bytes: float = 80 * GIB
    interleave: str = "where shorter"
    ext_uses_hbm: bool = True

    def text(self) -> str:
        """The assumptions in a sentence."""
        ext = "its own memory and in the HBM beside the weights" if self.ext_uses_hbm else "its own memory only"
        return (
            f"admission {self.admission}; FP16 peak {self.fp16_flop_per_s / 1e12:.0f} TFLOPS x 0.80, HBM bandwidth "
            f"x 0.85, {self.hbm_bytes / GIB:.0f} GiB of HBM a GPU, 20 us an all-reduce; "
            f"L3 interleaves two sub-batches {self.interleave}; HBM-PIM-EXT holds KV in {ext}; "
            "1,000 requests present at once, lengths from lognormals with the published moments; a cell is out of "
            f"memory when more than {OUT_OF_MEMORY_FRAC:.0%} of its requests could never fit"
        )


DEFAULT = Assumptions()


class ReserveWholeLength(FixedKnobs):
    """Admission by whole length needs the true lengths: an oracle by name, as the paper's baselines are in effect."""

    wants_truth = True


def machine(name: str, model: str, assumptions: Assumptions = DEFAULT, **overrides: Any) -> Tables:
    """A system of the paper under the assumptions. Raises SpecError where the weights do not fit."""
    system = load(
        f"system/{name}-dgx-a100",
        gpu=GPU,
        gpu_link=LINK,
        gpu__fp16_flop_per_s=assumptions.fp16_flop_per_s,
        gpu__hbm_bytes=assumptions.hbm_bytes,
        gpu__reserved_bytes=0.0,
        max_batched_tokens=1,
        hbm_kv=name == "gpu" or (name == "hbm-pim-ext" and assumptions.ext_uses_hbm),
        **overrides,
    )
    return compile_tables(system, load(f"model/{model}"))


def scheduler(tables: Tables, assumptions: Assumptions = DEFAULT) -> Policy:
    """L3's alignment on systems with PIM, filling memory on the others; admission as assumed."""
    budget = Budget.ALIGN_WHEN_FULL if tables.has_pim else Budget.UNLIMITED
    headroom_frac = 0.1 if assumptions.admission == "watermark" else 0.0
    share = tables.hbm_tokens / max(tables.hbm_tokens + tables.pim_tokens, 1) if tables.has_pim else 0.0
    kind = tables.system.pim.kind if tables.system.pim is not None else ""
    adaptive = kind == "dimm-bank" and assumptions.interleave == "where shorter"
    mode = SubBatching.ADAPTIVE if adaptive else SubBatching.ON
    knobs = Knobs(prefill_budget_tokens=budget, headroom_frac=headroom_frac, hbm_share_frac=share, sub_batching=mode)
    if assumptions.admission == "reserve":
        return ReserveWholeLength("oracle-reserve", replace(knobs, reserve_predicted=True))
    return FixedKnobs(assumptions.admission, knobs)


@cache
def trace(name: str) -> Workload:
    return load_trace(name)


@cache
def measured(name: str, model: str, workload: str, assumptions: Assumptions = DEFAULT) -> dict[str, float] | None:
    """Figures of one cell; None where it is out of memory."""
    try:
        tables = machine(name, model, assumptions)
    except SpecError:
        return None
    metrics = run_policy(tables, trace(workload), scheduler(tables, assumptions), record=False).metrics
    return metrics if metrics["rejected_count"] <= OUT_OF_MEMORY_FRAC * metrics["requests_count"] else None


def throughput(figures: dict[str, float]) -> float:
    """Tokens/s over the whole run, as the paper counts it: its requests are all there at the start."""
    return figures["output_tokens_count"] / figures["makespan_s"]


def row(figure: str, case: str, quantity: str, paper: float | None, ours: float | None, note: str = "") -> Row:
    """One line of the comparison; the ratio is ours over the paper's."""
    ratio = None if paper is None or ours is None or paper == 0 else ours / paper
    return {
        "figure": figure,
        "case": case,
        "quantity": quantity,
        "paper": paper,
        "ours": ours,
        "ratio": ratio,
        "note": note,
    }


def best(pairs: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The largest value and where it is."""
    return max(pairs) if pairs else (float("nan"), "nowhere")
