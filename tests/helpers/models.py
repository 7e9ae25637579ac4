"""Tiny random models of odd sizes with a character tokenizer, as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

CHARACTERS = "0123456789=+$ abcdefghijklmnopqrstuvwxyz"
END = "$"
VOCAB_SIZE = len(CHARACTERS)


def save_tokenizer(folder: Path) -> None:
    """One token a character; `$` ends a response."""
    vocabulary = {character: index for index, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    # All named: transformers adds a family's own special tokens where they are not.
    special = {"eos_token": END, "pad_token": END, "unk_token": " ", "bos_token": " "}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder."""
    return {
        name: value
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


_SIZES: dict[str, Any] = {
    "hidden_size": 22,
    "intermediate_size": 38,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "eos_token_id": CHARACTERS.index(END),
}
_HEADS = {"head_dim": 10}  # unlike hidden / heads


def save_qwen2(folder: Path, *, seed: int = 0, rows: int = VOCAB_SIZE, **sizes: Any) -> Path:
    """A Qwen2 with random biases, odd sizes and a tokenizer; its output table is tied."""
    own = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "tie_word_embeddings": True}
    return _save(Qwen2Config, Qwen2ForCausalLM, folder, seed, {"vocab_size": rows, **own, **sizes})


def save_qwen3(folder: Path, *, seed: int = 0, rows: int = VOCAB_SIZE, **sizes: Any) -> Path:
    """A Qwen3 with norms on its query and key heads."""
    return _save(Qwen3Config, Qwen3ForCausalLM, folder, seed, {"vocab_size": rows, **_HEADS, **sizes})


def save_llama(folder: Path, *, seed: int = 0, rows: int = VOCAB_SIZE, **sizes: Any) -> Path:
    """A Llama with Llama-3 rope scaling."""
    own = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    }
    return _save(LlamaConfig, LlamaForCausalLM, folder, seed, {"vocab_size": rows, **_HEADS, **own, **sizes})


def save_mistral(folder: Path, *, seed: int = 0, rows: int = VOCAB_SIZE, **sizes: Any) -> Path:
    """A Mistral whose tokens see five."""
    own = {"sliding_window": 5}
    return _save(
        MistralConfig, MistralForCausalLM, folder, seed, {"vocab_size": rows, **_HEADS, **own, **sizes}
    )


def save_qwen3_moe(folder: Path, *, seed: int = 0, rows: int = VOCAB_SIZE, **sizes: Any) -> Path:
    """A Qwen3-MoE of six experts, two of them for each token with weights as the router gives them."""
    own = {"moe_intermediate_size": 13, "num_experts": 6, "num_experts_per_tok": 2, "norm_topk_prob": False}
    return _save(
        Qwen3MoeConfig, Qwen3MoeForCausalLM, folder, seed, {"vocab_size": rows, **_HEADS, **own, **sizes}
    )


def save_mixtral(folder: Path, *, seed: int = 0, rows: int = VOCAB_SIZE, **sizes: Any) -> Path:
    """A Mixtral of four experts, two of them for each token."""
    own = {
        "hidden_size": 24,
        "intermediate_size": 19,
        "num_hidden_layers": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    return _save(
        MixtralConfig, MixtralForCausalLM, folder, seed, {"vocab_size": rows, **_HEADS, **own, **sizes}
    )


def as_written(model: Any, tensors: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """Tensors by the names of the parameters that they belong to, by those of a model folder: transformers
    holds all experts of a layer in one parameter and writes each on its own.

    The model's own parameters are lost.
    """
    for name, parameter in model.named_parameters():
        parameter.data = tensors[name]
    model.save_pretrained(folder)
    return read_weights(folder)


def _save(config_kind: Any, kind: Any, folder: Path, seed: int, sizes: dict[str, Any]) -> Path:
    config = config_kind(**{**_SIZES, **sizes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config).float()
        for parameter in model.parameters():  # everything away from its special start: biases, norms
            torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.15)
    model.generation_config.eos_token_id = config.eos_token_id
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder
