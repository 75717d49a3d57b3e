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
from numpy.typing import NDArray

from l3env.choices import Budget, PimForm, SubBatching
from l3env.knobs import Knobs
from l3env.machine.costs.experts import beside_s
from l3env.machine.tables import Tables, fc_grid_tokens
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


class Steps:
    """Decode steps of equal requests as the tables price them."""

    def __init__(self, tables: Tables, *, multi_token: bool = False) -> None:
        self._tables = tables
        self._coef = {name: float(tables.arrays.coef[name][0]) for name in tables.arrays.coef.dtype.names or ()}
        self._grid = fc_grid_tokens()
        self._queries = 2 if multi_token and self._coef["drafts_count"] else 1

    def capacity(self, place: Place, context_tokens: float) -> float:
        """Requests that fit when all go to the place, new ones' headroom kept."""
        blocks = math.ceil(context_tokens / self._tables.block_tokens)
        pools = self._tables.arrays.pool_blocks[0] * (1 - HEADROOM_FRAC) // blocks
        spread = int(self._coef["spread_pool"])
        pim = float(pools[spread] if place.pim_form == PimForm.DECOMPRESSED else pools[1 : spread or None].sum())
        share, hbm = place.hbm_share_frac, float(pools[0])
        if share in (0.0, 1.0):
            return hbm if share else pim
        return min(hbm / share, pim / (1 - share))

    def tokens_per_s(self, place: Place, requests: int, context_tokens: float) -> float:
        """Tokens that so many present requests emit a second, those that do not fit waiting; guesses left out.

        A mixture is 0 where not all fit: whoever has waiting requests to place then fills both sides, whatever the
        share. It is priced as one batch: requests alternate between sub-batches as they do between places, so that a
        sub-batch may have all its KV in one.
        """
        if 0 < place.hbm_share_frac < 1 and requests > self.capacity(place, context_tokens):
            return 0.0
        count = math.floor(min(requests, self.capacity(place, context_tokens)))
        if count == 0:
            return 0.0
        whole_s = self._one_batch_s(place, count, context_tokens)
        if self._coef["has_pim"] and place.hbm_share_frac in (0.0, 1.0):
            halves = [self._phase_s(place, count // 2, context_tokens, count - count // 2)]
            halves.append(self._phase_s(place, count - count // 2, context_tokens, count // 2))
            whole_s = min(whole_s, sum(halves))
        return count / whole_s

    def _back_s(self, requests: int) -> float:
        """FC, head and guesses of a decode batch."""
        if requests == 0:
            return 0.0
        arrays, rows = self._tables.arrays, requests * self._queries
        fc_s = self._look(arrays.fc_s[0], rows) + self._look(arrays.head_s[0], rows)
        return fc_s + (self._look(arrays.draft_s[0], requests) if self._queries == 2 else 0.0)

    def _gpu_s(self, work_s: float, requests: int) -> float:
        """GPU time of a decode batch: its work beside its all-to-all."""
        arrays, rows = self._tables.arrays, requests * self._queries
        experts_s, comm_s = (self._look(row[0], rows) for row in (arrays.experts_s, arrays.comm_s))
        return beside_s(work_s, experts_s, comm_s, self._coef["dispatch_frac"], self._coef["comm_sm_frac"])

    def _look(self, row: NDArray[np.float64], tokens: int) -> float:
        return float(np.interp(tokens, self._grid, row))

    def _sides_s(self, place: Place, requests: int, context_tokens: float) -> tuple[float, float]:
        """(HBM attention, PIM side) of a decode batch."""
        c, q = self._coef, self._queries
        in_hbm = round(place.hbm_share_frac * requests)
        in_pim, kv = requests - in_hbm, context_tokens + q
        hbm_s = pim_s = 0.0
        if in_hbm:
            token_s = c["hbm_token_s"] if q == 1 else c["hbm_verify_s"]
            hbm_s = token_s * kv * in_hbm + c["hbm_request_s"] * in_hbm * q + c["hbm_fixed_s"]
        if in_pim:
            decompressed = place.pim_form == PimForm.DECOMPRESSED
            kind = "token_s" if q == 1 else "verify_s"
            if decompressed:
                read_s, moved = c[f"spread_{kind}"] * kv * in_pim, c["spread_request_ratio"] * in_pim
            else:
                lanes = (int(c["spread_lane"]) or int(c["lanes_count"])) - 1
                fullest = math.ceil(in_pim / lanes)
                read_s, moved = fullest * (c[f"pim_{kind}"] * kv + c["pim_request_s"] * q), float(in_pim)
            moving_s = c["transfer_request_s"] * moved * q
            read_s += c["pim_batch_s"]
            pim_s = max(read_s + c["transfer_exposed_frac"] * moving_s, moving_s) + c["transfer_latency_s"]
        return hbm_s, pim_s

    def _one_batch_s(self, place: Place, requests: int, context_tokens: float) -> float:
        hbm_s, pim_s = self._sides_s(place, requests, context_tokens)
        return self._gpu_s(max(hbm_s, pim_s) + self._back_s(requests), requests)

    def _phase_s(self, place: Place, requests: int, context_tokens: float, others: int) -> float:
        hbm_s, pim_s = self._sides_s(place, requests, context_tokens)
        return max(self._gpu_s(hbm_s + self._back_s(others), others), pim_s)


class AdaptivePlacement(BasePolicy):
    """New KV goes where decode steps are predicted to be fastest."""

    name = "adaptive-placement"
    decision_interval_s = 1.0

    def __init__(self, *, multi_token: bool = False) -> None:
        self._multi_token = multi_token

    def prepare(self, system: Tables, training: Workload | None) -> None:
        self._steps = Steps(system, multi_token=self._multi_token)
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
            return self._steps.tokens_per_s(place, requests, context_tokens)

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
