"""Llama 2, 3 and 3.x (grouped queries, Llama-3 rope scaling, tied or untied output table)."""

from functools import partial

from megatron_scope.convert.families.base import Family, dense_decoder_rules, read_dense_shape

FAMILY = Family(
    architecture="LlamaForCausalLM",
    read_shape=partial(read_dense_shape, qkv_bias=False, qk_norm=False),
    rules=dense_decoder_rules,
)
