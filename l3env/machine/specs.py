"""Devices, models and systems as frozen dataclasses, loaded from presets or a user's TOML.

``load("system/l3-dgx-a100")`` reads ``presets/system/l3-dgx-a100.toml``; a path to a TOML file works as well. Each
TOML holds the fields of one dataclass and a ``[sources]`` table with the source of every value. Unknown, missing and
absurd keys are named together in one SpecError.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from l3env.errors import SpecError

PRESET_DIR = Path(__file__).parents[1] / "presets"

PIM_KINDS = ("dimm-bank", "dimm-rank", "hbm-pim", "hbm-pim-ext", "host-cpu")


def positive(**extra: Any) -> Any:
    """A required number > 0."""
    return field(metadata={"low": 0.0, "low_open": True, **extra})


def at_least(low: float, *, default: Any = dataclasses.MISSING, **extra: Any) -> Any:
    """A number >= low; required unless it has a default."""
    return field(default=default, metadata={"low": low, **extra})


def fraction() -> Any:
    """A required number in (0, 1]."""
    return field(metadata={"low": 0.0, "low_open": True, "high": 1.0})


@dataclass(frozen=True, kw_only=True)
class GpuSpec:
    """One GPU. Data-sheet peaks; the share of them that is reached is in the utilisation fields.

    Without the fields that have defaults it is a plain roofline, the larger of compute and memory time. They are what a
    measured GPU adds, see ``costs/gpu.py``; ``l3env calibrate`` and ``experiments/gpu/fit.py`` fit them.
    """

    name: str
    fp16_flop_per_s: float = positive(high=1e17)
    fp8_flop_per_s: float = at_least(0.0, default=0.0, high=1e17)  # for weights of 8 bit; 0: no faster than 16 bit
    fp8_output_bytes_per_s: float = at_least(0.0, default=0.0, high=1e14)  # FP8 products' outputs follow at; 0: beside
    hbm_bytes: float = positive(high=1e13)
    hbm_bytes_per_s: float = positive(high=1e14)
    compute_utilisation_frac: float = fraction()
    memory_utilisation_frac: float = fraction()
    reserved_bytes: float = at_least(0.0)  # CUDA context, libraries: never available to weights or KV
    power_w: float = positive(high=1e4)
    idle_power_w: float = at_least(0.0)
    mac_j: float = at_least(0.0)  # one multiply-accumulate
    hbm_j_per_byte: float = at_least(0.0)
    cache_j_per_byte: float = at_least(0.0)  # L2 + L1 + register file, per byte streamed through
    # linear operations
    sm_count: int = at_least(0, default=0, high=1e4)  # multiprocessors that tiles go over in waves; 0: no tiles
    tile_wave_frac: float = at_least(
        0.0, default=0.0, high=1.0
    )  # share of a last, partly filled wave that is waited for
    tile_ramp_frac: float = at_least(
        0.0, default=0.0, high=10.0
    )  # what a 128 x 128 tile takes longer for loading operands
    roofline_exponent: float = at_least(
        0.0, default=0.0, high=100.0
    )  # p-norm of compute and memory time; 0: the larger
    linear_launch_s: float = at_least(0.0, default=0.0, high=1.0)  # per linear operation
    elementwise_launch_s: float = at_least(0.0, default=0.0, high=1.0)  # norms, RoPE, KV write, activation of a layer
    elementwise_utilisation_frac: float = at_least(0.0, default=0.0, high=1.0)  # of the bandwidth; 0: free
    # prefill attention of one request in one layer
    prefill_launch_s: float = at_least(0.0, default=0.0, high=1.0)
    prefill_utilisation_frac: float = at_least(0.0, default=0.0, high=1.0)  # of the FLOP/s; 0: as linear operations
    prefill_latent_utilisation_frac: float = at_least(0.0, default=0.0, high=1.0)  # MLA's wider keys; 0: as others
    prefill_query_s: float = at_least(0.0, default=0.0, high=1.0)  # per new token: the longest tile runs on alone
    prefill_history_launch_s: float = at_least(0.0, default=0.0, high=1.0)  # more where there is a history
    prefill_tile_tokens: float = at_least(1.0, default=1.0, high=4096)  # fewer new tokens cost as much on a history
    prefill_chunk_ratio: float = at_least(0.0, default=1.0, high=100.0)  # new tokens' pairs cost this on a history
    prefill_history_ratio: float = at_least(0.0, default=1.0, high=100.0)  # pairs of a new token with history cost this
    # decode attention of a batch in one layer
    decode_launch_s: float = at_least(0.0, default=0.0, high=1.0)
    decode_utilisation_frac: float = at_least(0.0, default=0.0, high=1.0)  # of the bandwidth; 0: as linear operations
    decode_tail_frac: float = at_least(0.0, default=0.0, high=1.0)  # least share of a wave that a started one takes
    decode_compute_utilisation_frac: float = at_least(0.0, default=0.0, high=1.0)  # of the FLOP/s; 0: as linear ones
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LinkSpec:
    """A link, one direction."""

    name: str
    bytes_per_s: float = positive(high=1e13)
    utilisation_frac: float = fraction()
    latency_s: float = at_least(0.0, high=1.0)  # per transfer (PCIe) or per all-reduce (GPU interconnect)
    j_per_byte: float = at_least(0.0)
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DramSpec:
    """One DRAM die: its geometry, and timing constraints in clock cycles (names as in JESD79-4)."""

    name: str
    tck_s: float = positive(high=1e-6)
    row_bytes: int = at_least(1)
    column_bytes: int = at_least(1)  # what one column read delivers
    bank_groups_count: int = at_least(1, high=8)
    banks_per_group_count: int = at_least(1, high=8)
    bl_cycles: int = at_least(1)  # data of one column on the pins
    ccd_s_cycles: int = at_least(1)
    ccd_l_cycles: int = at_least(1)
    rrd_s_cycles: int = at_least(1)
    rrd_l_cycles: int = at_least(1)
    faw_cycles: int = at_least(1)
    rcd_cycles: int = at_least(1)
    ras_cycles: int = at_least(1)
    rp_cycles: int = at_least(1)
    rc_cycles: int = at_least(1)
    cl_cycles: int = at_least(1)
    wl_cycles: int = at_least(1)
    wtr_s_cycles: int = at_least(1)
    wtr_l_cycles: int = at_least(1)
    wr_cycles: int = at_least(1)
    rtp_cycles: int = at_least(1)
    refi_cycles: int = at_least(1)
    rfc_cycles: int = at_least(1)
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def banks_count(self) -> int:
        return self.bank_groups_count * self.banks_per_group_count


@dataclass(frozen=True, kw_only=True)
class PimSpec:
    """Memory that holds KV and computes decode attention beside it, for one host.

    DIMM kinds are built from ranks: ``channels x ranks_per_channel`` ranks of ``chips_per_rank`` chips. HBM-PIM and
    the host CPU give their aggregate ``internal_bytes_per_s`` and one channel, one rank.
    """

    name: str
    kind: str
    capacity_bytes: float = positive(high=1e16)
    channels_count: int = at_least(1)
    ranks_per_channel_count: int = at_least(1)
    chips_per_rank_count: int = at_least(1)
    banks_per_chip_count: int = at_least(1)
    channel_bytes_per_s: float = positive(high=1e15)  # external bus of one channel
    internal_bytes_per_s: float = positive(high=1e15)  # sum over the host of what the PUs stream, rows open
    internal_utilisation_frac: float = fraction()  # share left after row switches and refresh
    macs_per_element_count: int = at_least(1)  # N_cmr: multiply-accumulates a PU does per element it fetches
    rankset_overlap: bool = False  # a transfer blocks one rankset only
    holds_weights: bool = False  # the capacity is the GPUs' own HBM
    cell_j_per_byte: float = at_least(0.0)
    mac_j: float = at_least(0.0)
    io_j_per_byte: float = at_least(0.0)  # a byte through the pins
    static_power_w: float = at_least(0.0)
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class AttentionForm:
    """How queries meet stored KV in one layer: what is stored per token, and how often each element is used.

    Attributes:
        kv_heads_count: groups of heads that share stored elements.
        queries_per_kv_head: query heads of each group.
        key_size, value_size: elements of a KV head that a score, and the context, is computed with.
        stored_size: elements of a KV head that are stored: keys and values, or a latent that serves as both.
    """

    kv_heads_count: int
    queries_per_kv_head: int
    key_size: int
    value_size: int
    stored_size: int

    @property
    def heads_count(self) -> int:
        return self.kv_heads_count * self.queries_per_kv_head

    @property
    def macs_per_pair(self) -> int:
        """Multiply-accumulates of a (query token, KV token) pair over all heads: score and context."""
        return self.heads_count * (self.key_size + self.value_size)

    @property
    def stored_elements(self) -> int:
        """Elements stored per token."""
        return self.kv_heads_count * self.stored_size

    @property
    def query_elements(self) -> int:
        return self.heads_count * self.key_size

    @property
    def output_elements(self) -> int:
        return self.heads_count * self.value_size


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): K and V are projections of one latent per token."""

    query_rank: int = at_least(1, high=1e6)
    kv_rank: int = at_least(1, high=1e6)
    nope_size: int = at_least(1, high=1e6)  # of a head's query and key, without position
    rope_size: int = at_least(1, high=1e6)  # with rotary position; the key's is shared by all heads
    value_size: int = at_least(1, high=1e6)
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def stored_size(self) -> int:
        """Elements per token and layer: the latent and the shared rotary key."""
        return self.kv_rank + self.rope_size

    def parameters_count(self, hidden_size: int, heads_count: int) -> int:
        """Down- and up-projections of queries and KV, output projection."""
        query = hidden_size * self.query_rank + self.query_rank * heads_count * (self.nope_size + self.rope_size)
        kv = hidden_size * self.stored_size + self.kv_rank * heads_count * (self.nope_size + self.value_size)
        return query + kv + heads_count * self.value_size * hidden_size


@dataclass(frozen=True, kw_only=True)
class MoeSpec:
    """Mixture of experts in place of the FFN in all layers but the first ones (DeepSeekMoE, arXiv 2401.06066)."""

    experts_count: int = at_least(1, high=1e5)  # routed ones
    chosen_count: int = at_least(1, high=1e5)  # routed experts per token
    shared_count: int = at_least(0, high=100)  # experts that all tokens pass
    expert_ffn_size: int = at_least(1, high=1e7)
    dense_layers_count: int = at_least(0, high=1000)  # first layers with the model's own FFN
    groups_count: int = at_least(1, high=1e4)  # experts come in groups,
    chosen_groups_count: int = at_least(1, high=1e4)  # of which a token may use the best few
    route_scale: float = positive(high=1e3)
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer; weights of 16 or 8 bit, activations of 16 bit."""

    name: str
    layers_count: int = at_least(1, high=1000)
    hidden_size: int = at_least(1, high=1e6)
    heads_count: int = at_least(1, high=1024)
    kv_heads_count: int = at_least(1, high=1024)
    head_size: int = at_least(1, high=1024)
    ffn_size: int = at_least(1, high=1e7)
    gated_ffn: bool = False  # three matrices (gate, up, down) instead of two
    tied_embedding: bool = False
    vocab_size: int = at_least(1, high=1e7)
    context_tokens: int = at_least(1)
    tensor_parallel_count: int = at_least(1, high=1024)  # the deployment the source uses; a system may override
    bytes_per_parameter: float = positive(high=8)
    bytes_per_kv_element: float = positive(high=8)
    mla: LatentSpec | None = None
    moe: MoeSpec | None = None
    draft_modules_count: int = at_least(0, default=0, high=1)  # multi-token prediction: tokens guessed a step
    draft_acceptance_frac: float = at_least(0.0, default=0.0, high=1.0)  # share of the guesses that hold
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def naive_form(self) -> AttentionForm:
        """Attention on plain keys and values: prefill, and decode on decompressed KV."""
        if self.mla is None:
            groups = self.heads_count // self.kv_heads_count
            return AttentionForm(self.kv_heads_count, groups, self.head_size, self.head_size, 2 * self.head_size)
        key, value = self.mla.nope_size + self.mla.rope_size, self.mla.value_size
        return AttentionForm(self.heads_count, 1, key, value, key + value)

    @property
    def stored_form(self) -> AttentionForm:
        """Attention on KV as it is stored: with MLA absorbed, all heads' queries on one latent that is key and value
        (arXiv 2405.04434, section 2.1.2)."""
        if self.mla is None:
            return self.naive_form
        return AttentionForm(1, self.heads_count, self.mla.stored_size, self.mla.kv_rank, self.mla.stored_size)

    def form_bytes_per_token(self, form: AttentionForm) -> float:
        """KV of one token over all layers in a form."""
        return self.layers_count * form.stored_elements * self.bytes_per_kv_element

    @property
    def kv_bytes_per_token(self) -> float:
        """KV of one token over all layers, as stored."""
        return self.form_bytes_per_token(self.stored_form)

    @property
    def decompressed_bytes_per_token(self) -> float:
        """Plain keys and values of one token over all layers."""
        return self.form_bytes_per_token(self.naive_form)

    @property
    def gqa_group_count(self) -> int:
        """Query heads per stored KV head (N_gqa)."""
        return self.stored_form.queries_per_kv_head

    @property
    def moe_layers_count(self) -> int:
        """Layers with experts."""
        return 0 if self.moe is None else self.layers_count - self.moe.dense_layers_count

    @property
    def attention_parameters_count(self) -> int:
        """Weights of one layer's attention."""
        if self.mla is not None:
            return self.mla.parameters_count(self.hidden_size, self.heads_count)
        return 2 * self.hidden_size * (self.heads_count + self.kv_heads_count) * self.head_size

    @property
    def ffn_matrices_count(self) -> int:
        """Gate, up and down, or up and down."""
        return 3 if self.gated_ffn else 2

    @property
    def layer_parameters_count(self) -> int:
        """Weights of one dense layer: attention and the FFN matrices."""
        return self.attention_parameters_count + self.ffn_matrices_count * self.hidden_size * self.ffn_size

    @property
    def expert_parameters_count(self) -> int:
        """Weights of one expert; 0 without."""
        return 0 if self.moe is None else self.ffn_matrices_count * self.hidden_size * self.moe.expert_ffn_size

    def moe_layer_parameters_count(self, experts_count: int) -> int:
        """Weights of one layer with experts, counting so many of them: attention, router and experts."""
        assert self.moe is not None
        router = self.hidden_size * self.moe.experts_count
        return self.attention_parameters_count + router + experts_count * self.expert_parameters_count

    def layers_parameters_count(self, routed_count: int | None = None) -> int:
        """Weights of all layers with so many routed experts a layer (all by default)."""
        dense = (self.layers_count - self.moe_layers_count) * self.layer_parameters_count
        if self.moe is None:
            return dense
        routed = self.moe.experts_count if routed_count is None else routed_count
        return dense + self.moe_layers_count * self.moe_layer_parameters_count(routed + self.moe.shared_count)

    @property
    def embedding_parameters_count(self) -> int:
        """The token embedding, and the head where it has its own."""
        return self.vocab_size * self.hidden_size * (1 if self.tied_embedding else 2)

    @property
    def parameters_count(self) -> int:
        """All weights, norms and biases left out (< 0.1 %), the modules that guess tokens too."""
        return self.layers_parameters_count() + self.embedding_parameters_count

    @property
    def linear_flop_per_token(self) -> float:
        """FLOP of all linear operations for one token: its experts, router and head included, the embedding not."""
        chosen = 0 if self.moe is None else self.moe.chosen_count
        return 2.0 * (self.layers_parameters_count(chosen) + self.vocab_size * self.hidden_size)


@dataclass(frozen=True, kw_only=True)
class ExpertParallelSpec:
    """How the GPUs of a system share the routed experts of every layer.

    ``ranks_count`` GPUs form a group over which the experts are spread; a system may hold several groups. Each token is
    sent to the GPUs of its experts and comes back summed (dispatch and combine).
    """

    ranks_count: int = at_least(1, high=1e5)
    slots_count: int = at_least(1, high=1e5)  # expert places over all ranks: experts and their redundant copies
    tensor_parallel_count: int = at_least(1, high=1024)  # GPUs that a replica spans: attention is data-parallel
    network: LinkSpec  # one GPU's link to other hosts
    by_node: bool = False  # a token crosses the network once per host, then goes on over the GPU link
    shared_is_routed: bool = False  # the shared expert has slots of its own and is sent tokens like a routed one
    most_nodes_count: int = at_least(1, default=1000)  # hosts that a token's experts may lie on
    imbalance_frac: float = at_least(0.0, high=100.0)  # (largest - mean) / mean of the ranks' tokens
    micro_batches_count: int = at_least(1, default=1, high=2)  # 2: computing of one hides the all-to-all of the other
    overlap_by_phase: bool = False  # they take turns at attention and experts: dispatch and combine each beside one
    comm_sm_count: int = at_least(0, default=0, high=1e4)  # multiprocessors that the all-to-all takes while it runs
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SystemSpec:
    """A serving node: GPUs, what joins them, and where KV may live. ``pim`` is None on a GPU-only system."""

    name: str
    gpu: GpuSpec
    gpus_count: int = at_least(1, high=100000)
    gpu_link: LinkSpec
    pim: PimSpec | None = None
    pim_link: LinkSpec | None = None  # one GPU's link to the PIM side; None where PIM sits in the GPU's own memory
    hbm_kv: bool = True  # may KV live in HBM and be attended to by the GPU?
    max_batched_tokens: int = at_least(1)  # sizes the activation buffers that HBM keeps
    gpus_per_host_count: int = at_least(0, default=0, high=1024)  # GPUs that share one ``pim``; 0: all of them
    experts: ExpertParallelSpec | None = None  # None: every replica holds all experts, split like its other weights
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def host_gpus_count(self) -> int:
        """GPUs of one host."""
        return self.gpus_per_host_count or self.gpus_count


Spec = TypeVar("Spec", GpuSpec, LinkSpec, DramSpec, PimSpec, ModelSpec, SystemSpec)
KINDS: dict[str, type] = {
    "gpu": GpuSpec,
    "link": LinkSpec,
    "dram": DramSpec,
    "pim": PimSpec,
    "model": ModelSpec,
    "system": SystemSpec,
    "mla": LatentSpec,  # the last three are tables of a model or a system, without presets of their own
    "moe": MoeSpec,
    "experts": ExpertParallelSpec,
}


def names(kind: str) -> list[str]:
    """Names of the presets of one kind, sorted."""
    return sorted(path.stem for path in (PRESET_DIR / kind).glob("*.toml"))


def load(ref: str, **overrides: Any) -> Any:
    """Loads ``kind/name`` (a preset) or ``kind:path.toml`` (a user's file) into its dataclass.

    Args:
        ref: e.g. ``"system/l3-dgx-a100"``, ``"gpu/h200"``, ``"system:my-node.toml"``.
        overrides: fields to replace, nested ones with ``__``:
            ``load("system/l3-dgx-a100", gpu__hbm_bytes=76 * 2**30)``.

    Raises:
        SpecError: unknown kind or name, or keys that are unknown, missing or absurd (all named at once).
    """
    kind, path = _locate(ref)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise SpecError(f"{path}: cannot be read as TOML: {error}") from None
    for key, value in overrides.items():
        _override(raw, key.split("__"), value, ref)
    return from_mapping(kind, raw, where=str(path) if ":" in ref else ref)


def from_mapping(kind: str, raw: Mapping[str, Any], where: str) -> Any:
    """Builds the dataclass of ``kind`` from plain values; nested specs may be names or tables. Raises SpecError."""
    problems: list[str] = []
    spec = _build(kind, dict(raw), where, "", problems)
    if problems:
        raise SpecError(f"{where}: " + "; ".join(problems))
    return spec


def _locate(ref: str) -> tuple[str, Path]:
    if ":" in ref:
        kind, _, file = ref.partition(":")
        path = Path(file)
    else:
        kind, _, name = ref.partition("/")
        path = PRESET_DIR / kind / f"{name}.toml"
    if kind not in KINDS:
        raise SpecError(f"{ref!r}: unknown kind {kind!r}; expected one of {', '.join(KINDS)}")
    if not path.is_file():
        if ":" in ref:
            raise SpecError(f"{ref!r}: no such file")
        close = difflib.get_close_matches(path.stem, names(kind), n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise SpecError(f"unknown {kind} {path.stem!r}{hint}; there are: {', '.join(names(kind))}")
    return kind, path


def _override(raw: dict[str, Any], keys: list[str], value: Any, where: str) -> None:
    table = raw
    for key in keys[:-1]:
        inner = table.get(key)
        if isinstance(inner, str):
            _, path = _locate(inner)
            inner = tomllib.loads(path.read_text(encoding="utf-8"))
        if not isinstance(inner, dict):
            raise SpecError(f"{where}: override {'.'.join(keys)}: {key!r} is not a table")
        table[key] = dict(inner)
        table = table[key]
    table[keys[-1]] = value


def _build(kind: str, raw: dict[str, Any], where: str, prefix: str, problems: list[str]) -> Any:
    cls = KINDS[kind]
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in sorted(raw.keys() - fields.keys()):
        close = difflib.get_close_matches(key, fields, n=1)
        problems.append(f"unknown key {prefix}{key}" + (f" (did you mean {close[0]}?)" if close else ""))
    values: dict[str, Any] = {}
    for name, spec_field in fields.items():
        hint = hints[name]
        nested = _nested_kind(hint)
        optional = isinstance(hint, types.UnionType)
        if name not in raw or (raw[name] is None and optional):
            if _has_no_default(spec_field):
                problems.append(f"missing key {prefix}{name}")
            continue
        value = raw[name]
        if nested is not None:
            values[name] = _nested(nested, value, where, prefix + name, problems)
        elif name == "sources":
            if not isinstance(value, Mapping):
                problems.append(f"{prefix}sources = {value!r}: expected a table of texts")
            else:
                values[name] = dict(value)
        else:
            values[name] = _checked(value, hint, spec_field, prefix + name, problems)
    if problems:
        return None
    spec = cls(**values)
    problems.extend(prefix + problem for problem in _cross_checks(spec))
    return spec


def _nested(kind: str, value: Any, where: str, key: str, problems: list[str]) -> Any:
    if isinstance(value, Mapping):
        return _build(kind, dict(value), where, f"{key}.", problems)
    if isinstance(value, KINDS[kind]):
        return value
    if not isinstance(value, str) or not value.startswith((f"{kind}/", f"{kind}:")):
        such = [f" or the name of a {kind}, such as '{kind}/{name}'" for name in names(kind)[:1]]
        problems.append(f"{key} = {value!r}: expected a table{''.join(such)}")
        return None
    try:
        return load(value)
    except SpecError as error:
        problems.append(f"{key}: {error}")
        return None


def _nested_kind(hint: Any) -> str | None:
    for candidate in typing.get_args(hint) or (hint,):
        for kind, cls in KINDS.items():
            if candidate is cls:
                return kind
    return None


def _has_no_default(spec_field: dataclasses.Field[Any]) -> bool:
    return spec_field.default is dataclasses.MISSING and spec_field.default_factory is dataclasses.MISSING


def _checked(value: Any, hint: Any, spec_field: dataclasses.Field[Any], key: str, problems: list[str]) -> Any:
    if hint is bool or hint is str:
        if not isinstance(value, hint):
            problems.append(f"{key} = {value!r}: expected {'true or false' if hint is bool else 'text'}")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        problems.append(f"{key} = {value!r}: expected a finite number")
        return value
    if hint is int and value != int(value):
        problems.append(f"{key} = {value!r}: expected a whole number")
        return value
    low, high = spec_field.metadata.get("low"), spec_field.metadata.get("high")
    too_low = low is not None and (value <= low if spec_field.metadata.get("low_open") else value < low)
    if too_low:
        problems.append(f"{key} = {value!r}: expected {'>' if spec_field.metadata.get('low_open') else '>='} {low:g}")
    if high is not None and value > high:
        problems.append(f"{key} = {value!r}: expected <= {high:g}")
    return int(value) if hint is int else float(value)


def _cross_checks(spec: Any) -> list[str]:
    problems = []
    if isinstance(spec, GpuSpec) and 0 < spec.roofline_exponent < 1:
        problems.append(f"roofline_exponent = {spec.roofline_exponent}: expected 0 or >= 1")
    if isinstance(spec, GpuSpec) and spec.decode_tail_frac > 0 and spec.sm_count == 0:
        problems.append("decode_tail_frac > 0: needs sm_count")
    if isinstance(spec, ModelSpec) and spec.heads_count % spec.kv_heads_count:
        problems.append(
            f"heads_count = {spec.heads_count}: expected a multiple of kv_heads_count = {spec.kv_heads_count}"
        )
    if isinstance(spec, MoeSpec):
        problems += _moe_checks(spec)
    if isinstance(spec, ModelSpec) and spec.moe and spec.moe.dense_layers_count > spec.layers_count:
        problems.append(f"moe.dense_layers_count = {spec.moe.dense_layers_count}: expected <= {spec.layers_count}")
    if isinstance(spec, ExpertParallelSpec) and spec.slots_count % spec.ranks_count:
        problems.append(f"slots_count = {spec.slots_count}: expected a multiple of ranks_count = {spec.ranks_count}")
    if isinstance(spec, ExpertParallelSpec) and spec.overlap_by_phase and spec.micro_batches_count != 2:
        problems.append(f"overlap_by_phase: needs micro_batches_count = 2, not {spec.micro_batches_count}")
    if isinstance(spec, PimSpec) and spec.kind not in PIM_KINDS:
        problems.append(f"kind = {spec.kind!r}: expected one of {', '.join(PIM_KINDS)}")
    if isinstance(spec, SystemSpec) and spec.pim is None and not spec.hbm_kv:
        problems.append("hbm_kv = false without pim: there is no place for KV")
    if isinstance(spec, SystemSpec) and spec.pim and spec.pim.kind != "hbm-pim" and spec.pim_link is None:
        problems.append(f"missing key pim_link: {spec.pim.kind} is reached over a link")
    if isinstance(spec, SystemSpec) and spec.gpus_count % spec.host_gpus_count:
        problems.append(f"gpus_count = {spec.gpus_count}: expected a multiple of {spec.gpus_per_host_count} a host")
    if isinstance(spec, SystemSpec) and spec.experts and spec.experts.comm_sm_count > spec.gpu.sm_count:
        count = spec.experts.comm_sm_count
        problems.append(f"experts.comm_sm_count = {count}: expected at most the GPU's sm_count = {spec.gpu.sm_count}")
    if isinstance(spec, SystemSpec) and spec.experts and spec.gpus_count % spec.experts.ranks_count:
        problems.append(f"gpus_count = {spec.gpus_count}: expected a multiple of {spec.experts.ranks_count} ranks")
    return problems


def _moe_checks(spec: MoeSpec) -> list[str]:
    problems = []
    if spec.experts_count % spec.groups_count:
        problems.append(f"experts_count = {spec.experts_count}: expected a multiple of {spec.groups_count} groups")
    if spec.chosen_groups_count > spec.groups_count:
        problems.append(f"chosen_groups_count = {spec.chosen_groups_count}: expected <= {spec.groups_count}")
    elif spec.chosen_count > spec.experts_count // spec.groups_count * spec.chosen_groups_count:
        problems.append(f"chosen_count = {spec.chosen_count}: more than the chosen groups hold")
    return problems
