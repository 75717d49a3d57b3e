"""Synthetic reasoning workloads of the L3 paper: lognormal lengths with the published moments.

The parameters are the mu and sigma of ln(tokens) in reference/l3.md section 4 (moment matching: sigma^2 = ln(1 +
(sd/mean)^2), mu = ln(mean) - sigma^2/2). They are models of the data sets, not data.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l3env.errors import TraceError
from l3env.requests.workload import Workload

DEFAULT_COUNT = 1000


@dataclass(frozen=True)
class Lognormal:
    """mu and sigma of ln(tokens); ``divisor`` shortens every length."""

    mu: float
    sigma: float
    divisor: float = 1.0

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """(count,) tokens, rounded, at least 1."""
        return np.maximum(np.rint(rng.lognormal(self.mu, self.sigma, count) / self.divisor), 1).astype(np.int64)


# name: (prompt, output, what it is)
WORKLOADS = {
    "openr1": (Lognormal(4.3256, 0.6910), Lognormal(9.2639, 0.6069), "OpenR1-Math-220k, lognormal model"),
    "dolphin-r1": (Lognormal(4.2218, 1.4738), Lognormal(7.8920, 0.8757), "Dolphin-r1, lognormal model"),
    "dolphin-short": (
        Lognormal(4.2218, 1.4738, 10.0),
        Lognormal(7.8920, 0.8757, 10.0),
        "Dolphin-r1 with every length divided by 10, lognormal model",
    ),
    "openthoughts": (Lognormal(4.2719, 0.6652), Lognormal(8.5441, 0.6553), "OpenThoughts-114k-math, lognormal model"),
}


def generate(name: str, *, n: int = DEFAULT_COUNT, max_output: int | None = None, seed: int = 0) -> Workload:
    """``n`` requests of the workload ``name``, all present at 0; another seed draws other requests.

    ``max_output`` clips outputs at a generation limit (this lowers their mean and sd). Raises TraceError.
    """
    if name not in WORKLOADS:
        raise TraceError(f"synthetic workload {name!r}; expected one of {', '.join(WORKLOADS)}")
    if n < 1 or (max_output is not None and max_output < 1):
        raise TraceError(f"{name}: n={n}, max_output={max_output}; expected whole numbers >= 1")
    prompt, output, what = WORKLOADS[name]
    rng = np.random.default_rng([seed, 0x51])
    prompt_tokens = prompt.draw(rng, n)
    output_tokens = output.draw(rng, n)
    if max_output is not None:
        output_tokens = np.minimum(output_tokens, max_output)
    return Workload.build(
        name,
        np.zeros(n),
        prompt_tokens,
        output_tokens,
        source={
            "format": "synthetic",
            "what": what,
            "note": "drawn from published moments; not the data set's own lengths",
            "arrivals": "closed loop: all present at 0",
            "drawn_with_seed": seed,
        },
    )
