"""Qwen2, Qwen2.5 and the DeepSeek-R1-Distill models built on them: a Llama with biases on query, key and
value.
"""

from functools import partial

from megatron_scope.convert.families.base import Family, dense_decoder_rules, read_dense_shape

FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    read_shape=partial(read_dense_shape, qkv_bias=True, qk_norm=False),
    rules=dense_decoder_rules,
)
