"""Times the kernels between and beside the products of a DeepSeek-V3 layer on one GPU: what the model assumes of them.

    python -m l3env.experiments.gpu.measure_deepseek --out experiments/data/deepseek_kernels.csv

Element-wise kernels are compiled by NVRTC through torch, one pass over memory each with 16-byte accesses: residual and
norm, quantisation to FP8 with a scale for 128 elements, SiLU-mul, expert rows copied to their places and summed back.
Attention is torch's (cuDNN), heads of 192 for queries and keys and 128 for values; products are torch's FP8 ones.
A row of the table: operation, tokens, shape, seconds, bytes, FLOP. Rows are appended as they come.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

REPEATS = 20
HIDDEN, INNER, QUERY_RANK, VALUES = 7168, 2048, 1536, 128 * 128
COLUMNS = ("operation", "tokens", "shape", "time_s", "bytes", "flop", "device")
TOKENS = (1024, 8192, 16_384)

SOURCE = r"""
__device__ __forceinline__ void unpack(const uint4 v, float* f) {
  const unsigned w[4] = {v.x, v.y, v.z, v.w};
  for (int i = 0; i < 4; ++i) {
    f[2 * i] = __uint_as_float(w[i] << 16);
    f[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
  }
}
__device__ __forceinline__ unsigned half_up(float x) { return (__float_as_uint(x) + 0x8000u) >> 16; }
__device__ __forceinline__ uint4 pack(const float* f) {
  unsigned w[4];
  for (int i = 0; i < 4; ++i) w[i] = half_up(f[2 * i]) | (half_up(f[2 * i + 1]) << 16);
  return make_uint4(w[0], w[1], w[2], w[3]);
}
__device__ __forceinline__ unsigned short two_fp8(float low, float high) {
  unsigned short out;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(out) : "f"(high), "f"(low));
  return out;
}
__device__ __forceinline__ uint2 quantised(const float* f, float* scale, bool writes) {
  float most = 1e-8f;
  for (int i = 0; i < 8; ++i) most = fmaxf(most, fabsf(f[i]));
  for (int lane = 8; lane > 0; lane >>= 1) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, lane));
  const float by = 448.0f / most;
  if (writes) *scale = most / 448.0f;
  unsigned a = two_fp8(f[0] * by, f[1] * by) | ((unsigned)two_fp8(f[2] * by, f[3] * by) << 16);
  unsigned b = two_fp8(f[4] * by, f[5] * by) | ((unsigned)two_fp8(f[6] * by, f[7] * by) << 16);
  return make_uint2(a, b);
}
__device__ __forceinline__ float silu_mul(float gate, float up) { return gate / (1.0f + __expf(-gate)) * up; }

extern "C" __global__ void quantise(const uint4* x, uint2* out, float* scale, int eights) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= eights) return;
  float f[8];
  unpack(x[i], f);
  out[i] = quantised(f, scale + i / 16, i % 16 == 0);
}
extern "C" __global__ void activate(const uint4* x, uint4* out, int eights, int inner) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= eights) return;
  const int width = inner / 8, row = i / width, column = i % width;
  float gate[8], up[8];
  unpack(x[row * 2 * width + column], gate);
  unpack(x[row * 2 * width + width + column], up);
  for (int k = 0; k < 8; ++k) gate[k] = silu_mul(gate[k], up[k]);
  out[i] = pack(gate);
}
extern "C" __global__ void activate_quantise(const uint4* x, uint2* out, float* scale, int eights, int inner) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= eights) return;
  const int width = inner / 8, row = i / width, column = i % width;
  float gate[8], up[8];
  unpack(x[row * 2 * width + column], gate);
  unpack(x[row * 2 * width + width + column], up);
  for (int k = 0; k < 8; ++k) gate[k] = silu_mul(gate[k], up[k]);
  out[i] = quantised(gate, scale + i / 16, i % 16 == 0);
}
extern "C" __global__ void norm_residual(const uint4* x, uint4* residual, uint4* out, int width) {
  __shared__ float sums[32];
  const int i = blockIdx.x * width + threadIdx.x;
  float f[8], r[8], sum = 0.0f;
  unpack(x[i], f);
  unpack(residual[i], r);
  for (int k = 0; k < 8; ++k) { f[k] += r[k]; sum += f[k] * f[k]; }
  residual[i] = pack(f);
  for (int lane = 16; lane > 0; lane >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  float total = 0.0f;
  for (int k = 0; k < blockDim.x / 32; ++k) total += sums[k];
  const float by = rsqrtf(total / (8.0f * width) + 1e-6f);
  for (int k = 0; k < 8; ++k) f[k] *= by;
  out[i] = pack(f);
}
extern "C" __global__ void place_rows(const uint4* x, const int* target, uint4* out, int width) {
  const long long from = (long long)blockIdx.x * width, to = (long long)target[blockIdx.x] * width;
  for (int k = threadIdx.x; k < width; k += blockDim.x) out[to + k] = x[from + k];
}
extern "C" __global__ void sum_rows(const uint4* x, const int* source, const float* weight, uint4* out, int width) {
  const int a = source[2 * blockIdx.x], b = source[2 * blockIdx.x + 1];
  const float p = weight[2 * blockIdx.x], q = weight[2 * blockIdx.x + 1];
  for (int k = threadIdx.x; k < width; k += blockDim.x) {
    float f[8], g[8];
    unpack(x[(long long)a * width + k], f);
    unpack(x[(long long)b * width + k], g);
    for (int j = 0; j < 8; ++j) f[j] = p * f[j] + q * g[j];
    out[(long long)blockIdx.x * width + k] = pack(f);
  }
}
"""

Case = tuple[str, int, str, Callable[[], object], float, float]  # name, tokens, shape, call, bytes, FLOP


def seconds(call: Callable[[], object]) -> float:
    """Mean of REPEATS calls, after three to warm up."""
    for _ in range(3):
        call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(REPEATS):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / REPEATS


def elementwise(tokens: int) -> Iterator[Case]:
    """The kernels between the products for so many tokens of a GPU, 8 expert rows a token."""
    kernels = {
        name: torch.cuda._compile_kernel(SOURCE, name)
        for name in ("quantise", "activate", "activate_quantise", "norm_residual", "place_rows", "sum_rows")
    }

    def bf16(rows: int, width: int) -> torch.Tensor:
        return torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)

    def run(name: str, blocks: int, threads: int, *args: Any) -> Callable[[], object]:
        return lambda: kernels[name](grid=(blocks, 1, 1), block=(threads, 1, 1), args=args)

    def quantise(width: int) -> Case:
        x, eights = bf16(tokens, width), tokens * width // 8
        out = torch.empty(tokens, width, device="cuda", dtype=torch.uint8)
        scale = torch.empty(tokens, width // 128, device="cuda")
        call = run("quantise", -(-eights // 256), 256, x, out, scale, eights)
        return "quantise", tokens, str(width), call, tokens * width * (3 + 4 / 128), 0.0

    yield from map(quantise, (HIDDEN, QUERY_RANK, VALUES))
    x, residual, out = (bf16(tokens, HIDDEN) for _ in range(3))
    call = run("norm_residual", tokens, HIDDEN // 8, x, residual, out, HIDDEN // 8)
    yield "norm_residual", tokens, str(HIDDEN), call, tokens * HIDDEN * 8.0, 0.0
    yield "add", tokens, str(HIDDEN), lambda: torch.add(x, residual, out=out), tokens * HIDDEN * 6.0, 0.0
    pairs = 8 * tokens
    up, eights = bf16(pairs, 2 * INNER), pairs * INNER // 8
    inner = torch.empty(pairs, INNER, device="cuda", dtype=torch.bfloat16)
    small = torch.empty(pairs, INNER, device="cuda", dtype=torch.uint8)
    scale = torch.empty(pairs, INNER // 128, device="cuda")
    call = run("activate", eights // 256, 256, up, inner, eights, INNER)
    yield "activate", tokens, f"8 x {INNER}", call, pairs * INNER * 6.0, 0.0
    call = run("activate_quantise", eights // 256, 256, up, small, scale, eights, INNER)
    yield "activate_quantise", tokens, f"8 x {INNER}", call, pairs * INNER * (5 + 4 / 128), 0.0
    del up, inner, small, scale
    rows = torch.empty(pairs, HIDDEN, device="cuda", dtype=torch.uint8)
    placed, target = torch.empty_like(rows), torch.randperm(pairs, device="cuda").int()
    call = run("place_rows", pairs, 448, rows, target, placed, HIDDEN // 16)
    yield "place_rows", tokens, f"8 x {HIDDEN} FP8", call, pairs * HIDDEN * 2.0, 0.0
    del rows, placed
    wide, summed = bf16(pairs, HIDDEN), torch.empty(pairs // 2, HIDDEN, device="cuda", dtype=torch.bfloat16)
    call = run("sum_rows", pairs // 2, 448, wide, target, torch.rand(pairs, device="cuda"), summed, HIDDEN // 8)
    yield "sum_rows", tokens, f"2 of 8 x {HIDDEN}", call, pairs * HIDDEN * 3.0, 0.0


def attention(tokens: int, prompt_tokens: int) -> Iterator[Case]:
    """Causal attention of whole prompts on plain keys (192) and values (128), 128 heads."""
    prompts = tokens // prompt_tokens
    q, k = (torch.randn(prompts, 128, prompt_tokens, 192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    v = torch.randn(prompts, 128, prompt_tokens, 128, device="cuda", dtype=torch.bfloat16)
    flop = prompts * prompt_tokens * (prompt_tokens + 1) / 2 * 81_920

    def call() -> object:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    yield "attention", tokens, f"{prompts} x {prompt_tokens}", call, 0.0, flop


def fp8(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width, device="cuda", dtype=torch.bfloat16).to(torch.float8_e4m3fn)


def product(tokens: int, n: int, k: int) -> Iterator[Case]:
    """One FP8 product with a scale a row and a column."""
    a, b = fp8(tokens, k), fp8(n, k).t()
    by_row, by_column = torch.ones(tokens, 1, device="cuda"), torch.ones(1, n, device="cuda")

    def call() -> object:
        return torch._scaled_mm(a, b, scale_a=by_row, scale_b=by_column, out_dtype=torch.bfloat16)

    yield "product", tokens, f"{n} x {k}", call, 0.0, 2.0 * tokens * n * k


def grouped(tokens: int, n: int, k: int, groups: int = 9) -> Iterator[Case]:
    """The routed experts of a GPU, 8 rows a token in equal groups."""
    each = -(-8 * tokens // groups // 128) * 128
    a, b = fp8(groups * each, k), torch.stack([fp8(n, k) for _ in range(groups)]).transpose(-2, -1)
    ends = torch.arange(1, groups + 1, device="cuda", dtype=torch.int32) * each
    by_row, by_column = torch.ones(groups * each, device="cuda"), torch.ones(groups, n, device="cuda")

    def call() -> object:
        return torch._scaled_grouped_mm(a, b, by_row, by_column, offs=ends, out_dtype=torch.bfloat16)

    yield "grouped", tokens, f"{groups} x {each} x {n} x {k}", call, 0.0, 2.0 * groups * each * n * k


def cases() -> Iterator[Iterator[Case]]:
    """All, the most wanted first."""
    for tokens in reversed(TOKENS):
        yield elementwise(tokens)
    for prompt_tokens in (1024, 2048, 4096, 8192, 16_384):
        yield attention(16_384, prompt_tokens)
    yield attention(8192, 4096)
    for tokens in (64, 128, 4096):
        for n, k in ((2112, 7168), (24_576, 1536), (32_768, 512), (7168, 16_384), (4096, 7168), (7168, 2048)):
            yield product(tokens, n, k)
    for n, k in ((4096, 7168), (7168, 2048)):
        yield grouped(8192, n, k)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the table, a .csv")
    out = parser.parse_args().out
    device = torch.cuda.get_device_name()
    with out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for group in cases():
            torch.cuda.empty_cache()
            try:
                for name, tokens, shape, call, moved, flop in group:
                    row = (name, tokens, shape, f"{seconds(call):.4e}", f"{moved:.0f}", f"{flop:.0f}", device)
                    writer.writerow(row)
                    file.flush()
            except (RuntimeError, AttributeError, TypeError) as error:  # an operation that this build does not have
                print(f"left out: {error}")


if __name__ == "__main__":
    main()
