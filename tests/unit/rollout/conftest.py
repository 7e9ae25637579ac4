"""Tiny random models of several families, each with a character tokenizer, as Hugging Face folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.rollout.bench import EOS, Bench

ALPHABET = "0123456789+=-*"
VOCAB_SIZE = 16  # the alphabet, then <eos>, then <pad>
PAD = 15


def _config(family: str, **changes: Any) -> Any:
    import transformers

    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "eos_token_id": EOS,
        "bos_token_id": None,
        "pad_token_id": PAD,
    }
    by_family: dict[str, tuple[str, dict[str, Any]]] = {
        "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
        "qwen2_window": (
            "Qwen2Config",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        ),
        "llama": ("LlamaConfig", {}),
        "qwen3": ("Qwen3Config", {"head_dim": 16}),
        "mistral_window": ("MistralConfig", {"sliding_window": 8}),
        "qwen3_moe": (
            "Qwen3MoeConfig",
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 33, "head_dim": 12},
        ),
        "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 12}),
    }
    name, extra = by_family[family]
    return getattr(transformers, name)(**{**settings, **extra, **changes})


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: index for index, character in enumerate(ALPHABET)}
    vocabulary |= {"<eos>": EOS, "<pad>": PAD}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_model(family, seed=0, std=0.2, **config changes) -> a folder, made once per session."""
    made: dict[str, Path] = {}

    def make(family: str = "qwen2", seed: int = 0, std: float = 0.2, **changes: Any) -> Path:
        import torch
        from transformers import AutoModelForCausalLM

        key = repr((family, seed, std, sorted(changes.items())))
        if key not in made:
            model = AutoModelForCausalLM.from_config(_config(family, **changes))
            generator = torch.Generator().manual_seed(seed)
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.data.normal_(std=std, generator=generator)
                elif name.endswith(
                    ("q_norm.weight", "k_norm.weight")
                ):  # at one, half of what they do is hidden
                    parameter.data.normal_(mean=1.0, std=std, generator=generator)
            made[key] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[key])
            _tokenizer().save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture
def bench(make_model: Callable[..., Path]) -> Iterator[Callable[..., Bench]]:
    """bench(folder=None, **serve options) -> a running engine, closed after the test."""
    made: list[Bench] = []

    def build(folder: Path | None = None, **options: Any) -> Bench:
        made.append(Bench(folder or make_model(), **options))
        return made[-1]

    yield build
    for one in made:
        one.engine.close(5)
