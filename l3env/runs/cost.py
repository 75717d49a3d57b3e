"""What tokens cost: output tokens per dollar and per joule, from a run's figures and prices that the user gives.

    dollars per hour = sum over GPUs + PIM gigabytes x price + host + power x electricity price
    tokens per dollar = output tokens per second x 3600 / dollars per hour
    tokens per joule = 1 / energy per token

The power is the simulated one (GPUs and memory, static and dynamic), so tokens per joule leave out the host, and the
electricity price should be 0 where rents already include it. Hardware is paid for the whole time of a run, busy or not.
There are no default prices: they differ by an order of magnitude between users.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l3env.errors import L3EnvError
from l3env.files import read_toml
from l3env.machine.specs import SystemSpec
from l3env.units import GB

HOUR_S = 3600.0
KWH_J = 3.6e6
SINGLE = ("host_dollars_per_hour", "electricity_dollars_per_kwh")
BY_DEVICE = ("gpu_dollars_per_hour", "pim_dollars_per_gb_hour")
EXAMPLE = """\
host_dollars_per_hour = 3.0
electricity_dollars_per_kwh = 0.0   # 0: the rents include it
[gpu_dollars_per_hour]
a100-80 = 1.5                       # each GPU, by the name of its preset
[pim_dollars_per_gb_hour]
dimm-pim-ddr4-3200 = 0.002          # each gigabyte, likewise
"""


@dataclass(frozen=True)
class Prices:
    """Dollars for the parts of a system, devices by their names."""

    gpu_dollars_per_hour: Mapping[str, float]
    pim_dollars_per_gb_hour: Mapping[str, float]
    host_dollars_per_hour: float = 0.0
    electricity_dollars_per_kwh: float = 0.0

    @classmethod
    def from_toml(cls, path: Path) -> Prices:
        """Raises L3EnvError for a file that cannot be read, unknown keys, and values that are no prices."""
        raw = read_toml(path)
        for key in raw.keys() - {*SINGLE, *BY_DEVICE}:
            raise L3EnvError(f"{path}: unknown key {key!r}; expected {', '.join((*SINGLE, *BY_DEVICE))}")
        for key in BY_DEVICE:
            if not isinstance(raw.setdefault(key, {}), dict):
                raise L3EnvError(f"{path}: {key} = {raw[key]!r}; expected a table of prices by device name")
        single = {key: raw[key] for key in SINGLE if key in raw}
        for where in (single, *(raw[key] for key in BY_DEVICE)):
            for key, value in where.items():
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                    raise L3EnvError(f"{path}: {key} = {value!r}; expected a price >= 0")
        return cls(**raw)

    def dollars_per_hour(self, system: SystemSpec) -> float:
        """Hardware of one system, electricity apart. Raises L3EnvError for a device without a price."""
        dollars = self.host_dollars_per_hour
        dollars += system.gpus_count * _price(self.gpu_dollars_per_hour, "gpu_dollars_per_hour", system.gpu.name)
        if system.pim is not None:
            price = _price(self.pim_dollars_per_gb_hour, "pim_dollars_per_gb_hour", system.pim.name)
            dollars += system.pim.capacity_bytes / GB * price
        return dollars


def _price(prices: Mapping[str, float], table: str, name: str) -> float:
    if name not in prices:
        known = ", ".join(prices) or "none"
        raise L3EnvError(f"prices: [{table}] has no price for {name!r}; there are: {known}")
    return float(prices[name])


def cost_figures(row: Mapping[str, Any], system: SystemSpec, prices: Prices) -> dict[str, float]:
    """Cost of a run from its ``output_tokens_per_s`` (of the whole system) and ``energy_j_per_token``."""
    rate, energy_j = float(row["output_tokens_per_s"]), float(row["energy_j_per_token"])
    power_w = rate * energy_j
    per_hour = prices.dollars_per_hour(system) + power_w * HOUR_S / KWH_J * prices.electricity_dollars_per_kwh
    return {
        "dollars_per_hour": per_hour,
        "power_w": power_w,
        "tokens_per_dollar": rate * HOUR_S / per_hour if per_hour > 0 else float("inf"),
        "dollars_per_million_tokens": per_hour / (rate * HOUR_S) * 1e6 if rate > 0 else float("inf"),
        "tokens_per_joule": 1 / energy_j if energy_j > 0 else float("inf"),
    }
