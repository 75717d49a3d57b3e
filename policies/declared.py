"""What engines share that reserve memory for the longest output a request declares (``max_tokens``).

Workloads declare no limit, so there is one for all requests: an argument, or the longest output among earlier requests.
Only with an argument that no request exceeds is the reservation a guarantee.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from l3env.errors import PolicyError
from l3env.knobs import Knobs
from l3env.machine.tables import Tables
from l3env.policy import LengthPredictor
from l3env.policy.protocol import FixedKnobs, Role
from l3env.requests.workload import Workload


def declared_tokens(given: int | None, training: Workload | None, name: str) -> int:
    """The longest output that any request declares. Raises PolicyError where nothing says it."""
    if given is not None:
        return given
    if training is None or not len(training):
        raise PolicyError(f"{name} needs max_output_tokens, or earlier requests to take their longest output")
    return int(training.output_tokens.max())


class Declared(FixedKnobs):
    """A request starts where its prompt and its longest output, and those of all who run, fit to the end."""

    role = Role.PUBLISHED
    signals = "declared output limit"

    def __init__(self, name: str, knobs: Knobs, max_output_tokens: int | None, **changes: Any) -> None:
        super().__init__(name, knobs, **{"reserve_predicted": True, "headroom_frac": 0.0, **changes})
        self._given_tokens = max_output_tokens

    def prepare(self, system: Tables, training: Workload | None) -> None:
        self._limit_tokens = declared_tokens(self._given_tokens, training, self.name)

    def predictor(self) -> LengthPredictor | None:
        def declared(prompts: NDArray[np.int64]) -> NDArray[np.float64]:
            return np.full(prompts.shape, float(self._limit_tokens))

        return declared
