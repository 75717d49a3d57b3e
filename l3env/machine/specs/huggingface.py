"""A model from the ``config.json`` that comes with its weights (``hf:folder/config.json``).

Known are decoders in the manner of Llama (with grouped queries and a gated FFN), their mixtures of experts, and
DeepSeek's latent attention; keys as Hugging Face's transformers has them. The file does not say over how many GPUs a
replica spans: 1 is taken, ``?tensor_parallel_count=8`` says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from l3env.errors import SpecError
from l3env.files import is_file, read_json

PREFIX = "hf:"
FILE = "config.json"
DENSE = ("llama", "mistral", "qwen2", "qwen3")
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe")
LATENT = ("deepseek_v3",)
MOST = 2**31
BYTES = {"bfloat16": 2, "float16": 2, "float32": 2}  # served with 16 bit; a quantisation of 8 bit is a key of its own


def config_path(folder: Path, ref: str) -> Path:
    """The file of ``hf:folder`` or ``hf:folder/config.json``. Raises SpecError where there is none."""
    path = folder / Path(ref.removeprefix(PREFIX)).expanduser()
    found = next((each for each in (path / FILE, path) if is_file(each)), None)
    if found is None:
        raise SpecError(f"{str(path)!r}: no such file; expected hf:FOLDER/{FILE}, as it comes with a model's weights")
    return found


def read_config(path: Path) -> dict[str, Any]:
    """The values of a ModelSpec. Raises SpecError for an unknown architecture, missing keys, what is not modelled."""
    raw = read_json(path, SpecError)
    if not isinstance(raw, dict):
        raise SpecError(f"{path}: expected an object, as Hugging Face's {FILE}")
    config = _Config(path, raw)
    kind = raw.get("model_type")
    if kind not in (*DENSE, *EXPERTS, *LATENT):
        known = ", ".join((*DENSE, *EXPERTS, *LATENT))
        raise SpecError(f"{path}: model_type = {kind!r}: expected one of {known}; others take a TOML file")
    values = _common(config)
    if kind in LATENT:
        values |= _latent(config)
    elif kind in EXPERTS:
        values["moe"] = _experts(config)
    source = f"{FILE} of {path.parent.resolve().name}"
    for table in (values, values.get("mla"), values.get("moe")):
        if table is not None:
            table["sources"] = dict.fromkeys([key for key in table if key != "name"], source)
    values["sources"]["tensor_parallel_count"] = "assumption: one GPU"
    return values


class _Config:
    """The keys of one file; each that is missing is named."""

    def __init__(self, path: Path, raw: Mapping[str, Any]) -> None:
        self.path, self.raw = path, raw

    def __getitem__(self, key: str) -> Any:
        if self.raw.get(key) is None:
            raise SpecError(f"{self.path}: missing key {key}")
        return self.raw[key]

    def get(self, key: str, default: Any) -> Any:
        value = self.raw.get(key)
        return default if value is None else value

    def whole(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number that is calculated with; the specs' own rules look at the others."""
        value = self[key] if default is None else self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST:
            raise self.refuse(key, f"a whole number from {least} to {MOST}")
        return value

    def refuse(self, key: str, expected: str) -> SpecError:
        return SpecError(f"{self.path}: {key} = {self.raw.get(key)!r}: expected {expected}")


def _common(config: _Config) -> dict[str, Any]:
    heads, hidden = config.whole("num_attention_heads"), config.whole("hidden_size")
    if config.get("hidden_act", "silu") != "silu":
        raise config.refuse("hidden_act", "'silu', the gated FFN of Llama")
    return {
        "name": config.path.parent.resolve().name,
        "layers_count": config["num_hidden_layers"],
        "hidden_size": hidden,
        "heads_count": heads,
        "kv_heads_count": config.get("num_key_value_heads", heads),
        "head_size": config.get("head_dim", hidden // heads),
        "ffn_size": config["intermediate_size"],
        "gated_ffn": True,
        "tied_embedding": config.get("tie_word_embeddings", False),
        "vocab_size": config["vocab_size"],
        "context_tokens": _context_tokens(config),
        "tensor_parallel_count": 1,
        "bytes_per_parameter": _bytes_per_parameter(config),
        "bytes_per_kv_element": 2,
    }


def _context_tokens(config: _Config) -> int:
    """The longest context; up to the window where attention sees no further (there it is what is modelled)."""
    tokens = config.whole("max_position_embeddings")
    used = config.get("use_sliding_window", True)
    return min(tokens, config.whole("sliding_window", tokens)) if used else tokens


def _bytes_per_parameter(config: _Config) -> int:
    quantised = config.get("quantization_config", None)
    if quantised is not None:
        if not isinstance(quantised, dict) or quantised.get("quant_method") != "fp8":
            raise config.refuse("quantization_config", "quant_method 'fp8', or none: other weights are not modelled")
        return 1
    dtype = config.get("torch_dtype", config.get("dtype", "bfloat16"))
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise config.refuse("torch_dtype", f"one of {', '.join(BYTES)}")
    return BYTES[dtype]


def _experts(config: _Config) -> dict[str, Any]:
    """Mixtral and Qwen: experts in every layer, in one group."""
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers", []):
        raise config.refuse("decoder_sparse_step", "1 and no mlp_only_layers: experts in every layer")
    count = config.get("num_local_experts", None) or config["num_experts"]
    size = config.whole("moe_intermediate_size", config.whole("intermediate_size"))
    shared = config.whole("shared_expert_intermediate_size", 0, 0)
    if shared % size:
        raise config.refuse("shared_expert_intermediate_size", f"a multiple of moe_intermediate_size = {size}")
    return {
        "experts_count": count,
        "chosen_count": config["num_experts_per_tok"],
        "shared_count": shared // size,
        "expert_ffn_size": size,
        "dense_layers_count": 0,
        "groups_count": 1,
        "chosen_groups_count": 1,
        "route_scale": 1.0,
    }


def _latent(config: _Config) -> dict[str, Any]:
    """DeepSeek-V3 and R1 (arXiv 2412.19437): latent attention, experts in groups, modules that guess tokens."""
    if config.get("moe_layer_freq", 1) != 1:
        raise config.refuse("moe_layer_freq", "1: experts in every layer but the first ones")
    mla = {
        "query_rank": config["q_lora_rank"],
        "kv_rank": config["kv_lora_rank"],
        "nope_size": config["qk_nope_head_dim"],
        "rope_size": config["qk_rope_head_dim"],
        "value_size": config["v_head_dim"],
    }
    moe = {
        "experts_count": config["n_routed_experts"],
        "chosen_count": config["num_experts_per_tok"],
        "shared_count": config.get("n_shared_experts", 0),
        "expert_ffn_size": config["moe_intermediate_size"],
        "dense_layers_count": config["first_k_dense_replace"],
        "groups_count": config["n_group"],
        "chosen_groups_count": config["topk_group"],
        "route_scale": config["routed_scaling_factor"],
    }
    guesses = config.get("num_nextn_predict_layers", 0)
    return {"mla": mla, "moe": moe, "head_size": config["v_head_dim"], "draft_modules_count": guesses}
