"""Qwen3 (dense): a Llama whose query and key heads each pass an RMS norm before the rotation."""

from functools import partial

from megatron_scope.convert.families.base import Family, dense_decoder_rules, read_dense_shape

DEFAULT_HEAD_DIM = 128  # of a config.json without one: transformers' Qwen3Config does not derive it

FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    read_shape=partial(read_dense_shape, qkv_bias=False, qk_norm=True, default_head_dim=DEFAULT_HEAD_DIM),
    rules=dense_decoder_rules,
)
