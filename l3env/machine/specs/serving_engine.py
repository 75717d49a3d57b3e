"""Serving engines: what the host adds to a step of the GPUs, and by which rules memory is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated

from msgspec import Meta

from l3env.machine.specs.fields import Count, Natural, NotNegative, Seconds, Share


@dataclass(frozen=True, kw_only=True)
class MemorySpec:
    """How an engine finds out what HBM is left for KV: it takes a share of the GPU and profiles its largest step."""

    utilisation_frac: Annotated[float, Meta(gt=0, le=1), "share of the GPU's memory that it takes"]
    usable_frac: Annotated[Share, "of the GPU's memory that the driver reports"] = 1.0
    runtime_bytes: Annotated[NotNegative, "context, communication buffers, captured graphs"]
    logit_bytes: Annotated[NotNegative, "held for each sequence and entry of the vocabulary while it profiles"]
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """A serving engine around the GPUs. ``ideal`` adds nothing.

    The host prepares and launches a step: while the one before it runs, where it schedules ahead, and else before it. A
    step is then scheduled once the last but one has ended and the last one is launched.
    """

    name: str
    frontend_s: Annotated[Seconds, "from a request's arrival until it can be scheduled, and from a token to the client"]
    step_host_s: Annotated[Seconds, "host time of a step"]
    step_host_request_s: Annotated[Seconds, "more of it for each request of the step"]
    step_host_eager_s: Annotated[Seconds, "and for launching a step of more tokens than are captured"]
    step_gpu_s: Annotated[Seconds, "GPU time of a step beside the layers: inputs, sampling, gaps"]
    schedules_ahead: Annotated[bool, "a step is scheduled while the one before it runs"]
    blocks_by_chunk: Annotated[bool, "blocks of a prompt are taken chunk by chunk, once the whole would fit"]
    waits_after_preemption: Annotated[bool, "no admission in a step that preempts"]
    captured_tokens: Annotated[
        tuple[Count, ...], "batches captured in CUDA graphs: a step is padded to the next larger one"
    ] = ()
    max_num_seqs: Annotated[Natural, "requests that run at most, by default; 0: no limit"] = 0
    max_num_batched_tokens: Annotated[Natural, "tokens of a step at most, by default; 0: no limit"] = 0
    memory: Annotated[MemorySpec | None, "by default what weights and activations leave"] = None
    sources: Mapping[str, str] = field(default_factory=dict)

    def contradictions(self) -> list[str]:
        """What values say against each other."""
        sizes = self.captured_tokens
        if any(low >= high for low, high in pairwise(sizes)):
            return ["captured_tokens: expected ascending sizes"]
        return []

    def padded_tokens(self, tokens: int) -> int:
        """Tokens that a step of so many computes."""
        return next((size for size in self.captured_tokens if size >= tokens), tokens) if tokens else 0


IDEAL = EngineSpec(
    name="ideal",
    frontend_s=0.0,
    step_host_s=0.0,
    step_host_request_s=0.0,
    step_host_eager_s=0.0,
    step_gpu_s=0.0,
    schedules_ahead=False,
    blocks_by_chunk=False,
    waits_after_preemption=False,
)
