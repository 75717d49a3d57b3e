"""``l3env policies`` and ``l3env policies check``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from l3env.cli.columns import show_table
from l3env.cli.shared import Json, Model, Trace, announce_compilation, fail, out, print_json
from l3env.errors import L3EnvError

SMALL = "profile:azure-conv-2023?n=120"
US = 1e6

app = typer.Typer(invoke_without_command=True)


@app.callback()
def policies(context: typer.Context, as_json: Json = False) -> None:
    """Policies known by name; `check` tries out your own."""
    if context.invoked_subcommand is not None:
        return
    rows = _known()
    if as_json:
        print_json(rows)
        return
    show_table(tuple(rows[0]), [tuple(row.values()) for row in rows], ("module", "decides", "signals", "source"))
    out.print("your own: --policies my_policy.py:MyClass; l3env policies check my_policy.py tries it out")


def _known() -> list[dict[str, str]]:
    import inspect

    from l3env.policy.registry import make_policy, policy_factories

    rows = []
    for name, factory in sorted(policy_factories().items()):
        summary = (inspect.getdoc(factory) or "").split("\n")[0]
        made = make_policy(name)
        rows.append(
            {
                "policy": name,
                "class": str(made.role),
                "decides": how_often(made.decision_interval_s),
                "signals": getattr(made, "signals", ""),
                "source": getattr(made, "source", ""),
                "what": summary,
                "module": factory.__module__,
            }
        )
    return rows


def how_often(every_s: float) -> str:
    """How often a policy is asked, in words."""
    return "once" if every_s == float("inf") else "every iteration" if every_s == 0 else f"every {every_s:g} s"


@app.command()
def check(
    policy: Annotated[str, typer.Argument(help="file.py, file.py:Class, or any other policy.")],
    system: Annotated[str, typer.Option(help="A preset (l3env systems) or a TOML file.")] = "l3-dgx-a100",
    model: Model = "qwen-72b",
    trace: Trace = SMALL,
    as_json: Json = False,
) -> None:
    """Tries out a policy: its hooks, two small runs that must be the same, how long it takes to decide."""
    announce_compilation()
    from l3env.machine.pair import compile_pair
    from l3env.policy.registry import make_policy
    from l3env.requests.registry import load_trace
    from l3env.runs.driver import training_window
    from l3env.runs.tryout import try_out

    told: dict[str, Any] = {"policy": policy, "ok": False, "error": None}
    try:
        tables, workload = compile_pair(system, model), load_trace(trace)
        made = make_policy(policy)
        _ok(as_json, f"hooks: all there, with the right arguments; asked {how_often(made.decision_interval_s)}")
        found = try_out(policy, tables, workload, training_window(workload))
        _ok(
            as_json,
            f"run: {found.finished_count:,} of {found.requests_count:,} requests finished, "
            f"{found.slo_attainment_frac:.0%} within the SLO",
        )
        if found.leak or found.chance:
            raise L3EnvError(_not_repeated(policy, found))
        _ok(as_json, "repeats: a second run of the same object, and of a fresh one, are the same to the last bit")
        times = _times_us(found.decided_s)
        _ok(
            as_json,
            f"decisions: {times['decisions_count']:,}; median {times['median_us']:,.1f} us, "
            f"p99 {times['p99_us']:,.1f} us",
        )
    except L3EnvError as error:
        if as_json:
            print_json(told | {"error": str(error)})
        fail(str(error))
    if as_json:
        print_json(told | {"ok": True, "slo_attainment_frac": found.slo_attainment_frac} | times)


def _ok(as_json: bool, text: str) -> None:
    if not as_json:
        out.print(f"OK  {text}", soft_wrap=True)


def _times_us(decided_s: list[float]) -> dict[str, float]:
    import numpy as np

    median, p99 = np.quantile(decided_s, (0.5, 0.99)) * US if decided_s else (0.0, 0.0)
    return {"decisions_count": len(decided_s), "median_us": float(median), "p99_us": float(p99)}


def _not_repeated(policy: str, found: Any) -> str:
    from l3env.policy.mistakes import class_line
    from l3env.policy.registry import make_policy

    where = class_line(type(make_policy(policy)))
    if found.leak:
        return (
            f"policy {policy!r}: state leaks from one run into the next\n  {where}\n"
            f"  second run of the same object: expected the same results; got {found.leak}; prepare() should forget"
        )
    return (
        f"policy {policy!r}: does not repeat\n  {where}\n"
        f"  run of a fresh object: expected the same results; got {found.chance}; numbers drawn without a seed, "
        "a clock, or state outside the object?"
    )
