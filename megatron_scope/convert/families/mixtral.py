"""Mixtral: a Mistral with a mixture of experts in every layer, whose weights are normalized over the chosen
ones.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from megatron_scope.convert.families.base import Family, mixture_decoder_rules, read_dense_shape
from megatron_scope.convert.families.mistral import read_window
from megatron_scope.convert.families.mixture import read_mixture
from megatron_scope.convert.shape import ModelShape


def _read_shape(config: dict[str, Any], source: str) -> ModelShape:
    shape = read_dense_shape(config, source, qkv_bias=False, qk_norm=False)
    mixture = read_mixture(config, source, ffn_key="intermediate_size", normalize_weights=True)
    return dataclasses.replace(
        shape, sliding_window=read_window(config, source, default=None), mixture=mixture
    )


FAMILY = Family(
    architecture="MixtralForCausalLM",
    read_shape=_read_shape,
    rules=partial(mixture_decoder_rules, block="block_sparse_moe", projections=("w1", "w3", "w2")),
)
