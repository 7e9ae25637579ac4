"""What the config.json files of mixture-of-experts families share."""

from __future__ import annotations

from typing import Any

from megatron_scope.convert.families.base import read_count
from megatron_scope.convert.shape import Mixture
from megatron_scope.errors import DataError

# On the Hugging Face hub, and as transformers 5 writes it again.
_NUM_EXPERTS = ("num_experts", "num_local_experts")


def read_mixture(config: dict[str, Any], source: str, *, ffn_key: str, normalize_weights: bool) -> Mixture:
    """The routed experts of a config.json whose every layer has them; DataError names what is missing or not
    supported.

    `ffn_key` holds the hidden size of one expert.
    """
    _refuse_dense_layers(config, source)
    experts_key = next((key for key in _NUM_EXPERTS if key in config), _NUM_EXPERTS[0])
    num_experts, per_token, ffn_hidden_size = (
        read_count(config, key, source) for key in (experts_key, "num_experts_per_tok", ffn_key)
    )
    if per_token > num_experts:
        raise DataError(
            f"{source}: num_experts_per_tok is {per_token} but {experts_key} {num_experts}; copy the file "
            "again"
        )
    if normalize_weights and per_token == 1:
        raise DataError(
            f"{source}: num_experts_per_tok is 1 with normalized weights, which are then all 1 and give the "
            "router no gradient; supported: 2 or more"
        )
    return Mixture(num_experts, per_token, ffn_hidden_size, normalize_weights)


def _refuse_dense_layers(config: dict[str, Any], source: str) -> None:
    if config.get("mlp_only_layers"):
        raise DataError(
            f"{source}: mlp_only_layers is {config['mlp_only_layers']}; supported: experts in every layer"
        )
    if config.get("decoder_sparse_step", 1) != 1:
        raise DataError(
            f"{source}: decoder_sparse_step is {config['decoder_sparse_step']}; supported: 1, experts in "
            "every layer"
        )
