"""Systems: devices put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from msgspec import Meta

from l3env.machine.specs.devices import GpuSpec, LinkSpec, PimSpec
from l3env.machine.specs.fields import Count, Natural, NotNegative
from l3env.machine.specs.serving_engine import IDEAL, EngineSpec


@dataclass(frozen=True, kw_only=True)
class ExpertParallelSpec:
    """How the GPUs of a system share the routed experts of every layer.

    ``ranks_count`` GPUs form a group over which the experts are spread; a system may hold several groups. Each token is
    sent to the GPUs of its experts and comes back summed (dispatch and combine).
    """

    ranks_count: Annotated[Count, Meta(le=100_000)]
    slots_count: Annotated[Count, Meta(le=100_000), "expert places over all ranks: experts and their redundant copies"]
    tensor_parallel_count: Annotated[Count, Meta(le=1_024), "GPUs that a replica spans: attention is data-parallel"]
    network: Annotated[LinkSpec, "one GPU's link to other hosts"]
    by_node: Annotated[bool, "a token crosses the network once per host, then goes on over the GPU link"] = False
    shared_is_routed: Annotated[bool, "the shared expert has slots of its own, is sent tokens like a routed one"] = (
        False
    )
    most_nodes_count: Annotated[Count, "hosts that a token's experts may lie on"] = 1000
    imbalance_frac: Annotated[NotNegative, Meta(le=100.0), "(largest - mean) / mean of the ranks' tokens"]
    micro_batches_count: Annotated[Count, Meta(le=2), "2: computing of one hides the all-to-all of the other"] = 1
    overlap_by_phase: Annotated[bool, "they take turns at attention and experts, dispatch and combine beside"] = False
    comm_sm_count: Annotated[Natural, Meta(le=10_000), "multiprocessors that the all-to-all takes while it runs"] = 0
    sources: Mapping[str, str] = field(default_factory=dict)

    def contradictions(self) -> list[str]:
        """What values say against each other."""
        problems = []
        if self.slots_count % self.ranks_count:
            problems.append(
                f"slots_count = {self.slots_count}: expected a multiple of ranks_count = {self.ranks_count}"
            )
        if self.overlap_by_phase and self.micro_batches_count != 2:
            problems.append(f"overlap_by_phase: needs micro_batches_count = 2, not {self.micro_batches_count}")
        return problems


@dataclass(frozen=True, kw_only=True)
class SystemSpec:
    """A serving node: GPUs, what joins them, and where KV may live. ``pim`` is None on a GPU-only system."""

    name: str
    gpu: GpuSpec
    gpus_count: Annotated[Count, Meta(le=100_000)]
    gpu_link: LinkSpec
    pim: PimSpec | None = None
    pim_link: Annotated[LinkSpec | None, "one GPU's link to the PIM side; none where PIM is the GPU's own memory"] = (
        None
    )
    hbm_kv: Annotated[bool, "may KV live in HBM and be attended to by the GPU?"] = True
    max_batched_tokens: Annotated[Count, "sizes the activation buffers that HBM keeps"]
    gpus_per_host_count: Annotated[Natural, Meta(le=1_024), "GPUs that share one ``pim``; 0: all of them"] = 0
    experts: Annotated[ExpertParallelSpec | None, "without: every replica holds all, split like its other weights"] = (
        None
    )
    engine: Annotated[EngineSpec | None, "the serving engine that drives it; by default an ideal one"] = None
    sources: Mapping[str, str] = field(default_factory=dict)

    def contradictions(self) -> list[str]:
        """What values say against each other."""
        problems = []
        if self.pim is None and not self.hbm_kv:
            problems.append("hbm_kv = false without pim: there is no place for KV")
        if self.pim and self.pim.kind != "hbm-pim" and self.pim_link is None:
            problems.append(f"missing key pim_link: {self.pim.kind} is reached over a link")
        if self.gpus_count % self.host_gpus_count:
            problems.append(f"gpus_count = {self.gpus_count}: expected a multiple of {self.gpus_per_host_count} a host")
        if self.experts and self.experts.comm_sm_count > self.gpu.sm_count:
            count, most = self.experts.comm_sm_count, self.gpu.sm_count
            problems.append(f"experts.comm_sm_count = {count}: expected at most the GPU's sm_count = {most}")
        if self.experts and self.gpus_count % self.experts.ranks_count:
            problems.append(f"gpus_count = {self.gpus_count}: expected a multiple of {self.experts.ranks_count} ranks")
        return problems

    @property
    def serving(self) -> EngineSpec:
        """The serving engine that drives it."""
        return self.engine or IDEAL

    @property
    def host_gpus_count(self) -> int:
        """GPUs of one host."""
        return self.gpus_per_host_count or self.gpus_count
