"""Models: the sizes of a decoder-only transformer, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from msgspec import Meta

from l3env.machine.specs.fields import Count, Natural, Positive, Share


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

    query_rank: Annotated[Count, Meta(le=1_000_000)]
    kv_rank: Annotated[Count, Meta(le=1_000_000)]
    nope_size: Annotated[Count, Meta(le=1_000_000), "of a head's query and key, without position"]
    rope_size: Annotated[Count, Meta(le=1_000_000), "with rotary position; the key's is shared by all heads"]
    value_size: Annotated[Count, Meta(le=1_000_000)]
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

    experts_count: Annotated[Count, Meta(le=100_000), "routed ones"]
    chosen_count: Annotated[Count, Meta(le=100_000), "routed experts per token"]
    shared_count: Annotated[Natural, Meta(le=100), "experts that all tokens pass"]
    expert_ffn_size: Annotated[Count, Meta(le=10_000_000)]
    dense_layers_count: Annotated[Natural, Meta(le=1_000), "first layers with the model's own FFN"]
    groups_count: Annotated[Count, Meta(le=10_000), "experts come in groups,"]
    chosen_groups_count: Annotated[Count, Meta(le=10_000), "of which a token may use the best few"]
    route_scale: Annotated[Positive, Meta(le=1e3)]
    sources: Mapping[str, str] = field(default_factory=dict)

    def contradictions(self) -> list[str]:
        """What values say against each other."""
        problems = []
        if self.experts_count % self.groups_count:
            problems.append(f"experts_count = {self.experts_count}: expected a multiple of {self.groups_count} groups")
        if self.chosen_groups_count > self.groups_count:
            problems.append(f"chosen_groups_count = {self.chosen_groups_count}: expected <= {self.groups_count}")
        elif self.chosen_count > self.experts_count // self.groups_count * self.chosen_groups_count:
            problems.append(f"chosen_count = {self.chosen_count}: more than the chosen groups hold")
        return problems


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer; weights of 16 or 8 bit, activations of 16 bit."""

    name: str
    layers_count: Annotated[Count, Meta(le=1_000)]
    hidden_size: Annotated[Count, Meta(le=1_000_000)]
    heads_count: Annotated[Count, Meta(le=1_024)]
    kv_heads_count: Annotated[Count, Meta(le=1_024)]
    head_size: Annotated[Count, Meta(le=1_024)]
    ffn_size: Annotated[Count, Meta(le=10_000_000)]
    gated_ffn: Annotated[bool, "three matrices (gate, up, down) instead of two"] = False
    tied_embedding: bool = False
    vocab_size: Annotated[Count, Meta(le=10_000_000)]
    context_tokens: Count
    max_model_len: Annotated[
        Count | None, "prompt and output of the longest request served; by default the context"
    ] = None
    tensor_parallel_count: Annotated[Count, Meta(le=1_024), "the deployment the source uses; a system may override"]
    bytes_per_parameter: Annotated[Positive, Meta(le=8)]
    bytes_per_kv_element: Annotated[Positive, Meta(le=8)]
    block_scales: Annotated[bool, "8-bit weights with a scale for 128 x 128 of them, inputs with one for 128"] = False
    mla: LatentSpec | None = None
    moe: MoeSpec | None = None
    draft_modules_count: Annotated[Natural, Meta(le=1), "multi-token prediction: tokens guessed a step"] = 0
    draft_acceptance_frac: Annotated[Share, "share of the guesses that hold"] = 0.0
    sources: Mapping[str, str] = field(default_factory=dict)

    def contradictions(self) -> list[str]:
        """What values say against each other."""
        problems = []
        if self.heads_count % self.kv_heads_count:
            expected = f"a multiple of kv_heads_count = {self.kv_heads_count}"
            problems.append(f"heads_count = {self.heads_count}: expected {expected}")
        if self.moe and self.moe.dense_layers_count > self.layers_count:
            problems.append(f"moe.dense_layers_count = {self.moe.dense_layers_count}: expected <= {self.layers_count}")
        return problems

    @property
    def served_tokens(self) -> int:
        """Prompt and output tokens of the longest request that is served; longer ones are rejected."""
        return self.context_tokens if self.max_model_len is None else self.max_model_len

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
