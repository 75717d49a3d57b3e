"""Puts new KV where the next decode steps are predicted to be fastest: HBM, PIM as stored, PIM decompressed, or a share
in each of HBM and PIM.

For every place it works out, from the compiled tables, how many of the present requests would fit, what a decode step
of them would take, interleaved or as one batch, and so the tokens per second; it takes the best place for what it
admits until it looks again. Requests that run stay where they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from l3env.choices import Budget, PimForm, SubBatching
from l3env.knobs import Knobs
from l3env.machine.arrays import HBM
from l3env.machine.batch import Decodes
from l3env.machine.tables import Tables
from l3env.policy.protocol import BasePolicy
from l3env.policy.view import View
from l3env.requests.workload import Workload

SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of KV in HBM, tried besides none and all
GAIN_FRAC = 0.02  # a mixture must promise this much more than one place: requests of whole sizes never split exactly
HEADROOM_FRAC = 0.05
PEEK_COUNT = 64


@dataclass(frozen=True)
class Place:
    """Where new KV goes."""

    hbm_share_frac: float
    pim_form: PimForm = PimForm.STORED


def capacity(tables: Tables, place: Place, context_tokens: float) -> float:
    """Requests that fit when all go to the place, new ones' headroom kept."""
    blocks = math.ceil(context_tokens / tables.block_tokens)
    pools = tables.arrays.pool_blocks[0] * (1 - HEADROOM_FRAC) // blocks
    own = int(tables.arrays.coef["decompressed_pool"][0])
    pim = float(pools[own] if place.pim_form == PimForm.DECOMPRESSED else pools[1 : own or None].sum())
    share, hbm = place.hbm_share_frac, float(pools[HBM])
    if share in (0.0, 1.0):
        return hbm if share else pim
    return min(hbm / share, pim / (1 - share))


def tokens_per_s(
    tables: Tables, place: Place, requests: int, context_tokens: float, *, multi_token: bool = False
) -> float:
    """Tokens that so many present requests emit a second, those that do not fit waiting; guesses left out.

    A mixture is 0 where not all fit: whoever has waiting requests to place then fills both sides, whatever the share.
    It is priced as one batch: requests alternate between sub-batches as they do between places, so that a sub-batch may
    have all its KV in one.
    """
    most = capacity(tables, place, context_tokens)
    mixed = 0 < place.hbm_share_frac < 1
    if mixed and requests > most:
        return 0.0
    count = math.floor(min(requests, most))
    if count == 0:
        return 0.0
    in_hbm = round(place.hbm_share_frac * count)
    pim = "pim-decompressed" if place.pim_form == PimForm.DECOMPRESSED else "pim"
    decodes = [Decodes(in_hbm, context_tokens, "hbm")] if in_hbm else []
    decodes += [Decodes(count - in_hbm, context_tokens, pim)] if count > in_hbm else []
    mode = SubBatching.OFF if mixed else SubBatching.ADAPTIVE
    return count / tables.iteration_s(decodes, sub_batching=mode, multi_token=multi_token)


class AdaptivePlacement(BasePolicy):
    """New KV goes where decode steps are predicted to be fastest."""

    name = "adaptive-placement"
    decision_interval_s = 1.0

    def __init__(self, *, multi_token: bool = False) -> None:
        self._multi_token = multi_token

    def prepare(self, system: Tables, training: Workload | None) -> None:
        self._system = system
        single = [Place(1.0)] if system.has_hbm_kv else []
        mixed: list[Place] = []
        if system.has_pim:
            forms = [PimForm.STORED, PimForm.DECOMPRESSED] if system.model.mla is not None else [PimForm.STORED]
            single += [Place(0.0, form) for form in forms]
            mixed = [Place(share, form) for share in SHARES for form in forms] if system.has_hbm_kv else []
        self._single, self._mixed = single, mixed

    def best(self, requests: int, context_tokens: float) -> Place:
        """The place at which so many requests of a context decode fastest."""

        def rate(place: Place) -> float:
            return tokens_per_s(self._system, place, requests, context_tokens, multi_token=self._multi_token)

        alone = max(self._single, key=rate)
        mixture = max(self._mixed, key=rate, default=alone)
        return mixture if rate(mixture) > (1 + GAIN_FRAC) * rate(alone) else alone

    def decide(self, view: View) -> Knobs:
        base = Knobs(
            prefill_budget_tokens=Budget.UNLIMITED,
            headroom_frac=HEADROOM_FRAC,
            sub_batching=SubBatching.ADAPTIVE,
            multi_token=self._multi_token,
        )
        present = view.waiting_count + view.running_count
        rows = view.waiting(PEEK_COUNT)
        tokens = np.concatenate([rows["prompt_tokens"] + rows["emitted_tokens"], view.running["kv_tokens"]])
        if tokens.size == 0:
            return base
        place = self.best(present, float(np.maximum(tokens, 1).mean()))
        return replace(base, hbm_share_frac=place.hbm_share_frac, pim_form=place.pim_form)
