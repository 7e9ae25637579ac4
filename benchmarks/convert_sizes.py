"""The synthetic models that `benchmarks/convert.py` converts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

ALLOWANCE_BYTES = 500_000_000  # beside twice the largest tensor


@dataclasses.dataclass(frozen=True)
class Size:
    """A Llama-shaped model in bfloat16 and how often it is measured: others' conversions at most
    `rival_repeats` times.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_groups: int
    vocab_size: int
    max_shard_bytes: int = 5_000_000_000
    caches: tuple[str, ...] = ("cold",)
    rival_repeats: int = 5

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes as Hugging Face writes them."""
        hidden, ffn = self.hidden_size, self.ffn_hidden_size
        groups = self.num_groups * (hidden // self.num_heads)
        layer = {
            "input_layernorm": (hidden,),
            "mlp.down_proj": (hidden, ffn),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "post_attention_layernorm": (hidden,),
            "self_attn.k_proj": (groups, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.v_proj": (groups, hidden),
        }
        table = (self.vocab_size, hidden)
        return [
            ("model.embed_tokens.weight", table),
            *(
                (f"model.layers.{number}.{name}.weight", shape)
                for number in range(self.num_layers)
                for name, shape in layer.items()
            ),
            ("model.norm.weight", (hidden,)),
            ("lm_head.weight", table),
        ]

    @property
    def num_bytes(self) -> int:
        return sum(2 * math.prod(shape) for _, shape in self.tensors())

    @property
    def limit_bytes(self) -> int:
        """What a conversion may hold above the bare process."""
        return 2 * max(2 * math.prod(shape) for _, shape in self.tensors()) + ALLOWANCE_BYTES

    def config(self) -> dict[str, Any]:
        """config.json, in the keys of the published Llama 3.1 folders."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_groups,
            "hidden_act": "silu",
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": 13,
            "eos_token_id": 12,
            "torch_dtype": "bfloat16",
        }


TINY = Size(2, 64, 128, 4, 2, 256)
SIZES = {
    "small": Size(4, 1024, 3584, 16, 4, 32000, 100_000_000, caches=("cold", "warm")),
    "8b": Size(32, 4096, 14336, 32, 8, 128256, rival_repeats=1),
}
