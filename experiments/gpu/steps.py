"""Measured steps of a serving engine against the engine's formula: ``python -m l3env.experiments.gpu.steps FOLDER``.

A folder holds ``MODEL.WORKLOAD.steps.csv.gz`` of one GPU. While the engine is busy, a step's GPU time is the time
between its outputs coming back and those of the step before. Steps are scheduled ahead of outputs, so that this is
blurred where prompts come and go: single steps are compared where none is near, and windows of steps everywhere.
Predictions are ``Tables.iteration`` plus a constant for a run, the median difference of its decode steps: host time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from l3env import compile_pair
from l3env.machine.batch import Chunk, Decodes
from l3env.machine.tables import Tables

SYSTEM = "gpu-1xh100"
WINDOW_STEPS, PROMPT_TOKENS = 8, 500  # a window, and from how many prompt tokens on it stands apart


def predicted_s(tables: Tables, steps: pd.DataFrame) -> np.ndarray:
    """Each step's iteration: its decoding requests of their mean length, its prompts in equal chunks."""
    out = np.empty(len(steps))
    for i, (requests, context, prompts, tokens, pairs) in enumerate(
        steps[
            ["decode_requests", "decode_context_tokens", "prefill_requests", "prefill_tokens", "prefill_pairs"]
        ].itertuples(index=False, name=None)
    ):
        chunks: list[Chunk] = []
        if tokens:
            each = tokens / prompts
            history = max((pairs - prompts * each * (each + 1) / 2) / tokens, 0)
            chunks = [Chunk(max(round(each), 1), round(history))] * int(prompts)
        decodes = [Decodes(int(requests), context / requests - 1)] if requests else []
        out[i] = tables.iteration_s(decodes, chunks)
    return out


def errors(tables: Tables, path: Path) -> dict[str, float]:
    """Of one run."""
    steps = pd.read_csv(path)
    measured = steps["update_s"].diff()
    busy = steps["schedule_end_s"] < steps["update_s"].shift()
    modelled = pd.Series(predicted_s(tables, steps))
    no_prompts = steps["prefill_tokens"] == 0
    alone = busy & no_prompts & no_prompts.shift(1, fill_value=False) & no_prompts.shift(-1, fill_value=False)
    constant_s = float((measured - modelled)[alone].median())
    decode = ((modelled + constant_s) / measured - 1)[alone].abs()
    window = np.arange(len(steps)) // WINDOW_STEPS
    table = pd.DataFrame({"measured": measured, "modelled": modelled + constant_s, "tokens": steps["prefill_tokens"]})
    sums = table.groupby(window).sum()
    whole = busy.groupby(window).agg(["all", "size"])
    sums = sums[whole["all"] & (whole["size"] == WINDOW_STEPS)]
    error = sums["modelled"] / sums["measured"] - 1
    prompts = error[sums["tokens"] > PROMPT_TOKENS]
    return {
        "constant_ms": constant_s * 1e3,
        "decode_count": len(decode),
        "decode_median": float(decode.median()),
        "decode_p90": float(decode.quantile(0.9)),
        "window_count": len(error),
        "window_median": float(error.abs().median()),
        "window_p90": float(error.abs().quantile(0.9)),
        "prompt_count": len(prompts),
        "prompt_bias": float(prompts.median()),
        "prompt_median": float(prompts.abs().median()),
    }


def main() -> None:
    rows = {}
    for path in sorted(Path(sys.argv[1]).glob("*.steps.csv*")):
        run = path.name.partition(".steps")[0]
        rows[run] = errors(compile_pair(SYSTEM, run.partition(".")[0]), path)
    print(pd.DataFrame(rows).T.round(4).to_string())


if __name__ == "__main__":
    main()
