"""Qwen3 with a mixture of experts in every layer."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from megatron_scope.convert.families.base import Family, mixture_decoder_rules, read_dense_shape
from megatron_scope.convert.families.mixture import read_mixture
from megatron_scope.convert.shape import ModelShape


def _read_shape(config: dict[str, Any], source: str) -> ModelShape:
    shape = read_dense_shape(config, source, qkv_bias=False, qk_norm=True)
    mixture = read_mixture(
        config,
        source,
        ffn_key="moe_intermediate_size",
        normalize_weights=bool(config.get("norm_topk_prob", False)),
    )
    return dataclasses.replace(shape, mixture=mixture)


FAMILY = Family(
    architecture="Qwen3MoeForCausalLM",
    read_shape=_read_shape,
    rules=partial(mixture_decoder_rules, block="mlp", projections=("gate_proj", "up_proj", "down_proj")),
)
