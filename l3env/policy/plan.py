"""What a policy may decide beside Knobs: scores of requests, or one iteration, said in full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l3env.engine.kernels.plan import ANY_PIM, AUTO, DECOMPRESSED, Op
from l3env.errors import PlanError
from l3env.knobs import Knobs
from l3env.machine.arrays import HBM

PLACES = {"auto": AUTO, "pim": ANY_PIM, "pim-decompressed": DECOMPRESSED, "hbm": HBM}


@dataclass(frozen=True)
class Scored:
    """Knobs, and a score for some requests, from -1 to 1. A score stays until it is given anew; without one it is 0.

    With ``Order.BY_SCORE`` waiting requests are admitted from the highest score down, and held back below 0 while
    anything runs; with ``Victim.LOWEST_SCORE`` the running request with the lowest score is preempted first. Ties go to
    the earlier request.

    Attributes:
        requests: indices of the View.
        scores: one for each.
    """

    knobs: Knobs
    requests: NDArray[np.int64]
    scores: NDArray[np.float64]

    def checked(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Both as arrays. Raises PlanError for another number of scores, or one that is not from -1 to 1."""
        requests, scores = np.asarray(self.requests, np.int64), np.asarray(self.scores, np.float64)
        if requests.shape != scores.shape or requests.ndim != 1 or not (np.abs(scores) <= 1).all():
            raise PlanError(
                f"scored: {scores.size} scores for {requests.size} requests; expected one each, from -1 to 1"
            )
        return requests, scores


@dataclass(frozen=True)
class Plan:
    """One iteration, decided by the policy itself. Requests are named by the indices of the View.

    Decoding requests go on by themselves; blocks for their growth are taken before admissions, and where they do not
    fit the newest are preempted. An illegal plan raises PlanError.

    Attributes:
        admit: waiting requests to start; a sequence, or a mapping to a place: "auto" (PIM where there is room, else
            HBM), "hbm", "pim", "pim-decompressed" (models that store a latent) or a pool number.
        prefill: prompt tokens for each prefilling request, the new ones included; None gives all their whole rest.
        sub_batch: 0 or 1 for requests that are admitted, moved or resumed; the others stay, new ones go to the smaller.
        preempt: running requests to drop for recomputing.
        pause, resume: decoding requests that keep their KV and stop, and start again.
        decode: False stalls all decoding for this iteration.
        interleave: two interleaved sub-batches; False runs one batch. Without PIM there is always one.
        multi_token: verify a guessed token beside the next one, for models that guess.
    """

    admit: Sequence[int] | Mapping[int, str | int] = ()
    prefill: Mapping[int, int] | None = None
    sub_batch: Mapping[int, int] | None = None
    preempt: Sequence[int] = ()
    pause: Sequence[int] = ()
    resume: Sequence[int] = ()
    decode: bool = True
    interleave: bool = True
    multi_token: bool = True

    def operations(self) -> NDArray[np.int64]:
        """(M, 4) operations in the engine's order. Raises PlanError for a place that does not exist."""
        subs = dict(self.sub_batch or {})
        places = self.admit if isinstance(self.admit, Mapping) else dict.fromkeys(self.admit, "auto")
        rows: list[tuple[int, int, int, int]] = [(Op.PREEMPT, r, 0, 0) for r in self.preempt]
        rows += [(Op.PAUSE, r, 0, 0) for r in self.pause]
        resumed = [(Op.RESUME, r, subs.pop(r, AUTO), 0) for r in self.resume]
        admitted = [(Op.ADMIT, r, _pool(r, place), subs.pop(r, AUTO)) for r, place in places.items()]
        rows += [(Op.MOVE, r, sub, 0) for r, sub in subs.items()]
        rows += resumed + admitted
        rows += [(Op.PREFILL, r, tokens, 0) for r, tokens in (self.prefill or {}).items()]
        return np.array(rows, dtype=np.int64).reshape(-1, 4)


def _pool(request: int, place: str | int) -> int:
    if isinstance(place, str):
        if place not in PLACES:
            raise PlanError(f"plan: request {request}: place {place!r}; expected a pool number or {', '.join(PLACES)}")
        return PLACES[place]
    return int(place)
