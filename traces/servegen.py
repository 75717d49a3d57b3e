"""ServeGen: per-client statistics of a real service, from which requests are drawn.

``chunk-N-trace.csv`` (no header) has a row per 600 s window: start (s), requests/s, CV of gaps, fitted gap distribution
(``Gamma``, ``Weibull`` or empty), its shape, its scale (s). ``chunk-N-dataset.json`` maps six-hour windows to
distributions of token counts. Source: github.com/alibaba/ServeGen; Xiang et al., arXiv 2505.09999. Licence Apache-2.0.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from l3env.errors import TraceError
from l3env.requests.workload import Workload
from l3env.traces.containers import parse_csv
from l3env.traces.reading import MAX_TOKENS, FileFormat, member_names, read_members
from l3env.traces.spec import parse_positive, parse_seed
from l3env.traces.window import Window, parse_window

TRACE_COLUMNS = ("window_start_s", "rate_per_s", "gap_cv", "distribution", "shape", "scale_s")
WINDOW_S = 600.0
LENGTHS_WINDOW_S = 21600
DISTRIBUTIONS = ("Gamma", "Weibull", "")
DEFAULT_WINDOW = Window(0.0, 3600.0)
MEMBER = re.compile(r"(?:^|/)chunk-(\d+)-(trace\.csv|dataset\.json)$")
MODALITIES = ("image", "audio", "video")
PROMPT_CHOICES = ("all", "text")

Distribution = tuple[NDArray[np.int64], NDArray[np.float64]]  # values, cumulative probabilities


@dataclass(frozen=True)
class Client:
    """One client's windows and, where published, the bytes of its length distributions."""

    number: int
    rate_per_s: NDArray[np.float64]  # (W,)
    kind: list[str]  # (W,)
    shape: NDArray[np.float64]  # (W,)
    dataset: bytes | None
    file: str


def matches(path: Path) -> bool:
    """True for a folder or archive whose first files are ``chunk-N-trace.csv`` or ``chunk-N-dataset.json``."""
    try:
        return any(MEMBER.search(name) for name in member_names(path, limit=3))
    except TraceError:
        return False


def load(
    path: Path,
    *,
    window: Window | None = None,
    scale: float = 1.0,
    subset: str | None = None,
    prompt: str = "all",
    lengths: Workload | None = None,
    seed: int = 0,
) -> Workload:
    """Draws the requests of ``window`` (default: the first hour; its start becomes time 0). Arrival in s.

    In each client's 600 s window the number of arrivals is the published one (rate x 600 s x ``scale``, a fraction
    rounded at random), and the gaps between them have the fitted shape, scaled to fill the window. The published scale
    describes only the time between a window's first and last arrival, so it is not used. Draws are fixed by ``seed``,
    client and window, so a longer window begins with the same requests.

    Prompt and output lengths come from the client's six-hour distributions, independently (no joint one is published).
    For mm-image the prompt is the text tokens plus the tokens of as many images, audio and video clips as the request
    has (counts and sizes drawn); ``prompt="text"`` leaves these out. ``session_idx`` is the client's number.

    ``subset`` picks a set where the archive holds several. A set with rates only needs ``lengths``, a workload whose
    (prompt, output) pairs are drawn with replacement. Raises TraceError naming file, row and field.
    """
    if not (np.isfinite(scale) and scale > 0):
        raise TraceError(f"{path}: scale {scale}; expected a finite number > 0")
    if prompt not in PROMPT_CHOICES:
        raise TraceError(f"{path}: prompt {prompt!r}; expected one of {', '.join(PROMPT_CHOICES)}")
    name, clients = read_clients(path, subset)
    if lengths is None and all(client.dataset is None for client in clients):
        raise TraceError(
            f"{path}: set {name} has arrival rates only; expected lengths=TRACE (for example lengths=sharegpt-8k) "
            "to draw token counts from"
        )
    bounds_s = _bounds(path, window or DEFAULT_WINDOW, len(clients[0].rate_per_s))
    drawn = [_draw_client(client, bounds_s, scale, seed, prompt, lengths) for client in clients]
    arrival_s = np.concatenate([part[0] for part in drawn])
    if not arrival_s.size:
        raise TraceError(f"{path}: no request arrives in [{bounds_s[0]:g}, {bounds_s[1]:g}) s")
    order = np.argsort(arrival_s, kind="stable")
    return Workload.build(
        f"servegen-{name}",
        arrival_s[order] - bounds_s[0],
        np.concatenate([part[1] for part in drawn])[order],
        np.concatenate([part[2] for part in drawn])[order],
        session_idx=np.repeat([client.number for client in clients], [len(part[0]) for part in drawn])[order],
        source={
            "file": str(path),
            "format": FORMAT.name,
            "skipped": {},
            "note": "drawn from per-client statistics; not recorded requests",
            "set": name,
            "clients": len(clients),
            "window_s": [float(bound) for bound in bounds_s],
            "lengths": lengths.name if lengths is not None else "the clients' own distributions",
            "scale": scale,
            "prompt": prompt,
            "drawn_with_seed": seed,
        },
    )


def read_clients(path: Path, subset: str | None) -> tuple[str, list[Client]]:
    """The name of the set and its clients by number."""
    names = member_names(path)
    sets = sorted({_set_of(name, path) for name in names if MEMBER.search(name)})
    if not sets:
        raise TraceError(f"{path}: no chunk-N-trace.csv in it; expected a ServeGen folder or archive")
    if subset is None and len(sets) > 1:
        raise TraceError(f"{path}: holds the sets {', '.join(sets)}; expected subset= with one of them")
    chosen = subset or sets[0]
    if chosen not in sets:
        raise TraceError(f"{path}: subset {chosen!r}; expected one of {', '.join(sets)}")
    traces: dict[int, tuple[str, bytes]] = {}
    datasets: dict[int, bytes] = {}
    for name, data in read_members(path, MEMBER.pattern):
        found = MEMBER.search(name)
        if found and _set_of(name, path) == chosen:
            if found[2] == "trace.csv":
                traces[int(found[1])] = (f"{path}!{name}", data)
            else:
                datasets[int(found[1])] = data
    alone = sorted(traces.keys() ^ datasets.keys()) if datasets else []
    if alone:
        raise TraceError(f"{path}: set {chosen}: chunk {alone[0]} has only one of its two files ({len(alone)} such)")
    clients = [_client(number, *traces[number], datasets.get(number)) for number in sorted(traces)]
    windows = {len(client.rate_per_s) for client in clients}
    if len(windows) > 1:
        raise TraceError(f"{path}: set {chosen}: clients have {sorted(windows)} windows; expected the same number")
    return chosen, clients


def _set_of(name: str, path: Path) -> str:
    parent = name.rpartition("/")[0].rpartition("/")[2]
    return parent or path.name.partition(".")[0]


def _client(number: int, file: str, data: bytes, dataset: bytes | None) -> Client:
    table = parse_csv(data, file, names=TRACE_COLUMNS)
    start_s = table.numbers("window_start_s")
    table.require(start_s == np.arange(len(table)) * WINDOW_S, "window_start_s", "windows of 600 s from 0, in order")
    rate_per_s = table.numbers("rate_per_s")
    shape = table.numbers("shape")
    kind = table.columns["distribution"].to_pylist()
    table.require(np.array([name in DISTRIBUTIONS for name in kind]), "distribution", "Gamma, Weibull or nothing")
    idle_mask = np.array([name == "" for name in kind])
    table.require(
        idle_mask == (rate_per_s == 0), "distribution", "a distribution where, and only where, the rate is > 0"
    )
    table.require(idle_mask | (shape > 0), "shape", "a number > 0")
    return Client(number, rate_per_s, kind, shape, dataset, file)


def _bounds(path: Path, window: Window, windows: int) -> tuple[float, float]:
    span_s = windows * WINDOW_S
    start_s, end_s = window.bounds(0.0, span_s)
    if start_s >= span_s:
        raise TraceError(f"{path}: window starts at {start_s:g} s; expected less than the {span_s:g} s of the set")
    return start_s, min(end_s, span_s)


def _draw_client(
    client: Client,
    bounds_s: tuple[float, float],
    scale: float,
    seed: int,
    prompt: str,
    lengths: Workload | None,
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Arrival, prompt and output of one client's requests in ``bounds_s``."""
    parts = []
    samplers: dict[int, Mapping[str, Distribution]] = {}
    for window in range(int(bounds_s[0] // WINDOW_S), int(np.ceil(bounds_s[1] / WINDOW_S))):
        if client.rate_per_s[window] == 0:
            continue
        rng = np.random.default_rng([seed, client.number, window])
        times_s = window * WINDOW_S + _window_times(client, window, scale, rng)
        if lengths is not None:
            rows = rng.integers(0, len(lengths), times_s.size)
            tokens = lengths.prompt_tokens[rows], lengths.output_tokens[rows]
        else:
            key = int(window * WINDOW_S) // LENGTHS_WINDOW_S * LENGTHS_WINDOW_S
            if key not in samplers:
                samplers[key] = distributions(client, key)
            tokens = _draw_lengths(samplers[key], times_s.size, prompt, rng)
        keep_mask = (times_s >= bounds_s[0]) & (times_s < bounds_s[1])
        parts.append((times_s[keep_mask], tokens[0][keep_mask], tokens[1][keep_mask]))
    if not parts:
        return np.zeros(0), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    times, prompts, outputs = zip(*parts, strict=True)
    return np.concatenate(times), np.concatenate(prompts), np.concatenate(outputs)


def _window_times(client: Client, window: int, scale: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Ascending times in [0, 600): rate x 600 x scale of them, gaps of the fitted shape scaled to the window."""
    expected = round(client.rate_per_s[window] * WINDOW_S, 6) * scale
    count = int(expected) + int(rng.random() < expected % 1)
    shape = client.shape[window]
    gaps = rng.gamma(shape, 1.0, count + 1) if client.kind[window] == "Gamma" else rng.weibull(shape, count + 1)
    total = gaps.sum()
    if not (np.isfinite(total) and total > 0):  # a shape near 0 underflows: all mass in one gap, anywhere
        return np.full(count, rng.random() * WINDOW_S)
    times_s: NDArray[np.float64] = np.minimum(np.cumsum(gaps)[:-1] / total, np.nextafter(1.0, 0.0)) * WINDOW_S
    return times_s


def distributions(client: Client, key: int) -> Mapping[str, Distribution]:
    """The client's distributions in the six-hour window that starts at ``key`` s; empty ones left out."""
    file = client.file.replace("trace.csv", "dataset.json")
    try:
        fields = json.loads(client.dataset or b"{}")[str(key)]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TraceError(f"{file}: window {key}: cannot be read ({error!r}); expected JSON with that key") from error
    found = {}
    for name, text in fields.items():
        if name == "reason_ratio":
            continue
        distribution = _parse_distribution(file, key, name, text)
        if distribution is not None:
            found[name] = distribution
    return found


def _parse_distribution(file: str, key: int, name: str, text: str) -> Distribution | None:
    where = f"{file}: window {key}, field {name}"
    try:
        table = ast.literal_eval(text)
        values = np.array(list(table.keys()), dtype=np.int64)
        chances = np.array(list(table.values()), dtype=np.float64)
    except (ValueError, SyntaxError, AttributeError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        raise TraceError(f"{where}: got {str(text)[:40]!r}; expected a Python dict of value: probability") from error
    if not values.size:
        return None
    low = 1 if name in ("input_tokens", "output_tokens", "text_tokens") else 0
    if values.min() < low or values.max() > MAX_TOKENS:
        raise TraceError(f"{where}: got values {values.min()} to {values.max()}; expected {low} to {MAX_TOKENS}")
    if not (np.isfinite(chances).all() and (chances >= 0).all() and abs(chances.sum() - 1) < 1e-3):
        raise TraceError(f"{where}: probabilities sum to {chances.sum():g}; expected 1")
    return values, np.cumsum(chances) / chances.sum()


def _draw(distribution: Distribution, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    values, cumulative = distribution
    places = np.searchsorted(cumulative, rng.random(count), side="right")
    return values[np.minimum(places, values.size - 1)]


def _draw_lengths(
    fields: Mapping[str, Distribution], count: int, prompt: str, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    side = "input_tokens" if "input_tokens" in fields else "text_tokens"
    for name in (side, "output_tokens"):
        if name not in fields:
            raise TraceError(f"ServeGen: a client sends requests in a window without {name}; expected a distribution")
    prompt_tokens = _draw(fields[side], count, rng)
    output_tokens = _draw(fields["output_tokens"], count, rng)
    if prompt == "all":
        for modality in MODALITIES:
            prompt_tokens = prompt_tokens + _draw_items(fields, modality, count, rng)
    return prompt_tokens, output_tokens


def _draw_items(
    fields: Mapping[str, Distribution], modality: str, count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """(count,) tokens of a request's images (or audio, video): a drawn number of items of drawn sizes."""
    if f"{modality}_tokens" not in fields or f"{modality}_count" not in fields:
        return np.zeros(count, dtype=np.int64)
    items = _draw(fields[f"{modality}_count"], count, rng)
    sizes = _draw(fields[f"{modality}_tokens"], int(items.sum()), rng)
    return np.bincount(np.repeat(np.arange(count), items), weights=sizes, minlength=count).astype(np.int64)


FORMAT = FileFormat(
    "servegen",
    "ServeGen per-client statistics (folder or tar): requests are drawn",
    matches,
    load,
    {"window": parse_window, "scale": parse_positive, "subset": str, "prompt": str, "lengths": str, "seed": parse_seed},
)
