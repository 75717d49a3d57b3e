"""DeepSeek-V3 and R1 as they were served: published figures of attention, all-to-all, throughput, balance, guessing.

OI is DeepSeek's open-infra overview (day 6), TR the technical report (arXiv 2412.19437), ISCA arXiv 2505.09343, LMSYS
their reproduction of the deployment, TRT TensorRT-LLM's figures of R1's experts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

from l3env import load
from l3env.experiments.gpu import deep_gemm
from l3env.experiments.reproduce import deepseek_balance, deepseek_day, deepseek_places, deepseek_prefill
from l3env.experiments.reproduce.common import Row, row
from l3env.machine.batch import Decodes
from l3env.machine.costs import attention as attention_costs
from l3env.machine.costs import experts
from l3env.machine.specs import ModelSpec, SystemSpec
from l3env.machine.tables import Tables, compile_tables
from l3env.units import GB, TERA

FIGURE = "deepseek-v3"
OI_CONTEXT_TOKENS = 4989
OI_NODE_TOKENS_PER_S = 14_800
OI_USER_TOKENS_PER_S = 21.0  # 20 to 22
NODE_GPUS = 8
AVERAGE = "the published figure is a day's mean over changing load, the model's is at saturation without gaps"


def rows(progress: Callable[[int, int, str], None], *, quick: bool = False) -> list[Row]:
    """All comparisons; ``quick`` leaves the table of places out."""
    model = load("model/deepseek-v3")
    progress(0, 2, "figures")
    found = shapes(model) + attention(model) + products() + all_to_all(model) + decode(model)
    found += deepseek_prefill.rows(model) + deepseek_day.rows(model) + guessing(model) + balance()
    progress(1, 2, "places")
    found += [] if quick else places()
    progress(2, 2, "done")
    return found


def assumptions() -> str:
    """What the rows rest on, in a sentence."""
    return "H800 systems as in their presets; imbalance from the router study; steady state, equal requests"


def line(case: str, quantity: str, paper: float | None, ours: float, note: str = "") -> Row:
    return row(FIGURE, case, quantity, paper, ours, note)


def shapes(model: ModelSpec) -> list[Row]:
    """What the configuration gives."""
    case = "configuration"
    return [
        line(case, "parameters", 671e9, model.parameters_count, "norms and the guessing module left out"),
        line(case, "KV bytes per token, 16 bit", 70_272, model.kv_bytes_per_token),
        line(case, "KV bytes per token, decompressed", 4_997_120, model.decompressed_bytes_per_token),
        line(case, "GFLOP per token, linear operations", 73.25, model.linear_flop_per_token / 1e9),
    ]


def attention(model: ModelSpec) -> list[Row]:
    """FlashMLA on one H800: 128 heads are compute-bound, 16 (TP 8) memory-bound."""
    device = load("gpu/h800")
    context, batch = 8192, 132
    out = []
    for tp, what, paper in ((1, "TFLOP/s, compute-bound", 660.0), (8, "TB/s, memory-bound", 3.0)):
        time_s = batch * context * attention_costs.decode_token_s(model, device, tp)
        time_s += batch * attention_costs.query_move_s(model, device, tp, model.stored_form)
        time_s += attention_costs.launch_s(model, device, model.stored_form, device.decode_launch_s)
        flop = 2 * model.stored_form.macs_per_pair * model.layers_count * batch * context
        moved = batch * context * model.kv_bytes_per_token
        ours = flop / time_s / 1e12 if tp == 1 else moved / time_s / TERA
        out.append(line("FlashMLA on an H800", what, paper, ours, f"{batch} requests of {context} tokens"))
    return out


def products() -> list[Row]:
    """DeepGEMM's FP8 products on an H800: those of prefill one by one, the shapes of decode together."""
    listed = [(product, 1 / ratio) for product, ratio in deep_gemm.ratios(load("gpu/h800"))]
    out = []
    for product, faster in listed:
        if product.rows >= deep_gemm.FITTED_ROWS:
            rate = product.flop / product.seconds / TERA
            shape = f"{product.groups} x {product.rows:,} x {product.n:,} x {product.k:,}"
            note = "the rate at which outputs are written is fitted to these ten"
            out.append(line(f"DeepGEMM on an H800, {product.layout}, {shape}", "TFLOP/s", rate, faster * rate, note))
    for layout, shapes in (("dense, 64 and 128 rows", "dense"), ("masked", "masked")):
        rates = [
            faster for product, faster in listed if product.layout == shapes and product.rows < deep_gemm.FITTED_ROWS
        ]
        note = f"{min(rates):.2f} to {max(rates):.2f} in {len(rates)} shapes"
        case = f"DeepGEMM on an H800, {layout}"
        out.append(line(case, "throughput over measured, geometric mean", 1.0, statistics.geometric_mean(rates), note))
    return out


def all_to_all(model: ModelSpec) -> list[Row]:
    """DeepEP's low-latency kernels, and the bound that ISCA'25 derives from the bare link."""
    system = load("system/h800-ep144-decode")
    out = []
    for ranks, measured_us in ((64, 173 + 314), (128, 192 + 369), (256, 194 + 360)):
        time_s = float(experts.all_to_all_s(_ep(system, ranks, ranks, 0.0), model, 1, 128))
        note = "link utilisation taken from EP 128; fewer ranks keep more within the host"
        case = f"DeepEP, 128 tokens a GPU, EP {ranks}"
        out.append(line(case, "dispatch + combine, us", float(measured_us), time_s * 1e6, note))
    copies, hidden, tokens = 9, 7000, 32
    bound_s = 2 * copies * hidden * 3 * tokens / (50 * GB) * model.layers_count
    out.append(line("ISCA'25 bound, 50 GB/s", "ms a token", 14.76, bound_s * 1e3, "two micro-batches of 32 tokens"))
    return out


def _ep(system: SystemSpec, ranks: int, slots: int, imbalance_frac: float) -> SystemSpec:
    return load(
        f"system/{system.name}",
        gpus_count=ranks,
        experts__ranks_count=ranks,
        experts__slots_count=slots,
        experts__imbalance_frac=imbalance_frac,
    )


def tokens_per_s(tables: Tables, requests: int, context_tokens: float, *, multi_token: bool = False) -> float:
    """Tokens that equal requests with their KV in HBM emit a second, guesses left out."""
    return requests / tables.iteration_s([Decodes(requests, context_tokens)], multi_token=multi_token)


def node_tokens_per_s(tables: Tables, requests: float) -> tuple[float, float]:
    """(output tokens/s of a node, of a user) at so many requests a replica."""
    each = tokens_per_s(tables, math.floor(requests), OI_CONTEXT_TOKENS)
    return each * NODE_GPUS / tables.tp, each / math.floor(requests)


def decode(model: ModelSpec) -> list[Row]:
    """The decode unit of 18 nodes, no guessing: at the published concurrency, and at the published user speed."""
    tables = compile_tables(load("system/h800-ep144-decode"), model)
    implied = OI_NODE_TOKENS_PER_S / NODE_GPUS / OI_USER_TOKENS_PER_S
    node, user = node_tokens_per_s(tables, implied)
    case = f"OI decode, EP 144, KV {OI_CONTEXT_TOKENS}"
    note = f"{math.floor(implied)} requests a GPU, as node throughput over user speed implies"
    out = [line(f"{case}, same concurrency", "output tokens/s a node", OI_NODE_TOKENS_PER_S, node, note)]
    out.append(line(f"{case}, same concurrency", "tokens/s a user", OI_USER_TOKENS_PER_S, user, note))
    waited = waiting_node_tokens_per_s(tables, math.floor(implied))
    why = "each layer waits for the longest of 144 ranks; contexts with a coefficient of variation of 1"
    out.append(line(f"{case}, ranks unequal", "output tokens/s a node", OI_NODE_TOKENS_PER_S, waited, why))
    fastest = max(
        node
        for node, user in (node_tokens_per_s(tables, count) for count in range(8, 400, 4))
        if user >= OI_USER_TOKENS_PER_S
    )
    out.append(line(f"{case}, same user speed", "output tokens/s a node", OI_NODE_TOKENS_PER_S, fastest, AVERAGE))
    imbalance_frac = deepseek_balance.stored()["ranks"][deepseek_balance.LMSYS]["rebalanced_mean"]
    lmsys = compile_tables(_ep(tables.system, 72, 288, imbalance_frac), model)
    each = tokens_per_s(lmsys, 256, 2000)
    out.append(line("LMSYS decode, 9 nodes, batch 256, KV 2 K", "output tokens/s a node", 22_300, each * NODE_GPUS))
    return out


def waiting_node_tokens_per_s(tables: Tables, requests: int) -> float:
    """Node throughput where attention takes as long as on the fullest rank: a sum of n contexts deviates by
    cv / sqrt(n), the largest of R ranks by about sqrt(2 ln R) deviations."""
    excess = math.sqrt(2 * math.log(tables.replicas_count)) / math.sqrt(requests)
    return tokens_per_s(tables, requests, OI_CONTEXT_TOKENS * (1 + excess)) * NODE_GPUS / tables.tp


def guessing(model: ModelSpec) -> list[Row]:
    """Multi-token prediction: tokens per second with over without, at small and large batches."""
    out = []
    for name, context in (("h800-ep320-decode", 2048), ("h800-ep144-decode", 2048)):
        tables = compile_tables(load(f"system/{name}"), model)
        for requests, paper in ((8, 1.8), (256, None)):
            for acceptance_frac in (0.85, 0.90):
                gain = guessing_gain(tables, requests, context, acceptance_frac)
                case = f"guessing a second token, {name}, {requests} requests a replica, p = {acceptance_frac}"
                out.append(line(case, "tokens/s over those without", paper, gain))
    return out


def guessing_gain(tables: Tables, requests: int, context_tokens: int, acceptance_frac: float) -> float:
    """(1 + p) x step without / step with."""
    plain = tokens_per_s(tables, requests, context_tokens)
    verified = tokens_per_s(tables, requests, context_tokens, multi_token=True)
    return (1 + acceptance_frac) * verified / plain


def balance() -> list[Row]:
    """From the router study (``experiments/reproduce/deepseek_balance.py``)."""
    figures: dict[str, Any] = deepseek_balance.stored()
    found = figures["ranks"]["h800-ep32-prefill"]
    fitted = "the popularity model's strength of domains is fitted to this figure"
    quantity = "(largest - mean) / mean of ranks"
    out = [line("R1's experts, EP 32, fixed", quantity, 1.56, found["fixed_mean"], fitted)]
    out.append(line("R1's experts, EP 32, fixed, least of layers", quantity, 0.46, found["fixed_low"]))
    out.append(line("R1's experts, EP 32, fixed, most of layers", quantity, 2.46, found["fixed_high"]))
    note = "5 % of the workload's mixture changes in an interval: assumed"
    out.append(line("R1's experts, EP 32, 288 slots", quantity, 0.11, found["rebalanced_mean"], note))
    for gamma, (start, end) in figures["gamma"].items():
        case = f"experts of a layer on the training mixture, gamma {gamma}"
        out.append(line(case, "imbalance after 300 steps", None, end, f"{start:.2f} at the start"))
    return out


def places() -> list[Row]:
    """Where decode attention should live, and what choosing by prediction reaches."""
    out = []
    for cell in deepseek_places.cells():
        rates = ", ".join(f"{place} {rate:,.0f}" for place, rate in cell.rates.items())
        case = f"{cell.model} on {cell.system}, {cell.context_tokens:,} tokens, batch {cell.batch}: best {cell.best}"
        out.append(line(case, "adaptive over best fixed place", None, cell.adaptive_ratio, f"tokens/s: {rates}"))
    return out
