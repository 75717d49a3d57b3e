"""Times of one tensor-parallel shard of a transformer layer on the GPU at hand, measured. Imports nothing of l3env.

CUDA events under graph replay: a graph holds many calls of one operation, so a time includes the gap to the next kernel
of a graph and no Python. Weights and KV rotate through more memory than the L2 cache holds; inputs stay, as the
activations that the operation before has just written do. Data is random: zeros draw less power and run faster.

Runs resume: every row is appended to the CSV at once, and rows that are there are not measured again. The file runs by
itself as well, where l3env is not installed: ``python gpu_measure.py PLAN.json OUT.csv --budget-s 500``.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

COLUMNS = ("op", "model", "tp", "tokens", "batch", "kv_len", "k", "n", "backend", "ms", "ms_low", "ms_high")
ROTATE_BYTES = 512 * 2**20  # several times the L2 cache of any GPU there is
REPLAYS = 7
GRAPH_S = 2e-3  # a graph is filled to about this long
NODES_MOST = 256
BUSY_BYTES = 2 * 2**30
BUSY_PERCENT = 20

Call = Callable[[], Any]


@dataclass(frozen=True)
class Shard:
    """What one GPU holds of one layer."""

    model: str
    tp: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    gated: bool

    def linear(self) -> dict[str, tuple[int, int]]:
        """(input, output) sizes of the linear operations."""
        q = self.heads * self.head_size
        return {
            "qkv": (self.hidden, q + 2 * self.kv_heads * self.head_size),
            "o": (q, self.hidden),
            "up": (self.hidden, (2 if self.gated else 1) * self.ffn),
            "down": (self.ffn, self.hidden),
        }


class GpuError(Exception):
    """The GPU cannot be measured; one line says why."""


def require_idle_gpu() -> None:
    """Raises GpuError without a CUDA torch, without a GPU, or when something else runs on it."""
    if torch.version.cuda is None:
        raise GpuError(f"torch {torch.__version__} is built without CUDA: install a CUDA build to measure a GPU")
    if not torch.cuda.is_available():
        raise GpuError("no CUDA GPU is visible to torch: check the driver and CUDA_VISIBLE_DEVICES")
    used_bytes, busy_percent = _use()
    if used_bytes > BUSY_BYTES or busy_percent > BUSY_PERCENT:
        raise GpuError(
            f"{torch.cuda.get_device_name()} is busy ({used_bytes / 2**30:.1f} GiB in use, {busy_percent:.0f} % load): "
            "times would be wrong; stop what runs there or choose another GPU with CUDA_VISIBLE_DEVICES"
        )


def _use() -> tuple[float, float]:
    """(bytes in use, load in percent) of the current GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        uuid = str(torch.cuda.get_device_properties(0).uuid)
        query = [tool, "--query-gpu=uuid,memory.used,utilization.gpu", "--format=csv,noheader,nounits"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout
        for line in answer.splitlines():
            name, used_mib, load = (part.strip() for part in line.split(","))
            if uuid in name and used_mib.isdigit() and load.isdigit():
                return float(used_mib) * 2**20, float(load)
    free, total = torch.cuda.mem_get_info()
    return float(total - free), 0.0


def describe_gpu() -> dict[str, Any]:
    """What was measured on what."""
    props = torch.cuda.get_device_properties(0)
    return {
        "gpu": props.name,
        "memory_bytes": props.total_memory,
        "sm_count": props.multi_processor_count,
        "l2_bytes": props.L2_cache_size,
        "compute_capability": f"{props.major}.{props.minor}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


# -- timing ----------------------------------------------------------------------------------------------------------


def time_calls(calls: list[Call]) -> tuple[float, float, float]:
    """(median, low, high) seconds of one call; the calls are the same operation on rotating buffers."""
    for call in calls[:3]:
        call()
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for call in calls[:2]:
        call()
    end.record()
    end.synchronize()
    guess_s = max(start.elapsed_time(end) / min(2, len(calls)) / 1e3, 2e-6)
    nodes = max(1, min(NODES_MOST, math.ceil(GRAPH_S / guess_s)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(nodes):
            calls[i % len(calls)]()
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) / 1e3 / nodes for a, b in itertools.pairwise(events)]
    graph.reset()
    return statistics.median(times), min(times), max(times)


class Pool:
    """Random bf16 memory from which operands are cut, one after the other."""

    def __init__(self, size_bytes: int) -> None:
        self.flat = torch.empty(size_bytes // 2, dtype=torch.bfloat16, device="cuda").normal_(0, 0.05)

    def rotating(self, *shapes: tuple[int, ...]) -> list[list[torch.Tensor]]:
        """Sets of tensors of these shapes, enough of them to pass the L2 cache by."""
        sizes = [math.prod(shape) for shape in shapes]
        sets = max(1, min(64, math.ceil(ROTATE_BYTES / (2 * sum(sizes))), self.flat.numel() // sum(sizes)))
        out, at = [], 0
        for _ in range(sets):
            one = []
            for shape, size in zip(shapes, sizes, strict=True):
                one.append(self.flat[at : at + size].view(shape))
                at += size
            out.append(one)
        return out


class Rows:
    """The CSV: appended row by row, read back to resume."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: set[tuple[str, ...]] = set()
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                self.done = {self.key(row) for row in csv.DictReader(file)}
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(COLUMNS)

    @staticmethod
    def key(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(row.get(name, "")) for name in COLUMNS[:9])

    def missing(self, **row: Any) -> bool:
        return self.key(row) not in self.done

    def add(self, times_s: tuple[float, float, float], **row: Any) -> None:
        ms = dict(zip(COLUMNS[9:], (f"{t * 1e3:.6g}" for t in times_s), strict=True))
        self.done.add(self.key(row))
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS, restval="").writerow({**row, **ms})


# -- operations ------------------------------------------------------------------------------------------------------


def matmul_calls(pool: Pool, tokens: int, k: int, n: int) -> list[Call]:
    """(tokens, k) x (n, k)^T, as a linear layer computes it."""
    x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16)
    y = torch.empty(tokens, n, device="cuda", dtype=torch.bfloat16)
    return [lambda w=w: torch.mm(x, w.t(), out=y) for (w,) in pool.rotating((n, k))]  # type: ignore[misc]


def fp8_calls(tokens: int, k: int, n: int) -> list[Call]:
    """The same in FP8 (E4M3), one scale a tensor, bf16 out."""
    rows = max(16, tokens)
    x = torch.randn(rows, k, device="cuda").to(torch.float8_e4m3fn)
    sets = max(1, min(64, math.ceil(ROTATE_BYTES / (k * n))))
    weights = [torch.randn(n, k, device="cuda").to(torch.float8_e4m3fn) for _ in range(sets)]
    one = torch.ones((), device="cuda")
    return [
        lambda w=w: torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)  # type: ignore[misc]
        for w in weights
    ]


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """FlashAttention-2 as torch ships it: (batch, length, heads, size), GQA, causal from the lower right."""
    result = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False, scale=None
    )
    return result[0]


def cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """cuDNN's attention; causal from the upper left, so for whole prompts (or no mask) only."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal, enable_gqa=True
        ).transpose(1, 2)


def default(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """Whatever torch takes by itself."""
    return functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal, enable_gqa=True
    ).transpose(1, 2)


def lower_right(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """torch's own causal mask from the lower right."""
    group = q.shape[2] // k.shape[2]
    mask = causal_lower_right(q.shape[1], k.shape[1]) if causal else None
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    return functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
    )


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """Whatever torch takes with a mask written out."""
    key = (q.shape[1], k.shape[1])
    if key not in MASKS:
        MASKS.clear()
        MASKS[key] = torch.ones(key, dtype=torch.bool, device="cuda").tril(key[1] - key[0])
    return functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=MASKS[key], enable_gqa=True
    )


MASKS: dict[tuple[int, int], torch.Tensor] = {}


def merge(a: torch.Tensor, lse_a: torch.Tensor, b: torch.Tensor, lse_b: torch.Tensor) -> torch.Tensor:
    """Joins attention over two halves of the keys."""
    share = torch.sigmoid(lse_a - lse_b)
    return (a.float() * share + b.float() * (1 - share)).to(a.dtype)


def split(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """cuDNN over the history without a mask and over the new tokens with one, joined as FlashInfer's cascades are."""
    history = k.shape[1] - q.shape[1]
    if not causal or history == 0:
        return cudnn(q, k, v, causal)
    qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    a, lse_a = attend(qt, kt[:, :, :history], vt[:, :, :history], None, True, 0.0, False, False)[:2]
    b, lse_b = attend(qt, kt[:, :, history:], vt[:, :, history:], None, True, 0.0, True, False)[:2]
    return compiled(merge)(a, lse_a.reshape(*a.shape[:3], 1), b, lse_b.reshape(*b.shape[:3], 1)).transpose(1, 2)


COMPILED: dict[Any, Any] = {}


def compiled(function: Any) -> Any:
    """The function as torch compiles it, once for each shape."""
    if function not in COMPILED:
        torch._dynamo.config.recompile_limit = 10_000
        torch._dynamo.config.accumulated_recompile_limit = 100_000
        COMPILED[function] = torch.compile(function, dynamic=False)
    return COMPILED[function]


ATTENTION = {
    "flash": flash,
    "cudnn": cudnn,
    "default": default,
    "lower_right": lower_right,
    "masked": masked,
    "split": split,
}
WHOLE_PROMPT_ONLY = ("cudnn", "default")  # causal from the upper left


def attention_calls(pool: Pool, shard: Shard, backend: str, tokens: int, batch: int, kv_len: int) -> list[Call]:
    """Attention of ``tokens`` new tokens of each of ``batch`` requests on ``kv_len`` tokens in all."""
    q = torch.randn(batch, tokens, shard.heads, shard.head_size, device="cuda", dtype=torch.bfloat16)
    kv = (batch, kv_len, shard.kv_heads, shard.head_size)
    attend = ATTENTION[backend]
    return [lambda k=k, v=v: attend(q, k, v, tokens > 1) for k, v in pool.rotating(kv, kv)]  # type: ignore[misc]


# -- a stack of layers -----------------------------------------------------------------------------------------------


def add_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual addition and RMS norm."""
    total = (x + residual).float()
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5)
    return (total * scale * weight).to(x.dtype), total.to(x.dtype)


def rope_and_store(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, heads: int
) -> torch.Tensor:
    """Rotates Q and K (batch, tokens, heads, size), writes K and V to the end of the cache, returns Q."""
    kv_heads = keys.shape[2]
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)

    def turn(x: torch.Tensor) -> torch.Tensor:
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    keys.copy_(turn(k))
    values.copy_(v)
    return turn(q)


def gate(x: torch.Tensor) -> torch.Tensor:
    """SwiGLU's activation."""
    a, b = x.chunk(2, dim=-1)
    return functional.silu(a) * b


def activation(shard: Shard) -> tuple[Callable[[torch.Tensor], torch.Tensor], str, int]:
    """The activation, its name in the CSV and its input's size."""
    return (gate, "gate", 2 * shard.ffn) if shard.gated else (functional.gelu, "gelu", shard.ffn)


class Stack:
    """Layers with weights of their own, norms, RoPE, KV cache writes, residuals: all that one step runs."""

    def __init__(self, shard: Shard, layers: int) -> None:
        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02

        self.shard = shard
        self.weights = [{name: randn(n, k) for name, (k, n) in shard.linear().items()} for _ in range(layers)]
        self.norm = torch.ones(shard.hidden, device="cuda", dtype=torch.bfloat16)
        self.add_norm, self.rope, self.activation = (
            compiled(function) for function in (add_norm, rope_and_store, activation(shard)[0])
        )

    def step(self, tokens: int, batch: int, kv_len: int, backend: str) -> Call:
        """One iteration: ``tokens`` new tokens of each request at the end of ``kv_len``."""
        s = self.shard
        x0 = torch.randn(batch * tokens, s.hidden, device="cuda", dtype=torch.bfloat16)
        kv = (2, batch, kv_len, s.kv_heads, s.head_size)
        caches = [torch.randn(kv, device="cuda", dtype=torch.bfloat16) for _ in self.weights]
        angle = torch.rand(1, tokens, 1, s.head_size // 2, device="cuda")
        cos, sin = angle.cos(), angle.sin()
        attend = ATTENTION[backend]

        def run() -> torch.Tensor:
            x, residual = x0, x0
            for weights, cache in zip(self.weights, caches, strict=True):
                x, residual = self.add_norm(x, residual, self.norm)
                qkv = functional.linear(x, weights["qkv"]).view(batch, tokens, -1, s.head_size)
                new = cache[:, :, kv_len - tokens :]
                q = self.rope(qkv, cos, sin, new[0], new[1], s.heads)
                out = attend(q, cache[0], cache[1], tokens > 1)
                x = functional.linear(out.reshape(batch * tokens, -1), weights["o"])
                x, residual = self.add_norm(x, residual, self.norm)
                x = functional.linear(self.activation(functional.linear(x, weights["up"])), weights["down"])
            return x

        return run


# -- the plan --------------------------------------------------------------------------------------------------------


def measure_linear(rows: Rows, pool: Pool, shard: Shard, tokens_list: list[int], fp8: bool) -> Iterator[str]:
    for name, (k, n) in shard.linear().items():
        for tokens in tokens_list:
            row = {"op": f"linear_{name}", "model": shard.model, "tp": shard.tp, "tokens": tokens, "k": k, "n": n}
            if rows.missing(**row, backend="bf16"):
                yield f"{shard.model} tp {shard.tp}: {name}, {tokens} tokens"
                rows.add(time_calls(matmul_calls(pool, tokens, k, n)), **row, backend="bf16")
            if fp8 and tokens % 16 == 0 and rows.missing(**row, backend="fp8"):
                yield f"{shard.model} tp {shard.tp}: {name} in FP8, {tokens} tokens"
                rows.add(time_calls(fp8_calls(tokens, k, n)), **row, backend="fp8")


def measure_attention(
    rows: Rows, pool: Pool, shard: Shard, points: list[tuple[int, int, int]], backends: list[str]
) -> Iterator[str]:
    """``points`` are (new tokens, batch, length in all)."""
    for tokens, batch, kv_len in points:
        op = "prefill_attn" if tokens > 1 else "decode_attn"
        kv_bytes = 4 * batch * kv_len * shard.kv_heads * shard.head_size
        if kv_bytes > 2 * pool.flat.numel():
            continue
        for backend in backends:
            if kv_len > tokens > 1 and backend in WHOLE_PROMPT_ONLY:
                continue
            row = {
                "op": op,
                "model": shard.model,
                "tp": shard.tp,
                "tokens": tokens,
                "batch": batch,
                "kv_len": kv_len,
                "k": shard.heads,
                "n": shard.kv_heads,
                "backend": backend,
            }
            if rows.missing(**row):
                yield f"{shard.model} tp {shard.tp}: {op} {tokens} x {batch} on {kv_len}, {backend}"
                try:
                    rows.add(time_calls(attention_calls(pool, shard, backend, tokens, batch, kv_len)), **row)
                except (RuntimeError, TypeError, ValueError) as error:
                    print(f"{row}: {str(error).splitlines()[0]}", file=sys.stderr)
                    torch.cuda.synchronize()


def measure_copies(rows: Rows) -> Iterator[str]:
    for size in [2**p for p in range(12, 31, 2)]:
        device = torch.empty(size, dtype=torch.uint8, device="cuda")
        other = torch.empty_like(device)
        host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        pairs = {"copy_d2d": (other, device), "copy_h2d": (device, host), "copy_d2h": (host, device)}
        for op, (target, source) in pairs.items():
            if rows.missing(op=op, n=size):
                yield f"{op} {size:,} bytes"
                rows.add(time_calls([lambda t=target, s=source: t.copy_(s, non_blocking=True)]), op=op, n=size)  # type: ignore[misc]


def measure_launch(rows: Rows) -> Iterator[str]:
    if rows.missing(op="launch_gap"):
        yield "launch gap"
        x = torch.zeros(32, device="cuda")
        rows.add(time_calls([lambda: x.add_(1.0)]), op="launch_gap")


def measure_stack(rows: Rows, shard: Shard, layers: int, points: list[tuple[int, int, int]]) -> Iterator[str]:
    """Times of the whole stack of ``layers`` layers; ``n`` holds their number."""
    stack = None
    for tokens, batch, kv_len in points:
        for backend in ("flash", "split" if kv_len > tokens > 1 else "cudnn"):
            row = {
                "op": "stack",
                "model": shard.model,
                "tp": shard.tp,
                "tokens": tokens,
                "batch": batch,
                "kv_len": kv_len,
                "n": layers,
                "backend": backend,
            }
            if rows.missing(**row):
                yield f"{shard.model} tp {shard.tp}: {layers} layers, {tokens} x {batch} on {kv_len}, {backend}"
                stack = stack or Stack(shard, layers)
                try:
                    call = stack.step(tokens, batch, kv_len, backend)
                    rows.add(time_calls([call]), **row)
                    del call
                except (RuntimeError, TypeError, ValueError) as error:
                    print(f"{row}: {str(error).splitlines()[0]}", file=sys.stderr)
                    torch.cuda.synchronize()
        torch.cuda.empty_cache()


def measure_elementwise(rows: Rows, shard: Shard, tokens_list: list[int]) -> Iterator[str]:
    """The stack's small operations one by one."""
    s = shard
    function, name_of_activation, width = activation(shard)
    for tokens in tokens_list:

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

        x, up, norm = randn(tokens, s.hidden), randn(tokens, width), randn(s.hidden)
        qkv = randn(tokens, 1, s.heads + 2 * s.kv_heads, s.head_size)
        kv = randn(2, tokens, 1, s.kv_heads, s.head_size)
        angle = torch.rand(1, 1, 1, s.head_size // 2, device="cuda")
        calls: dict[str, Call] = {
            "add_norm": lambda x=x, norm=norm: compiled(add_norm)(x, x, norm),  # type: ignore[misc]
            name_of_activation: lambda up=up: compiled(function)(up),  # type: ignore[misc]
            "rope": lambda q=qkv, a=angle, kv=kv: compiled(rope_and_store)(q, a, a, kv[0], kv[1], s.heads),  # type: ignore[misc]
        }
        for name, call in calls.items():
            row = {"op": f"small_{name}", "model": s.model, "tp": s.tp, "tokens": tokens}
            if rows.missing(**row):
                yield f"{s.model} tp {s.tp}: {name}, {tokens} tokens"
                rows.add(time_calls([call]), **row)


def steps(plan: dict[str, Any], rows: Rows) -> Iterator[str]:
    """Everything a plan asks for, in its order; yields before each measurement. A part that fails leaves the rest."""
    pool = Pool(int(plan["pool_bytes"]))
    for part in plan["parts"]:
        try:
            yield from _part(part, rows, pool)
        except Exception as error:
            print(f"{part['kind']} {part.get('shard')}: {error!r}", file=sys.stderr)
            traceback.print_exc()


def _part(part: dict[str, Any], rows: Rows, pool: Pool) -> Iterator[str]:
    kind = part["kind"]
    if kind == "copies":
        yield from measure_copies(rows)
        return
    if kind == "launch":
        yield from measure_launch(rows)
        return
    shard = Shard(**part["shard"])
    if kind == "linear":
        yield from measure_linear(rows, pool, shard, part["tokens"], part.get("fp8", False))
    elif kind == "attention":
        yield from measure_attention(rows, pool, shard, part["points"], part["backends"])
    elif kind == "small":
        yield from measure_elementwise(rows, shard, part["tokens"])
    elif kind == "stack":
        yield from measure_stack(rows, shard, part["layers"], part["points"])
    else:
        raise ValueError(f"plan: unknown kind {kind!r}")


def shard_fields(shard: Shard) -> dict[str, Any]:
    """A shard as a plan holds it."""
    return asdict(shard)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--budget-s", type=float, default=math.inf)
    options = parser.parse_args()
    require_idle_gpu()
    plan = json.loads(options.plan.read_text(encoding="utf-8"))
    rows = Rows(options.out)
    options.out.with_suffix(".json").write_text(json.dumps(describe_gpu(), indent=2) + "\n", encoding="utf-8")
    began = last = time.perf_counter()
    for count, what in enumerate(steps(plan, rows)):
        now = time.perf_counter()
        if now - last > 5 or count == 0:
            print(f"{now - began:6.1f} s, {count} done: {what}", flush=True)
            last = now
        if now - began > options.budget_s:
            print(f"budget spent after {count} measurements; run again to go on", flush=True)
            return
    print(f"all done in {time.perf_counter() - began:.1f} s", flush=True)


if __name__ == "__main__":
    try:
        main()
    except GpuError as error:
        sys.exit(f"error: {error}")
