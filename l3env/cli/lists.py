"""What is there: ``l3env systems``, ``models``, ``knobs``, ``schema``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from l3env.cli.columns import show_table
from l3env.cli.shared import Json, out, print_json


def systems(as_json: Json = False) -> None:
    """Systems there are: GPUs and places for KV."""
    from l3env.machine import specs

    loaded = [specs.load(f"system/{name}") for name in specs.names("system")]
    if as_json:
        print_json([_plain(spec) for spec in loaded])
        return
    heads = ("system", "GPUs", "HBM GB", "HBM TB/s", "PFLOP/s", "PIM", "PIM GB", "PIM TB/s", "GPU-PIM GB/s")
    table = []
    for spec in loaded:
        n, pim = spec.gpus_count, spec.pim
        link = spec.pim_link.bytes_per_s * spec.pim_link.utilisation_frac * n / 1e9 if spec.pim_link else None
        row = (
            spec.name,
            f"{n} x {spec.gpu.name}",
            f"{n * spec.gpu.hbm_bytes / 1e9:,.0f}",
            f"{n * spec.gpu.hbm_bytes_per_s / 1e12:.1f}",
            f"{n * spec.gpu.fp16_flop_per_s / 1e15:.1f}",
            pim.kind if pim else "-",
            f"{pim.capacity_bytes / 1e9:,.0f}" if pim else "-",
            f"{pim.internal_bytes_per_s / 1e12:.1f}" if pim else "-",
            f"{link:,.0f}" if link else "-",
        )
        table.append(row)
    show_table(heads, table, ("GPU-PIM GB/s", "PFLOP/s", "PIM TB/s", "HBM TB/s"))


def models(as_json: Json = False) -> None:
    """Models there are: sizes and KV bytes."""
    from l3env.machine import specs

    loaded = [specs.load(f"model/{name}") for name in specs.names("model")]
    if as_json:
        print_json([_plain(spec) for spec in loaded])
        return
    heads = ("model", "params", "layers", "hidden", "heads", "KV heads", "FFN", "KV B/token", "TP")
    table = []
    for spec in loaded:
        row = (
            spec.name,
            f"{spec.parameters_count / 1e9:.1f} B",
            str(spec.layers_count),
            f"{spec.hidden_size:,}",
            str(spec.heads_count),
            str(spec.kv_heads_count),
            f"{spec.ffn_size:,}" + (" g" if spec.gated_ffn else ""),
            f"{spec.kv_bytes_per_token:,.0f}",
            str(spec.tensor_parallel_count),
        )
        table.append(row)
    show_table(heads, table, ("heads", "hidden", "KV heads"))
    out.print("g: gated FFN (three matrices); TP: GPUs a replica spans by default")


def knobs(as_json: Json = False) -> None:
    """Settings of policies and actions: values, levels, what each does."""
    from l3env.knobs import knob_table

    rows = knob_table()
    if as_json:
        print_json(rows)
        return
    heads = ("knob", "default", "values", "levels", "what")
    show_table(heads, [tuple(row[head] for head in heads) for row in rows], ("values", "levels", "default"))
    out.print("levels: what actions and searches choose among (`--action-knobs`; `l3env tune`)")


def schema(kind: Annotated[str, typer.Argument(help="system, model, gpu, link, pim, dram, ...")]) -> None:
    """Print the JSON schema of a TOML file, for editors."""
    from l3env.machine import specs

    print_json(specs.json_schema(kind))


def _plain(spec: Any) -> Any:
    import dataclasses

    plain = dataclasses.asdict(spec)
    if "parameters_count" in dir(spec):
        plain |= {"parameters_count": spec.parameters_count, "kv_bytes_per_token": spec.kv_bytes_per_token}
    return plain
