"""What a day's mean of prefill has and saturation has not: prompts of unequal length, and a load that swings.

    python -m l3env.experiments.reproduce.deepseek_traffic          # the facts anew, from the traces

Lengths have the shape of two real services: Mooncake's (Kimi), whose prefix ids say what of each prompt was cached, and
a DeepSeek-R1 service (ServeGen, by its embedded profile), of which only whole prompts are known. A balancer deals them
to the GPUs with the two aims of DeepSeek's open-infra overview: equal core attention and equal tokens. The load is that
of the R1 service. What is taken from the traces is kept as statistics in a file, so the study runs without them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from l3env.errors import TraceError
from l3env.files import write_text
from l3env.requests.workload import Workload
from l3env.traces import catalog, profile, servegen

PATH = Path(__file__).parents[1] / "data" / "deepseek_day.json"
CHAT, REASONING = "mooncake-conversation", "servegen-deepseek-r1"
CONTEXT_TOKENS = 65_536  # V3 and R1 took 64 K in February 2025 (their price list)
SERVICES = {"deepseek-r1": REASONING, **{name: f"servegen-language-{name}" for name in ("m-large", "m-mid", "m-small")}}
HOURS = (0.5, 1.0, 3.0, 6.0, 24.0)  # of an interval of provisioning
GROUPS, STEPS = 20, 10  # of the joint distribution: groups by new tokens, quantiles within each

Array = NDArray[np.float64]
Batch = list[tuple[int, int]]  # (new tokens, history) of each prompt


# --- prompts


def cached_tokens(workload: Workload) -> NDArray[np.int64]:
    """(N,) tokens of each prompt in leading blocks that an earlier one had; one token at least is new."""
    seen: set[int] = set()
    hits = np.zeros(len(workload), dtype=np.int64)
    for i, (start, end) in enumerate(zip(workload.prefix_offsets[:-1], workload.prefix_offsets[1:], strict=True)):
        ids = workload.prefix_ids[start:end].tolist()
        hits[i] = next((place for place, block in enumerate(ids) if block not in seen), len(ids))
        seen.update(ids)
    return np.minimum(hits * workload.prefix_block_tokens, workload.prompt_tokens - 1)


def joint(new: Array, cached: Array) -> dict[str, list[list[float]]]:
    """Quantiles of new and of cached tokens in groups of equal size by new tokens, each over its mean.

    A token at least, since draws interpolate on a logarithmic scale. Of a few thousand prompts that keeps the means of
    squares and products, on which attention depends, within 5 %; of many more the longest would be drawn too often.
    """
    chances = np.arange(STEPS + 1) / STEPS
    groups = np.array_split(np.argsort(new, kind="stable"), GROUPS)

    def table(values: Array) -> list[list[float]]:
        return [
            np.quantile(np.maximum(values[group], 1) / values.mean(), chances).round(4).tolist() for group in groups
        ]

    return {"new": table(new), "cached": table(cached)}


def draw_joint(tables: dict[str, list[list[float]]], count: int) -> tuple[Array, Array]:
    """(count,) new and cached tokens that have such quantiles, each of mean 1."""
    rng = np.random.default_rng(0)
    group = rng.permutation(count) % GROUPS

    def drawn(table: Array) -> Array:
        place = rng.random(count) * STEPS
        low = np.minimum(place.astype(int), STEPS - 1)
        values: Array = np.exp(table[group, low] + (table[group, low + 1] - table[group, low]) * (place - low))
        return values / values.mean()

    return drawn(np.log(tables["new"])), drawn(np.log(tables["cached"]))


def chat_prompts(count: int, new_mean: float, cached_mean: float) -> Batch:
    """New and cached tokens as they occur together in the chat service, at these means."""
    new, cached = draw_joint(stored()["prompts"], count)
    return _whole(new * new_mean, cached * cached_mean)


def reasoning_prompts(count: int, new_mean: float, cached_mean: float) -> Batch:
    """Prompts of the R1 service scaled to the mean and cut at the context; of each the same share is cached."""
    drawn = profile.generate(REASONING, n=count).prompt_tokens.astype(float)
    mean = new_mean + cached_mean
    factor = brentq(lambda factor: np.minimum(factor * drawn, CONTEXT_TOKENS).mean() - mean, 1e-2, 1e2)
    prompt = np.minimum(float(factor) * drawn, CONTEXT_TOKENS)
    return _whole(prompt * (new_mean / mean), prompt * (cached_mean / mean))


def equal_prompts(count: int, new_mean: float, cached_mean: float) -> Batch:
    return [(round(new_mean), round(cached_mean))] * count


def _whole(new: Array, cached: Array) -> Batch:
    tokens = np.maximum(np.rint(new), 1).astype(int)
    history = np.minimum(np.rint(cached).astype(int), CONTEXT_TOKENS - tokens)
    return list(zip(tokens.tolist(), history.tolist(), strict=True))


# --- the balancer


def batches(waiting: Batch, most_tokens: int, chunk_tokens: int) -> Iterator[Batch]:
    """What is prefilled in each iteration: prompts as they come, until so many new tokens. They are whole; only of one
    longer than a chunk the rest goes on in the next iteration, on its history. An unfilled last one is left out."""
    started: Batch = []
    coming = iter(waiting)
    while True:
        batch, rest, tokens = [], [], 0
        while tokens < most_tokens:
            prompt = started.pop(0) if started else next(coming, None)
            if prompt is None:
                return
            new, history = prompt
            chunk = min(new, chunk_tokens)
            batch.append((chunk, history))
            tokens += chunk
            if new > chunk:
                rest.append((new - chunk, history + chunk))
        yield batch
        started += rest


def deal(costs: Array, ranks: int) -> list[NDArray[np.int64]]:
    """Items of each rank: the longest first, each to the rank whose larger share is then the least.

    Args:
        costs: (N, K) of each item in each quantity to balance.
    """
    shares = costs * ranks / costs.sum(axis=0)
    loads = np.zeros((ranks, costs.shape[1]))
    rank = np.empty(len(costs), dtype=np.int64)
    for item in np.argsort(-shares.max(axis=1), kind="stable"):
        rank[item] = (loads + shares[item]).max(axis=1).argmin()
        loads[rank[item]] += shares[item]
    return [np.flatnonzero(rank == i) for i in range(ranks)]


def alike(attention: Array, tokens: Array, units: int) -> list[NDArray[np.int64]]:
    """Items of each unit: of like attention per token, and as many tokens as the others."""
    order = np.argsort(-attention / tokens, kind="stable")
    before = np.cumsum(tokens[order]) - tokens[order]
    unit = (before * units / tokens.sum()).astype(np.int64)
    return [order[unit == i] for i in range(units)]


# --- the load


def served_frac(load: Array, windows: int) -> float:
    """Mean load over mean capacity, where each interval of so many windows has the capacity that its fullest needs."""
    return float(load.mean() / _capacity(load, windows).mean())


def capacity_frac(load: Array, windows: int) -> float:
    """Mean over most capacity, provisioned likewise."""
    capacity = _capacity(load, windows)
    return float(capacity.mean() / capacity.max())


def _capacity(load: Array, windows: int) -> Array:
    most: Array = load.reshape(-1, windows).max(axis=1)
    return most


def rates(path: Path, subset: str) -> dict[str, Array]:
    """(W,) requests/s of a ServeGen service, all clients, in windows of 600 s; and prompt tokens/s where lengths are
    published: each client's rate times the mean prompt of its six hours."""
    _, clients = servegen.read_clients(path, subset)
    requests = np.array([client.rate_per_s for client in clients])
    if clients[0].dataset is None:
        return {"requests": requests.sum(axis=0)}
    tokens = np.zeros_like(requests)
    windows = round(servegen.LENGTHS_WINDOW_S / servegen.WINDOW_S)
    for row, client in enumerate(clients):
        for first in range(0, requests.shape[1], windows):
            span = slice(first, first + windows)
            if requests[row, span].any():
                fields = servegen.distributions(client, round(first * servegen.WINDOW_S))
                values, cumulative = fields["input_tokens"]
                tokens[row, span] = requests[row, span] * float(values @ np.diff(cumulative, prepend=0.0))
    return {"requests": requests.sum(axis=0), "prompt tokens": tokens.sum(axis=0)}


def swing(load: Array) -> dict[str, dict[str, float]]:
    """Both ratios of a load, for each interval of provisioning in hours."""

    def ratios(of: Callable[[Array, int], float]) -> dict[str, float]:
        return {f"{hours:g}": round(of(load, round(hours * 3600 / servegen.WINDOW_S)), 4) for hours in HOURS}

    return {"served_frac": ratios(served_frac), "capacity_frac": ratios(capacity_frac)}


# --- the facts


def facts() -> dict[str, Any]:
    """Statistics of the traces: of all loads, and of the second half of the chat service, when its cache is warm.

    Raises TraceError where the traces are not at hand.
    """
    places = {name: catalog.locate(catalog.read_manifest()[name]) for name in (CHAT, *SERVICES.values())}
    load: dict[str, Any] = {}
    for subset, name in SERVICES.items():
        path = places[name]
        if path is None:
            raise TraceError(f"trace {name!r} is not on this machine; expected L3ENV_TRACE_DIR with the trace folder")
        load |= {f"{subset}, {what}": swing(series) for what, series in rates(path, subset).items()}
    chat = catalog.resolve(CHAT)
    if chat is None or places[CHAT] is None:
        raise TraceError(f"trace {CHAT!r} is not on this machine; expected L3ENV_TRACE_DIR with the trace folder")
    cached = cached_tokens(chat)
    half = slice(len(chat) // 2, None)
    return {
        "load": load,
        "prompts": joint((chat.prompt_tokens - cached)[half].astype(float), cached[half].astype(float)),
    }


def stored() -> dict[str, Any]:
    """The facts kept with the package."""
    return dict(json.loads(PATH.read_text("utf-8")))


def save(found: dict[str, Any]) -> None:
    """Writes the facts, a row a line."""
    lines = json.dumps(found["load"], indent=2).replace("\n", "\n  ")
    tables = ",\n".join(
        f'    "{name}": [\n' + ",\n".join(f"      {json.dumps(row)}" for row in rows) + "\n    ]"
        for name, rows in found["prompts"].items()
    )
    text = f'{{\n  "load": {lines},\n  "prompts": {{\n{tables}\n  }}\n}}\n'
    write_text(PATH, text)


if __name__ == "__main__":
    save(facts())
