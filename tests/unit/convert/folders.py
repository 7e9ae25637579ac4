"""Tiny Hugging Face folders with random weights, written without transformers."""

import json

import torch
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 12,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 130,
}
QWEN = {**CONFIG, "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {**CONFIG, "architectures": ["Qwen3ForCausalLM"], "head_dim": 5}


def tensors(config=None, seed=0):
    """Every tensor that the model of a config has, by its Hugging Face name."""
    c = CONFIG if config is None else config
    hidden, ffn, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    head_dim = c.get("head_dim") or hidden // c["num_attention_heads"]
    query, key = c["num_attention_heads"] * head_dim, c["num_key_value_heads"] * head_dim
    sizes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not c["tie_word_embeddings"]:
        sizes["lm_head.weight"] = (vocab, hidden)
    for layer in range(c["num_hidden_layers"]):
        inner = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (query, hidden),
            "self_attn.k_proj.weight": (key, hidden),
            "self_attn.v_proj.weight": (key, hidden),
            "self_attn.o_proj.weight": (hidden, query),
            "mlp.gate_proj.weight": (ffn, hidden),
            "mlp.up_proj.weight": (ffn, hidden),
            "mlp.down_proj.weight": (hidden, ffn),
        }
        if "Qwen2" in c["architectures"][0]:
            for name, size in (("q", query), ("k", key), ("v", key)):
                inner[f"self_attn.{name}_proj.bias"] = (size,)
        if "Qwen3" in c["architectures"][0]:
            inner |= {f"self_attn.{name}_norm.weight": (head_dim,) for name in "qk"}
        sizes |= {f"model.layers.{layer}.{name}": size for name, size in inner.items()}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


def write_folder(path, config=None, weights=None, **changes):
    """A folder with config.json (with `changes`; None takes a key out) and one safetensors file."""
    settings = {**(CONFIG if config is None else config), **changes}
    settings = {key: value for key, value in settings.items() if value is not None}
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(settings))
    save_file(tensors(config) if weights is None else weights, path / "model.safetensors")
    return path
