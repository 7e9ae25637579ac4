"""What a decoder-only model looks like, independent of either side's names."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from megatron_scope.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's rescaling of low rotary frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The sizes and switches that build a model; `vocab_rows` is the embedding table's length without
    padding.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_rows: int
    max_positions: int
    norm_epsilon: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool  # an RMS norm of each query and key head over head_dim, before the rotation

    def inverse_frequencies(self) -> Tensor:
        """Rotary inverse frequencies, float32 [head_dim / 2]; rounded as transformers and SGLang round
        them.
        """
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.int64).float() / self.head_dim
        frequencies = 1.0 / (self.rope_theta**exponents)
        return frequencies if self.rope_scaling is None else _rescaled(frequencies, self.rope_scaling)


def _rescaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Keeps short waves, slows long ones by `factor`, and blends linearly in between."""
    turns = scaling.original_max_positions / (2 * math.pi / frequencies)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def padded_vocab_size(rows: int, tensor_parallel: int) -> int:
    """`rows` rounded up to a multiple of 128 times the tensor-parallel size, as Megatron shards want it."""
    unit = 128 * tensor_parallel
    return (rows + unit - 1) // unit * unit


def spread_layers(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Layers of each pipeline stage, as even as can be; middle stages take the remainder, since the ends hold
    the embeddings.
    """
    base, extra = divmod(num_layers, num_stages)
    by_distance_from_ends = sorted(range(num_stages), key=lambda stage: -min(stage, num_stages - 1 - stage))
    larger = set(by_distance_from_ends[:extra])
    return tuple(base + (stage in larger) for stage in range(num_stages))


def check_layout(shape: ModelShape, tensor: int, stage_sizes: tuple[int, ...], name: str) -> None:
    """ConfigError when `tensor` does not divide the model's heads, groups and MLP or the stages do not add
    up.
    """
    for label, count in (
        ("attention heads", shape.num_attention_heads),
        ("query groups", shape.num_query_groups),
        ("MLP rows", shape.ffn_hidden_size),
    ):
        if count % tensor:
            raise ConfigError(
                f"parallel.tensor is {tensor} but {name} has {count} {label}, which {tensor} does not "
                "divide; "
                "use a smaller parallel.tensor"
            )
    if sum(stage_sizes) != shape.num_layers or min(stage_sizes) < 0:
        raise ConfigError(
            f"pipeline_layers is {list(stage_sizes)}, {sum(stage_sizes)} layers; {name} has "
            f"{shape.num_layers}"
        )


def rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings of a config.json: `rope_parameters` (transformers 5) or `rope_theta` +
    `rope_scaling` (before).
    """
    settings = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if "type" in settings:
        settings.setdefault("rope_type", settings.pop("type"))
    if "rope_theta" in config:
        settings.setdefault("rope_theta", config["rope_theta"])
    return settings
