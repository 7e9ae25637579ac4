"""What a decoder-only model looks like, independent of either side's names."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from megatron_scope.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's rescaling of low rotary frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The routed experts that stand in for every layer's MLP."""

    num_experts: int
    experts_per_token: int
    ffn_hidden_size: int  # of one expert
    normalize_weights: bool  # the chosen experts' weights sum to one


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
    sliding_window: int | None = None  # tokens that a token sees, itself among them; None sees all before it
    mixture: Mixture | None = None  # None: one dense MLP a layer

    @property
    def dims(self) -> dict[str, int]:
        """Lengths by the names that the families' rules use."""
        lengths = {
            "hidden": self.hidden_size,
            "ffn": self.ffn_hidden_size,
            "query": self.num_attention_heads * self.head_dim,
            "key": self.num_query_groups * self.head_dim,
            "head": self.head_dim,
            "vocab": self.vocab_rows,
        }
        if self.mixture is not None:
            lengths |= {"experts": self.mixture.num_experts, "expert_ffn": self.mixture.ffn_hidden_size}
        return lengths

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


@dataclasses.dataclass(frozen=True)
class LayoutKeys:
    """What the user called the parts of a layout, for messages."""

    tensor: str = "parallel.tensor"
    expert: str = "parallel.expert"


def check_layout(
    shape: ModelShape,
    tensor: int,
    stage_sizes: tuple[int, ...],
    name: str,
    expert: int = 1,
    keys: LayoutKeys | None = None,
) -> None:
    """ConfigError when `tensor` does not divide the model's heads, groups and MLP, `expert` its experts, or
    the stages do not add up.
    """
    keys = keys or LayoutKeys()
    split = {"attention heads": shape.num_attention_heads, "query groups": shape.num_query_groups}
    if shape.mixture is None:  # experts are whole on a rank
        split["MLP rows"] = shape.ffn_hidden_size
    for label, count in split.items():
        if count % tensor:
            raise ConfigError(
                f"{keys.tensor} is {tensor} but {name} has {count} {label}, which {tensor} does not divide; "
                f"use a smaller {keys.tensor}"
            )
    if expert > 1 and shape.mixture is None:
        raise ConfigError(
            f"{keys.expert} is {expert} but {name} is a dense model, without experts; set {keys.expert} to 1"
        )
    if shape.mixture is not None and shape.mixture.num_experts % expert:
        raise ConfigError(
            f"{keys.expert} is {expert} but {name} has {shape.mixture.num_experts} experts, which {expert} "
            f"does not divide; use a smaller {keys.expert}"
        )
    if sum(stage_sizes) != shape.num_layers or min(stage_sizes) < 0:
        raise ConfigError(
            f"pipeline_layers is {list(stage_sizes)}, {sum(stage_sizes)} layers; {name} has "
            f"{shape.num_layers}"
        )


@dataclasses.dataclass(frozen=True)
class FileLayout:
    """The parallel layout whose ranks can read whole blocks and files; every other one loads the checkpoint
    too.
    """

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1

    @property
    def num_ranks(self) -> int:
        """The fewest ranks that make it: experts fold over the tensor ranks of a stage."""
        return self.pipeline * math.lcm(self.tensor, self.expert)

    def check(self, shape: ModelShape, name: str) -> tuple[int, ...]:
        """The layers of each pipeline stage; ConfigError for a layout that a model cannot be split over."""
        stage_sizes = spread_layers(shape.num_layers, self.pipeline)
        check_layout(shape, self.tensor, stage_sizes, name, self.expert, LayoutKeys("--tp", "--ep"))
        return stage_sizes


def check_trainable(
    shape: ModelShape, tensor: int, sequence: bool, stage_sizes: tuple[int, ...], name: str
) -> None:
    """ConfigError for a layout at which Megatron runs a model's experts but does not train them."""
    if shape.mixture is None:
        return
    if tensor > 1 and not sequence:
        raise ConfigError(
            f"parallel.tensor is {tensor} without parallel.sequence, but {name} has experts, which train "
            "with sequence parallelism only; set parallel.sequence=true"
        )
    if min(stage_sizes) == 0:
        raise ConfigError(
            f"pipeline_layers is {list(stage_sizes)}, but {name} has experts, whose optimizer cannot be "
            "saved from a stage without them; give every stage a layer"
        )


def rope_settings(config: dict[str, Any], source: str) -> dict[str, Any]:
    """The rotary settings of a config.json: `rope_parameters` (transformers 5) or `rope_theta` +
    `rope_scaling` (before). DataError where they are no object.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise DataError(f"{source}: the rotary settings are {given!r}; expected an object with rope_type")
    settings = dict(given)
    if "type" in settings:
        settings.setdefault("rope_type", settings.pop("type"))
    if "rope_theta" in config:
        settings.setdefault("rope_theta", config["rope_theta"])
    return settings
