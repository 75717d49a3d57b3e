"""``l3env timeline``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from l3env.cli.shared import announce_compilation, file_out, numbers, say
from l3env.cli.shared import out as stdout
from l3env.errors import L3EnvError


def timeline(
    system: Annotated[str, typer.Option(help="A preset (l3env systems) or a TOML file.")] = "l3-dgx-a100",
    model: Annotated[str, typer.Option(help="A preset (l3env models) or a TOML file.")] = "gpt-175b",
    trace: Annotated[str, typer.Option(help="A name, a file, or a spec; ?n=200 keeps it short.")] = (
        "azure-conv-2023?n=200"
    ),
    policy: Annotated[str, typer.Option(help="A name (l3env policies) or file.py:Class.")] = "l3-model",
    load: Annotated[str, typer.Option(help="Times the trace's own arrival rate.")] = "1.0",
    utilization: Annotated[str | None, typer.Option(help="Instead: times what the machine serves.")] = None,
    replica: Annotated[int, typer.Option(help="Which replica of the system is drawn.")] = 0,
    out: Annotated[Path, typer.Option(callback=file_out, help="The trace to write.")] = Path("runs/timeline.json"),
) -> None:
    """One run as a Chrome / Perfetto trace: devices, sub-batches, bubbles, requests. Opens in ui.perfetto.dev."""
    announce_compilation()
    from l3env.machine.pair import compile_pair
    from l3env.policy.registry import make_policy
    from l3env.requests.registry import load_trace
    from l3env.runs import timeline as drawing
    from l3env.runs.driver import training_window
    from l3env.runs.saturation import load_at_capacity

    tables, whole = compile_pair(system, model), load_trace(trace)
    if not 0 <= replica < tables.replicas_count:
        raise L3EnvError(f"--replica {replica}; expected 0 to {tables.replicas_count - 1}")
    if utilization is None:
        (level,) = numbers(load, "--load", 1)
    else:
        level = numbers(utilization, "--utilization", 1)[0] * load_at_capacity(tables, whole)
    made = make_policy(policy)
    training = training_window(whole)
    events, outcome = drawing.record(tables, whole.at_load(level), made, replica=replica, training=training)
    about = {"system": system, "model": model, "trace": trace, "policy": policy, "load": level, "replica": replica}
    drawing.write(out, events, about)
    figures = outcome.metrics
    stdout.print(
        f"{figures['requests_count']:,.0f} requests, {figures['iterations_count']:,.0f} iterations, bubbles: "
        f"GPU {figures['gpu_bubble_frac']:.1%}, PIM {figures['pim_bubble_frac']:.1%} of iteration time"
    )
    say(f"written: {out} ({len(events):,} events); open it in ui.perfetto.dev")
