"""Tiny Hugging Face folders with random weights, written without transformers, and checkpoints of them."""

import json

import torch
from safetensors.torch import load_file, save_file

from megatron_scope.convert.hf_folder import HfFolder
from megatron_scope.convert.mapping import model_entries
from megatron_scope.convert.torch_dist_writer import TorchDistWriter

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
MISTRAL = {**CONFIG, "architectures": ["MistralForCausalLM"], "sliding_window": 8}
MIXTRAL = {
    **CONFIG,
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
QWEN3_MOE = {
    **CONFIG,
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "head_dim": 5,
    "mlp_only_layers": [],
    "moe_intermediate_size": 7,
    "norm_topk_prob": True,
    "num_experts": 6,
    "num_experts_per_tok": 2,
}
BY_FAMILY = {
    config["architectures"][0]: config for config in (CONFIG, MISTRAL, MIXTRAL, QWEN, QWEN3, QWEN3_MOE)
}


def tensors(config=None, seed=0):
    """Every tensor that the model of a config has, by its Hugging Face name: random float32."""
    generator = torch.Generator().manual_seed(seed)
    sizes = sizes_of(CONFIG if config is None else config)
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


def sizes_of(c):
    """The size of every tensor that the model of a config has."""
    hidden, vocab = c["hidden_size"], c["vocab_size"]
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
            **_mlp(c),
        }
        if "Qwen2" in c["architectures"][0]:
            for name, size in (("q", query), ("k", key), ("v", key)):
                inner[f"self_attn.{name}_proj.bias"] = (size,)
        if "Qwen3" in c["architectures"][0]:
            inner |= {f"self_attn.{name}_norm.weight": (head_dim,) for name in "qk"}
        sizes |= {f"model.layers.{layer}.{name}": size for name, size in inner.items()}
    return sizes


def _mlp(c):
    """Sizes of what stands in an MLP's place in a layer."""
    hidden, ffn = c["hidden_size"], c["intermediate_size"]
    if "Mixtral" in c["architectures"][0]:
        sizes = {"block_sparse_moe.gate.weight": (c["num_local_experts"], hidden)}
        for expert in range(c["num_local_experts"]):
            sizes |= {
                f"block_sparse_moe.experts.{expert}.w1.weight": (ffn, hidden),
                f"block_sparse_moe.experts.{expert}.w3.weight": (ffn, hidden),
                f"block_sparse_moe.experts.{expert}.w2.weight": (hidden, ffn),
            }
        return sizes
    if "Moe" in c["architectures"][0]:
        sizes = {"mlp.gate.weight": (c["num_experts"], hidden)}
        for expert in range(c["num_experts"]):
            sizes |= _projections(f"mlp.experts.{expert}", hidden, c["moe_intermediate_size"])
        return sizes
    return _projections("mlp", hidden, ffn)


def _projections(block, hidden, ffn):
    return {
        f"{block}.gate_proj.weight": (ffn, hidden),
        f"{block}.up_proj.weight": (ffn, hidden),
        f"{block}.down_proj.weight": (hidden, ffn),
    }


def write_folder(path, config=None, weights=None, **changes):
    """A folder with config.json (with `changes`; None takes a key out) and one safetensors file."""
    settings = {**(CONFIG if config is None else config), **changes}
    settings = {key: value for key, value in settings.items() if value is not None}
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(settings))
    save_file(tensors(config) if weights is None else weights, path / "model.safetensors")
    return path


def write_shards(path, weights, count=2):
    """Replaces the folder's weight file by `count` files and an index, names dealt round; returns the
    index's map.
    """
    (path / "model.safetensors").unlink(missing_ok=True)
    files = [f"part-{number}.safetensors" for number in range(count)]
    file_of = {name: files[number % count] for number, name in enumerate(sorted(weights))}
    for file in files:
        save_file({name: weights[name] for name in weights if file_of[name] == file}, path / file)
    index = {"metadata": {}, "weight_map": file_of}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return file_of


def read_weights(path):
    """Every tensor of a folder's safetensors files."""
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_bits(found, expected):
    """Whether both have the same names, dtypes and numbers."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in expected.items()
    )


def stacked(path, padded_vocab=256):
    """A folder's numbers as a Megatron checkpoint stacks them, by its keys."""
    folder = HfFolder(path)
    found = {}
    for entry in model_entries(folder.family, folder.shape, padded_vocab):
        value = folder.shard(entry, 0, 1)
        if entry.key not in found:
            found[entry.key] = torch.full((*entry.stack, *value.shape), float("nan"), dtype=value.dtype)
        found[entry.key][entry.place] = value
    return found


def write_checkpoint(path, values, config=None):
    """A checkpoint of tensors by key, each one block, and the config.json of its model (None: without)."""
    path.mkdir(parents=True, exist_ok=True)
    with TorchDistWriter(path) as writer:
        for key, value in values.items():
            writer.add(key, tuple(value.shape), (0,) * value.dim(), value.clone())
        writer.finish()
    if config is not None:
        (path / "hf").mkdir()
        (path / "hf" / "config.json").write_text(json.dumps(config))
    return path
