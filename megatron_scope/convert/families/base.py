"""What a family file declares, and the rules that decoders share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from megatron_scope.convert.layouts import QKV, Columns, GateUp, Layout, Replicated
from megatron_scope.convert.shape import ModelShape, RopeScaling, rope_settings
from megatron_scope.errors import DataError

Table = Literal["embedding", "output"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One Megatron parameter and the Hugging Face tensors that hold its numbers, each with the names of its
    dimensions (ModelShape.dims).

    `{layer}` is the layer's number and `{expert}` an expert's: global in Hugging Face names, counted from the
    first that a rank holds in Megatron's. A `table` rule is for the vocabulary tables, whose padded size
    depends on the run.
    """

    megatron: str
    hf: Mapping[str, str]
    layout: Layout | None = None
    table: Table | None = None

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.megatron

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.megatron


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family: its architecture name, how its config.json is read, and its rules."""

    architecture: str
    read_shape: Callable[[dict[str, Any], str], ModelShape]
    rules: Callable[[ModelShape], tuple[Rule, ...]]


DEFAULT_ROPE_THETA = 10000.0  # of a config.json without one, as the first Llamas have it
_LAYER = "decoder.layers.{layer}."
_HF_LAYER = "model.layers.{layer}."


def attention_rules(shape: ModelShape) -> tuple[Rule, ...]:
    """Embedding, both norms of a layer, attention with grouped queries, final norm, output table."""
    attention, hf_attention = f"{_LAYER}self_attention", f"{_HF_LAYER}self_attn"
    lengths = {"q": "query", "k": "key", "v": "key"}
    rules = [
        Rule(
            "embedding.word_embeddings.weight",
            {"model.embed_tokens.weight": "vocab hidden"},
            table="embedding",
        ),
        Rule(
            f"{_LAYER}input_layernorm.weight", {f"{_HF_LAYER}input_layernorm.weight": "hidden"}, Replicated()
        ),
        Rule(
            f"{attention}.linear_qkv.weight",
            {f"{hf_attention}.{name}_proj.weight": f"{length} hidden" for name, length in lengths.items()},
            QKV(),
        ),
        Rule(f"{attention}.linear_proj.weight", {f"{hf_attention}.o_proj.weight": "hidden query"}, Columns()),
        Rule(
            f"{_LAYER}pre_mlp_layernorm.weight",
            {f"{_HF_LAYER}post_attention_layernorm.weight": "hidden"},
            Replicated(),
        ),
        Rule("decoder.final_layernorm.weight", {"model.norm.weight": "hidden"}, Replicated()),
        Rule("output_layer.weight", {"lm_head.weight": "vocab hidden"}, table="output"),
    ]
    if shape.qkv_bias:
        biases = {f"{hf_attention}.{name}_proj.bias": length for name, length in lengths.items()}
        rules.append(Rule(f"{attention}.linear_qkv.bias", biases, QKV()))
    if shape.qk_norm:
        rules += [
            Rule(
                f"{attention}.{name}_layernorm.weight",
                {f"{hf_attention}.{name}_norm.weight": "head"},
                Replicated(),
            )
            for name in "qk"
        ]
    return tuple(rules)


def dense_decoder_rules(shape: ModelShape) -> tuple[Rule, ...]:
    """Pre-norm attention and one gated MLP a layer."""
    mlp = gated_mlp_rules(f"{_LAYER}mlp", f"{_HF_LAYER}mlp", "ffn", ("gate_proj", "up_proj", "down_proj"))
    return attention_rules(shape) + mlp


def mixture_decoder_rules(
    shape: ModelShape, *, block: str, projections: tuple[str, str, str]
) -> tuple[Rule, ...]:
    """Pre-norm attention and routed experts in every layer.

    `block` is the Hugging Face name of what stands in the MLP's place, with `gate` as its router;
    `projections` are an expert's gate, up and down projections.
    """
    router = Rule(
        f"{_LAYER}mlp.router.weight", {f"{_HF_LAYER}{block}.gate.weight": "experts hidden"}, Replicated()
    )
    experts = gated_mlp_rules(
        f"{_LAYER}mlp.experts.local_experts.{{expert}}",
        f"{_HF_LAYER}{block}.experts.{{expert}}",
        "expert_ffn",
        projections,
    )
    return (*attention_rules(shape), router, *experts)


def gated_mlp_rules(
    megatron: str, hf: str, length: str, projections: tuple[str, str, str]
) -> tuple[Rule, ...]:
    """An MLP of hidden size `length` (a name of ModelShape.dims) and its gate, up and down projections."""
    gate, up, down = (f"{hf}.{name}.weight" for name in projections)
    return (
        Rule(f"{megatron}.linear_fc1.weight", {gate: f"{length} hidden", up: f"{length} hidden"}, GateUp()),
        Rule(f"{megatron}.linear_fc2.weight", {down: f"hidden {length}"}, Columns()),
    )


def read_dense_shape(
    config: dict[str, Any],
    source: str,
    *,
    qkv_bias: bool,
    qk_norm: bool,
    default_head_dim: int | None = None,
) -> ModelShape:
    """The sizes that Llama-like config.json files share; DataError names what is missing or not supported.

    A config.json without head_dim means `default_head_dim`, or hidden_size / num_attention_heads where that
    is None.
    """
    _refuse_unsupported(config, source)
    rope = rope_settings(config, source)
    heads = read_count(config, "num_attention_heads", source)
    groups = read_count(config, "num_key_value_heads", source, default=heads)
    if heads % groups:
        raise DataError(
            f"{source}: num_attention_heads is {heads}, which num_key_value_heads={groups} does not divide; "
            "copy the file again"
        )
    hidden_size = read_count(config, "hidden_size", source)
    return ModelShape(
        num_layers=read_count(config, "num_hidden_layers", source),
        hidden_size=hidden_size,
        ffn_hidden_size=read_count(config, "intermediate_size", source),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=read_count(config, "head_dim", source, default=default_head_dim or hidden_size // heads),
        vocab_rows=read_count(config, "vocab_size", source),
        max_positions=read_count(config, "max_position_embeddings", source),
        norm_epsilon=_read_number(config, "rms_norm_eps", source),
        rope_theta=_read_number(rope, "rope_theta", source, default=DEFAULT_ROPE_THETA),
        rope_scaling=_rope_scaling(rope, source),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
    )


def read_count(config: dict[str, Any], key: str, source: str, default: int | None = None) -> int:
    """A positive whole number of config.json, or `default` where there is one and the key is missing or
    null; DataError names what is wrong.
    """
    value = _read(config, key, source, default)
    if type(value) is not int or value < 1:
        raise DataError(f"{source}: {key} is {value!r}; expected a whole number of 1 or more")
    return value


def _read_number(config: dict[str, Any], key: str, source: str, default: float | None = None) -> float:
    value = _read(config, key, source, default)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise DataError(f"{source}: {key} is {value!r}; expected a number above 0")
    return float(value)


def _read(config: dict[str, Any], key: str, source: str, default: Any) -> Any:
    value = config.get(key)
    if value is None and default is None:
        raise DataError(f"{source}: {key!r} is missing; expected a complete Hugging Face config.json")
    return default if value is None else value


def _refuse_unsupported(config: dict[str, Any], source: str) -> None:
    if config.get("use_sliding_window"):
        raise DataError(
            f"{source}: use_sliding_window is true; a window in some layers only is not supported"
        )
    kinds = config.get("layer_types") or []
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind != "full_attention":
            raise DataError(f"{source}: layer_types has {kind!r}; supported: full_attention")
    if config.get("hidden_act", "silu") != "silu":
        raise DataError(f"{source}: hidden_act is {config['hidden_act']!r}; supported: silu")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise DataError(f"{source}: {key} is true; models with this bias are not supported yet")


def _rope_scaling(rope: dict[str, Any], source: str) -> RopeScaling | None:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind != "llama3":
        raise DataError(f"{source}: rope_type is {kind!r}; supported: default, llama3")
    return RopeScaling(
        factor=_read_number(rope, "factor", source),
        low_freq_factor=_read_number(rope, "low_freq_factor", source),
        high_freq_factor=_read_number(rope, "high_freq_factor", source),
        original_max_positions=read_count(rope, "original_max_position_embeddings", source),
    )
