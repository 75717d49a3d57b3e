"""FP8 products against DeepGEMM's published times on an H800, and the one parameter that is fitted to them.

    python -m l3env.experiments.gpu.deep_gemm

The table is of February 2025, the month of the published serving figures (github.com/deepseek-ai/DeepGEMM, README at
its release; the shapes are DeepSeek-V3's). Tiles and waves are those fitted to 16-bit products of other models, at
twice the rate; ``fp8_output_bytes_per_s``, the rate at which outputs follow a tile's computing, is fitted to the
prefill shapes (from 4,096 rows on) and holds for the others as it is.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.optimize import minimize_scalar

from l3env import load
from l3env.machine.costs import gpu
from l3env.machine.specs import GpuSpec

TABLE = Path(__file__).parents[1] / "data" / "deepgemm_h800.csv"
FITTED_ROWS = 4096
MODEL = load("model/deepseek-v3")


@dataclass(frozen=True)
class Product:
    """``groups`` products (rows, k) x (k, n) in one kernel, as measured."""

    layout: str
    groups: int
    rows: int
    n: int
    k: int
    seconds: float

    @property
    def flop(self) -> float:
        return 2.0 * self.groups * self.rows * self.n * self.k


def measured() -> list[Product]:
    """The published table."""
    with TABLE.open(newline="") as file:
        return [_product(row) for row in csv.DictReader(file)]


def _product(row: dict[str, str]) -> Product:
    groups, rows, n, k = (int(row[name]) for name in ("groups", "rows", "n", "k"))
    return Product(row["layout"], groups, rows, n, k, 2.0 * groups * rows * n * k / (float(row["tflop_per_s"]) * 1e12))


def modelled_s(device: GpuSpec, product: Product) -> float:
    """The kernel alone, without its launch and at the highest clock: the table's times are short kernels'."""
    device = replace(device, sustained_slowdown_frac=0.0)
    rows, columns = np.array([float(product.rows)]), float(product.n * product.groups)
    total = product.groups * rows
    compute = gpu.matmul_compute_s(MODEL, device, rows, product.k, columns, grouped=product.groups > 1)
    weights = product.groups * product.k * product.n * MODEL.bytes_per_parameter
    time_s = gpu.product_s(MODEL, device, compute, weights, total * product.k, total * product.n)
    return float(time_s[0]) - device.linear_launch_s - device.block_launch_s


def ratios(device: GpuSpec) -> Iterator[tuple[Product, float]]:
    """(product, modelled over measured time)."""
    for product in measured():
        yield product, modelled_s(device, product) / product.seconds


def fitted_bytes_per_s(device: GpuSpec) -> float:
    """Least squares on the logarithm of the ratios of the prefill shapes."""

    def error(exponent: float) -> float:
        trial = replace(device, fp8_output_bytes_per_s=10**exponent)
        return sum(np.log(ratio) ** 2 for product, ratio in ratios(trial) if product.rows >= FITTED_ROWS)

    return float(10 ** minimize_scalar(error, bounds=(11.0, 14.0), method="bounded").x)


def main() -> None:
    device = load("gpu/h800")
    print(f"fitted {fitted_bytes_per_s(device):.4g} B/s, in the preset {device.fp8_output_bytes_per_s:.4g}")
    for product, ratio in ratios(device):
        rate = product.flop / product.seconds / 1e12
        shape = f"{product.layout:10} {product.groups} x {product.rows:5} x {product.n:5} x {product.k:5}"
        print(f"{shape} measured {rate:6.0f} TFLOP/s, modelled {rate / ratio:6.0f}, time ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
