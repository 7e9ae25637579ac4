"""Mistral: a Llama whose tokens may see only a window of those before them."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_scope.convert.families.base import Family, dense_decoder_rules, read_dense_shape
from megatron_scope.convert.shape import ModelShape
from megatron_scope.errors import DataError

DEFAULT_WINDOW = 4096  # of a config.json without one, as transformers' MistralConfig has it; null is none


def read_window(config: dict[str, Any], source: str, default: int | None) -> int | None:
    """The tokens that a token sees, itself among them; None for all before it. DataError for no number."""
    window = config.get("sliding_window", default)
    if window is not None and (not isinstance(window, int) or window < 1):
        raise DataError(f"{source}: sliding_window is {window!r}; expected 1 or more, or null")
    return window


def _read_shape(config: dict[str, Any], source: str) -> ModelShape:
    shape = read_dense_shape(config, source, qkv_bias=False, qk_norm=False)
    return dataclasses.replace(shape, sliding_window=read_window(config, source, DEFAULT_WINDOW))


FAMILY = Family(architecture="MistralForCausalLM", read_shape=_read_shape, rules=dense_decoder_rules)
